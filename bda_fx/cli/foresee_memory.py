"""Foresee from sizes whether a command fits in memory, before it begins."""

from __future__ import annotations

import contextlib
import ctypes

from bda_fx.cli.errors import CliError, ExitCode
from bda_fx.cli.write_output import size

PEAK = 2.5
"""Peak memory over bytes of weights, of opening and rewriting a model: `make cli-memory` measures
it. Comes to more for small models, whose weights are little beside PyTorch itself."""

_M_MMAP_THRESHOLD = -3  # of malloc.h


def check_memory(weight_bytes: int, *, factor: float = PEAK, ignore: bool = False) -> None:
    """Refuse what will not fit.

    ``weight_bytes`` of all models that are open at a time; ``ignore`` skips the check.

    Raises:
        CliError: ``factor`` times the weights is more than what is available.
    """
    import torch

    from bda_fx import choose_truth

    available = choose_truth.available_bytes(torch.device("cpu"))
    needed = int(factor * weight_bytes)
    if ignore or available is None or needed <= available:
        return
    raise CliError(
        f"not enough memory: about {size(needed)} are needed "
        f"({factor:g} × {size(weight_bytes)} of weights), {size(available)} are available",
        "free some, choose --dtype float16 or bfloat16, or try regardless with --no-memory-check",
        ExitCode.NO_MEMORY,
    )


def return_freed_memory() -> None:
    """Have the C library give large blocks back to the system as they are freed, under glibc.

    Left to itself it keeps what a thread frees for that thread (planning runs in threads), in holes
    between what stays: half the weights of a model, in the end. Blocks from a megabyte on are
    mapped one by one instead, which costs a page fault for each 4 KiB at first touch.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
