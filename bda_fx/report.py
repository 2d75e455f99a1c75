"""The report: for every attention product what was done, or why not, and what it saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from bda_fx.passes.count_costs import Layout, count_costs, layouts_of, sizes_of
from bda_fx.passes.sites import Plan, Site, Skip


@dataclass(frozen=True)
class AlternativeReport:
    """A basis that was not taken. ``estimated``: its noise is rough, its rows were not sought."""

    side: str
    basis_size: int
    noise: float
    estimated: bool
    noise_ratio: float | None


@dataclass(frozen=True)
class SiteReport:
    """One attention product.

    ``name`` is the weight that is decomposed (of keys or values, or of queries or outputs where
    ``side`` is "qo"); ``params`` and ``macs_per_token`` count that projection alone, as its
    partners keep their size, by the formulas of ``bda_fx.passes.count_costs``: ``params`` with its
    biases, ``params_after`` with the index tensors of a scattered basis, once for all its sites.
    ``in_features`` is what the basis is picked from: the projection's inputs, or an output
    projection's outputs.
    ``module``, ``source`` and ``remedy`` say of a skip where it comes from and what can be done.
    ``noise`` is the predicted amplification of the site's own rounding noise, ``noise_share`` the
    estimated part of the original's noise that comes from the site (in the output where it is
    largest; None where it was not estimated), ``condition`` the 2-norm condition of the worst
    head's change of basis. ``alternatives`` are the other sizes and sides that were weighed:
    ``noise_ratio`` is what the whole program's would be with that one instead. ``speed`` tells the
    form that was chosen by speed and how fast it was (``profitability``). Fields that do not
    apply are None.
    """

    name: str
    product: str
    status: str
    reason: str | None = None
    reason_code: str | None = None
    node: str | None = None
    contractions: tuple[str, ...] = ()
    side: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    decomposed: int | None = None
    in_features: int | None = None
    basis: str | None = None
    basis_size: int | None = None
    condition: float | None = None
    noise: float | None = None
    noise_share: float | None = None
    alternatives: tuple[AlternativeReport, ...] = ()
    params_before: int | None = None
    params_after: int | None = None
    macs_per_token_before: int | None = None
    macs_per_token_after: int | None = None
    source: str | None = None
    module: str | None = None
    remedy: str | None = None
    speed: str | None = None


@dataclass(frozen=True)
class Report:
    """What a rewrite did or would do. Bytes are those of the program's weights and constants.

    ``noise_ratio`` is the predicted noise of the noisiest output over the original's, None where
    the shares of the sites were not estimated. ``bda_fx.verify`` measures it.
    """

    sites: tuple[SiteReport, ...]
    bytes_before: int | None = None
    bytes_after: int | None = None
    noise_ratio: float | None = None

    @property
    def rewritten(self) -> tuple[SiteReport, ...]:
        return tuple(s for s in self.sites if s.status == "rewritten")

    @property
    def skipped(self) -> tuple[SiteReport, ...]:
        return tuple(s for s in self.sites if s.status == "skipped")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "sites": [asdict(s) for s in self.sites],
            "rewritten": len(self.rewritten),
            "skipped": len(self.skipped),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "noise_ratio": self.noise_ratio,
        }

    def to_markdown(self) -> str:
        """A summary line and a table of all sites."""
        lines = [self.summary(), ""]
        if self.sites:
            lines += [
                "| site | product | heads | D of E | basis | noise | condition | parameters |"
            ]
            lines += ["|---|---|---|---|---|---|---|---|"]
        for s in self.sites:
            if s.status == "skipped":
                where = s.name or (s.contractions[0] if s.contractions else "?")
                lines.append(f"| {where} | {s.product} | skipped: {s.reason} ||||||")
                continue
            heads = f"{s.heads}" if s.heads == s.kv_heads else f"{s.heads}/{s.kv_heads}"
            lines.append(
                f"| {s.name} | {s.product} | {heads} × {s.head_dim} "
                f"| {s.decomposed} of {s.in_features} "
                f"| {s.basis} {s.basis_size} | {s.noise:.2f} | {s.condition:.0f} "
                f"| {s.params_before:,} → {s.params_after:,} |"
            )
        return "\n".join(lines)

    def summary(self) -> str:
        """One line: how many products, and what the rewritten projections save."""
        if not self.sites:
            return "No attention product found in this program: nothing to rewrite."
        before = sum(s.params_before or 0 for s in self.rewritten)
        after = sum(s.params_after or 0 for s in self.rewritten)
        text = f"{len(self.rewritten)} of {len(self.sites)} attention products rewritten"
        if before:
            text += f"; their decomposed projections: {before:,} → {after:,} parameters"
            text += f" ({100 * (after - before) / before:+.1f} %)"
        if self.noise_ratio is not None and self.rewritten:
            text += f"; predicted noise {self.noise_ratio:.2f} × the original's"
        if self.bytes_before and self.bytes_after:
            text += f"; all weights: {self.bytes_before:,} → {self.bytes_after:,} bytes"
        return text

    def __str__(self) -> str:
        lines = [self.summary()]
        for s in self.sites:
            where = s.name or (s.contractions[0] if s.contractions else "?")
            if s.status == "skipped":
                lines.append(f"  - {s.product} {where}: skipped, {s.reason}")
                lines += [f"      in {s.module}"] if s.module else []
                lines += [f"      {s.source}"] if s.source else []
                lines += [f"      {s.remedy}"] if s.remedy else []
            else:
                lines.append(
                    f"  + {s.product} {where}: {s.kv_heads} heads × {s.decomposed}, "
                    f"basis {s.basis_size} "
                    f"of {s.in_features}, noise {s.noise:.2f}"
                )
                lines += [f"      {s.speed}"] if s.speed else []
        return "\n".join(lines)


def report_of(
    plan: Plan,
    derived: Mapping[str, Tensor] | None = None,
    bytes_before: int | None = None,
    bytes_after: int | None = None,
) -> Report:
    """The report of a plan; ``derived`` tells which index tensors the graph really needs."""
    layouts = layouts_of(plan, derived)
    sites = [_rewritten(plan, at, layout) for at, layout in enumerate(layouts)]
    skips = map(_skipped, plan.skips)
    return Report((*sites, *skips), bytes_before, bytes_after, plan.noise_ratio())


def _rewritten(plan: Plan, at: int, layout: Layout) -> SiteReport:
    item = plan.sites[at]
    return replace(
        _describe(item.site),
        status="rewritten",
        basis=item.strategy,
        basis_size=item.size,
        condition=item.condition,
        noise=item.noise,
        noise_share=None if plan.alike else max(item.shares),
        alternatives=_alternatives(plan, at),
        speed=item.weighed.explain() if item.weighed else None,
        **asdict(count_costs(layout, sizes_of(item))),
    )


def _alternatives(plan: Plan, at: int) -> tuple[AlternativeReport, ...]:
    noises = [item.noise for item in plan.sites]
    return tuple(
        AlternativeReport(
            other.side,
            other.size,
            other.noise,
            other.estimated,
            plan.noise_ratio([*noises[:at], other.noise, *noises[at + 1 :]]),
        )
        for other in plan.sites[at].alternatives
        if math.isfinite(other.noise)
    )


def _describe(site: Site) -> SiteReport:
    """What a site is, whatever is done to it."""
    widths = [len(head) for p in site.partners for head in p.features]
    return SiteReport(
        name=site.linear.name,
        product=site.product,
        status="skipped",
        contractions=site.contractions,
        side=site.side,
        heads=site.num_heads,
        kv_heads=site.num_kv_heads,
        head_dim=max(widths, default=site.decomposed),
        decomposed=site.decomposed,
        in_features=site.basis_features,
    )


def _skipped(skip: Skip) -> SiteReport:
    known = _describe(skip.site) if skip.site else SiteReport(skip.name, skip.product, "skipped")
    return replace(
        known,
        name=skip.name,
        product=skip.product,
        reason=skip.explain(),
        reason_code=skip.reason.name,
        node=skip.node,
        contractions=(skip.contraction,),
        source=skip.source or None,
        module=skip.module or None,
        remedy=skip.remedy or None,
    )
