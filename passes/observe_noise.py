"""Predict a site's noise from what a run of the program showed, instead of from white inputs.

A run and a backward pass (``estimate_shares`` in the API layer) show the values v that a site
rounds, what the outputs make of an error in them (the gradient g), and what they make of an error
in a weight (the gradient Γ, summed over tokens). To first order, in units of u², the noise is

    Σ_j E[v_j²] Σ_t g_tj²                      of rounded values
    Σ_j Σ_i W_ij² · mean_i Γ_ij²               of rounded weights

A change of basis turns v and W one way and g and Γ the other, so their second moments, a D × D
matrix each, foretell the noise of every basis. It counts what ``predict_noise`` cannot see from the
weights: that inputs are neither white nor of RMS size 1, that softmax does not hear what all
scores of a row have in common, and with it most of what a rounded key weight does to inputs that
look alike.

Assumptions: roundings are independent, and a factor's size at one token or input tells nothing
about what is made of errors there (v² and g², W² and Γ² are averaged each by itself).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observed:
    """What a run showed of one factor's vectors, second moments [n, D, D] in float64.

    ``values``: mean over tokens of v vᵀ, for outputs of a linear, or for what an output projection
    reads. ``effects``: sum over tokens of g gᵀ. ``weight_effects``: mean over the linear's inputs
    (or outputs) of Γ Γᵀ. The last two in units of the output's noise.
    """

    values: Tensor
    effects: Tensor
    weight_effects: Tensor


@dataclass(frozen=True)
class Rounded:
    """Values or weights that are rounded at a site: vectors [n] of D features of heads ``groups``.

    ``energies`` and ``effects`` [n, D, D]. ``along``: they turn by S⁻¹ as the decomposed factor
    does, else by Sᵀ. ``terms``: products that a value is the sum of. ``elements``: of a weight,
    how many there are for each feature; 0 for values. ``decomposed``: in the first features an
    input is added as it is.
    """

    energies: Tensor
    effects: Tensor
    groups: Tensor
    along: bool
    terms: int = 0
    elements: int = 0
    decomposed: bool = False


def rounded_by(
    observed: Observed,
    gram: Tensor,
    count: int,
    groups: Tensor,
    *,
    computed: bool,
    along: bool,
    decomposed: bool = False,
) -> tuple[Rounded, Rounded]:
    """Values and weights of one factor: ``gram`` [n, D, D] of the weights, ``count`` of them for
    each feature.

    ``computed``: the values are outputs of the linear and turn as its weights do; what an output
    projection reads turns the other way.
    """
    return (
        Rounded(
            observed.values,
            observed.effects,
            groups,
            along == computed,
            terms=count if computed else 0,
            decomposed=decomposed and computed,
        ),
        Rounded(
            gram,
            observed.weight_effects,
            groups,
            along,
            elements=count,
            decomposed=decomposed,
        ),
    )


def turned_energies(part: Rounded, s: Tensor, s_inv: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and effects of each feature in the basis ``s`` [G, D, D], [n, D] each."""
    there, back = (s_inv, s.mT) if part.along else (s.mT, s_inv)
    return _energies(part.energies, there[part.groups]), _energies(part.effects, back[part.groups])


def observed_energies(
    parts: Sequence[Rounded],
    s: Tensor,
    s_inv: Tensor,
    size: int,
    heard: tuple[Tensor, Tensor],
    partial_roundings: Sequence[tuple[float, float]],
    smallest: float,
) -> tuple[Tensor, Tensor]:
    """Noise of each head before and after the change of basis, [G] each, in units of u².

    ``heard`` [G, D] each: what rounding with feedback leaves of an error in a weight that turns
    along, and in one that does not. ``partial_roundings``: for each part, those of the original's
    sums and of the new ones. ``smallest``: the dtype's smallest normal value.
    """
    groups, dim = s.shape[:2]
    was, now = torch.zeros(groups, dtype=s.dtype), torch.zeros(groups, dtype=s.dtype)
    identity = torch.zeros(groups, dim, dtype=s.dtype)
    turned = [turned_energies(part, s, s_inv) for part in parts]
    for part, (energies, _) in zip(parts, turned, strict=True):
        if part.decomposed and part.elements:
            identity[:, :size] = (1 / energies[:, :size].clamp_min(1)).nan_to_num(1.0)
    floor = smallest**2
    for part, (energies, effects), (before, after) in zip(
        parts, turned, partial_roundings, strict=True
    ):
        left = energies * (1 - identity[part.groups]) if part.decomposed else energies
        if part.elements:
            count = part.elements - (size if part.decomposed else 0)
            share = heard[0 if part.along else 1][part.groups]
            noise = (left + count * floor) * effects * share
        else:
            own = part.energies.diagonal(dim1=1, dim2=2)
            met = part.effects.diagonal(dim1=1, dim2=2)
            was.index_add_(0, part.groups, ((own + floor) * met).sum(1) * (1 + before))
            noise = (left + floor) * effects * (1 + after)
            if part.decomposed:
                noise[:, :size] += energies[:, :size] * effects[:, :size]
        now.index_add_(0, part.groups, noise.sum(1))
    return was, now


def _energies(moments: Tensor, turn: Tensor) -> Tensor:
    """Diagonal of turnᵀ M turn, [n, D]."""
    return (turn * (moments @ turn)).sum(1).clamp_min(0)
