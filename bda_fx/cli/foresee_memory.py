"""Foresee from sizes whether a command fits in memory, before it begins."""

from __future__ import annotations

from bda_fx.cli.errors import CliError, ExitCode
from bda_fx.cli.write_output import size

PEAK = 2.5
"""Peak memory over bytes of weights, of opening and rewriting a model: `make cli-memory` measures
it. Comes to more for small models, whose weights are little beside PyTorch itself."""


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
