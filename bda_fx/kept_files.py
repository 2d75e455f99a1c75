"""Files that outlive a process: beside Inductor's caches, and never half written.

TORCHINDUCTOR_CACHE_DIR / bda_fx
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def kept_files() -> Path:
    """Their directory, which may not exist yet."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "bda_fx"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it takes the place of ``path`` in one step, or is removed
    where writing fails.

    Raises:
        OSError: it cannot be written or moved.
    """
    beside = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
