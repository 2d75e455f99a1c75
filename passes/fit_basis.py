"""Fit a basis to a noise budget: the largest of several sizes that one or more sites can take.

Sites that share a basis (K and V made by one linear) are weighed together: each must keep to the
budget. What a size costs is known long before C is: from S alone, of D × D per head
(``predict_noise_of``), and for ``pivot`` from the greedy rows before any exchange. So a size that
is far over the budget is given up at once, and C is computed only where S alone cannot vouch for
the change of basis to be exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bda_fx.passes.change_basis import change_basis, complete_basis
from bda_fx.passes.choose_basis import BasisSearch
from bda_fx.passes.predict_noise import Moments, predict_noise, predict_noise_of, second_moments
from bda_fx.passes.read_weights import SiteWeights

MAX_RESIDUAL = 1e-11
"""A change of basis must reproduce the weights to this relative error in float64: its own rounding
is below 1e-16 × condition × √E, and a basis that misses part of a head leaves far more."""
SURE_CONDITION = 1e3
"""Up to this condition of S the change of basis is exact to 1e-12 without a look at C."""
EXCHANGES_LOWER_FULL = 2.25
EXCHANGES_LOWER = 1.25
"""More than exchanges lower the noise of a greedy basis: of D rows, and of fewer. Measured over all
K and V of MiniLM-L6 and rxnfp at six sizes: by up to 2.07 times at r = D, 1.10 below; on random
weights of 1 to 32 heads 1.66 and 1.05."""


@dataclass(frozen=True)
class Fit:
    """What one site makes of a basis: noise as ``predict_noise`` gives it, condition of S."""

    rows: Tensor
    noise: float
    worst: float
    condition: float
    residual: float


@dataclass(frozen=True)
class Misfit:
    """No size will do: the least noise of the exact ones, the least residual of the others."""

    noise: float = math.inf
    residual: float = math.inf


def fit_basis(
    weights: Sequence[SiteWeights],
    sizes: Sequence[int],
    strategy: str,
    budget: float | None,
    *,
    quick: bool = False,
) -> list[Fit] | Misfit:
    """The basis of the first of ``sizes`` (largest first) that suits each of ``weights``.

    ``budget`` bounds the predicted noise of each site; None takes any. Returns a :class:`Fit` for
    each site, on common rows. ``quick`` gives up without telling how far off the last size was.
    """
    heads = torch.cat([w.heads for w in weights]) if len(weights) > 1 else weights[0].heads
    search = BasisSearch(heads, strategy)
    moments = [second_moments(w.heads, w.bias, w.partners, w.fellows) for w in weights]

    def weigh(rows: Tensor) -> list[Fit]:
        return [_weigh(w, m, rows) for w, m in zip(weights, moments, strict=True)]

    noise, residual = math.inf, math.inf
    for size in sizes:
        if budget is not None and strategy == "pivot" and (quick or size != sizes[-1]):
            gain = EXCHANGES_LOWER_FULL if size == heads.shape[2] else EXCHANGES_LOWER
            if max(fit.noise for fit in weigh(search.first_rows(size))) > gain * budget:
                continue
        fits = weigh(search.rows(size))
        worst_residual = max(fit.residual for fit in fits)
        worst_noise = max(fit.noise for fit in fits)
        if worst_residual > MAX_RESIDUAL:
            residual = min(residual, worst_residual)
        elif budget is None or worst_noise <= budget:
            return fits
        else:
            noise = min(noise, worst_noise)
    return Misfit(noise, residual)


def _weigh(weights: SiteWeights, moments: Moments, rows: Tensor) -> Fit:
    s, condition = complete_basis(weights.heads, rows, weights.bias)
    if condition <= SURE_CONDITION:
        return Fit(rows, *predict_noise_of(moments, s), condition, 0.0)
    change = change_basis(weights.heads, rows, weights.bias)
    noise, worst = predict_noise(
        weights.heads, weights.bias, change, weights.partners, weights.fellows
    )
    return Fit(rows, noise, worst, change.condition, change.residual)
