"""Fit bases of several sizes to one or more sites, as cheaply as a decision about them allows.

Sites that share a basis (K and V made by one linear) are weighed together. The noise of a size is
estimated from the angles of the greedy rows (``BasisSearch.obliqueness``), at a small part of the
cost of a fit, and the estimates are scaled to the fit of the nearest size; so a plan is drafted on
estimates, and rows are exchanged, S is computed and its noise predicted only for the sizes that it
takes. C is computed only where S alone cannot vouch for the change of basis to be exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bda_fx.passes.change_basis import change_basis, complete_basis
from bda_fx.passes.choose_basis import BasisSearch
from bda_fx.passes.predict_noise import (
    Moments,
    PartnerHeads,
    keeps_sums_wide,
    partial_roundings,
    predict_noise,
)
from bda_fx.passes.predict_range import keeps_range
from bda_fx.passes.read_weights import SiteWeights, moments_of

MAX_RESIDUAL = 1e-11
"""A change of basis must reproduce the weights to this relative error in float64: its own rounding
is below 1e-16 × condition × √E, and a basis that misses part of a head leaves far more."""
SURE_CONDITION = 1e3
"""Up to this condition of S the change of basis is exact to 1e-12 without a look at C."""
EXCHANGES_LOWER_FULL = 1.5
"""What exchanges usually lower the noise of a greedy basis of D rows by: up to 2.07 times over all
K and V of MiniLM-L6 and rxnfp, 1.66 on random weights of 1 to 32 heads. With fewer rows by 1.1."""


@dataclass(frozen=True)
class Fit:
    """What one site makes of a basis: noise as ``predict_noise`` gives it, condition of S.

    ``residual`` is the relative error of the change of basis in float64; the fit is of no use above
    ``MAX_RESIDUAL``. ``in_range``: whether values stay within the dtype's range where those of
    the original do. ``correction``: noise over what the weights alone would make it, where a run of
    the program showed more than they do.
    """

    rows: Tensor
    noise: float
    worst: float
    condition: float
    residual: float
    in_range: bool = True
    correction: float = 1.0

    @property
    def exact(self) -> bool:
        return self.residual <= MAX_RESIDUAL

    @property
    def usable(self) -> bool:
        return self.exact and self.in_range


class BasisFits:
    """Bases of any size for ``weights`` (sites that share them), computed when asked for.

    ``balanced``: whether the other factor has a say in S (see ``change_basis``). ``optimize_for``:
    what noise is counted (see ``predict_noise``).
    """

    def __init__(
        self,
        weights: Sequence[SiteWeights],
        strategy: str,
        dtype: torch.dtype,
        *,
        balanced: bool = True,
        optimize_for: str | None = None,
    ) -> None:
        self.dtype, self.balanced, self.optimize_for = dtype, balanced, optimize_for
        heads = [w.heads for w in weights]
        self.weights = [_light(w) for w in weights]
        self.search = BasisSearch(torch.cat(heads) if len(heads) > 1 else heads[0], strategy)
        self.moments = [moments_of(w) for w in weights]
        self.head_dim = heads[0].shape[2]
        self._fits: dict[int, list[Fit]] = {}
        self._scales: dict[int, list[float]] = {}

    def noise(self, size: int) -> list[float]:
        """Noise of each site: of the fit if there is one, else an estimate; inf if of no use."""
        if size not in self._fits and self.search.strategy == "pivot":
            nearest = min(self._scales, key=lambda known: abs(known - size), default=None)
            scales = [1.0] * len(self.weights) if nearest is None else self._scales[nearest]
            return [scale * self._estimate(size) for scale in scales]
        return [fit.noise if fit.usable else float("inf") for fit in self.fits(size)]

    def _estimate(self, size: int) -> float:
        noise = (self.search.obliqueness(size) * self._sums(size)) ** 0.5
        return noise / EXCHANGES_LOWER_FULL if size == self.head_dim else noise

    def _sums(self, size: int) -> float:
        """Roundings on the way to a product over those of the original, on either factor alike."""
        terms = self.moments[0].key_terms
        if keeps_sums_wide(self.dtype) or not terms:
            return 1.0
        was, now = (1 + partial_roundings(n) for n in (terms, terms - size))
        return (now / was + 1) / 2

    def weighed(self, size: int) -> bool:
        """Whether the noise of ``size`` was asked for before."""
        return size in self._fits or self.search.judged(size)

    @property
    def known(self) -> list[int]:
        """Sizes that were fitted."""
        return list(self._fits)

    def fits(self, size: int) -> list[Fit]:
        """The fit of each site to the best basis of ``size`` rows."""
        if size not in self._fits:
            fits = self._fits[size] = self._weigh(self.search.rows(size))
            if self.search.strategy == "pivot" and all(fit.exact for fit in fits):
                estimate = max(self._estimate(size), 1e-9)
                self._scales[size] = [fit.noise / estimate for fit in fits]
        return self._fits[size]

    def _weigh(self, rows: Tensor) -> list[Fit]:
        pairs = zip(self.weights, self.moments, strict=True)
        return [self._weigh_one(weights, moments, rows) for weights, moments in pairs]

    def _weigh_one(self, weights: SiteWeights, moments: Moments, rows: Tensor) -> Fit:
        weights = replace(weights, heads=weights.heads.double())
        both = moments.balancing(self.balanced)
        s, condition = complete_basis(weights.heads, rows, weights.bias, both)
        if condition <= SURE_CONDITION:
            s_inv, residual = torch.linalg.inv(s), 0.0
        else:
            change = change_basis(weights.heads, rows, weights.bias, both)
            s, s_inv, condition = change.s, change.s_inv, change.condition
            residual = change.residual
        noise = predict_noise(moments, s, s_inv, len(rows), self.dtype, self.optimize_for)
        in_range = keeps_range(weights, moments, s, s_inv, self.dtype)
        correction = 1.0
        if moments.rounded:
            alone = predict_noise(
                replace(moments, rounded=()), s, s_inv, len(rows), self.dtype, self.optimize_for
            )
            correction = noise.site / alone.site
        return Fit(rows, noise.site, noise.worst, condition, residual, in_range, correction)


def _light(weights: SiteWeights) -> SiteWeights:
    """What is kept of a site's weights, as all sites of a model are held at a time: of the other
    factors, for which their moments will do, the biases."""

    def bare(factors: Sequence[PartnerHeads]) -> list[PartnerHeads]:
        return [replace(factor, weight=factor.weight.new_empty(0)) for factor in factors]

    return replace(weights, partners=bare(weights.partners), fellows=bare(weights.fellows))
