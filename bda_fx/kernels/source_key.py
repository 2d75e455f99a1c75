"""A hash of sources, for whatever is kept of their results beyond a process."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path


@functools.cache
def kernel_source_key() -> str:
    """Changes with any source file in this directory."""
    return hash_sources(Path(__file__).parent)


def hash_sources(directory: Path) -> str:
    """A hash of the names and texts of all sources in ``directory`` and below."""
    digest = hashlib.sha256()
    folders = os.walk(directory, followlinks=True)
    for path in sorted(Path(folder, name) for folder, _, names in folders for name in names):
        if path.suffix in (".py", ".cpp", ".h"):
            name = path.relative_to(directory).as_posix()
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]
