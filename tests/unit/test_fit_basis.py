"""fit_basis: the largest size within the budget, as trying every size in full would find it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bda_fx.passes.change_basis import change_basis, complete_basis
from bda_fx.passes.choose_basis import STRATEGIES, BasisSearch, choose_basis
from bda_fx.passes.fit_basis import MAX_RESIDUAL, Fit, Misfit, fit_basis
from bda_fx.passes.predict_noise import (
    PartnerHeads,
    predict_noise,
    predict_noise_of,
    second_moments,
)
from bda_fx.passes.read_weights import SiteWeights
from tests.tolerances import FLOAT64_SEARCH
from tests.unit.real_weights import MODELS, projections

G, H, E, D = 4, 8, 60, 12
SIZES = (12, 11, 10, 9, 7, 6)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def site(seed: int = 0, *, biased: bool = True) -> SiteWeights:
    partner = PartnerHeads(
        randn(H, D, E, seed=seed + 1),
        randn(H, D, seed=seed + 2) if biased else None,
        torch.arange(H) // (H // G),
    )
    bias = randn(G, D, seed=seed + 3) if biased else None
    return SiteWeights(randn(G, E, D, seed=seed), bias, [partner])


def tried_in_full(weights: list[SiteWeights], strategy: str, budget: float | None) -> Tensor | None:
    heads = torch.cat([w.heads for w in weights])
    for size in SIZES:
        rows = choose_basis(heads, size, strategy)
        changes = [change_basis(w.heads, rows, w.bias) for w in weights]
        noise = [
            predict_noise(w.heads, w.bias, change, w.partners)[0]
            for w, change in zip(weights, changes, strict=True)
        ]
        exact = all(change.residual <= MAX_RESIDUAL for change in changes)
        if exact and (budget is None or max(noise) <= budget):
            return rows
    return None


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [6, 10, 12])
def test_noise_from_moments_is_the_noise_of_the_change(size: int, biased: bool) -> None:
    weights = site(biased=biased)
    rows = choose_basis(weights.heads, size, "pivot")
    change = change_basis(weights.heads, rows, weights.bias)
    s, condition = complete_basis(weights.heads, rows, weights.bias)
    assert torch.equal(s, change.s)
    assert condition == pytest.approx(change.condition, rel=FLOAT64_SEARCH)
    moments = second_moments(weights.heads, weights.bias, weights.partners)
    expected = predict_noise(weights.heads, weights.bias, change, weights.partners)
    assert predict_noise_of(moments, s) == pytest.approx(expected, rel=FLOAT64_SEARCH)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", [1.3, 1.6, 2.0, 4.0, None])
@pytest.mark.parametrize("seeds", [(0,), (4,), (0, 4)])
def test_skipping_hopeless_sizes_changes_nothing(
    strategy: str, budget: float | None, seeds: tuple[int, ...]
) -> None:
    weights = [site(seed) for seed in seeds]
    expected = tried_in_full(weights, strategy, budget)
    found = fit_basis(weights, SIZES, strategy, budget)
    if expected is None:
        assert isinstance(found, Misfit)
        return
    assert not isinstance(found, Misfit)
    assert all(torch.equal(fit.rows, expected) for fit in found)
    assert len(found) == len(weights)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [1.5, 2.0, 3.0])
def test_skipping_hopeless_sizes_changes_nothing_on_real_weights(model: str, budget: float) -> None:
    for projection in projections(model)[:6]:
        heads = projection.heads.double()
        partner = PartnerHeads(
            projection.partner, projection.partner_bias, torch.arange(len(heads))
        )
        weights = SiteWeights(heads, projection.bias.double(), [partner])
        d = heads.shape[2]
        sizes = [d, d * 15 // 16, d * 7 // 8, d * 3 // 4, d // 2]
        found = fit_basis([weights], sizes, "pivot", budget)
        taken = 0 if isinstance(found, Misfit) else len(found[0].rows)
        larger = [size for size in sizes if size > taken]
        for size in larger:
            change = change_basis(heads, choose_basis(heads, size, "pivot"), weights.bias)
            assert predict_noise(heads, weights.bias, change, weights.partners)[0] > budget


def test_a_budget_that_nothing_meets_tells_the_least_noise() -> None:
    found = fit_basis([site()], SIZES, "pivot", 1.0)
    assert isinstance(found, Misfit)
    smallest = fit_basis([site()], SIZES[-1:], "pivot", None)
    assert not isinstance(smallest, Misfit)
    assert found.noise == pytest.approx(smallest[0].noise, rel=FLOAT64_SEARCH)


def test_low_rank_heads_are_judged_by_the_residual() -> None:
    weights = site(biased=False)
    weights.heads[1] = 0
    weights.heads[2, :, 4:] = 0
    found = fit_basis([weights], (8,), "pivot", None)
    assert not isinstance(found, Misfit)
    assert isinstance(found[0], Fit)
    assert found[0].residual <= MAX_RESIDUAL
    missing = fit_basis([weights], (2,), "first", None)
    weights.heads[:, :2] = 0  # the first rows span nothing, and the null space has no room
    lost = fit_basis([weights], (2,), "first", None)
    assert not isinstance(missing, Misfit)
    assert isinstance(lost, Misfit)
    assert lost.residual > MAX_RESIDUAL


def test_sizes_share_one_search() -> None:
    heads = site().heads
    search = BasisSearch(heads, "pivot")
    for size in SIZES:
        assert torch.equal(search.rows(size), choose_basis(heads, size, "pivot"))
        assert len(search.first_rows(size)) == size
