"""Predict what a change of basis costs in rounding noise, from the weights alone.

Both factors of a product are rounded, so feature j of each carries noise of its own size, and the
product's noise² is proportional to Σ_j E[K_j²] E[Q_j²]. With white inputs E[K_j²] = ‖W[:, j]‖² + b_j²
(likewise for Q; for an output weight ‖O[j, :]‖²). The amplification of a change of basis is

    sqrt( Σ_j E[K'_j²] E[Q'_j²]  /  Σ_j E[K_j²] E[Q_j²] ),   K' = K S⁻¹,  Q' = Q Sᵀ.

It is a ratio to the site's own rounding noise, not an absolute error, and holds for every dtype
because all terms scale with its unit roundoff alike.
"""

from __future__ import annotations

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
    heads: Tensor, bias: Tensor | None, change: ChangeOfBasis, partners: list[PartnerHeads]
) -> tuple[float, float]:
    """Amplification of the whole site, and of its worst head. 1 means: as noisy as the original.

    ``heads`` [G, E, D] and ``bias`` [G, D] of the projection. A head without energy counts as 1.
    """
    key = _energy(heads.double().transpose(1, 2), bias)
    moved = change.coefficients.square().sum(1)
    moved[:, : len(change.rows)] += 1
    if change.bias is not None:
        moved = moved + change.bias.square()
    before, after = [], []
    for partner in partners:
        s = change.s[partner.groups]
        before.append((key[partner.groups] * _energy(partner.weight.double(), partner.bias)).sum(-1))
        turned = s @ partner.weight.double()
        turned_bias = None
        if partner.bias is not None:
            turned_bias = (s @ partner.bias.double().unsqueeze(-1)).squeeze(-1)
        after.append((moved[partner.groups] * _energy(turned, turned_bias)).sum(-1))
    was, now = torch.cat(before), torch.cat(after)
    if not float(was.sum()) > 0:
        return 1.0, 1.0
    ratios = torch.where(was > 0, now / was, 1.0)
    return float((now.sum() / was.sum()).sqrt()), float(ratios.max().sqrt())


def _energy(features: Tensor, bias: Tensor | None) -> Tensor:
    """Mean square of each feature for white inputs: [·, D, n] → [·, D]."""
    energy = features.square().sum(-1)
    return energy if bias is None else energy + bias.double().square()
