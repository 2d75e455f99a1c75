"""Have the C library give freed memory back to the system, under glibc; elsewhere nothing is done.

Left to itself it keeps what a thread frees for that thread (planning runs in threads), in holes
between what stays.
"""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of malloc.h."""


def set_malloc_parameter(parameter: int, value: int) -> None:
    """``mallopt`` for this process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)


def return_freed_memory() -> None:
    """Give large blocks back as they are freed, from now on: half the weights of a model, in the
    end. Blocks from a megabyte on are mapped one by one, which costs a page fault for each 4 KiB at
    first touch; for a process of one's own."""
    set_malloc_parameter(M_MMAP_THRESHOLD, 1 << 20)


def return_free_memory_now() -> None:
    """Give back what is free now, once; costs some milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
