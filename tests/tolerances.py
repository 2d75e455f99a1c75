"""Every tolerance of the tests, with its derivation. None is an absolute number picked to pass."""

from __future__ import annotations

import torch

EPS64 = 2.0**-52
"""Spacing of float64 at 1; a rounding is off by half of it at most."""

FLOAT64_IDENTITY = 1e-14
"""Relative error of an identity in float64, per unit of condition number. Backward-stable solves
and products with inner size n err by about √n eps in norm (random signs; n eps at worst). For the
sizes tested, n ≤ 128, √n eps = 2.5e-15; four such steps (solve, two transforms, product)."""

FLOAT64_SEARCH = 1e-6
"""Relative error of Σ_g J_g between two ways to compute it. The Gram matrix is rounded to √n eps =
1e-15 against its smallest eigenvalue, which is above 1e-5 on the bases compared (J < 1e4 there),
and δ = 1e-12 shifts it by 1e-7: ten times the larger."""

EXCHANGE_TO_BEST = 2.0
"""Σ_g J_g of the pivoted basis over that of the best subset, found by brute force. There is no
useful bound for one-row exchanges; measured on 300 random problems with E ≤ 10 the worst ratio was
1.82 and the mean 1.04 (√ of it in noise: 1.35 and 1.02)."""

PARTIAL_ROUNDINGS = 1.6
"""Factor between the rounding of partial sums in float32 and ``partial_roundings``, either way: how
a GEMM cuts a sum into runs is its own affair. Two runs of half of ``RUN`` + 1 would give a ratio of
1/2; 0.66 (at 256 terms, two runs of 128) … 1.11 measured with MKL, 1 / 0.66 = 1.52, and some per
cent from the sampling."""

NOISE_PREDICTION: dict[torch.dtype, float] = {
    torch.float32: PARTIAL_ROUNDINGS**0.5,
    torch.float16: 1.1,
    torch.bfloat16: 1.1,
}
"""Factor between measured and predicted noise of a site, either way. In float32 the sums of the
original and of the rewrite may be off by ``PARTIAL_ROUNDINGS`` against each other, of which noise
is the root: 0.93 … 1.13 measured. Where sums are rounded once, the sampling is left: 0.95 … 1.03
measured with 200 tokens, 1 / √(2 × 200) = 0.05 a norm, twice that."""

QUANTISED_NOISE_PREDICTION = 1.45
"""The same for weights quantised afterwards. Where features share a step it is predicted from the
one of largest RMS size, though the largest element may be that of another: 0.71 … 0.76 measured
with int8 output projections, 1 / 0.71 = 1.41; 0.88 … 1.12 elsewhere."""


def identity(condition: float) -> float:
    """Bound on the relative error of a float64 identity that goes through S of this condition."""
    return FLOAT64_IDENTITY * condition


SOFTMAX_GAIN = 10.0
"""Relative error of a rewritten attention in float64 over that of its products. The softmax turns
an absolute error d of the scores into a relative error of its weights of at most 2 d, and the
scores of the test programs stay within 5 in size."""


def program(conditions: list[float]) -> float:
    """Bound on the relative error in float64 of a program rewritten at sites of these conditions.

    Errors of sites add up. A program without sites is the original: no error at all.
    """
    return SOFTMAX_GAIN * sum(identity(condition) for condition in conditions)


FLOAT64_PIVOT = 1e-12
"""Relative error in float64 of a whole model rewritten on pivoted bases. Their conditions stay
below 100 at the sizes tested, so this is ``identity(100)``; it is the promise made to users."""


def model(condition: float) -> float:
    """The same for any basis, from the largest condition of the model's sites."""
    return identity(condition)


NOISE_RATIO: dict[object, dict[torch.dtype, float]] = {
    "full": {torch.float32: 2.0, torch.float16: 2.0, torch.bfloat16: 2.0},
    15 / 16: {torch.float32: 1.5, torch.float16: 1.35, torch.bfloat16: 1.35},
}
"""Error of a rewritten model over its own, both against float64, by basis size and dtype. The
promise to users: at most twice the model's own rounding error with a full pivoted basis. One of
15/16 D is better conditioned: 1.2 … 1.3 measured on the same weights before the pass was written
(the design's table; 1.4 in float32), and chance moves a ratio of such norms by a few per cent."""

FLOAT32_MODEL = 1e-5
"""Relative difference in float32 of a tiny model and its rewrite. Each has its own rounding error,
a few times 2⁻²⁴ √E per layer (1e-6 for the 2 layers of width 32 tested), and the rewrite may have
twice as much; three times the sum. A wrong weight gives 1e-2 and more."""

ZIP_END = 256
"""Bytes at the end of a zip file: the end of the central directory in its 32- and 64-bit forms."""


def zip_record(name: int) -> int:
    """Most bytes that a record with a name of this length takes in a torch archive beside its data.

    Local header 30 and central entry 46 (each with the name and up to 28 bytes of 64-bit sizes),
    a data descriptor of 24, and padding that puts the data at a multiple of 64.
    """
    return 30 + 46 + 2 * (name + 28) + 24 + 64 + 4


FLOAT64_FRESH = 1e-9
"""Relative error in float64 of a compiled model after its weights changed. Roundoff is below
``program`` of conditions up to 10⁴, so 1e-9; a weight that was not seen to change is off by more
than ``STALE``."""

STALE = 1e-4
"""What the weight changes of the tests do to the output, at least (asserted): 10⁵ times as much."""

FLOAT32_PRODUCT = 20 * 2.0**-24
"""Relative error between two spellings of one float32 product of inner size 20: each sums 20
terms, in an order of its own, and rounds each partial sum."""


INVISIBLE = 1e-9
"""Relative change of a module's outputs below which a change of basis inserted by hand is called
invisible. The rounding of float64 leaves about 1e-14 times the condition of a random 2 × 2 matrix,
below 1e-12; a real dependence leaves far more than 1e-6."""

FLOAT64_PERPLEXITY_CHANGE = 1e-10
"""Relative error in float64 of a change of the perplexity of 1 % or more: log-likelihoods of size
10 at most, whose mean over 1280 tokens errs by 10 √1280 eps = 8e-14 at worst, over a change of 0.01
is 8e-12; ten times that."""

BOOTSTRAP_WIDTH = 0.05
"""Relative error of the width of a 95 % bootstrap interval of 10,000 resamples for normal data. The
2.5 % quantile of R draws has standard deviation √(p (1 − p) / R) / φ(z) = 0.027 of one, 1.4 % of
z = 1.96; the two ends together 1 %. Five times that."""

BOOTSTRAP_BIAS = 0.007
"""Coverage that the bootstrap interval of 64 normal blocks lacks: it is narrower than Student's by
√(63/64) · 1.960/1.998 = 0.973, and 2 Φ(0.973 z) − 1 = 0.943."""


def coverage(trials: int) -> float:
    """Bound on a measured coverage of a 95 % interval: its bias and four binomial deviations."""
    return BOOTSTRAP_BIAS + 4 * (0.95 * 0.05 / trials) ** 0.5


FLOAT64_SECOND_MOMENT = 1e-6
"""Relative error of what pruning costs for inputs of a given second moment. Those of the tests span
10⁴ in size, 10⁸ in M, and the cost is made of the small ones: n eps 10⁸ = 5e-7 at n = 23."""

PRUNED_NOISE = 2.0
"""Rounding error of basis and coefficients over that of two low-rank factors, pivoted rows. In
units of one rounding, a product of factors has √2, the basis' own rows have 1 and a row c P_B of
the others √2 ‖c‖. At r = m / 4 and a mean ‖c‖² of 4.55, as measured on the weight tested:
√((¾ · 2 · 4.55 + ¼) / 2) = 1.88; 1.93 measured in each dtype."""

FLOAT32_LOSS = 1e-5
"""Relative error of a quadratic form in float32 over some thousand errors: n eps at most along one
of D = 69 features (4e-6), and sums of positive terms after that."""

FEEDBACK_LOSS = 1.2
"""Factor between the loss of weights rounded with feedback and u² Σ c d, either way. Few features
make up most of the loss, and the squares of one's 400 rounding errors add up to within 1 / √(400 /
3) = 9 % (kurtosis under 4): two deviations. 0.95 … 1.05 measured over 64 heads."""

NOISE_ESTIMATE, NOISE_ESTIMATE_SCALED = 4.0, 2.0
"""Factor between the noise that ``BasisFits`` estimates and that of the fit, either way: before any
fit (0.27 … 1.54 measured on K and V of MiniLM-L6 and rxnfp with D to D / 2 rows, worst in bfloat16,
as the angles know nothing of biases nor of how loud a head is), and scaled to a fit of 7/8 D (0.67
… 1.51, worst at D)."""

BALANCED_ENERGY = 1.2
"""Most of the orthonormal completion's energy that a head may have with the balanced one. The basis
features come first and the others make the best of what is left, which is not the least sum of all:
1.16 at worst and 0.001 at best over 600 random heads at 4 sizes (worst with one or two spare
directions)."""

SAMPLED_SHARE = 0.15
"""Relative error of a share that is estimated from one random cotangent: the mean of (Jᵀz)² over at
least 800 values, squares that vary by √2 of their mean and count by their energy (kurtosis 3), is
within √(2 · 3 / 800) = 8 % a deviation, partly in numerator and denominator alike."""

SAMPLED_ERRORS = 0.15
"""Relative error of a share where the errors of wide linears are measured in some features. Of
1,024, 85 stand for 939, and what a feature adds varies by about itself: 1 / √85 = 11 % a deviation
of their part, if none of it shows in the energy by which they were taken. The other part is exact,
and so is what the sites and all other ops add. Up to 4 % measured on models."""

SORTED_SAMPLE = 0.01
"""Relative error of a sum of 939 terms in order of which every eleventh is taken from the middle of
its stretch: a midpoint rule with 85 steps, exact but for the curvature of the order, 1 / 85² of its
range, and for the ends."""


FORETOLD_NOISE = 0.15
"""Relative error of a whole model's predicted noise ratio. A pooled output of 24 rows has some 240
independent errors (ten directions of a row carry most), so its energy is within √(2 / 240) = 9 %, a
ratio of two within 13 %, the root of that within 6.5 % a deviation; two deviations, and 2 % for
noise that the prediction leaves out on either side (the inside of attention ops)."""


DEFAULT_BUDGET = 1.4
"""What ``noise_budget="auto"`` promises of a float32 model: its noise over the original's own."""


def float32_sum(terms: int) -> float:
    """Relative error (RMS) of a float32 sum of ``terms`` random products, a basis feature, a bias.

    Each partial sum is rounded, to 2⁻²⁴ / √3 of it at worst, and their squares grow linearly:
    2⁻²⁴ √(n / 6). Twice that, for the few outputs that the tests sample; 0.4 … 1.2 measured. A term
    too many or too few gives 0.1.
    """
    return 2 * 2.0**-24 * ((terms + 2) / 6) ** 0.5


def kernel(dtype: torch.dtype) -> float:
    """Bound on the relative error of the CPU kernel: its sum of at most 257 products in float32 (by
    norm, 0.4 … 6 × 2⁻²⁴ measured), then one rounding."""
    return float32_sum(257) + torch.finfo(dtype).eps / 2


KERNEL_TO_ATEN = 1.1
"""Error of the CPU kernel over that of the plain ATen ops, both against float64. Where 16-bit types
are rounded once instead of twice, 0.75 measured (√½ of equal roundings, and more as ATen's second
is of the larger sum); in float32 both sum runs, 0.85 … 1.0 measured, and chance moves the ratio of
norms over 10⁴ outputs by √(2 / 10⁴) = 1.4 %."""
