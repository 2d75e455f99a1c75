"""What a preparation is: the paper's procedure and ours, from a layer's weights to what it stores.

Both take W [H, E, D] of a projection and U [H, n, D] of its partner (queries, or the output
projection of V, transposed) in bfloat16, and round what they store to bfloat16.

* "paper": the procedure of arXiv 2510.01718 (First-r against Last-r by residual), as its authors
  published it for DeepSeek-V2-Lite. Each head's product P = U Wᵀ [n, E] is formed; for the first D
  columns and for the last D, each head's least squares P[:, B] X = P is solved for all E columns;
  the end with the lower mean residual wins and is solved once more, keeping the other E - D columns
  of X as coefficients and P[:, B] in the partner's place. float32 throughout; the QR solver
  (``driver="gels"``), the one that it has on a GPU. For V, P = (V O)ᵀ.
* "paper, lean": the same decision with nothing done twice: the E - D columns only, solutions kept.
* ours: choose the basis, change basis (C and S), predict the noise, turn the partner by S. float64.
  Everything is computed, whatever the strategy: "first" and "residual-min" here are the paper's
  rows by our algebra, which never forms P. Weights are rounded to nearest: the feedback between
  both factors that a rewrite in half precision adds (``round_weights``) is not timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bda_fx.passes.change_basis import ChangeOfBasis, change_basis, turn_vectors
from bda_fx.passes.choose_basis import choose_basis
from bda_fx.passes.predict_noise import Noise, PartnerHeads, predict_noise, second_moments

SEED = 0


@dataclass(frozen=True)
class Projection:
    """H heads of D features of E inputs; the partner has ``partner`` inputs or outputs."""

    heads: int
    in_features: int
    head_dim: int
    partner: int

    def weights(self, seed: int = SEED) -> tuple[Tensor, Tensor]:
        """W [H, E, D] and U [H, n, D], bfloat16."""
        generator = torch.Generator().manual_seed(seed)
        near = torch.randn(self.heads, self.in_features, self.head_dim, generator=generator)
        far = torch.randn(self.heads, self.partner, self.head_dim, generator=generator)
        return near.bfloat16(), far.bfloat16()


Stages = dict[str, float]
"""Seconds by stage; procedures that have one stage call it "all". They are CPU seconds of the
calling thread, which other work on the machine does not lengthen: set torch to one thread."""


def paper(near: Tensor, far: Tensor) -> Stages:
    """The published procedure; see the module docstring."""
    start = time.thread_time()
    d = near.shape[2]
    products = far.float() @ near.float().mT
    residuals = []
    for first in (True, False):
        solved = [_least_squares(_end(p, d, first), p) for p in products]
        residuals.append(statistics.mean(float(s.residuals.mean()) for s in solved))
    first = residuals[0] <= residuals[1]
    for p in products:
        solution = _least_squares(_end(p, d, first), p).solution
        (solution[:, d:] if first else solution[:, :-d]).bfloat16()
        _end(p, d, first).bfloat16()
    return {"all": time.thread_time() - start}


def paper_lean(near: Tensor, far: Tensor) -> Stages:
    """The same decision: each end solved once, for the columns that need it."""
    start = time.thread_time()
    d = near.shape[2]
    products = far.float() @ near.float().mT
    ends = []
    for first in (True, False):
        solved = [
            _least_squares(_end(p, d, first), p[:, d:] if first else p[:, :-d]) for p in products
        ]
        residual = statistics.mean(float(s.residuals.mean()) for s in solved)
        ends.append((residual, first, [s.solution for s in solved]))
    _, first, solutions = min(ends, key=lambda end: end[0])
    for p, solution in zip(products, solutions, strict=True):
        solution.bfloat16()
        _end(p, d, first).bfloat16()
    return {"all": time.thread_time() - start}


def _end(product: Tensor, d: int, first: bool) -> Tensor:
    return product[:, :d] if first else product[:, -d:]


def _least_squares(left: Tensor, right: Tensor) -> Any:
    return torch.linalg.lstsq(left, right, driver="gels")


def ours(strategy: str, share: float) -> Callable[[Tensor, Tensor], Stages]:
    def prepare(near: Tensor, far: Tensor) -> Stages:
        times = [time.thread_time()]
        rows = choose_basis(near, int(near.shape[2] * share), strategy)
        times.append(time.thread_time())
        change = change_basis(near, rows)
        change.coefficients.bfloat16()
        times.append(time.thread_time())
        _noise(near, far, change)
        times.append(time.thread_time())
        turn_vectors(far, change, torch.arange(len(near)), against=True).bfloat16()
        times.append(time.thread_time())
        stages = (after - before for before, after in itertools.pairwise(times))
        return dict(zip(STAGES, stages, strict=True))

    return prepare


STAGES = ("choose", "change", "predict", "turn")
PROCEDURES: dict[str, Callable[[Tensor, Tensor], Stages]] = {
    "paper": paper,
    "paper, lean": paper_lean,
    "first, D": ours("first", 1),
    "residual-min, D": ours("residual-min", 1),
    "window, D": ours("window", 1),
    "pivot, D": ours("pivot", 1),
    "pivot, 7/8 D": ours("pivot", 7 / 8),
}


def noise_of(projection: Projection, name: str) -> tuple[float, float]:
    """Predicted noise of the site and of its worst head; the paper's rows by Residual-min."""
    strategy, share = name.split(", ") if "paper" not in name else ("residual-min", "D")
    near, far = projection.weights()
    rows = choose_basis(near, int(near.shape[2] * (7 / 8 if share != "D" else 1)), strategy)
    noise = _noise(near, far, change_basis(near, rows))
    return noise.site, noise.worst


def _noise(near: Tensor, far: Tensor, change: ChangeOfBasis) -> Noise:
    """Predicted noise in bfloat16, in which the weights are stored."""
    groups = torch.arange(len(near))
    partner = PartnerHeads(far.mT, None, groups, far.shape[1])
    moments = second_moments(near, None, [partner])
    return predict_noise(moments, change.s, change.s_inv, len(change.rows), torch.bfloat16)
