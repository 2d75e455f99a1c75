"""Write to a file without ending the process where that fails.

That outputs appear whole or not at all is the work of ``bda_fx.exporters.place_output``.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


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
