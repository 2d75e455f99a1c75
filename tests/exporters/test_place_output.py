"""``place_output``: all files or none, whatever ends the work."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from bda_fx.exporters.exported import ExportError
from bda_fx.exporters.place_output import PlaceError, check_destination, place_output


def write(path: Path, *, overwrite: bool = False, text: str = "new") -> None:
    with place_output(path, overwrite=overwrite) as staging:
        (staging.directory / f"{path.name}.data").write_text(text)
        staging.path.write_text(text)
        (staging.scratch / "intermediate").write_text("large")


def contents(directory: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in directory.iterdir()}


def test_files_appear_together(tmp_path: Path) -> None:
    with place_output(tmp_path / "a.onnx", overwrite=False) as staging:
        staging.path.write_text("graph")
        (staging.directory / "a.onnx.data").write_text("weights")
        assert [f.name for f in staging.files()] == ["a.onnx.data", "a.onnx"]  # itself last
        assert not (tmp_path / "a.onnx").exists()
    assert contents(tmp_path) == {"a.onnx": "graph", "a.onnx.data": "weights"}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_is_left_behind(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with place_output(tmp_path / "a", overwrite=False) as staging:
            staging.path.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert contents(tmp_path) == {}


def test_an_existing_file_is_kept_unless_asked(tmp_path: Path) -> None:
    write(tmp_path / "a", text="old")
    with pytest.raises(
        ExportError,
        match=r"exists already: .* overwrite=True \(--force\), or",
    ):
        write(tmp_path / "a")
    assert contents(tmp_path) == {"a": "old", "a.data": "old"}
    write(tmp_path / "a", overwrite=True)
    assert contents(tmp_path) == {"a": "new", "a.data": "new"}


def test_a_file_beside_it_is_kept_too(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text("mine")
    with pytest.raises(ExportError, match=r"a\.data exists already"):
        write(tmp_path / "a")
    assert contents(tmp_path) == {"a.data": "mine"}


def test_what_was_put_aside_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails between the first file and the last."""
    write(tmp_path / "a", text="old")
    replace = os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "a" and Path(source).read_text() == "new":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ExportError, match=r"no space left to write in .*: make room, or"):
        write(tmp_path / "a", overwrite=True)
    assert contents(tmp_path) == {"a": "old", "a.data": "old"}


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is a directory: give the name of a file in it"):
        write(tmp_path)
    with pytest.raises(ExportError, match=r"no directory .*absent: create it with mkdir"):
        write(tmp_path / "absent" / "a")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EACCES, r"no permission to write in .* \(Permission denied\): choose another path"),
        (errno.EROFS, r"no permission to write in .* \(Read-only file system\)"),
        (errno.ENOSPC, "no space left to write in"),
        (errno.EIO, "writing to .* failed"),
    ],
)
def test_errors_of_the_file_system_say_what_to_do(tmp_path: Path, code: int, text: str) -> None:
    def fail() -> None:
        with place_output(tmp_path / "a", overwrite=False) as staging:
            staging.path.write_text("half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(ExportError, match=text):
        fail()
    assert contents(tmp_path) == {}


def test_space_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    check_destination(tmp_path / "a", overwrite=False, needed=1)
    with pytest.raises(PlaceError, match=r"about 2,000 bytes are needed and 1 are free: make room"):
        check_destination(tmp_path / "a", overwrite=False, needed=2000)


def test_a_link_to_nowhere_is_an_output_too(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "absent")
    with pytest.raises(PlaceError, match="exists already"):
        write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()
