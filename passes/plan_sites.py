"""Plan: which sites to rewrite, from which side, on which basis, within the model's noise budget.

    noise of the model² = 1 + Σ_s share_s (noise_s² - 1)  ≤  budget²

Requires: sites, the values of their weights, and what share of the model's rounding noise each site
has (``estimate_shares`` in the API layer). Leaves: a :class:`Plan`; nothing is changed. A site that
cannot be rewritten as asked becomes a skip with the reason.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from bda_fx.passes.observe_noise import Observed
from bda_fx.passes.predict_noise import keeps_sums_wide
from bda_fx.passes.read_weights import FactorKey, all_finite, constants_of
from bda_fx.passes.side_by_side import side_by_side
from bda_fx.passes.site_choices import Choice, skips_of, steps_of, worthwhile
from bda_fx.passes.sites import IN, OUT, Fold, Found, Plan, Reason, Site, SitePlan
from bda_fx.passes.spend_budget import Weigh, all_alike, noisiest, spend_budget

LADDER = (1.0, 31 / 32, 15 / 16, 29 / 32, 7 / 8, 13 / 16, 3 / 4, 5 / 8, 1 / 2)
"""Fractions of D that ``basis_size="auto"`` tries, largest first."""

BUDGET, BUDGET_OF_LONG_SUMS = 1.25, 1.4
"""``noise_budget="auto"``: where products are summed in a wider dtype and rounded once (float16,
bfloat16), and where they are summed in the dtype itself."""

CHANCE = 1.02
"""Plans stay this far below the budget: rounding errors of the original and of the rewritten model
are two draws, and the ratio of their norms varies by some per cent from input to input."""

USUAL_SHARE = 0.25
"""Share of a model's rounding noise that all of its sites together are taken to have where it is
not estimated. Measured: BERTs with real weights 0.06, fifteen other architectures with random
weights 0.01 … 0.2, a single layer with sharp attention 0.2 … 0.4."""

QUANTISED_SHARE = 0.5
"""The same of the error of quantised weights, which is not that of roundings: a block's attention
has a third of its weights. Models planned with it measure 1.03 … 1.09 where 1.25 is allowed
(MiniLM-L6 and rxnfp, int8 and fp8); planned with half of it, 1.04 … 1.22."""

KEPT_SEARCHES = 256 << 20
"""Bytes that all searches together may keep for the next; beyond, each begins anew: at a model of
28 layers of width 1,024 that would be half of the weights' own memory."""


@dataclass(frozen=True)
class Planning:
    """What the planner is asked for; the meaning of the names is in ``bda_fx.Options``."""

    basis: str = "auto"
    basis_size: str | float = "auto"
    noise_budget: str | float = "auto"
    products: tuple[str, ...] = ("qk", "vo")
    side: str = "auto"
    keep: tuple[str, ...] = ()
    opaque_cache: bool = False
    """Keys and values may be kept by one graph and read by another, so their change of basis must
    depend on their weights alone: each on a basis of its own, whatever else the program has."""
    optimize_for: str | None = None
    headroom: float = 1.0
    """What part of the budget may be spent on these weights; others of the same graph, on the same
    sizes, may need the rest."""
    alternatives: bool = True
    """Whether the steps that are not taken are weighed in any case, to be told of; else only where
    the budget does not allow the first one everywhere."""

    def strategy(self, folded: bool) -> str:
        """How rows are chosen; ``folded``: x can come in basis order at no cost."""
        if self.basis == "slices":
            return "pivot" if folded else "window"
        return "pivot" if self.basis == "auto" else self.basis

    @property
    def enforced(self) -> bool:
        """Whether the budget decides; an explicit size is taken whatever it costs."""
        return self.basis_size == "auto"

    def budget(self, dtypes: Sequence[torch.dtype]) -> float:
        """How noisy a model whose sites have these dtypes may become."""
        if self.noise_budget != "auto":
            return float(self.noise_budget)
        wide = self.optimize_for is not None or any(map(keeps_sums_wide, dtypes))
        return BUDGET if wide else BUDGET_OF_LONG_SUMS

    def allowance(self, dtypes: Sequence[torch.dtype]) -> float:
        """What Σ share (noise² - 1) may come to in a model whose sites have these dtypes."""
        return max((self.budget(dtypes) / CHANCE) ** 2 - 1, 0.0)

    @property
    def usual_share(self) -> float:
        """Share of the noise that all sites are taken to have where it is not estimated."""
        return USUAL_SHARE if self.optimize_for is None else QUANTISED_SHARE

    def sizes(self, site: Site) -> list[int]:
        """Basis sizes to try, largest first."""
        fractions = LADDER if self.enforced else (self.basis_size,)
        limit = min(site.decomposed, site.basis_features)
        sizes = []
        for fraction in fractions:
            part = 1.0 if fraction == "full" else float(fraction)
            sizes.append(max(1, min(limit, int(site.decomposed * part))))
        return list(dict.fromkeys(sizes))


def plan_sites(
    found: Found,
    values: Mapping[str, Tensor],
    planning: Planning,
    folds: Mapping[str, Fold] | None = None,
    shares: Sequence[Sequence[float]] | None = None,
    observed: Mapping[FactorKey, Observed] | None = None,
) -> Plan:
    """Choose a basis for every site of ``found``; ``values`` holds the constants it reads.

    ``folds`` says for which K/V weights the gather of x would be free on one common basis.
    ``shares`` are those of ``found.sites``, for each output of the program. Without them every site
    is held to the same noise, whatever else the program has: then equal weights are planned alike
    in every graph. ``observed``: what a run of the program showed of the sites' factors.
    """
    folds = folds or {}
    skips = list(found.skips)
    wanted: list[tuple[Site, Sequence[float]]] = []
    for at, site in enumerate(found.sites):
        reason, detail = _refusal(site, values, planning)
        if reason is not None:
            skips += skips_of(site, reason, detail)
        else:
            wanted.append((site, [planning.usual_share] if shares is None else shares[at]))
    allowance = planning.allowance([values[site.linear.weight].dtype for site, _ in wanted])
    spend = _Spending(planning, allowance * planning.headroom, shares is None)
    with side_by_side() as pool:
        choices = _choices(wanted, values, planning, folds, shares is None, observed or {})
        _decide(choices, spend, pool)
        again = [part for choice in choices for part in _second_try(choice, planning)]
        if again != choices:
            choices = again
            _decide(choices, spend, pool)
        choices = _share_bases(choices, spend)
    planned = [plan for choice in choices for plan in choice.plans()]
    for choice in choices:
        skips += choice.skips(planning.noise_budget)
    for i, skip in enumerate(skips):
        module, source = found.places.get(skip.contraction, ("", ""))
        skips[i] = replace(skip, module=skip.module or module, source=skip.source or source)
    return Plan(
        tuple(planned),
        tuple(skips),
        _folds(folds, planned),
        found.cached,
        found.linears,
        spend.limit / planning.headroom,
        spend.alike,
        found.places,
    )


def _refusal(
    site: Site, values: Mapping[str, Tensor], planning: Planning
) -> tuple[Reason | None, str]:
    """Why a site is not looked at."""
    if not set(site.product.split("+")) <= set(planning.products):
        return Reason.NOT_REQUESTED, f"products={planning.products}"
    for name in planning.keep:
        if fnmatchcase(site.linear.name, name):
            return Reason.NOT_REQUESTED, f"keep={name!r}"
    if planning.side != "auto" and not _views(site, planning):
        return Reason.NOT_REQUESTED, f"side={planning.side!r}"
    return unusable(site, values), ""


def _views(site: Site, planning: Planning) -> list[Site]:
    views = [view for view in (site, site.other) if view is not None]
    return [view for view in views if planning.side in ("auto", view.side)]


@dataclass(frozen=True)
class _Spending:
    """What may be spent: ``alike`` on every choice by itself, else on all of them together."""

    planning: Planning
    allowance: float
    alike: bool

    @property
    def limit(self) -> float:
        return self.allowance if self.planning.enforced else math.inf

    def allows(self, costs: Sequence[Sequence[float]]) -> bool:
        """Whether these are within the budget, even where it does not decide about sizes."""
        return self._within(costs, self.allowance)

    def allows_first(self, choices: Sequence[Choice]) -> bool:
        """Whether the first step can be taken everywhere."""
        return self._within([choice.costs(0) for choice in choices], self.limit)

    def _within(self, costs: Sequence[Sequence[float]], limit: float) -> bool:
        totals = [max(o) if self.alike else sum(o) for o in zip(*costs, strict=True)]
        return all(math.isfinite(total) and total <= limit for total in totals)

    def choose(self, choices: Sequence[Choice], weigh: Weigh) -> None:
        for group in [[choice] for choice in choices] if self.alike else [choices]:
            for choice, step in zip(group, spend_budget(group, self.limit, weigh), strict=True):
                choice.chosen = step


def _choices(
    wanted: Sequence[tuple[Site, Sequence[float]]],
    values: Mapping[str, Tensor],
    planning: Planning,
    folds: Mapping[str, Fold],
    alike: bool,
    observed: Mapping[FactorKey, Observed],
) -> list[Choice]:
    """What is to be chosen: a basis for each site, or one for all of a weight if that is free."""
    groups: dict[object, list[tuple[Site, Sequence[float]]]] = defaultdict(list)
    for number, (site, share) in enumerate(wanted):
        together = _may_fold(site, folds, planning) and not planning.opaque_cache
        key = (site.linear.weight, site.decomposed) if together else number
        groups[key].append((site, share))
    choices = []
    for group in groups.values():
        sites, shares = [site for site, _ in group], [share for _, share in group]
        views = [sites] if len(sites) > 1 else [[view] for view in _views(sites[0], planning)]
        steps = worthwhile(steps_of(views, planning.sizes))
        shared = len(sites) > 1
        choices.append(
            Choice(
                views,
                shares,
                steps,
                values,
                planning.strategy(_folded(sites[0], wanted, folds, planning)),
                not planning.opaque_cache,
                shared,
                alike,
                planning.optimize_for,
                observed,
            )
        )
    return choices


def _may_fold(site: Site, folds: Mapping[str, Fold], planning: Planning) -> bool:
    return site.linear.weight in folds and site.axis == OUT and planning.side != "qo"


def _folded(
    site: Site,
    wanted: Sequence[tuple[Site, Sequence[float]]],
    folds: Mapping[str, Fold],
    planning: Planning,
) -> bool:
    """Whether x will come in basis order: all sites of its weight can be on one basis."""
    sizes = {other.decomposed for other, _ in wanted if other.linear.weight == site.linear.weight}
    return _may_fold(site, folds, planning) and not planning.opaque_cache and len(sizes) == 1


def _second_try(choice: Choice, planning: Planning) -> list[Choice]:
    """Where no step suits: a choice for each site instead of one for all, or the other side."""
    if choice.step is not None:
        return [choice]
    if choice.shared:
        pairs = list(zip(choice.views[0], choice.shares, strict=True))
        return _choices(pairs, choice.values, planning, {}, choice.alike, choice.observed)
    every = steps_of(choice.views, planning.sizes)
    return [choice if len(every) == len(choice.steps) else replace(choice, steps=every, chosen=0)]


def _decide(choices: list[Choice], spend: _Spending, pool: ThreadPoolExecutor) -> None:
    """Choose a step everywhere, first on estimates, then on what was found for the steps taken, and
    for those above them that may do although their estimates say no. The best plan on the way is
    taken whose noise is all known."""
    best, most = [choice.chosen for choice in choices], -1.0
    outputs = len(choices[0].shares[0]) if choices and not spend.alike else 1
    ways = [noisiest, all_alike] if outputs > 1 else [noisiest]
    frugal = sum(choice.search_bytes for choice in choices) > KEPT_SEARCHES
    for choice in choices:
        choice.frugal = frugal
    list(pool.map(Choice.estimate_first, choices))
    estimated = False
    while ways:
        if not estimated and (spend.planning.alternatives or not spend.allows_first(choices)):
            list(pool.map(Choice.estimate, choices))
            estimated = True
        spend.choose(choices, ways[0])
        if not all(choice.settled for choice in choices):
            list(pool.map(Choice.settle, choices))
            continue
        worth = sum(choice.step.worth for choice in choices if choice.step)
        if worth > most:
            best, most = [choice.chosen for choice in choices], worth
        above = _steps_to_try(choices, spend)
        tried = [(choice, step) for choice, step in above if step is not None]
        if not tried:
            ways = ways[1:]
        list(pool.map(lambda pair: pair[0].find(pair[1]), tried))
    for choice, step in zip(choices, best, strict=True):
        choice.chosen = step


def _steps_to_try(choices: Sequence[Choice], spend: _Spending) -> list[tuple[Choice, int | None]]:
    """With each choice, the nearest step above the chosen one that is unknown and would do if its
    estimate is too high."""
    costs = [choice.costs(choice.chosen) for choice in choices]
    totals = [0.0 if spend.alike else sum(output) for output in zip(*costs, strict=True)]
    found: list[tuple[Choice, int | None]] = []
    for choice, mine in zip(choices, costs, strict=True):
        others = [0.0 if spend.alike else t - m for t, m in zip(totals, mine, strict=True)]
        hopeful = (
            step
            for step in reversed(range(choice.chosen))
            for hoped in [choice.costs_hoped_for(step)]
            if hoped is not None and spend.allows([others, hoped])
        )
        found.append((choice, next(hopeful, None)))
    return found


def _share_bases(choices: list[Choice], spend: _Spending) -> list[Choice]:
    """Put sites of one weight and size on one basis, where the budget has room for it.

    One basis for K and V means one gather and one GEMM, for about 1.5 times the noise.
    """
    groups: dict[object, list[Choice]] = defaultdict(list)
    for choice in choices:
        site = choice.sites[0]
        if (
            choice.step
            and not choice.shared
            and site.axis == OUT
            and not spend.planning.opaque_cache
        ):
            groups[site.linear.weight, site.decomposed, choice.step.size].append(choice)
    for group in groups.values():
        if len(group) < 2:
            continue
        together = _on_one_basis(group)
        others = [choice for choice in choices if choice not in group]
        costs = [choice.costs(choice.chosen) for choice in others]
        if spend.allows([*costs, together.costs(0)]):
            choices = [*others, together]
    return choices


def _on_one_basis(group: Sequence[Choice]) -> Choice:
    first = group[0]
    assert first.step is not None
    sites = [choice.sites[0] for choice in group]
    shares = [choice.shares[0] for choice in group]
    step = replace(first.step, view=0)
    together = Choice(
        [sites],
        shares,
        [step],
        first.values,
        first.strategy,
        first.balanced,
        shared=True,
        alike=first.alike,
        optimize_for=first.optimize_for,
        observed=first.observed,
    )
    together.settle()
    return together


def _folds(folds: Mapping[str, Fold], planned: Sequence[SitePlan]) -> tuple[Fold, ...]:
    """The gathers that are free: all sites of the weight are on one basis, picked from inputs."""
    found = []
    for weight, fold in folds.items():
        items = [item for item in planned if item.site.linear.weight == weight]
        bases = {item.basis for item in items}
        if len(bases) == 1 and items[0].site.axis == OUT:
            found.append(replace(fold, basis=bases.pop()))
    return tuple(_compatible([fold for fold in found if _undisturbed(fold, planned)]))


def _undisturbed(fold: Fold, planned: Sequence[SitePlan]) -> bool:
    """Whether no linear that the fold reorders is itself decomposed, on another basis."""
    inputs = {item.site.linear.weight for item in planned if item.site.axis == OUT}
    outputs = {item.site.linear.weight for item in planned if item.site.axis == IN}
    return fold.producer.weight not in outputs and not any(
        reader.weight in inputs | outputs for reader in fold.readers
    )


def _compatible(folds: list[Fold]) -> list[Fold]:
    """Folds that do not put the same weight in two orders."""
    kept: list[Fold] = []
    taken: set[str] = set()
    for fold in folds:
        touched = {
            fold.producer.weight,
            *(name for name, _ in fold.constants),
            *(r.weight for r in fold.readers),
        }
        if not touched & taken:
            kept.append(fold)
            taken |= touched
    return kept


def unusable(site: Site, values: Mapping[str, Tensor]) -> Reason | None:
    """Why the site's weights cannot be decomposed at all, looking at their kind and values."""
    for name in sorted(constants_of([site])):
        value = values.get(name)
        if value is None or value.device.type == "meta" or _is_fake(value):
            return Reason.NO_VALUES
        if not value.dtype.is_floating_point:
            return Reason.NOT_FLOATING
        if not all_finite(value):
            return Reason.NOT_FINITE
    return None


def _is_fake(value: Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)
