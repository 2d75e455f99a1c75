"""Predict whether a change of basis keeps values within the range of their dtype.

Scores, outputs and x itself are as they were; what is new is K' = K S⁻¹, Q' = Q Sᵀ and the weights
that make them. With inputs of RMS size 1 a feature reaches

    reach_j = |b_j| + PEAK ‖w_j‖              w_j: its column of weights, b_j: its bias

and an input reaches PEAK. Where the original reaches beyond the largest finite value M, its inputs
must be smaller than that for it not to overflow, in proportion; so K' is within the range wherever
x and K are if

    max_j reach(K'_j)  ≤  max(M, PEAK, max_j reach(K_j))

and likewise Q' beside y and Q. A weight is at most ‖w_j‖ in size, which M must not be below. What
is summed on the way to K' (x_R C, before x_B is added) has at most the norm of the whole, and an
attention output is a mean of values.

This is about dtypes of short range: float16 has M = 65504, the others 10³⁸. Its other end, values
below the smallest normal one, is a matter of noise: see ``predict_noise``.

Assumptions: as there, inputs of uncorrelated features. No bound from the weights alone could hold
for all inputs: with every x_i at M any sum overflows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bda_fx.passes.predict_noise import Moments, PartnerHeads
from bda_fx.passes.read_weights import SiteWeights

PEAK = 500.0
"""Largest value of a feature over its RMS size. Channels of language models that stand out have
some hundred times the size of others (Dettmers et al. 2022: up to 150 times); a normal variable of
100 times the size reaches 500 once in a million."""


def keeps_range(
    weights: SiteWeights, moments: Moments, s: Tensor, s_inv: Tensor, dtype: torch.dtype
) -> bool:
    """Whether the factors of a site stay within ``dtype``'s range where the original's do.

    ``s`` and ``s_inv`` [G, D, D]. Cost O(G D³ + H D²).
    """
    largest = torch.finfo(dtype).max
    own = PartnerHeads(weights.heads.mT, weights.bias, torch.arange(len(weights.heads)))
    sides = (
        (moments.key, [own, *weights.fellows], s_inv),
        (moments.query, weights.partners, s.mT),
    )
    for moment, factors, turn in sides:
        now, norm = _reach(moment, factors, turn)
        if not norm <= largest:  # nan is not either
            return False
        if not now <= max(largest, PEAK):
            was, _ = _reach(moment, factors, torch.eye(s.shape[1], dtype=s.dtype).expand_as(s))
            if not now <= was:
                return False
    return True


def _reach(moment: Tensor, factors: Sequence[PartnerHeads], turn: Tensor) -> tuple[float, float]:
    """The largest reach of a feature and the largest norm of its weights, turned by ``turn``.

    ``moment`` [G, D, D] sums over all ``factors`` and their biases, so that the norm is an upper
    bound where several meet a head.
    """
    weights, shift = moment, 0.0
    for factor in factors:
        if factor.bias is not None:
            bias = factor.bias.double().unsqueeze(1)
            weights = weights.index_add(0, factor.groups, bias.mT @ bias, alpha=-1)
            shift = max(shift, float((bias @ turn[factor.groups]).abs().max()))
    energies = (turn.mT @ weights @ turn).diagonal(dim1=1, dim2=2).clamp_min(0)
    norm = float(energies.max().sqrt())
    return shift + PEAK * norm, norm
