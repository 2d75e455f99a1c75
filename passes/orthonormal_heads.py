"""The heads of a projection as the search for a basis sees them: columns orthonormalised.

Angles between rows, and the volumes that they span, are those of Y_g, the head's weights with
orthonormal columns; which orthonormal columns does not matter. A head of rank k < D has D - k zero
columns; heads without weight are left out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Singular values below this times a head's largest are noise of float32 weights: not counted."""
WELL_CONDITIONED = 1e-4
"""Ratio of a Gram matrix's eigenvalues above which one pass orthonormalises to 1e-12."""
ORTHONORMAL, ORTHONORMAL_AT_FIRST = 1e-12, 1e-6
"""Largest element of YᵀY - 1 for columns that count as orthonormal, and after the first of two
passes. Rounding leaves eps × condition² there, so heads that pass have a condition below 1e5, and
full rank."""
SHORT_ROW = 1e-4
"""A row's ‖y‖² counts as at least this share of the mean row's: a zero row has no direction, and
1e-4 / δ makes it the worst choice there is instead of an orthogonal one."""


@dataclass(frozen=True)
class Heads:
    """The heads that carry weight, as the search sees them."""

    y: Tensor
    """[G, E, D] orthonormalised; zero columns where rank < D."""
    energy: Tensor
    """[G, E] ‖y_i‖²."""
    sizes: Tensor
    """[G, E] ‖y_i‖², bounded from below."""
    rank: Tensor
    """[G] float64."""

    @functools.cached_property
    def single(self) -> Heads:
        """The same in float32."""
        return Heads(*(getattr(self, f.name).float() for f in fields(self)))


def orthonormal_heads(heads: Tensor) -> Heads:
    largest = heads.abs().amax((1, 2), keepdim=True).double()
    y = heads / largest.clamp_min(torch.finfo(torch.float64).tiny)
    orthonormal = _orthonormalise(y)
    if orthonormal is not None:
        y, rank = orthonormal, torch.full_like(y[:, 0, 0], y.shape[2])
    else:
        y, rank = _orthonormalise_what_counts(y)
    energy = y.square().sum(-1)
    sizes = energy.maximum(SHORT_ROW * rank.unsqueeze(1) / heads.shape[1])
    return Heads(y, energy, sizes, rank)


def _orthonormalise(y: Tensor) -> Tensor | None:
    """The heads' columns orthonormalised by Cholesky factors of their Gram matrices, once or twice;
    None if some head is badly conditioned. Which orthonormal columns they become does not matter:
    all angles are the same."""
    gram = y.mT @ y
    for allowed in (ORTHONORMAL_AT_FIRST, ORTHONORMAL):
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed.any():
            return None
        eye = torch.eye(y.shape[2], dtype=y.dtype, device=y.device).expand_as(factor)
        y = y @ torch.linalg.solve_triangular(factor, eye, upper=False).mT
        gram = y.mT @ y
        off = float((gram - torch.eye(y.shape[2], dtype=y.dtype, device=y.device)).abs().max())
        if off < ORTHONORMAL:
            return y
        if not off < allowed:
            return None
    return None


def _orthonormalise_what_counts(y: Tensor) -> tuple[Tensor, Tensor]:
    """The same by spectra: once more where the loss of orthogonality, eps × condition², is worth
    it. Columns that a head lacks rank for are zero, heads without any are left out. Also the ranks
    [G]."""
    for least in (RANK_TOLERANCE**2, 0.5):
        spectrum, axes = torch.linalg.eigh(y.mT @ y)
        kept = (spectrum > least * spectrum[:, -1:]) & (spectrum > 0)
        y = y @ (axes * torch.where(kept, spectrum, torch.inf).rsqrt().unsqueeze(1))
        if (spectrum[:, 0] > WELL_CONDITIONED * spectrum[:, -1]).all():
            break
    rank = kept.sum(1)
    return y[rank > 0], rank[rank > 0].double()
