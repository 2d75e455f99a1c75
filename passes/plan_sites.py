"""Plan: how much of each site to rewrite, on which basis, within the noise budget.

Requires: sites and the values of their weights. Leaves: a :class:`Plan`; nothing is changed.
A site that cannot be rewritten as asked becomes a skip with the reason.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bda_fx.passes.fit_basis import MAX_RESIDUAL, Fit, Misfit, fit_basis
from bda_fx.passes.read_weights import constants_of, read_site
from bda_fx.passes.sites import IN, OUT, REMEDIES, Fold, Found, Plan, Reason, Site, SitePlan, Skip

LADDER = (1.0, 15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2)
"""Fractions of D that ``basis_size="auto"`` tries, largest first."""

MIN_SIDE_GAIN = 4 / 3
"""How much more the other side must save where as many tokens pass through both: a decomposed
output projection also adds up heads and sorts outputs, and a second search costs as much as the
first."""


@dataclass(frozen=True)
class Planning:
    """What the planner is asked for; the meaning of the names is in ``bda_fx.Options``."""

    basis: str = "auto"
    basis_size: str | float = "auto"
    noise_budget: float = 2.0
    products: tuple[str, ...] = ("qk", "vo")
    side: str = "auto"
    share: bool = True
    """Whether K and V may share a basis, which depends on the graph."""

    @property
    def strategy(self) -> str:
        return "pivot" if self.basis == "auto" else self.basis

    @property
    def bound(self) -> float | None:
        """The noise that a basis may have; an explicit size is taken whatever it costs."""
        return self.noise_budget if self.basis_size == "auto" else None

    def sizes(self, site: Site) -> list[int]:
        """Basis sizes to try, largest first."""
        fractions = LADDER if self.basis_size == "auto" else (self.basis_size,)
        limit = min(site.decomposed, site.basis_features)
        sizes = []
        for fraction in fractions:
            share = 1.0 if fraction == "full" else float(fraction)
            sizes.append(max(1, min(limit, int(site.decomposed * share))))
        return list(dict.fromkeys(sizes))


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
    groups: dict[tuple[str, str], list[tuple[Site, Fit]]] = defaultdict(list)
    wanted: list[Site] = []
    for site in found.sites:
        if not set(site.product.split("+")) <= set(planning.products):
            skips += _skips(site, Reason.NOT_REQUESTED, f"products={planning.products}")
            continue
        reason = unusable(site, values)
        if reason is not None:
            skips += _skips(site, reason)
            continue
        wanted.append(site)
    with _one_thread():
        choices = [_choose_side(site, values, planning) for site in wanted]
    for view, choice in choices:
        if isinstance(choice, Fit):
            groups[view.linear.weight, view.axis].append((view, choice))
        else:
            skips += _skips(view, *choice)
    for (weight, _), sites in groups.items():
        chosen = _plan_weight(sites, values, planning, weight in folds)
        planned += chosen
        bases = {item.basis for item in chosen}
        if weight in folds and len(bases) == 1 and chosen[0].site.axis == OUT:
            folded.append(replace(folds[weight], basis=bases.pop()))
    folded = [fold for fold in folded if _undisturbed(fold, planned)]
    for i, skip in enumerate(skips):
        module, source = found.places.get(skip.contraction, ("", ""))
        skips[i] = replace(skip, module=skip.module or module, source=skip.source or source)
    return Plan(
        tuple(planned), tuple(skips), tuple(_compatible(folded)), found.cached, found.linears
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The matrices of a search are too small for more: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _choose_side(
    site: Site, values: Mapping[str, Tensor], planning: Planning
) -> tuple[Site, Fit | tuple[Reason, str]]:
    """The view of the site that saves most, and its basis or why it has none.

    What a side saves is a matter of the tokens that pass through its linear, and of the size that
    its conditioning allows. Where both are equal it is the side of keys and values.
    """
    views = [view for view in (site, site.other) if view is not None]
    if planning.side != "auto":
        views = [view for view in views if view.side == planning.side]
    if not views:
        return site, (Reason.NOT_REQUESTED, f"side={planning.side!r}")
    views.sort(key=lambda view: -_saving(view, max(planning.sizes(view))))
    chosen, choice = views[0], _plan_one(views[0], values, planning)
    for view in views[1:]:
        saved = _saving(chosen, len(choice.rows)) if isinstance(choice, Fit) else 0
        least = MIN_SIDE_GAIN * saved if view.linear.tokens == chosen.linear.tokens else saved
        larger = [size for size in planning.sizes(view) if _saving(view, size) > least]
        another = _plan_one(view, values, planning, larger)
        if isinstance(another, Fit):
            chosen, choice = view, another
    return chosen, choice


def _saving(site: Site, size: int) -> int:
    """Multiplications that a basis of ``size`` saves at the example's sizes."""
    return site.linear.tokens * len(site.features) * site.decomposed * size


def _undisturbed(fold: Fold, planned: list[SitePlan]) -> bool:
    """Whether no linear that the fold reorders is itself decomposed, on another basis."""
    inputs = {item.site.linear.weight for item in planned if item.site.axis == OUT}
    outputs = {item.site.linear.weight for item in planned if item.site.axis == IN}
    return fold.producer.weight not in outputs and not any(
        reader.weight in inputs | outputs for reader in fold.readers
    )


def _plan_weight(
    sites: list[tuple[Site, Fit]],
    values: Mapping[str, Tensor],
    planning: Planning,
    foldable: bool,
) -> list[SitePlan]:
    """Plan the sites of one weight: on one basis where that saves more, else each on its own.

    One basis for K and V means one gather and one GEMM, for about 1.5 times the noise. It is taken
    where the gather is then free, and elsewhere only if no site has to take a smaller basis for it.
    """
    planned = [
        _as_plan(site, f"{site.linear.name}_{_tag(site)}", choice, planning)
        for site, choice in sites
    ]
    widths = {site.decomposed for site, _ in sites}
    if len(planned) < 2 or len(widths) > 1 or sites[0][0].axis == IN or not planning.share:
        return planned
    together = [site for site, _ in sites]
    largest = max(item.size for item in planned)
    sizes = [size for size in planning.sizes(together[0]) if foldable or size >= largest]
    read = [read_site(site, values) for site in together]
    shared = fit_basis(read, sizes, planning.strategy, planning.bound)
    if isinstance(shared, Misfit):
        return planned
    if foldable or all(fit.noise <= planning.noise_budget for fit in shared):
        name = f"{together[0].linear.name}_kv"
        planned = [_as_plan(s, name, f, planning) for s, f in zip(together, shared, strict=True)]
    return planned


def _tag(site: Site) -> str:
    """What tells the sites of one weight apart in the names of their bases."""
    return f"{site.product.replace('+', '')}{site.features[0][0]}"


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
        if not value.isfinite().all():
            return Reason.NOT_FINITE
    return None


def _is_fake(value: Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def _plan_one(
    site: Site, values: Mapping[str, Tensor], planning: Planning, sizes: Sequence[int] | None = None
) -> Fit | tuple[Reason, str]:
    """The largest basis that keeps to the budget, or why there is none."""
    quick = sizes is not None
    sizes = planning.sizes(site) if sizes is None else sizes
    if not sizes:
        return Reason.NOTHING_SAVED, "the other side saves as much"
    weights = read_site(site, values)
    found = fit_basis([weights], sizes, planning.strategy, planning.bound, quick=quick)
    if not isinstance(found, Misfit):
        return found[0]
    if found.noise < float("inf"):
        return Reason.TOO_NOISY, f"{found.noise:.2f} at best, budget {planning.noise_budget}"
    return Reason.RANK_DEFICIENT, f"residual {found.residual:.1e} at best, limit {MAX_RESIDUAL:.0e}"


def _as_plan(site: Site, basis: str, fit: Fit, planning: Planning) -> SitePlan:
    return SitePlan(
        site=site,
        basis=basis,
        strategy=planning.strategy,
        size=len(fit.rows),
        rows=tuple(fit.rows.tolist()),
        noise=fit.noise,
        worst_head_noise=fit.worst,
        condition=fit.condition,
    )


def _skips(site: Site, reason: Reason, detail: str = "") -> list[Skip]:
    return [
        Skip(
            product,
            contraction,
            reason,
            site.linear.weight,
            site.linear.name,
            detail,
            remedy=REMEDIES.get(reason, ""),
            site=site,
        )
        for contraction in site.contractions
        for product in site.product.split("+")
    ]
