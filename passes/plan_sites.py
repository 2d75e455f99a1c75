"""Plan: how much of each site to rewrite, on which basis, within the noise budget.

Requires: sites and the values of their weights. Leaves: a :class:`Plan`; nothing is changed.
A site that cannot be rewritten as asked becomes a skip with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bda_fx.passes.change_basis import ChangeOfBasis, change_basis
from bda_fx.passes.choose_basis import choose_basis
from bda_fx.passes.predict_noise import predict_noise
from bda_fx.passes.read_weights import SiteWeights, read_site
from bda_fx.passes.sites import Fold, Found, Plan, Reason, Site, SitePlan, Skip

LADDER = (1.0, 15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2)
"""Fractions of D that ``basis_size="auto"`` tries, largest first."""

MAX_RESIDUAL = 1e-11
"""A change of basis must reproduce the weights to this relative error in float64: its own rounding
is below 1e-16 × condition × √E, and a basis that misses part of a head leaves far more."""


@dataclass(frozen=True)
class Planning:
    """What the planner is asked for; the meaning of the names is in ``bda_fx.Options``."""

    basis: str = "auto"
    basis_size: str | float = "auto"
    noise_budget: float = 2.0
    products: tuple[str, ...] = ("qk", "vo")

    @property
    def strategy(self) -> str:
        return "pivot" if self.basis == "auto" else self.basis

    def sizes(self, site: Site) -> list[int]:
        """Basis sizes to try, largest first."""
        fractions = LADDER if self.basis_size == "auto" else (self.basis_size,)
        limit = min(site.decomposed, site.linear.in_features)
        sizes = []
        for fraction in fractions:
            share = 1.0 if fraction == "full" else float(fraction)
            sizes.append(max(1, min(limit, int(site.decomposed * share))))
        return list(dict.fromkeys(sizes))


@dataclass(frozen=True)
class _Choice:
    size: int
    rows: Tensor
    change: ChangeOfBasis
    noise: float
    worst: float


def plan_sites(
    found: Found,
    values: Mapping[str, Tensor],
    planning: Planning,
    folds: Mapping[str, Fold] | None = None,
) -> Plan:
    """Choose a basis for every site of ``found``; ``values`` holds the constants it reads.

    ``folds`` says for which K/V weights the gather of x would be free on one common basis.
    """
    folds = folds or {}
    folded: list[Fold] = []
    skips = list(found.skips)
    planned: list[SitePlan] = []
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in found.sites:
        if site.product in planning.products:
            groups[site.linear.weight].append(site)
        else:
            skips += _skips(site, Reason.NOT_REQUESTED, f"products={planning.products}")
    for weight, sites in groups.items():
        usable = []
        for site in sites:
            reason = unusable(site, values)
            if reason is None:
                usable.append(site)
            else:
                skips += _skips(site, reason)
        chosen, reasons = _plan_weight(usable, values, planning, weight in folds)
        planned += chosen
        for site, reason, detail in reasons:
            skips += _skips(site, reason, detail)
        bases = {item.basis for item in chosen}
        if weight in folds and len(bases) == 1:
            folded.append(replace(folds[weight], basis=bases.pop()))
    return Plan(tuple(planned), tuple(skips), tuple(_compatible(folded)))


def _plan_weight(
    sites: list[Site], values: Mapping[str, Tensor], planning: Planning, foldable: bool
) -> tuple[list[SitePlan], list[tuple[Site, Reason, str]]]:
    """Plan the sites of one K/V weight: on one basis where that saves more, else each on its own.

    One basis for K and V means one gather and one GEMM, for about 1.5 times the noise. It is taken
    where the gather is then free, and elsewhere only if no site has to take a smaller basis for it.
    """
    planned, refused = [], []
    for site in sites:
        choice = _plan_one(site, read_site(site, values), planning)
        if isinstance(choice, _Choice):
            name = f"{site.linear.name}_{site.product}{site.decomposed}"
            planned.append(_as_plan(site, name, choice, planning))
        else:
            refused.append((site, *choice))
    if len(planned) < 2 or len({item.site.decomposed for item in planned}) > 1:
        return planned, refused
    together = [item.site for item in planned]
    shared = _plan_shared(together, values, planning)
    free = foldable and (planning.basis_size != "auto" or shared is not None)
    same = shared is not None and shared[0].size >= max(item.size for item in planned)
    quiet = shared is not None and all(c.noise <= planning.noise_budget for c in shared)
    if shared is not None and (free or (same and quiet)):
        name = f"{together[0].linear.name}_kv"
        planned = [_as_plan(s, name, c, planning) for s, c in zip(together, shared, strict=True)]
    return planned, refused


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
    linears = (site.linear, *(p.linear for p in site.partners))
    names = [n for linear in linears for n in (linear.weight, *linear.biases) if n is not None]
    for name in names:
        value = values.get(name)
        if value is None or value.device.type == "meta" or _is_fake(value):
            return Reason.NO_VALUES
        if not value.dtype.is_floating_point:
            return Reason.NOT_FLOATING
        if not value.isfinite().all():
            return Reason.NOT_FINITE
    return None


def _is_fake(value: Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def _plan_one(site: Site, weights: SiteWeights, planning: Planning) -> _Choice | tuple[Reason, str]:
    """The largest basis that keeps to the budget, or why there is none."""
    quietest, inexact = float("inf"), float("inf")
    for size in planning.sizes(site):
        rows = choose_basis(weights.heads, size, planning.strategy)
        choice = _weigh(weights, rows)
        if choice.change.residual > MAX_RESIDUAL:
            inexact = min(inexact, choice.change.residual)
            continue
        if planning.basis_size != "auto" or choice.noise <= planning.noise_budget:
            return choice
        quietest = min(quietest, choice.noise)
    if quietest < float("inf"):
        return Reason.TOO_NOISY, f"{quietest:.2f} at best, budget {planning.noise_budget}"
    return Reason.RANK_DEFICIENT, f"residual {inexact:.1e} at best, limit {MAX_RESIDUAL:.0e}"


def _plan_shared(
    sites: list[Site], values: Mapping[str, Tensor], planning: Planning
) -> list[_Choice] | None:
    """One basis for all sites: the largest size that suits each of them, or None."""
    weights = [read_site(site, values) for site in sites]
    together = torch.cat([w.heads for w in weights])
    for size in planning.sizes(sites[0]):
        rows = choose_basis(together, size, planning.strategy)
        choices = [_weigh(w, rows) for w in weights]
        quiet = planning.basis_size != "auto" or all(
            c.noise <= planning.noise_budget for c in choices
        )
        if quiet and all(c.change.residual <= MAX_RESIDUAL for c in choices):
            return choices
    return None


def _weigh(weights: SiteWeights, rows: Tensor) -> _Choice:
    change = change_basis(weights.heads, rows, weights.bias)
    noise, worst = predict_noise(weights.heads, weights.bias, change, weights.partners)
    return _Choice(len(rows), rows, change, noise, worst)


def _as_plan(site: Site, basis: str, choice: _Choice, planning: Planning) -> SitePlan:
    return SitePlan(
        site=site,
        basis=basis,
        strategy=planning.strategy,
        size=choice.size,
        rows=tuple(choice.rows.tolist()),
        noise=choice.noise,
        worst_head_noise=choice.worst,
        condition=choice.change.condition,
    )


def _skips(site: Site, reason: Reason, detail: str = "") -> list[Skip]:
    return [
        Skip(site.product, contraction, reason, site.linear.weight, site.linear.name, detail)
        for contraction in site.contractions
    ]
