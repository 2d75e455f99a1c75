"""Fit bases of several sizes to one or more sites, as cheaply as a decision about them allows.

Sites that share a basis (K and V made by one linear) are weighed together. The noise of a size is
estimated from the angles of the greedy rows (``BasisSearch.obliqueness``), at a small part of the
cost of a fit, and the estimates are scaled to the last fit; so a plan is drafted on estimates, and
rows are exchanged, S is computed and its noise predicted only for the sizes that it takes. C is
computed only where S alone cannot vouch for the change of basis to be exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bda_fx.passes.change_basis import change_basis, complete_basis
from bda_fx.passes.choose_basis import BasisSearch
from bda_fx.passes.predict_noise import Moments, predict_noise
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
    ``MAX_RESIDUAL``.
    """

    rows: Tensor
    noise: float
    worst: float
    condition: float
    residual: float

    @property
    def exact(self) -> bool:
        return self.residual <= MAX_RESIDUAL


class BasisFits:
    """Bases of any size for ``weights`` (sites that share them), computed when asked for.

    ``balanced``: whether the other factor has a say in S (see ``change_basis``).
    """

    def __init__(
        self,
        weights: Sequence[SiteWeights],
        strategy: str,
        dtype: torch.dtype,
        *,
        balanced: bool = True,
    ) -> None:
        self.dtype, self.balanced = dtype, balanced
        # All sites of a model are held at a time: the heads as they are stored, and of the other
        # factors their moments alone.
        heads = [_as_stored(w.heads, dtype) for w in weights]
        self.projections = [(h, w.bias) for h, w in zip(heads, weights, strict=True)]
        self.search = BasisSearch(torch.cat(heads) if len(heads) > 1 else heads[0], strategy)
        self.moments = [moments_of(w) for w in weights]
        self.head_dim = heads[0].shape[2]
        self._fits: dict[int, list[Fit]] = {}
        self._scales = [1.0] * len(heads)

    def noise(self, size: int) -> list[float]:
        """Noise of each site: of the fit if there is one, else an estimate; inf if not exact."""
        if size not in self._fits and self.search.strategy == "pivot":
            return [scale * self._estimate(size) for scale in self._scales]
        return [fit.noise if fit.exact else float("inf") for fit in self.fits(size)]

    def _estimate(self, size: int) -> float:
        noise = self.search.obliqueness(size) ** 0.5
        return noise / EXCHANGES_LOWER_FULL if size == self.head_dim else noise

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
                self._scales = [fit.noise / estimate for fit in fits]
        return self._fits[size]

    def _weigh(self, rows: Tensor) -> list[Fit]:
        pairs = zip(self.projections, self.moments, strict=True)
        return [self._weigh_one(*projection, moments, rows) for projection, moments in pairs]

    def _weigh_one(self, heads: Tensor, bias: Tensor | None, moments: Moments, rows: Tensor) -> Fit:
        both, heads = moments.balancing(self.balanced), heads.double()
        s, condition = complete_basis(heads, rows, bias, both)
        if condition <= SURE_CONDITION:
            s_inv, residual = torch.linalg.inv(s), 0.0
        else:
            change = change_basis(heads, rows, bias, both)
            s, s_inv, condition = change.s, change.s_inv, change.condition
            residual = change.residual
        noise = predict_noise(moments, s, s_inv, len(rows), self.dtype)
        return Fit(rows, noise.site, noise.worst, condition, residual)


def _as_stored(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """``heads`` in ``dtype``, where nothing is lost by it: weights were widened from there."""
    narrow = heads.to(dtype)
    return narrow if torch.equal(narrow.to(heads.dtype), heads) else heads
