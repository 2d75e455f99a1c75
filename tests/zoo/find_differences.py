"""Compare a report with the sites expected of an architecture."""

from __future__ import annotations

from collections import Counter

import bda_fx
from tests.zoo.entry import Expected


def wanted_sites(expected: Expected) -> Counter[tuple[str | int, ...]]:
    """(product, D, E, heads, kv heads) → how many sites; (product, reason) → how many skips."""
    counts: Counter[tuple[str | int, ...]] = Counter()
    for product, some in (("qk", expected.qk), ("vo", expected.vo)):
        for s in some:
            counts[product, s.decomposed, s.in_features, s.heads, s.kv_heads] += s.count
    for product, reason, count in expected.skipped:
        counts[product, reason] += count
    return counts


def found_sites(report: bda_fx.Report) -> Counter[tuple[str | int | None, ...]]:
    """The same of a report."""
    counts: Counter[tuple[str | int | None, ...]] = Counter()
    for s in report.rewritten:
        counts[s.product, s.decomposed, s.in_features, s.heads, s.kv_heads] += 1
    for s in report.skipped:
        counts[s.product, s.reason_code] += 1
    return counts


def assert_sites(report: bda_fx.Report, expected: Expected) -> None:
    """The report has the sites expected and no other, at full basis size, with the right costs."""
    found, wanted = found_sites(report), wanted_sites(expected)
    missing, extra = dict(wanted - found), dict(found - wanted)
    assert (missing, extra) == ({}, {}), f"missing {missing}, not expected {extra}\n{report}"
    for s in report.rewritten:
        assert s.basis_size == s.decomposed
        assert s.macs_per_token_before == s.kv_heads * s.decomposed * s.in_features
        saved = s.kv_heads * s.decomposed * s.basis_size
        assert s.macs_per_token_before - s.macs_per_token_after == saved
    assert len(report.sites) == len(report.rewritten) + len(report.skipped)


def count(expected: Expected) -> int:
    """How many sites there are."""
    return sum(s.count for s in (*expected.qk, *expected.vo))
