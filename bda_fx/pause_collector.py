"""Keep Python's cyclic garbage collector off while many objects are made that all stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No automatic collections in the block (or the function, as a decorator), as compilers do:
    each would go through the whole heap, half a second of it where PyTorch's compiler has been
    imported and has traced a model. What is in cycles stays until the first one after."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
