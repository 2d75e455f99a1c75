"""Predict what a change of basis costs in rounding noise, from the weights alone.

Both factors of a product are rounded, so feature j of each carries noise of its own RMS size, and
the product's noise² is proportional to Σ_j E[K_j²] E[Q_j²]. With white inputs
E[K_j²] = ‖W[:, j]‖² + b_j² (likewise for Q; for an output weight ‖O[j, :]‖²). The amplification is

    sqrt( Σ_j E[K'_j²] E[Q'_j²]  /  Σ_j E[K_j²] E[Q_j²] ),   K' = K S⁻¹,  Q' = Q Sᵀ,

a ratio to the product's own rounding noise, not an absolute error. It holds for every dtype, as all
terms scale with its unit roundoff alike. The site's figure sums both energies over all heads first.

Assumptions: inputs white (their scales and correlations cancel only in part), roundings
independent, and weights rounded in both versions. Where the original's weights are exact in the
working dtype (a model stored in bf16 or fp16 and judged against its own float64 run), the new
weights' rounding has no counterpart and adds as much noise again to either factor:
``exact_weights`` multiplies by √2. In float32 the accumulation of each dot product outweighs the
rounding of the weights, so leave it off.

Measured over predicted, all K and V sites of MiniLM-L6 and rxnfp on white inputs, pivoted basis of
D, 15/16 D and 7/8 D rows: float32 0.93 … 0.99 and 0.73 … 1.02 (rxnfp sums over up to a quarter
fewer terms than before, and float32's noise is mostly that of summation); bf16 0.84 … 1.12. bf16
with exact weights, over √2 times the prediction: K 0.96 … 1.05, V 0.66 … 0.91, which errs on the
safe side (V's product is also averaged over tokens). On nearly singular bases in bf16 nothing
predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bda_fx.passes.change_basis import ChangeOfBasis


@dataclass(frozen=True)
class PartnerHeads:
    """The other factor, features first: ``weight`` [H, D, ·], ``bias`` [H, D], ``groups`` [H]."""

    weight: Tensor
    bias: Tensor | None
    groups: Tensor


def predict_noise(
    heads: Tensor,
    bias: Tensor | None,
    change: ChangeOfBasis,
    partners: list[PartnerHeads],
    fellows: Sequence[PartnerHeads] = (),
    *,
    exact_weights: bool = False,
) -> tuple[float, float]:
    """Amplification of the whole site, and of its worst head. 1 means: as noisy as the original.

    ``heads`` [G, E, D] and ``bias`` [G, D] of the projection. ``partners`` meet its features;
    ``fellows`` meet the partners too and turn along. A head without energy counts as 1.
    Cost O(G E D + H D² n).
    """
    was, now = _product_energies(heads, bias, change, partners, fellows)
    rounding = 2**0.5 if exact_weights else 1.0
    if not float(was.sum()) > 0:
        return 1.0, 1.0
    site = float((now.sum() / was.sum()).sqrt())
    return rounding * site, rounding * float(_ratios(was, now).max())


def predict_head_noise(
    heads: Tensor, bias: Tensor | None, change: ChangeOfBasis, partners: list[PartnerHeads]
) -> Tensor:
    """Amplification of each key/value head over all its query heads, [G] float64."""
    return _ratios(*_product_energies(heads, bias, change, partners))


@dataclass(frozen=True)
class Moments:
    """What the noise of a product depends on besides S, worked out once for several bases.

    ``key`` [G, D, D]: WᵀW + b bᵀ; ``query`` [G, D, D]: the sum of U Uᵀ + a aᵀ over the heads
    served. Float64.
    """

    key: Tensor
    query: Tensor


def second_moments(
    heads: Tensor,
    bias: Tensor | None,
    partners: list[PartnerHeads],
    fellows: Sequence[PartnerHeads] = (),
) -> Moments:
    """Moments of a site; arguments as for :func:`predict_noise`. Cost O((G E + H n) D²)."""
    heads = heads.double()
    key = _add_outer(heads.mT @ heads, bias)
    query = torch.zeros_like(key)
    for total, factors in ((key, fellows), (query, partners)):
        for factor in factors:
            weight = factor.weight.double()
            total.index_add_(0, factor.groups, _add_outer(weight @ weight.mT, factor.bias))
    return Moments(key, query)


def predict_noise_of(moments: Moments, s: Tensor) -> tuple[float, float]:
    """What :func:`predict_noise` says of the change of basis by an invertible ``s`` [G, D, D].

    E[K'_j²] = [S⁻ᵀ (WᵀW + b bᵀ) S⁻¹]_jj, likewise for Q': O(G D³), whatever the number of inputs.
    """
    inverse = torch.linalg.inv(s)
    key = ((moments.key @ inverse) * inverse).sum(1)
    query = ((s @ moments.query) * s).sum(2)
    was = (_diagonals(moments.key) * _diagonals(moments.query)).sum(1)
    now = (key * query).sum(1)
    if not float(was.sum()) > 0:
        return 1.0, 1.0
    return float((now.sum() / was.sum()).sqrt()), float(_ratios(was, now).max())


def _add_outer(gram: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return gram
    return gram + bias.double().unsqueeze(2) * bias.double().unsqueeze(1)


def _diagonals(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)


def _ratios(was: Tensor, now: Tensor) -> Tensor:
    return torch.where(was > 0, now / was, 1.0).sqrt()


def _product_energies(
    heads: Tensor,
    bias: Tensor | None,
    change: ChangeOfBasis,
    partners: list[PartnerHeads],
    fellows: Sequence[PartnerHeads] = (),
) -> tuple[Tensor, Tensor]:
    """Σ_j E[K_j²] E[Q_j²] of each key/value head before and after the change of basis, [G] each."""
    key = _energy(heads.double().mT, bias)
    moved = change.coefficients.square().sum(1)
    moved[:, : len(change.rows)] += 1
    if change.bias is not None:
        moved = moved + change.bias.square()
    for fellow in fellows:
        before, after = _energies(fellow, change.s_inv.mT)
        key = key.index_add(0, fellow.groups, before)
        moved = moved.index_add(0, fellow.groups, after)
    was, now = key.new_zeros(len(key)), key.new_zeros(len(key))
    for partner in partners:
        query, turned = _energies(partner, change.s)
        was.index_add_(0, partner.groups, (key[partner.groups] * query).sum(-1))
        now.index_add_(0, partner.groups, (moved[partner.groups] * turned).sum(-1))
    return was, now


def _energies(factor: PartnerHeads, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of a factor's features before and after the change of basis, [n, D] each."""
    turn = turn[factor.groups]
    bias = None
    if factor.bias is not None:
        bias = (turn @ factor.bias.double().unsqueeze(-1)).squeeze(-1)
    weight = factor.weight.double()
    return _energy(weight, factor.bias), _energy(turn @ weight, bias)


def _energy(features: Tensor, bias: Tensor | None) -> Tensor:
    """Mean square of each feature for white inputs: [·, D, n] → [·, D]."""
    energy = features.square().sum(-1)
    return energy if bias is None else energy + bias.double().square()
