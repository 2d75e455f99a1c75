"""The confidence interval of a noise ratio: quantiles against tables, coverage by simulation."""

from __future__ import annotations

import math

import pytest
import torch

from bda_fx.noise_interval import CONFIDENCE, noise_interval, student_t


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281), (30, 2.0423)],
)
def test_students_t(freedom: int, quantile: float) -> None:
    """Tabulated to four decimals; half a unit in the last place."""
    assert abs(student_t(CONFIDENCE, freedom) - quantile) <= 0.5e-4


def test_many_degrees_of_freedom_are_normal() -> None:
    """The step to the normal quantile is small: t/z − 1 = (z² + 1) / (4 n) to first order."""
    just_below, above = student_t(CONFIDENCE, 1000), student_t(CONFIDENCE, 1001)
    assert 0 < just_below / above - 1 < 1.3 * (above**2 + 1) / 4000


@pytest.mark.parametrize("samples", [2, 5, 20])
def test_coverage(samples: int) -> None:
    """The true ratio lies in 95 % of the intervals, less three binomial standard deviations.

    Energies share a factor per input, as the errors of two models on one input do. Neither it nor
    their own part is normal, as Student's t assumes; for that 1.5 % are allowed.
    """
    random = torch.Generator().manual_seed(0)
    trials, ratio, hits = 2000, 1.5, 0
    for _ in range(trials):
        common = torch.randn(samples, generator=random, dtype=torch.float64).mul(0.5).exp()
        own = 0.5 + torch.rand(2, samples, generator=random, dtype=torch.float64)
        interval = noise_interval(ratio**2 * common * own[0], common * own[1])
        assert interval is not None
        hits += interval[0] <= ratio <= interval[1]
    slack = 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / trials) + 0.015
    assert hits / trials >= CONFIDENCE - slack


def test_no_interval_without_two_samples_or_without_noise() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert noise_interval(one, one) is None
    assert noise_interval(two, torch.zeros(2)) is None
    assert noise_interval(torch.tensor([1.0, math.inf]), two) is None
    assert noise_interval(torch.tensor([1.0, 0.0]), two) == (0.0, math.inf)


def test_what_varies_together_does_not_widen_it() -> None:
    energies = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    assert noise_interval(4 * energies, energies) == pytest.approx((2.0, 2.0))
