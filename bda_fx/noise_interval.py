"""Confidence interval of a noise ratio from independent samples (inputs, or rows of a batch).

Sample i contributes the squared distances c_i (candidate) and r_i (reference) from the truth. The
pooled ratio is q = √(Σc / Σr); leaving each sample out in turn gives q_i, and the jackknife the
standard error of its logarithm

    se² = (n − 1) / n · Σ (log q_i − log q)²

in which what the two models' errors have in common cancels. The interval is q exp(± t se) with
Student's t for n − 1 degrees of freedom: wide where samples are few and, unlike a bootstrap's,
without chance of its own. Simulated coverage is 94 … 96 % where energies of samples differ by
factors of two to three, and falls to 91 % where one in a few has nearly all the energy.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

CONFIDENCE = 0.95


def noise_interval(candidate: Tensor, reference: Tensor) -> tuple[float, float] | None:
    """95 % interval of √(Σ candidate / Σ reference) over n samples [n]; None for less than two."""
    samples = candidate.numel()
    if samples < 2 or not candidate.isfinite().all():
        return None
    total_candidate, total_reference = candidate.sum(), reference.sum()
    if total_candidate == 0 or total_reference == 0:
        return None
    whole = (total_candidate / total_reference).log() / 2
    parts = ((total_candidate - candidate) / (total_reference - reference)).log() / 2
    error = math.sqrt((samples - 1) / samples * float((parts - whole).square().sum()))
    if not math.isfinite(error):  # all the noise is in one sample
        return 0.0, math.inf
    ratio, spread = float(whole.exp()), student_t(CONFIDENCE, samples - 1) * error
    return ratio * math.exp(-spread), ratio * _exp(spread)


def student_t(confidence: float, freedom: int) -> float:
    """The t with P(|T| < t) = ``confidence`` for T of Student's distribution."""
    if freedom > 1000:  # the normal quantile is 0.1 % less there
        return NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, 1.0
    while _student_within(high, freedom) < confidence:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _student_within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def _student_within(t: float, freedom: int) -> float:
    """P(|T| < t): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
