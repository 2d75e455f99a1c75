"""Report: plain data out, a summary that can be read, a table with one row per product."""

from __future__ import annotations

import dataclasses
import json

from bda_fx import Report, SiteReport
from bda_fx.passes.sites import Factor, Linear, Plan, Reason, Site, SitePlan, Skip
from bda_fx.report import AlternativeReport, report_of

REWRITTEN = SiteReport(
    name="layer.0.key.weight",
    product="qk",
    status="rewritten",
    contractions=("matmul",),
    side="kv",
    heads=8,
    kv_heads=4,
    head_dim=6,
    decomposed=6,
    in_features=20,
    basis="pivot",
    basis_size=5,
    condition=12.3,
    noise=1.234,
    params_before=504,
    params_after=404,
    macs_per_token_before=480,
    macs_per_token_after=360,
)
SKIPPED = SiteReport(
    name="",
    product="vo",
    status="skipped",
    reason="returned by the program (at output)",
    reason_code="RETURNED",
    node="output",
    contractions=("matmul_1",),
)
REPORT = Report((REWRITTEN, SKIPPED), bytes_before=4000, bytes_after=3600)


def test_partition() -> None:
    assert REPORT.rewritten == (REWRITTEN,)
    assert REPORT.skipped == (SKIPPED,)


def test_dict_goes_through_json_and_back() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["rewritten"] == data["skipped"] == 1
    sites = [
        SiteReport(
            **{
                **site,
                "contractions": tuple(site["contractions"]),
                "alternatives": tuple(AlternativeReport(**a) for a in site["alternatives"]),
            }
        )
        for site in data["sites"]
    ]
    assert Report(tuple(sites), data["bytes_before"], data["bytes_after"]) == REPORT


def test_dict_has_every_field() -> None:
    names = {f.name for f in dataclasses.fields(SiteReport)}
    assert all(set(site) == names for site in REPORT.to_dict()["sites"])


def test_summary() -> None:
    assert REPORT.summary() == (
        "1 of 2 attention products rewritten; their decomposed projections: 504 → 404 parameters "
        "(-19.8 %); all weights: 4,000 → 3,600 bytes"
    )


def test_summary_without_sites_says_so() -> None:
    empty = Report(())
    text = "No attention product found in this program: nothing to rewrite."
    assert empty.summary() == str(empty) == text
    assert empty.to_markdown().strip() == text
    assert empty.to_dict()["sites"] == []


def test_str_lists_every_site() -> None:
    assert str(REPORT).splitlines()[1:] == [
        "  + qk layer.0.key.weight: 4 heads × 6, basis 5 of 20, noise 1.23",
        "  - vo matmul_1: skipped, returned by the program (at output)",
    ]


def test_markdown_is_one_table() -> None:
    lines = REPORT.to_markdown().splitlines()
    assert lines[0] == REPORT.summary()
    assert lines[1] == ""
    header, rule, rewritten, skipped = lines[2:]
    columns = header.count("|")
    assert rule.count("|") == rewritten.count("|") == columns
    cells = ["layer.0.key.weight", "qk", "8/4 × 6", "6 of 20", "pivot 5", "1.23", "12", "504 → 404"]
    assert rewritten == f"| {' | '.join(cells)} |"
    assert skipped.count("|") == columns
    assert skipped.startswith("| matmul_1 | vo | skipped: returned by the program (at output) |")


def test_markdown_with_nothing_but_a_nameless_skip() -> None:
    nameless = dataclasses.replace(SKIPPED, contractions=())
    assert "skipped: returned" in Report((nameless,)).to_markdown()
    assert "skipped, returned" in str(Report((nameless,)))


def test_report_of_plan_counts_the_projection() -> None:
    linear = Linear("k.weight", "p_k", ("linear",), ("p_bias",), 20, 12)
    query = Linear("q.weight", "p_q", ("linear_1",), (None,), 20, 12)
    heads = (tuple(range(6)), tuple(range(6, 12)))
    site = Site("qk", linear, heads, (Factor(query, "out", heads, (0, 1)),), ("matmul",))
    item = SitePlan(site, "k_qk6", "pivot", 5, tuple(range(5)), 1.1, 1.2, 3.0)
    skip = Skip("vo", "matmul_1", Reason.RETURNED, "output", detail="a cache")
    report = report_of(Plan((item,), (skip,)))
    (done,), (left,) = report.rewritten, report.skipped
    assert (done.heads, done.kv_heads, done.head_dim, done.basis_size) == (2, 2, 6, 5)
    assert (done.params_before, done.params_after) == (12 * 20 + 12, 12 * 15 + 12)
    assert (done.macs_per_token_before, done.macs_per_token_after) == (12 * 20, 12 * 15)
    assert left.reason == "returned by the program (at output): a cache"
    assert (left.reason_code, left.node, left.source) == ("RETURNED", "output", None)
