"""Files are replaced at once, also where the file system has no locks."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from phicore.disk.replacing import SUFFIX, remove_left, replacing


def test_file_is_replaced_when_the_block_ends(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, mode=0o600) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_file_stays_if_the_block_raises_or_writes_nothing(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as new:
            new.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with replacing(path):
        pass
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks of this kind")
@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_is_replaced_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr("phicore.disk.replacing.fcntl.flock", refuse)
    path = tmp_path / "file"
    with replacing(path) as new:
        new.write_text("new")
        remove_left(tmp_path)  # which another process may do
        assert new.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks of this kind")
def test_what_nobody_holds_is_removed(tmp_path: Path):
    left = tmp_path / f".file.abc{SUFFIX}"
    left.mkdir()
    (left / "file").write_text("half")
    path = tmp_path / "file"
    with replacing(path) as new:
        new.write_text("new")
        remove_left(tmp_path)  # this one is held
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "new"
