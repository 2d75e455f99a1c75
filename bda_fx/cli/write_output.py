"""Look at an output before the work begins, and write to it without ending the process.

That outputs appear whole or not at all is the work of ``bda_fx.exporters.place_output``.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

from bda_fx.cli.errors import CliError, ExitCode


def check_output(path: Path, *, force: bool, needed: int = 0) -> None:
    """Look before the work begins whether ``path`` can be written; ``needed`` is in bytes.

    Raises:
        CliError: it exists and ``force`` is not given, its folder does not exist or is not
            writable, or the file system has less than ``needed`` free.
    """
    if path.is_dir():
        raise CliError(
            f"{path} is a directory",
            f"name a file, such as -o {path / 'model'}",
            ExitCode.CANNOT_WRITE,
        )
    if os.path.lexists(path) and not force:
        raise CliError(
            f"{path} exists already",
            "choose another name with -o, or replace it with --force",
            ExitCode.CANNOT_WRITE,
        )
    folder = path.absolute().parent
    if not folder.is_dir():
        raise CliError(
            f"there is no directory {folder}", f"mkdir -p {folder}", ExitCode.CANNOT_WRITE
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CliError(
            f"no permission to write in {folder}",
            "choose another place with -o, or change the permissions",
            ExitCode.CANNOT_WRITE,
        )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CliError(
            f"no space to write {path}: about {size(needed)} are needed, {size(free)} are free",
            "free some space or choose another place with -o",
            ExitCode.CANNOT_WRITE,
        )


class Sink(io.RawIOBase):
    """A file for writers that cannot cope with errors; ``close`` raises the first one.

    PyTorch's archive writer ends the whole process where writing fails, as it goes on to write in
    its destructor. So a failed write counts as done, and what follows it is thrown away.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self._error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """What writers do when they are done. Goes nowhere: all is written in one go."""
        return offset

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if self._error is None:
            try:
                self._file.write(view)
            except BaseException as error:  # Ctrl-C too
                self._error = error
        return view.nbytes

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            raise self._error


def size(count: int) -> str:
    """``count`` bytes for people."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
