"""A report as a table, also for models without values, of which sizes alone are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bda_fx.passes.sites import Reason
from bda_fx.report import Report, SiteReport

if TYPE_CHECKING:
    from rich.console import Group


def saved_params(report: Report) -> int:
    """Parameters that are saved, or could be with a full basis where there are no values to plan
    with: heads · D of the D × E weights of a head need not be stored for each of D features."""
    return sum(_saved(site) or 0 for site in report.sites)


def _saved(site: SiteReport) -> int | None:
    if site.status == "rewritten":
        assert site.params_before is not None
        assert site.params_after is not None
        return site.params_before - site.params_after
    if site.reason_code != Reason.NO_VALUES.name or site.decomposed is None:
        return None
    heads = site.heads if site.side == "qo" else site.kv_heads
    return (heads or 0) * site.decomposed**2


def _before(site: SiteReport) -> int | None:
    if site.params_before is not None:
        return site.params_before
    heads = site.heads if site.side == "qo" else site.kv_heads
    if heads is None or site.decomposed is None or site.in_features is None:
        return None
    return heads * site.decomposed * site.in_features


def report_table(report: Report) -> Group:
    """A summary, a table of sites, and for skipped ones why, once for each reason."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("weight", overflow="fold")
    table.add_column("product")
    for column in ("heads × D", "inputs E", "basis r", "parameters", "saved", "noise"):
        table.add_column(column, justify="right", no_wrap=True)
    reasons: dict[str, int] = {}
    for site in report.sites:
        saved, before = _saved(site), _before(site)
        if saved is None:
            reason = f"{site.reason}: {site.remedy}" if site.remedy else f"{site.reason}"
            reasons[reason] = reasons.get(reason, 0) + 1
            table.add_row(site.name or "?", site.product, "", "", "", "", "skipped", "")
            continue
        planned = site.status == "rewritten"
        table.add_row(
            site.name,
            site.product,
            f"{site.heads if site.side == 'qo' else site.kv_heads} × {site.decomposed}",
            f"{site.in_features}",
            f"{site.basis_size}" if planned else f"≤ {site.decomposed}",
            f"{before:,}",
            f"{'' if planned else 'up to '}{saved:,} ({100 * saved / (before or 1):.1f} %)",
            f"{site.noise:.2f}" if site.noise is not None else "",
        )
    parts: list[Any] = [_summary(report)]
    if report.sites:
        parts.append(table)
    parts += [f"skipped, {count} ×: {reason}" for reason, count in reasons.items()]
    return Group(*parts)


def _summary(report: Report) -> str:
    bare = [s for s in report.skipped if s.reason_code == Reason.NO_VALUES.name]
    if not bare:
        return report.summary()
    saved, before = saved_params(report), sum(_before(s) or 0 for s in bare)
    return (
        f"{len(bare)} of {len(report.sites)} attention products could be rewritten, by their "
        f"sizes; their projections: up to {saved:,} of {before:,} parameters saved "
        f"({100 * saved / max(before, 1):.1f} %). With the weights, inspect plans for a noise "
        "budget"
    )
