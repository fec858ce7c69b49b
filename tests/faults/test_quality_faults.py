"The audit: columns that are not there, files that are not what they say, and disks that are full."

import pytest

from ftbook.quality.cleaning import write_clean
from cases.quality import good, labelled, quick, write


def test_a_missing_column_lists_those_there_are():
    with pytest.raises(ValueError, match="no column 'text'; there are 'score', 'sentence'"):
        quick([dict(score=1, sentence=t) for t in good], text_column='text')


def test_nothing_left_is_an_error(tmp_path):
    path = tmp_path / 'rows.jsonl'
    write(path, labelled(['', ' ', '\n']))
    with pytest.raises(ValueError, match='nothing of .* would be left'):
        write_clean(quick(path), path)
    assert [p.name for p in tmp_path.iterdir()] == ['rows.jsonl']


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    from ftbook import files

    path = tmp_path / 'rows.jsonl'
    write(path, labelled([*good, good[0]]))
    found = quick(path)

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'replace', full)
    with pytest.raises(OSError):
        write_clean(found, path)
    assert [p.name for p in tmp_path.iterdir()] == ['rows.jsonl']


@pytest.mark.parametrize(
    'content, said',
    [
        (b'text,label\nfine,pos\nbroken\n', 'rows.csv:3'),
        (b'text,label\nfi\0ne,pos\n', 'NUL'),
        (b'PAR1....', 'is Parquet'),
        (b'text,label\nf\xe9,pos\n', 'UTF-8'),
        (b'', 'no rows'),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, content, said):
    (path := tmp_path / 'rows.csv').write_bytes(content)
    with pytest.raises(ValueError, match=said):
        quick(path)
