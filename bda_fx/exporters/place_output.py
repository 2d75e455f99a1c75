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
        ExportError: ``path`` exists and ``overwrite`` is not set; its directory does not exist or
            cannot be written; there is no space left.
    """
    destination = Path(path)
    parent = destination.parent
    if destination.is_dir():
        raise ExportError(f"{destination} is a directory: give the name of a file in it")
    if destination.exists() and not overwrite:
        raise ExportError(f"{destination} exists: pass overwrite=True, or another path")
    if not parent.is_dir():
        raise ExportError(f"{parent} is not a directory: create it, or give another path")
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


def require_space(directory: Path, needed: int) -> None:
    """Refuse to begin what cannot end: ``needed`` bytes that ``directory`` does not have.

    Raises:
        ExportError: with both numbers.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ExportError(
            f"the export needs about {needed:,} bytes in {directory}, which has {free:,} free: "
            "make room, or give a path elsewhere"
        )


def _move(staging: Staging, overwrite: bool) -> None:
    """Move every file to its destination, or put everything back."""
    moved: list[Path] = []
    aside: list[tuple[Path, Path]] = []
    try:
        for target in staging.files():
            if target.exists():
                if not overwrite:
                    raise ExportError(f"{target} exists: pass overwrite=True, or another path")
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


def _refused(error: OSError, parent: Path) -> ExportError:
    if error.errno == errno.ENOSPC:
        return ExportError(f"no space left in {parent}: make room, or give a path elsewhere")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ExportError(f"{parent} cannot be written ({error.strerror}): give a path elsewhere")
    return ExportError(f"writing to {parent} failed ({error}): give a path elsewhere")
