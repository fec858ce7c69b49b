"The audit on rows that nobody should have to see: what it says, and that every row is accounted for."

import json, random

import pytest
from hypothesis import given, settings, strategies as st

from ftbook.data.read import read_rows
from ftbook.quality.audit import SAFE
from ftbook.quality.report import audit_report, save_audit
from ftbook.quality.cleaning import clean, write_clean
from ftbook.quality.findings import Finding
from cases.quality import good, labelled, quick, write


def where(found):
    return [f.where for f in found.findings]


def adds_up(found, kinds=SAFE):
    kept, left = clean(found, kinds)
    assert sorted([*kept, *(l['row'] for l in left)]) == list(range(len(found.view)))
    assert all(0 <= i < len(found.view) for f in found.findings for i in (*f.rows, *f.drop))
    assert all(l['why'] and l['where'] for l in left)
    return kept, left


def test_clean_rows_have_no_errors():
    found = quick(labelled(good * 1))
    assert not found.findings.errors and not [f for f in found.findings if f.drop]


values = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.floats(allow_nan=True),
    st.booleans(),
    st.text(max_size=30),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries(dict(text=values, label=values)), min_size=1, max_size=20))
def test_any_rows_add_up(rows):
    found = quick(rows)
    adds_up(found)
    adds_up(found, ('form', 'duplicates', 'labels'))
    audit_report(found).html()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.fixed_dictionaries(dict(prompt=values, completion=values)),
            st.fixed_dictionaries(dict(messages=values)),
            st.fixed_dictionaries(dict(text=values)),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_instructions_add_up(rows):
    try:
        found = quick(rows)
    except ValueError as e:
        assert 'column' in str(e)
        return
    adds_up(found)
    audit_report(found).html()


def test_labels_of_two_types_are_a_finding():
    found = quick(labelled(good, ['pos', 1, 'neg', 'pos']))
    assert found.finding('labels.types').rows == [1]


@pytest.mark.parametrize(
    'labels, kind',
    [(['pos'] * 8, 'labels.classes'), (['pos'] * 4 + ['neg'] * 4, None), (list('abcdefgh'), 'labels.classes')],
)
def test_classes_that_cannot_be_learnt(labels, kind):
    found = quick(labelled([f'{t} {i}' for i, t in enumerate(good * 2)], labels))
    assert (kind in where(found)) if kind else 'labels.classes' not in where(found)


def test_a_row_of_a_megabyte():
    rows = labelled([*good, 'word ' * 200_000, 'x' * 1_000_000, '1' * 1_000_000, 'a.b@' * 250_000])
    found = quick(rows)
    adds_up(found)
    assert 4 in found.finding('form.length').rows


def test_very_many_identical_rows():
    rows = labelled(['The same sentence again.'] * 100_000, ['pos'] * 100_000)
    found = quick(rows)
    kept, left = adds_up(found)
    assert kept == [0] and len(left) == 99_999


def test_scripts_and_emoji_are_not_damage():
    texts = [
        'שלום עולם, זה סרט טוב מאוד',
        'هذا فيلم جيد',
        '👩‍👩‍👧 ♥',
        '映画はとても面白かった',
        'naïve café',
        'Ünïcödé',
        '‏مرحبا‎',
    ]
    assert 'form.encoding' not in where(quick([dict(text=t) for t in texts]))


def test_damage_is():
    bad = ['cafÃ© was nice', 'it�s', 'a\x00b', 'donâ€™t go']
    assert quick([dict(text=t) for t in [*good, *bad]]).finding('form.encoding').rows == [4, 5, 6, 7]


def test_secrets_are_not_repeated_in_the_report():
    key = 'sk-' + 'a1b2c3d4' * 5
    found = quick([dict(text=f'{t} {key} ann@example.org') for t in good])
    assert found.finding('form.personal').rows == [0, 1, 2, 3]
    evidence = json.dumps(found.finding('form.personal').evidence)
    assert key not in evidence and 'ann@' not in evidence
    page = audit_report(found).html()
    assert key not in page and 'ann@example' not in page


@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.jsonl', '.json', '.parquet'])
def test_the_cleaned_copy(tmp_path, suffix):
    rows = labelled([*good, good[0], '  ', 'comma, "quote"\nand a line'])
    path = tmp_path / f'rows{suffix}'
    write(path, rows)
    before = path.read_bytes()
    cleaned, left = write_clean(quick(path), path)
    assert path.read_bytes() == before
    assert list(read_rows(cleaned)) == [read_rows(path)[i] for i in (0, 1, 2, 3, 6)]
    assert [l['row'] for l in read_rows(left)] == [4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, cleaned.name, left.name])
    with pytest.raises(FileExistsError, match='is there already'):
        write_clean(quick(path), path)


def test_the_report_is_whole(tmp_path):
    rows = labelled([*good, good[1], '<script>alert(1)</script> and a lot of words'])
    folder = save_audit(quick(rows), tmp_path / 'out')
    html = (folder / 'report.html').read_text()
    assert '<script>alert' not in html and 'http' not in html.replace('http://www.w3.org', '')
    flat, told = read_rows(folder / 'findings.parquet'), json.loads((folder / 'findings.json').read_text())
    assert len(flat) == sum(len(f['rows']) for f in told['findings']) and told['rows'] == 6


def test_the_report_escapes_rows_labels_and_file_names(tmp_path):
    evil = '<script>alert(1)</script>'
    rows = labelled([*good, good[0], evil, evil], [evil, 'neg', evil, 'neg', 'neg', 'neg', evil])
    report = audit_report(quick(rows), f'{evil}.csv: the audit')
    html = report.html()
    assert '<script' not in html and html.count('&lt;script&gt;') > 5
    assert report.save(tmp_path / 'alone.html').read_text() == html
    report.audit.findings.append(Finding('note', evil, evil))
    assert '<script' not in report._repr_html_() and report._repr_html_().count('&lt;script&gt;') >= 2


def test_the_audit_changes_nothing():
    rows = labelled([*good, good[0]])
    before = json.dumps(rows)
    found = quick(rows)
    clean(found)
    audit_report(found).html()
    assert json.dumps(rows) == before


def test_leaks_and_benchmarks_are_found():
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghij', k=6)) for _ in range(500)]
    texts = [' '.join(rng.choices(words, k=25)) for _ in range(60)]
    test = [
        dict(text=texts[3], label='pos'),
        dict(text=texts[7].replace(' ', '  ').upper(), label='pos'),
        dict(text=' '.join(rng.choices(words, k=25)), label='neg'),
    ]
    found = quick(labelled(texts), test=test, benchmarks=['so the question is: ' + texts[11]])
    leaked = {
        i for f in found.findings if f.where in ('leakage.exact', 'leakage.near', 'leakage.contained') for i in f.rows
    }
    assert leaked == {3, 7}
    assert list(found.finding('leakage.benchmark').rows) == [11]
