"""Measure how long a run of products this machine's float32 GEMM adds up one by one.

A GEMM cuts a long sum into runs of about equal length, adds each up by itself and then the runs to
each other. A sum of m terms whose partial sums are rounded as they come has m / 2 times the error
variance of one rounding; of n runs, m / (2 n). Where a library cuts depends on the processor: MKL
takes up to 192 terms in one run on one x86 server and up to 384 on another, so this is measured,
once a process, in some ten milliseconds.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

STEP, LONGEST = 64, 1024
"""Lengths that are tried: multiples of this, up to that."""
ROWS = 128
"""Size of the products; 128² errors tell their variance to one or two per cent."""
ONE_RUN = 0.75
"""Share of m / 2 above which a sum counts as one run: halfway between one run and two."""


@functools.cache
def longest_run() -> int:
    """Most products that a float32 GEMM on the CPU adds up one by one; at most ``LONGEST``."""
    run = STEP
    with _disable_current_modes(), torch.inference_mode(), torch.device("cpu"):
        for terms in range(STEP, LONGEST + 1, STEP):
            if partial_sums_rounded(terms) < ONE_RUN * terms / 2:
                break
            run = terms
    return run


def partial_sums_rounded(terms: int) -> float:
    """Error variance of float32 sums of ``terms`` products over that of rounding them once, less 1;
    from one product of random matrices, the same at every call."""
    generator = torch.Generator("cpu").manual_seed(terms)

    def draw() -> Tensor:
        return torch.randn(ROWS, terms, generator=generator, dtype=torch.float32)

    x, w = draw(), draw()
    exact = x.double() @ w.double().T
    once = (exact.float() - exact).square().sum()
    return float((x @ w.T - exact).square().sum() / once) - 1
