"""Predict a site's noise from what a run of the program showed, instead of from white inputs.

A run and a backward pass (``estimate_shares`` in the API layer) show the values v that a site
rounds, what the outputs make of an error in them (the gradient g), and what they make of an error
in a weight (the gradient Γ, summed over tokens). To first order, in units of u², the noise is

    Σ_t Σ_j v_tj² g_tj²                        of rounded values, token by token
    Σ_j Σ_i W_ij² · mean_i Γ_ij²               of rounded weights

A change of basis turns v and W one way and g and Γ the other: v and g of some tokens, and the
second moments of W and Γ, a D × D matrix each, foretell the noise of every basis. It counts what
``predict_noise`` cannot see from the weights: that inputs are neither white nor of RMS size 1, that
the outputs hear most of some tokens where others have the large values, that softmax does not hear
what all scores of a row have in common, and with it most of what a rounded key weight does to
inputs that look alike.

Assumptions: roundings are independent, and a weight's size at one input tells nothing about what is
made of errors there (W² and Γ² are averaged each by itself).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observed:
    """What a run showed of one factor's vectors.

    ``values`` and ``effects`` [n, T, D] in float32: v and g of T tokens, for outputs of a linear,
    or for what an output projection reads. ``weight_effects`` [n, D, D] in float64: mean over the
    linear's inputs (or outputs) of Γ Γᵀ. Effects are in units of the output's noise: squares of g,
    and Γ Γᵀ, are divided by it. ``typical``: the tokens are those of real inputs; where they are
    made up, it says nothing which tokens have large values and which are heard, so that v² and g²
    are averaged each by itself.
    """

    values: Tensor
    effects: Tensor
    weight_effects: Tensor
    typical: bool = True


def pick_tokens(
    values: Tensor, effects: Tensor, *, count: int, typical: bool = True
) -> tuple[Tensor, Tensor]:
    """At most ``count`` tokens of ``values`` and ``effects`` [n, T, D] that stand for all.

    Half of them are those with most noise; of the others every k-th in that order is taken, and
    counts for k. Of tokens that are not ``typical`` (see :class:`Observed`) every k-th is taken.
    """
    tokens = values.shape[1]
    if tokens <= count:
        return values, effects
    if not typical:
        kept = torch.arange(0, tokens, tokens / count, device=values.device).long()
        return values[:, kept], effects[:, kept] * (tokens / len(kept)) ** 0.5
    order = (values * effects).square().sum((0, 2)).argsort(descending=True, stable=True)
    loud, others = order[: count // 2], order[count // 2 :]
    step = -(-len(others) // (count - count // 2))
    quiet = others[step // 2 :: step]
    weights = torch.full((len(quiet), 1), len(others) / len(quiet), device=effects.device).sqrt()
    kept = torch.cat([loud, quiet])
    heard = torch.cat([effects[:, loud], effects[:, quiet] * weights], 1)
    return values[:, kept], heard


@dataclass(frozen=True)
class Rounded:
    """Values or weights that are rounded at a site: vectors of D features of n heads ``groups``.

    Values are themselves, with their ``effects`` [n, T, D]; of weights there are the second moments
    [n, D, D] of both. ``along``: they turn by S⁻¹ as the decomposed factor does, else by Sᵀ.
    ``terms``: products that a value is the sum of. ``elements``: of a weight, how many there are
    for each feature; 0 for values. ``decomposed``: in the first features an input is added as it
    is. ``typical``: see :class:`Observed`.
    """

    vectors: Tensor
    effects: Tensor
    groups: Tensor
    along: bool
    terms: int = 0
    elements: int = 0
    decomposed: bool = False
    typical: bool = True

    def turned(self, s: Tensor, s_inv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each feature in the basis ``s`` [G, D, D], [n, D] each in float64: its energy, that of
        its effects, and of both together."""
        there, back = (s_inv, s.mT) if self.along else (s.mT, s_inv)
        return self._energies(there[self.groups], back[self.groups])

    def as_they_are(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same in the original basis."""
        if self.elements:
            energies, effects = (
                moments.diagonal(dim1=1, dim2=2).clamp_min(0)
                for moments in (self.vectors, self.effects)
            )
            return energies, effects, energies * effects
        return self._energies_of(self.vectors, self.effects)

    def _energies(self, there: Tensor, back: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.elements:
            energies, effects = _diagonal(self.vectors, there), _diagonal(self.effects, back)
            return energies, effects, energies * effects
        return self._energies_of(
            self.vectors @ there.to(self.vectors.dtype), self.effects @ back.to(self.effects.dtype)
        )

    def _energies_of(self, values: Tensor, effects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, effects = values.square(), effects.square()
        size, heard = values.sum(1).double(), effects.sum(1).double()
        both = size * heard / values.shape[1]
        return size, heard, (values * effects).sum(1).double() if self.typical else both


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
            typical=observed.typical,
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
    turned = [part.turned(s, s_inv) for part in parts]
    for part, (energies, _, _) in zip(parts, turned, strict=True):
        if part.decomposed and part.elements:
            identity[:, :size] = (1 / energies[:, :size].clamp_min(1)).nan_to_num(1.0)
    floor = smallest**2
    for part, (_, effects, heard_energies), (before, after) in zip(
        parts, turned, partial_roundings, strict=True
    ):
        left = heard_energies * (1 - identity[part.groups]) if part.decomposed else heard_energies
        if part.elements:
            count = part.elements - (size if part.decomposed else 0)
            noise = (left + count * floor * effects) * heard[0 if part.along else 1][part.groups]
        else:
            _, met, own = part.as_they_are()
            was.index_add_(0, part.groups, (own + floor * met).sum(1) * (1 + before))
            noise = (left + floor * effects) * (1 + after)
            if part.decomposed:
                noise[:, :size] += heard_energies[:, :size]
        now.index_add_(0, part.groups, noise.sum(1))
    return was, now


def _diagonal(moments: Tensor, turn: Tensor) -> Tensor:
    """Diagonal of turnᵀ M turn, [n, D]."""
    return (turn * (moments @ turn)).sum(1).clamp_min(0)
