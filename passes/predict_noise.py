"""Predict what a change of basis costs in rounding noise, from the weights alone.

Both factors of a product are rounded, so feature j of each carries noise of its own RMS size, that
the other factor multiplies. With white inputs E[K_j²] = ‖W[:, j]‖² + b_j² (likewise for Q; for an
output weight ‖O[j, :]‖²). In units of u² (one rounding of a value of size 1), summed over features,

    original    Σ_j k_j q_j (ρ(E) + ρ(n))                          k = E[K²],   q = E[Q²]
    rewritten   Σ_j κ_j p_j ρ(n)                      Q' = Q Sᵀ,   κ = E[K'²],  p = E[Q'²]
              + Σ_j c_j p_j ρ(E - r) + Σ_{j<r} κ_j p_j            x_R C, and x_B added to it
              + Σ_j c_j d_j(Q') + Σ_j p_j d_j(K')                  C and U Sᵀ, rounded to weights

where c = κ - 1 in the r features that have x_B added (κ elsewhere), and ρ(m) = 1 + a(m) for a sum
of m products: a = 0 where the sum is kept in float32 and rounded once (float16, bfloat16); where it
is kept in the dtype itself, every partial sum is rounded too (``partial_roundings``). The *noise*
of a site is the root of rewritten over original: a ratio to the product's own rounding noise, not
an absolute error.

d_j is what an error in feature j does to the product. Rounded to nearest it is p_j (or κ_j);
rounded with feedback (``round_weights``) it is the part of the other factor's feature j that the
features rounded after it cannot make up for: its conditional variance given those. The original's
weights are what they are, so they have no such term.

A value below the dtype's smallest normal one t is rounded as t is: where the *square* of a rounded
value is meant above, it is e + t² (for feature j of a weight c_j + n t² with n elements). So what
float16 loses to underflow is noise like any other.

**Weights rounded to a quantised grid afterwards** (``optimize_for``). Its step is far above that of
the dtype, so the weights are all that is noisy, the original's too, rounded to nearest:

    original    Σ_j ĥ(k)_j q_j + k_j ĥ(q)_j            rewritten   Σ_j ĥ(c)_j p_j + κ_j ĥ(p)_j

up to one factor. In fp8 (relative steps) ĥ(c)_j = c_j. In int8 a row of the weight shares a step in
proportion to its largest value: ĥ(c)_j = c_j where rows make features, and the largest of all
c_j where the features are columns (output projections), as one large feature coarsens the others.
Biases are counted in with the weights, though they are not quantised: an upper estimate.

Features that have no basis row are free to be chosen (see ``change_basis``), so S may have p_j κ_j
below the original's: noise under 1 is possible.

Assumptions: inputs white (their scales and correlations cancel only in part) and roundings
independent. Measured over predicted, on white inputs and ten K and V of MiniLM-L6 and rxnfp
with D and 7/8 D rows (noise 1.8 … 7.4, weights made by ``transform_weights``): 0.95 … 1.03 in
float16 and bfloat16, 0.93 … 1.13 in float32, where a GEMM's runs are not all equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bda_fx.passes.measure_sums import longest_run
from bda_fx.passes.observe_noise import Observed, Rounded, observed_energies, rounded_by

SAFE_SQUARE = 1e-24
"""‖u‖² of the largest partner feature above which its products can be summed in float32: what
vanishes there is below 1e-7 of ‖u‖. Far smaller weights are read in float64."""
DAMPING = 1e-6
"""Added to a Hessian's diagonal as a share of its mean: directions that the other factor never
reads would otherwise take up errors without bound."""
MORE_DAMPING = 6
"""How often it is made a hundred times more for a head whose Hessian is not positive even so: a
badly conditioned S magnifies what rounding made of the moments."""


@dataclass(frozen=True)
class PartnerHeads:
    """The other factor, features first: ``weight`` [H, D, n], ``bias`` [H, D], ``groups`` [H].

    ``terms``: how many products a feature is the sum of, 0 for what is not computed by a linear
    (constants, attention outputs).
    """

    weight: Tensor
    bias: Tensor | None
    groups: Tensor
    terms: int = 0
    observed: Observed | None = None


@dataclass(frozen=True)
class Moments:
    """What the noise of a product depends on besides S, worked out once for several bases.

    ``key`` [G, D, D]: WᵀW + b bᵀ; ``query`` [G, D, D]: the sum of U Uᵀ + a aᵀ over the heads
    served; float64. ``key_terms``: products that a decomposed feature is the sum of;
    ``query_partials``: the ``partial_roundings`` of the others, in the mean.
    ``inputs``: whether the decomposed features are computed from basis inputs (K and V, Q), not
    read by an output projection. ``rounded``: what a run of the program showed, if there was one.
    """

    key: Tensor
    query: Tensor
    key_terms: int
    query_partials: float
    inputs: bool = True
    key_weights: int = 0
    query_weights: float = 0.0
    rounded: tuple[Rounded, ...] = ()

    def turned(self, s: Tensor, s_inv: Tensor) -> tuple[Tensor, Tensor]:
        """E[K'ᵀK'] and E[Q'ᵀQ'] after the change of basis ``s`` [G, D, D]."""
        return s_inv.mT @ self.key @ s_inv, s @ self.query @ s.mT

    def balancing(self, wanted: bool) -> tuple[Tensor, Tensor] | None:
        """What ``change_basis`` is told of both factors, if the other one is to have a say."""
        return (self.key, self.query) if wanted else None


@dataclass(frozen=True)
class Noise:
    """``site`` and ``worst`` head: amplification of the rounding noise, 1 = as the original."""

    site: float
    worst: float


def keeps_sums_wide(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are summed in a wider one and rounded once."""
    return dtype in (torch.float16, torch.bfloat16)


def partial_roundings(terms: float) -> float:
    """a(m): variance of the rounding of partial sums, over that of one rounding of the sum.

    Partial sum i of a run of m has i / m of the energy, so that they add up to m / 2. Sums
    longer than this machine's runs are cut into equal ones. Measured over this: 0.9 … 1.06 for 32
    to 4,096 terms. One token alone (a GEMV) has other runs, mostly shorter.
    """
    return terms / (2 * max(1, math.ceil(terms / longest_run())))


def second_moments(
    heads: Tensor,
    bias: Tensor | None,
    partners: Sequence[PartnerHeads],
    fellows: Sequence[PartnerHeads] = (),
    *,
    inputs: bool = True,
    observed: Observed | None = None,
) -> Moments:
    """Moments of a site: ``heads`` [G, E, D] and ``bias`` [G, D] of the projection.

    ``partners`` meet its features; ``fellows`` meet the partners too and turn along. ``observed``:
    what a run showed of the heads, of use only where it showed every factor. Cost
    O((G E + H n) D²).
    """
    wide = heads.double()
    gram = wide.mT @ wide
    key = _add_outer(gram, bias)
    query = torch.zeros_like(key)
    met: list[tuple[PartnerHeads, Tensor, bool]] = []
    for along, total, factors in ((True, key, fellows), (False, query, partners)):
        for factor in factors:
            met.append((factor, _partner_gram(factor.weight), along))
            total.index_add_(0, factor.groups, _add_outer(met[-1][1], factor.bias))
    sizes = [float(_diagonals(square).sum()) for _, square, along in met if not along]
    partials = sum(
        size * partial_roundings(p.terms) for size, p in zip(sizes, partners, strict=True)
    )
    rounded: tuple[Rounded, ...] = ()
    if observed is not None and all(factor.observed is not None for factor, _, _ in met):
        own = PartnerHeads(wide.mT, bias, torch.arange(len(wide)), observed=observed)
        rounded = (
            *_rounded(own, gram, computed=inputs, along=True, decomposed=True),
            *(
                part
                for factor, square, along in met
                for part in _rounded(factor, square, computed=factor.terms > 0, along=along)
            ),
        )
    return Moments(
        key,
        query,
        heads.shape[1] if inputs else 0,
        partials / sum(sizes) if sum(sizes) > 0 else 0.0,
        inputs,
        heads.shape[1],
        sum(p.weight.shape[0] * p.weight.shape[2] for p in partners) / max(len(heads), 1),
        rounded,
    )


def _partner_gram(weight: Tensor) -> Tensor:
    """U Uᵀ [H, D, D] of ``weight`` [H, D, n], the larger part of the work.

    Products of half-precision weights are exact in float32 unless they leave its range, and sums of
    them are right to 1e-6: enough for what depends on this, noise and what ``change_basis`` is free
    to choose.
    """
    if keeps_sums_wide(weight.dtype):
        single = weight.float()
        gram = (single @ single.mT).double()
        if gram.max() > SAFE_SQUARE:
            return gram
    wide = weight.double()
    return wide @ wide.mT


def _rounded(
    factor: PartnerHeads, gram: Tensor, *, computed: bool, along: bool, decomposed: bool = False
) -> tuple[Rounded, Rounded]:
    assert factor.observed is not None
    return rounded_by(
        factor.observed,
        gram,
        factor.weight.shape[2],
        factor.groups,
        computed=computed,
        along=along,
        decomposed=decomposed,
    )


def predict_noise(
    moments: Moments,
    s: Tensor,
    s_inv: Tensor,
    size: int,
    dtype: torch.dtype,
    optimize_for: str | None = None,
) -> Noise:
    """Noise of the change of basis ``s`` [G, D, D] with ``size`` basis features, in ``dtype``.

    ``optimize_for``: "int8" or "fp8" for the noise of weights that are quantised afterwards. A head
    without energy counts as 1. O(G D³), whatever the number of inputs.
    """
    key, query = moments.turned(s, s_inv)
    if optimize_for is not None:
        was, now = _quantisation_energies(moments, key, query, size, optimize_for)
    elif moments.rounded:
        was, now = _observed_energies(moments, key, query, s, s_inv, size, dtype)
    else:
        was, now = _noise_energies(moments, key, query, size, dtype)
    if not float(was.sum()) > 0:
        return Noise(1.0, 1.0)
    ratios = torch.where(was > 0, now / was, 1.0).sqrt()
    return Noise(float((now.sum() / was.sum()).sqrt()), float(ratios.max()))


def _noise_energies(
    moments: Moments, key: Tensor, query: Tensor, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sums of the module docstring for every head, [G] each, from the turned moments."""
    wide = keeps_sums_wide(dtype)
    rate = 0.0 if wide else 1.0
    k, q, kappa, p = map(_diagonals, (moments.key, moments.query, key, query))
    queries = 1 + rate * moments.query_partials
    was = (k * q * (1 + rate * partial_roundings(moments.key_terms) + queries)).sum(1)
    coefficients = _without_identity(kappa, size)
    now = kappa * p * queries
    if moments.inputs:
        now += coefficients * p * (1 + rate * partial_roundings(max(moments.key_terms - size, 0)))
        now[:, :size] += (kappa * p)[:, :size]
    else:
        now += kappa * p
    alone_k, alone_q = _alone(key, query, size) if wide else (kappa, p)
    now += coefficients * alone_q + p * alone_k
    floor = torch.where(was > 0, torch.finfo(dtype).smallest_normal ** 2, 0.0)
    was += floor * (k + q).sum(1)
    elements = (moments.key_weights - size) * p + moments.query_weights * kappa
    return was, now.sum(1) + floor * (kappa + p + elements).sum(1)


def _observed_energies(
    moments: Moments,
    key: Tensor,
    query: Tensor,
    s: Tensor,
    s_inv: Tensor,
    size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same from what a run showed (see ``observe_noise``)."""
    wide = keeps_sums_wide(dtype)
    heard = (torch.ones_like(s[:, 0]),) * 2
    if wide:
        alone_k, alone_q = _alone(key, query, size)
        kappa, p = _diagonals(key), _diagonals(query)
        heard = (
            torch.where(p > 0, alone_q / p, 1.0),
            torch.where(kappa > 0, alone_k / kappa, 1.0),
        )
    partials = [(0.0, 0.0)] * len(moments.rounded)
    if not wide:
        partials = [
            (
                partial_roundings(part.terms),
                partial_roundings(part.terms - (size if part.decomposed else 0)),
            )
            for part in moments.rounded
        ]
    smallest = torch.finfo(dtype).smallest_normal
    return observed_energies(moments.rounded, s, s_inv, size, heard, partials, smallest)


def _alone(key: Tensor, query: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What rounding with feedback leaves of an error in a feature of Q' and of K', [G, D] each:
    the conditional variances of K' and of Q'."""
    kappa, p = _diagonals(key), _diagonals(query)
    coefficients = _without_identity(kappa, size)
    alone_q = conditional_variances(query, rounding_order(coefficients, p))
    return conditional_variances(key, rounding_order(p, kappa)), alone_q


def _quantisation_energies(
    moments: Moments, key: Tensor, query: Tensor, size: int, grid: str
) -> tuple[Tensor, Tensor]:
    """The same for weights on a quantised grid."""
    k, q, kappa, p = map(_diagonals, (moments.key, moments.query, key, query))

    def steps(energies: Tensor, rows: bool) -> Tensor:
        return energies if grid == "fp8" or rows else energies.max().expand_as(energies)

    by_rows = moments.inputs, moments.query_partials > 0
    was = steps(k, by_rows[0]) * q + k * steps(q, by_rows[1])
    now = steps(_without_identity(kappa, size), by_rows[0]) * p + kappa * steps(p, by_rows[1])
    return was.sum(1), now.sum(1)


def _without_identity(energies: Tensor, size: int) -> Tensor:
    """Energies of the coefficients: the first ``size`` features have an input added as it is."""
    coefficients = energies.clone()
    coefficients[:, :size] = (coefficients[:, :size] - 1).clamp_min(0)
    return coefficients


def rounding_order(steps: Tensor, weights: Tensor) -> Tensor:
    """Order in which D features are rounded, [G, D]: the one that would cost most goes first.

    ``steps`` [G, D]: mean squares of the values (their rounding errors are proportional);
    ``weights`` [G, D]: what the product makes of an error.
    """
    return (steps * weights).argsort(dim=1, descending=True, stable=True)


def conditional_variances(hessian: Tensor, order: Tensor) -> Tensor:
    """Variance of each feature given all that come after it in ``order``, [G, D].

    At most its own: what is damped would else have some where there is none, in a zero head.
    """
    factor = feedback_factor(hessian, order)
    alone = torch.empty_like(order, dtype=hessian.dtype)
    alone.scatter_(1, order, _diagonals(factor).square().reciprocal())
    return alone.minimum(_diagonals(hessian))


def feedback_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of ``hessian`` [G, D, D] in ``order``.

    Row j, over its diagonal, says how later features make up for an error in feature j.
    """
    size = hessian.shape[1]
    sorted_rows = hessian.gather(1, order.unsqueeze(2).expand(-1, -1, size))
    ordered = sorted_rows.gather(2, order.unsqueeze(1).expand(-1, size, -1))
    damping = DAMPING * _diagonals(ordered).mean(1)
    damping = torch.where(damping > 0, damping, 1.0)
    ordered = ordered + torch.diag_embed(damping.unsqueeze(1).expand(-1, size))
    # The inverse's factor from that of the matrix in reverse: H = V Vᵀ with V upper, V⁻¹ᵀ lower.
    flipped, failed = torch.linalg.cholesky_ex(ordered.flip(1, 2))
    for _ in range(MORE_DAMPING):
        if not failed.any():
            break
        damping = torch.where(failed > 0, 100 * damping, 0.0)
        ordered = ordered + torch.diag_embed(damping.unsqueeze(1).expand(-1, size))
        flipped, failed = torch.linalg.cholesky_ex(ordered.flip(1, 2))
    if failed.any():
        raise ValueError("the moments of a factor are not finite: its noise cannot be foretold")
    upper = flipped.flip(1, 2)
    eye = torch.eye(size, dtype=hessian.dtype, device=hessian.device).expand_as(upper)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


def _add_outer(gram: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return gram
    return gram + bias.double().unsqueeze(2) * bias.double().unsqueeze(1)


def _diagonals(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)
