"""BasisFits: fits as choosing rows and changing basis in full give them, and how near estimates
come."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bda_fx.passes.change_basis import change_basis
from bda_fx.passes.choose_basis import STRATEGIES, BasisSearch, choose_basis
from bda_fx.passes.fit_basis import MAX_RESIDUAL, BasisFits
from bda_fx.passes.predict_noise import PartnerHeads, predict_noise
from bda_fx.passes.read_weights import SiteWeights, moments_of
from bda_fx.passes.site_choices import Choice, Step
from bda_fx.passes.spend_budget import spend_budget
from tests.tolerances import FLOAT64_SEARCH, NOISE_ESTIMATE, NOISE_ESTIMATE_SCALED
from tests.unit.real_weights import MODELS, projections

G, H, E, D = 4, 8, 60, 12
SIZES = (12, 11, 10, 9, 7, 6)
BF16 = torch.bfloat16


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def site(seed: int = 0, *, biased: bool = True) -> SiteWeights:
    partner = PartnerHeads(
        randn(H, D, E, seed=seed + 1),
        randn(H, D, seed=seed + 2) if biased else None,
        torch.arange(H) // (H // G),
        E,
    )
    bias = randn(G, D, seed=seed + 3) if biased else None
    return SiteWeights(randn(G, E, D, seed=seed), bias, [partner])


def real(model: str) -> list[SiteWeights]:
    found = []
    for projection in projections(model):
        heads = projection.heads.double()
        terms = projection.partner.shape[2] if projection.product == "qk" else 0
        partner = PartnerHeads(
            projection.partner, projection.partner_bias, torch.arange(len(heads)), terms
        )
        found.append(SiteWeights(heads, projection.bias.double(), [partner]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seeds", [(0,), (0, 4)])
def test_a_fit_is_the_change_of_basis_in_full(
    seeds: tuple[int, ...], strategy: str, balanced: bool, dtype: torch.dtype
) -> None:
    weights = [site(seed) for seed in seeds]
    fits = BasisFits(weights, strategy, dtype, balanced=balanced)
    for size in SIZES:
        rows = choose_basis(torch.cat([w.heads for w in weights]), size, strategy)
        found = fits.fits(size)
        assert fits.noise(size) == [fit.noise for fit in found]
        for w, fit in zip(weights, found, strict=True):
            moments = moments_of(w)
            both = (moments.key, moments.query) if balanced else None
            change = change_basis(w.heads, rows, w.bias, both)
            noise = predict_noise(moments, change.s, change.s_inv, size, dtype)
            assert torch.equal(fit.rows, rows)
            assert fit.exact
            assert fit.noise == pytest.approx(noise.site, rel=FLOAT64_SEARCH)
            assert fit.worst == pytest.approx(noise.worst, rel=FLOAT64_SEARCH)
            assert fit.residual <= MAX_RESIDUAL
    assert fits.known == list(SIZES)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [6, 10, 12])
def test_conditions_are_those_of_the_rows_in_the_basis(size: int, biased: bool) -> None:
    """Up to ``SURE_CONDITION``: what is under them is chosen to be no worse."""
    weights = site(biased=biased)
    fit = BasisFits([weights], "pivot", BF16).fits(size)[0]
    worst = torch.linalg.cond(weights.heads[:, fit.rows]).max()
    assert fit.condition == pytest.approx(float(worst), rel=FLOAT64_SEARCH)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("model", MODELS)
def test_estimates_are_near_what_a_fit_gives(model: str, dtype: torch.dtype) -> None:
    for weights in real(model)[1:7:2]:
        d = weights.heads.shape[2]
        sizes = [d, d * 15 // 16, d * 7 // 8, d * 3 // 4]
        fits = BasisFits([weights], "pivot", dtype)
        rough = [fits.noise(size)[0] for size in sizes]
        assert fits.known == []
        fits.fits(d * 7 // 8)
        scaled = [fits.noise(size)[0] for size in sizes]
        known = [fits.fits(size)[0].noise for size in sizes]
        for estimates, bound in ((rough, NOISE_ESTIMATE), (scaled, NOISE_ESTIMATE_SCALED)):
            for estimate, noise in zip(estimates, known, strict=True):
                assert 1 / bound < estimate / noise < bound


def test_estimates_are_scaled_to_the_last_fit() -> None:
    weights = [site(0), site(4)]
    fits = BasisFits(weights, "pivot", BF16)
    before = fits.noise(9)
    assert before[0] == before[1]  # of one search, so they cannot be told apart
    assert [fit.noise for fit in fits.fits(10)] == fits.noise(10)
    scales = [now / was for now, was in zip(fits.noise(9), before, strict=True)]
    rough_at_10 = BasisFits(weights, "pivot", BF16).noise(10)
    expected = [fit.noise / rough for fit, rough in zip(fits.fits(10), rough_at_10, strict=True)]
    assert scales == pytest.approx(expected)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "pivot"])
def test_other_strategies_have_no_estimates(strategy: str) -> None:
    fits = BasisFits([site()], strategy, BF16)
    noise = fits.noise(9)
    assert fits.known == [9]
    assert noise == [fits.fits(9)[0].noise]


def test_low_rank_heads_are_judged_by_the_residual() -> None:
    weights = site(biased=False)
    weights.heads[1] = 0
    weights.heads[2, :, 4:] = 0
    fits = BasisFits([weights], "pivot", BF16)
    assert fits.fits(8)[0].exact
    assert math.isfinite(fits.noise(8)[0])


def test_a_basis_that_misses_a_direction_is_of_no_use() -> None:
    weights = site(biased=False)
    first = BasisFits([weights], "first", BF16)
    assert first.fits(2)[0].exact
    weights.heads[:, :2] = 0  # the first rows span nothing, and the null space has no room
    lost = BasisFits([weights], "first", BF16)
    assert lost.noise(2) == [math.inf]
    assert not lost.fits(2)[0].exact
    assert lost.fits(2)[0].residual > MAX_RESIDUAL


def test_a_step_that_cannot_be_taken_costs_inf_whatever_the_share() -> None:
    """A share of 0 times an infinite noise is no number, and would be compared as one."""
    weights = site(biased=False)
    weights.heads[:, :2] = 0
    choice = Choice([[]], [[0.0, 0.5]], [Step(0, 2, 1.0)], {}, "first", balanced=False)
    choice._fits[0] = BasisFits([weights], "first", BF16)
    assert choice.costs(0) == [math.inf, math.inf]
    assert choice.costs(1) == [0.0, 0.0]
    for allowance in (0.0, 1.0, math.inf):
        assert spend_budget([choice], allowance) == [1]


def test_sites_that_share_a_basis_are_judged_one_by_one() -> None:
    whole, lost = site(0, biased=False), site(4, biased=False)
    lost.heads[:, :2] = 0
    noise = BasisFits([whole, lost], "first", BF16).noise(2)
    assert math.isfinite(noise[0])
    assert noise[1] == math.inf


def test_sizes_share_one_search() -> None:
    heads = site().heads
    search = BasisSearch(heads, "pivot")
    for size in SIZES:
        assert torch.equal(search.rows(size), choose_basis(heads, size, "pivot"))
        assert len(search.first_rows(size)) == size
