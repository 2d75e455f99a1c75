"""Write an artefact of several files so that either all of them appear or none does.

Files are written in a hidden directory beside their destination, on the same file system, and moved
out at the end: the artefact itself last, so that whoever waits for it finds the rest. Whatever ends
the work before (an error, no space, Ctrl-C) removes that directory, and what an overwriting export
had put aside comes back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bda_fx.exporters.exported import ExportError

NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
ELSEWHERE = "choose another path (-o)"
"""What both who call a function and who type a command can do."""


class PlaceError(ExportError):
    """An output that cannot be put where it was to go; nothing was left behind."""


class Staging:
    """The hidden directory. ``path`` is where the artefact is to be written for now."""

    def __init__(self, directory: Path, destination: Path) -> None:
        self.directory = directory
        self.destination = destination
        self.path = directory / destination.name
        self.scratch = directory / "scratch"
        self.scratch.mkdir()

    def files(self) -> list[Path]:
        """Destinations of what was written so far, the artefact last."""
        names = sorted(file.name for file in self.directory.iterdir() if file.is_file())
        names.sort(key=lambda name: name == self.destination.name)
        return [self.destination.parent / name for name in names]


@contextlib.contextmanager
def place_output(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Staging]:
    """A place to write ``path`` and files beside it, which appear when the block ends well.

    Raises:
        PlaceError: as ``check_destination``; there is no space left.
    """
    destination = Path(path)
    parent = destination.parent
    check_destination(destination, overwrite=overwrite)
    try:
        directory = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=parent))
    except OSError as error:
        raise _refused(error, parent) from error
    try:
        staging = Staging(directory, destination)
        yield staging
        _move(staging, overwrite)
    except OSError as error:
        raise _refused(error, parent) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_destination(path: Path, *, overwrite: bool, needed: int = 0) -> None:
    """Look before the work begins whether ``path`` can be written; ``needed`` is in bytes.

    Raises:
        PlaceError: it exists and ``overwrite`` is not set, its directory does not exist or cannot
            be written, or the file system has less than ``needed`` free.
    """
    parent = path.absolute().parent
    if path.is_dir():
        raise PlaceError(f"{path} is a directory: give the name of a file in it")
    if os.path.lexists(path) and not overwrite:
        raise PlaceError(
            f"{path} exists already: replace it with overwrite=True (--force), or {ELSEWHERE}"
        )
    if not parent.is_dir():
        raise PlaceError(f"there is no directory {parent}: create it with mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PlaceError(
            f"no permission to write in {parent}: {ELSEWHERE}, or change the permissions"
        )
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise PlaceError(
            f"no space to write {path}, about {needed:,} bytes are needed and {free:,} are free: "
            f"make room, or {ELSEWHERE}"
        )


def _move(staging: Staging, overwrite: bool) -> None:
    """Move every file to its destination, or put everything back."""
    moved: list[Path] = []
    aside: list[tuple[Path, Path]] = []
    try:
        for target in staging.files():
            if target.exists():
                check_destination(target, overwrite=overwrite)
                kept = staging.scratch / target.name
                os.replace(target, kept)
                aside.append((kept, target))
            os.replace(staging.directory / target.name, target)
            moved.append(target)
    except BaseException:
        for target in moved:
            target.unlink(missing_ok=True)
        for kept, target in aside:
            os.replace(kept, target)
        raise


def _refused(error: OSError, parent: Path) -> PlaceError:
    if error.errno in NO_ROOM:
        return PlaceError(
            f"no space left to write in {parent} ({error.strerror}), and nothing was left behind: "
            f"make room, or {ELSEWHERE}"
        )
    if error.errno in NO_PERMISSION:
        return PlaceError(f"no permission to write in {parent} ({error.strerror}): {ELSEWHERE}")
    return PlaceError(f"writing to {parent} failed ({error}): {ELSEWHERE}")
