"Writing beside and renaming: what a full disk, a read-only folder and a broken block leave behind."

import errno
import os
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError

from ftbook.files import (
    _beside,
    _check_place,
    _error_number,
    _scratch,
    _whole,
    _writing,
    build_once,
    write_files,
    write_table,
    write_text,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def refuse(number):
    def replace(*_):
        raise OSError(number, os.strerror(number))

    return replace


def whole(folder):
    return (folder / 'done').exists()


def test_a_file_is_replaced_whole(tmp_path):
    path = write_text(tmp_path / 'deep' / 'note.txt', 'one\r\ntwo\n')
    assert path.read_bytes() == b'one\r\ntwo\n'
    assert write_text(path, 'new').read_text() == 'new' and names(path.parent) == ['note.txt']


def test_a_table_is_replaced_whole(tmp_path):
    path = write_table(tmp_path / 'deep' / 'rows.parquet', pa.table({'a': [1, 2]}))
    assert pq.read_table(path).to_pydict() == {'a': [1, 2]} and names(path.parent) == ['rows.parquet']


def test_a_broken_block_leaves_the_old_file_and_nothing_beside(tmp_path):
    path = write_text(tmp_path / 'note.txt', 'old')
    with pytest.raises(KeyboardInterrupt):
        with _beside(path) as part:
            part.write_text('half')
            raise KeyboardInterrupt
    assert path.read_text() == 'old' and names(tmp_path) == ['note.txt']


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_disk_that_refuses_is_named(tmp_path, monkeypatch, number):
    path = write_text(tmp_path / 'note.txt', 'old')
    monkeypatch.setattr('ftbook.files.os.replace', refuse(number))
    with pytest.raises(OSError, match='make room or change its permissions') as told:
        write_text(path, 'new')
    assert str(tmp_path) in str(told.value) and os.strerror(number) in str(told.value)
    assert told.value.errno == number
    assert path.read_text() == 'old' and names(tmp_path) == ['note.txt']


def test_another_error_passes_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr('ftbook.files.os.replace', refuse(errno.EIO))
    with pytest.raises(OSError) as told:
        write_text(tmp_path / 'note.txt', 'new')
    assert told.value.errno == errno.EIO and 'make room' not in str(told.value)


def test_the_number_that_safetensors_hides_is_found(tmp_path):
    full = SafetensorError('I/O error: No space left on device (os error 28)')
    assert [_error_number(e) for e in (full, SafetensorError('header'), OSError(13, 'no'))] == [28, 0, 13]
    with pytest.raises(OSError, match='cannot be written: No space left on device'):
        with _writing(tmp_path):
            raise full
    with pytest.raises(SafetensorError):
        with _writing(tmp_path):
            raise SafetensorError('header')


def test_files_that_belong_together_change_together(tmp_path, monkeypatch):
    write_files(tmp_path, {'a': lambda p: p.write_text('1'), 'b': lambda p: p.write_text('1')})

    def full(path):
        path.write_text('2')
        raise SafetensorError('I/O error: No space left on device (os error 28)')

    with pytest.raises(OSError, match='cannot save the adapter in .* Free some space'):
        write_files(tmp_path, {'a': lambda p: p.write_text('2'), 'b': full})
    assert names(tmp_path) == ['a', 'b'] and [(tmp_path / n).read_text() for n in 'ab'] == ['1', '1']


@pytest.mark.parametrize('number', [errno.ENOTDIR, errno.EEXIST, errno.EFBIG, errno.ENOSPC])
def test_a_cache_that_takes_no_files_says_what_to_set(tmp_path, number):
    def build(folder):
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match='cannot write to the cache folder .*set FTBOOK_CACHE'):
        build_once(tmp_path / 'x', whole, build)
    assert names(tmp_path) == ['.x.lock']


def test_the_cache_can_be_read_by_others(tmp_path):
    folder = build_once(tmp_path / 'x', whole, lambda folder: (folder / 'done').touch())
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


def test_a_killed_builders_scratch_folder_is_swept(tmp_path):
    (tmp_path / '.x.part-99999').mkdir()
    build_once(tmp_path / 'x', whole, lambda folder: (folder / 'done').touch())
    assert names(tmp_path) == ['.x.lock', 'x']


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'thesis.txt').touch()
    with pytest.raises(FileExistsError, match='theirs exists and holds something'):
        with _whole(tmp_path / 'theirs', 'mark'):
            pass
    _check_place(tmp_path / 'new', 'mark')
    with pytest.raises(RuntimeError):
        with _whole(tmp_path / 'new', 'mark') as inside:
            (inside / 'mark').touch()
            raise RuntimeError
    assert names(tmp_path) == ['theirs'] and names(tmp_path / 'theirs') == ['thesis.txt']


@pytest.fixture
def replaced(tmp_path):
    "A folder with an old state, and what replaces it."
    target = tmp_path / "result"
    target.mkdir()
    (target / "state.txt").write_text("old")

    def replace():
        with _scratch(target) as scratch:
            (scratch / "state.txt").write_text("new")

    return target, replace


def test_a_folder_is_replaced_and_nothing_is_left_beside_it(replaced):
    target, replace = replaced
    replace()
    assert (target / "state.txt").read_text() == "new" and [p.name for p in target.parent.iterdir()] == ["result"]


def test_a_replacement_that_fails_half_way_leaves_the_old_folder(replaced, monkeypatch):
    target, replace = replaced
    real = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: real(self, to) if ".part" not in self.name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace()
    assert (target / "state.txt").read_text() == "old" and [p.name for p in target.parent.iterdir()] == ["result"]


def test_a_replacement_that_was_killed_half_way_is_undone_by_the_next(replaced):
    target, replace = replaced
    target.rename(target.with_name(".result.old"))
    with pytest.raises(ZeroDivisionError), _scratch(target):
        assert (target / "state.txt").read_text() == "old"
        1 / 0
    assert (target / "state.txt").read_text() == "old"
