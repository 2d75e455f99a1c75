"""Plans: the ladder of sizes, the budget, sharing a basis, and what cannot be decomposed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bda_fx.passes.find_folds import find_folds
from bda_fx.passes.find_sites import find_sites
from bda_fx.passes.plan_sites import CHANCE, LADDER, USUAL_SHARE, Planning, plan_sites
from bda_fx.passes.read_weights import constants_of, extract_constants
from bda_fx.passes.sites import Plan, Reason
from tests.passes.test_find_folds import Latent
from tests.programs import Attention, B, D, FusedAttention, S, canonical, randn


def plan(model: nn.Module, **options: Any) -> Plan:
    width = next(model.children()).in_features
    program = canonical(model, randn(B, S, width))
    found = find_sites(program)
    constants = extract_constants(program, constants_of(found.sites))
    values = constants.evaluate(program.tensors)
    return plan_sites(found, values, Planning(**options), find_folds(program, found))


def test_auto_takes_the_largest_size_within_the_budget() -> None:
    model = Attention(head_dim=16, embed=48)
    by_size = {size: plan(model, basis_size=size).sites[0].noise for size in LADDER}
    limit = by_size[LADDER[4]] * 1.0001
    budget = CHANCE * (1 + USUAL_SHARE * (limit**2 - 1)) ** 0.5
    expected = max(size for size in LADDER if by_size[size] <= limit)
    chosen = plan(model, noise_budget=budget).sites[0]
    assert chosen.size == int(16 * expected)
    assert chosen.noise <= limit


def test_a_larger_budget_never_saves_less() -> None:
    model = Attention(head_dim=16, embed=48)
    sizes = [
        [site.size for site in plan(model, noise_budget=budget).sites] for budget in (1.5, 2, 4, 99)
    ]
    totals = [sum(row) for row in sizes]
    assert totals == sorted(totals)


@pytest.mark.parametrize("budget", [1.01, 1.5, 2.0, 99.0])
@pytest.mark.parametrize("basis", ["pivot", "window"])
def test_the_same_plan_where_nobody_is_told_of_alternatives(budget: float, basis: str) -> None:
    model = Attention(head_dim=16, embed=48)
    told, untold = (
        plan(model, noise_budget=budget, basis=basis, alternatives=wanted)
        for wanted in (True, False)
    )
    assert [replace(site, alternatives=()) for site in untold.sites] == [
        replace(site, alternatives=()) for site in told.sites
    ]
    assert untold.skips == told.skips
    assert all(site.alternatives for site in told.sites)
    if budget == 99.0:  # then the first step is taken everywhere, and no other is weighed
        assert [site.alternatives for site in untold.sites] == [(), ()]


@pytest.mark.parametrize(("size", "expected"), [("full", D), (0.5, D // 2), (1e-6, 1)])
def test_an_explicit_size_is_taken_whatever_the_budget(size: Any, expected: int) -> None:
    sites = plan(Attention(), basis_size=size, noise_budget=1.0).sites
    assert [site.size for site in sites] == [expected, expected]


def test_a_budget_that_nothing_meets_says_how_close_it_came() -> None:
    """Pivoted rows of half the size would: there noise is 0.98."""
    skips = plan(Attention(), basis="first", noise_budget=1.0).skips
    assert {skip.reason for skip in skips} == {Reason.TOO_NOISY}
    assert all("at best" in skip.detail for skip in skips)


@pytest.mark.parametrize("product", ["qk", "vo"])
def test_only_the_products_asked_for(product: str) -> None:
    result = plan(Attention(), basis_size="full", products=(product,))
    assert [site.site.product for site in result.sites] == [product]
    assert [skip.reason for skip in result.skips] == [Reason.NOT_REQUESTED]


def test_a_free_gather_is_worth_one_basis_for_both() -> None:
    result = plan(Latent(), basis_size="full")
    assert len({site.basis for site in result.sites}) == 1
    assert [fold.basis for fold in result.folds] == [result.sites[0].basis]


def test_slices_are_pivoted_where_the_gather_is_free() -> None:
    """One site on a basis of its own, or K and V of other sizes, need a gather: windows there."""
    free = plan(Latent(), basis="slices", basis_size="full")
    assert {site.strategy for site in free.sites} == {"pivot"}
    assert len(free.folds) == 1
    elsewhere = plan(Attention(), basis="slices", basis_size="full")
    assert {site.strategy for site in elsewhere.sites} == {"window"}
    for site in elsewhere.sites:
        assert site.rows == tuple(range(site.rows[0], site.rows[0] + site.size))
    from_q = plan(Latent(), basis="slices", basis_size="full", side="qo")
    assert {site.strategy for site in from_q.sites} == {"window"}


@pytest.mark.parametrize(("keep", "left"), [("k.weight", "vo"), ("[kv].*", None), ("q*", "qk vo")])
def test_kept_weights(keep: str, left: str | None) -> None:
    result = plan(Attention(), keep=(keep,), basis_size="full")
    assert " ".join(site.site.product for site in result.sites) == (left or "")
    kept = [skip for skip in result.skips if skip.reason is Reason.NOT_REQUESTED]
    assert len(kept) == 2 - len(result.sites)
    assert all(skip.detail == f"keep={keep!r}" for skip in kept)


def test_separate_linears_have_bases_of_their_own() -> None:
    result = plan(Attention(), basis_size="full")
    assert len({site.basis for site in result.sites}) == 2
    assert result.folds == ()


def test_one_linear_shares_a_basis_only_within_the_budget() -> None:
    quiet = plan(FusedAttention(), basis_size="full", noise_budget=1e9)
    noisy = plan(FusedAttention(), basis_size="full", noise_budget=1.0)
    assert len({site.basis for site in quiet.sites}) == 1
    assert len({site.basis for site in noisy.sites}) == 2


def test_the_plan_reports_condition_and_noise() -> None:
    for site in plan(Attention(), basis_size="full").sites:
        assert site.condition >= 1
        assert site.worst_head_noise >= site.noise > 0
        assert len(site.rows) == site.size
        assert list(site.rows) == sorted(set(site.rows))


def test_a_pruned_head_is_no_obstacle() -> None:
    model = Attention()
    with torch.no_grad():
        model.k.weight[D : 2 * D] = 0
        model.k.bias[D : 2 * D] = 0
    assert len(plan(model, basis_size="full").sites) == 2
