"""What a report says about each attention: what, where, why, and what can be done about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bda_fx
from bda_fx.passes.sites import REMEDIES, Reason
from bda_fx.report import Report, SiteReport
from tests.programs import FULL, Attention, B, D, E, H, example, randn, seeded


@torch.library.custom_op("bda_fx_explain::attention", mutates_args=())
def unknown_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@unknown_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


class Plain(Attention):
    """[B, S, E] → [B, S, E]; ``core`` may be replaced."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        out = self.attend(*self.project(x, x))
        return self.o(out.transpose(1, 2).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Rotated(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(turned(q), turned(k), v)


class Normalised(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(F.rms_norm(q, (D,)), F.rms_norm(k, (D,)), v)


class Grouped(Plain):
    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Nested(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(
            q.sum() > 0,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
            lambda q, k, v: F.scaled_dot_product_attention(2 * q, k, v),
            (q, k, v),
        )


class Unknown(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return unknown_attention(q, k, v)


class Spelled(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / D**0.5).softmax(-1) @ v.relu()


class Linear(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.mT @ v)


class Sorted(Plain):
    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, memory)
        return q, k[..., x[0, 0, :D].argsort()], v


class Infinite(Plain):
    """A weight that holds infinity: the planner is against it, not the finder."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.k.weight[0, 0] = float("inf")


def turned(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2])[:, None] * 0.1 ** torch.arange(D // 2)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


KINDS: dict[str, tuple[Callable[[], Plain], dict[str, str | None]]] = {
    "sorted": (Sorted, {"qk": "DATA_DEPENDENT", "vo": None}),
    "plain": (Plain, {"qk": None, "vo": None}),
    "grouped": (Grouped, {"qk": None, "vo": None}),
    "linear": (Linear, {"qk": None, "vo": None}),
    "rotated": (Rotated, {"qk": "ROTATED", "vo": None}),
    "normalised": (Normalised, {"qk": "NORMALISED", "vo": None}),
    "spelled": (Spelled, {"qk": None, "vo": "COMPUTED"}),
    "nested": (Nested, {"qk": "NESTED", "vo": "NESTED"}),
    "unknown": (Unknown, {"qk": "UNKNOWN_OP", "vo": "UNKNOWN_OP"}),
    "infinite": (Infinite, {"qk": "NOT_FINITE", "vo": None}),
}
"""Attention of each kind, and the reason why a product of it is skipped, or None."""


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Model(nn.Module):
    """One attention of each kind, in a block by the name of the kind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name: Block(make()) for name, (make, _) in KINDS.items()})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


@pytest.fixture(scope="module")
def report() -> Report:
    return bda_fx.analyze(Model().eval(), (example(),), options=FULL)


def of_kind(report: Report, kind: str) -> list[SiteReport]:
    """Sites whose weight or module lies in the block of a kind."""
    block = f"blocks.{kind}.attention"
    return [s for s in report.sites if block in (s.module or "") or s.name.startswith(block)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_product_is_accounted_for(report: Report, kind: str) -> None:
    found = of_kind(report, kind)
    assert {s.product: s.reason_code for s in found} == KINDS[kind][1]
    assert len(found) == 2
    assert {s.status == "skipped" for s in found if s.reason_code} <= {True}
    assert {s.status == "rewritten" for s in found if not s.reason_code} <= {True}


def test_nothing_else_is_in_the_report(report: Report) -> None:
    assert len(report.sites) == 2 * len(KINDS)
    assert len(report.rewritten) + len(report.skipped) == len(report.sites)


SKIPPED = [
    (kind, product)
    for kind, (_, reasons) in KINDS.items()
    for product, reason in reasons.items()
    if reason
]


@pytest.mark.parametrize(("kind", "product"), SKIPPED)
def test_a_skip_says_why_and_where(report: Report, kind: str, product: str) -> None:
    (skip,) = (s for s in of_kind(report, kind) if s.product == product)
    reason = Reason[str(skip.reason_code)]
    assert skip.node
    assert skip.contractions
    assert str(skip.reason).startswith(reason.value)
    assert skip.node in str(skip.reason)
    assert skip.remedy == REMEDIES.get(reason)
    assert skip.module == f"blocks.{kind}.attention"
    assert skip.source is not None
    file, line = re.match(r'File "(.+)", line (\d+)', skip.source).groups()  # type: ignore[union-attr]
    assert Path(file).name in ("test_explain.py", "programs.py")
    text = Path(file).read_text().splitlines()[int(line) - 1].strip()
    assert skip.source.endswith(text)


@pytest.mark.parametrize(("kind", "product"), SKIPPED)
def test_a_skip_is_explained_to_people(report: Report, kind: str, product: str) -> None:
    (skip,) = (s for s in of_kind(report, kind) if s.product == product)
    lines = [line.strip() for line in str(report).splitlines()]
    where = skip.name or skip.contractions[0]
    at = lines.index(f"- {product} {where}: skipped, {skip.reason}")
    following = lines[at + 1 : at + 4]
    wanted = [f"in {skip.module}" if skip.module else None, skip.source, skip.remedy]
    wanted = [line for line in wanted if line]
    assert following[: len(wanted)] == wanted


def test_a_skip_is_explained_to_programs(report: Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["rewritten"], data["skipped"]) == (len(report.rewritten), len(SKIPPED))
    for plain, site in zip(data["sites"], report.sites, strict=True):
        for name in ("reason", "reason_code", "node", "module", "source", "remedy"):
            assert plain[name] == getattr(site, name)


def test_a_rewritten_site_has_no_excuse(report: Report) -> None:
    for site in report.rewritten:
        assert (site.reason, site.reason_code, site.remedy) == (None, None, None)
        assert site.name
        assert site.contractions
        assert (site.head_dim, site.decomposed, site.in_features) == (D, D, E)


def test_the_table_has_a_row_for_each_product(report: Report) -> None:
    rows = [line for line in report.to_markdown().splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(report.sites)
    assert sum("skipped: " in row for row in rows) == len(SKIPPED)


# -- what the plan is against -----------------------------------------------------------------


UNWANTED = pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"products": ()}, "NOT_REQUESTED"),
        ({"basis": "first", "noise_budget": 1.0}, "TOO_NOISY"),
    ],
)


@UNWANTED
def test_a_site_that_is_not_wanted_has_its_sizes(options: dict[str, Any], reason: str) -> None:
    report = bda_fx.analyze(Block(Grouped()), (example(),), options=options)
    assert {s.reason_code for s in report.sites} == {reason}
    for site in report.sites:
        assert (site.heads, site.kv_heads, site.decomposed, site.in_features) == (H, 2, D, E)
        assert site.remedy == REMEDIES[Reason[reason]]
        assert site.params_before is None


@UNWANTED
def test_a_site_that_is_not_wanted_says_where_it_is(options: dict[str, Any], reason: str) -> None:
    report = bda_fx.analyze(Block(Grouped()), (example(),), options=options)
    for site in report.sites:
        assert site.module == "attention"
        assert "test_explain.py" in (site.source or "")


def test_without_values_everything_else_is_known(report: Report) -> None:
    """On the meta device the same sites are found, with their sizes."""
    model = Model().eval().to("meta")
    meta = bda_fx.analyze(model, (example().to("meta"),), options=FULL)
    known = {(s.name, s.product): s for s in meta.sites if s.reason_code == "NO_VALUES"}
    rewritten = {(s.name, s.product) for s in report.rewritten}
    infinite = ("blocks.infinite.attention.k.weight", "qk")
    assert set(known) == rewritten | {infinite}
    for site in report.rewritten:
        other = known[site.name, site.product]
        for name in ("heads", "kv_heads", "head_dim", "decomposed", "in_features", "side"):
            assert getattr(other, name) == getattr(site, name)
        assert other.remedy == REMEDIES[Reason.NO_VALUES]
        assert other.contractions == site.contractions
    rest = {(s.product, s.reason_code, s.module) for s in meta.skipped} - {
        (s.product, s.reason_code, s.module) for s in known.values()
    }
    assert rest == {
        (s.product, s.reason_code, s.module)
        for s in report.skipped
        if s.reason_code != "NOT_FINITE"
    }


def test_cross_attention_without_values() -> None:
    """Sizes are those of either side: here queries are many and keys are of other features."""

    class Cross(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.v = nn.Linear(9, H * D), nn.Linear(9, H * D)
            seeded(self)

    model = Cross().to("meta")
    args = (example().to("meta"), randn(B, 3, 9).to("meta"))
    sites = bda_fx.analyze(model, args, options=FULL).sites
    assert {(s.name, s.side, s.in_features) for s in sites} <= {
        ("k.weight", "kv", 9),
        ("v.weight", "kv", 9),
        ("q.weight", "qo", E),
        ("o.weight", "qo", E),
    }
    assert {(s.heads, s.kv_heads, s.decomposed, s.reason_code) for s in sites} == {
        (H, H, D, "NO_VALUES")
    }


def test_a_program_without_attention_says_so() -> None:
    report = bda_fx.analyze(nn.Linear(E, E), (example(),))
    assert report.sites == ()
    assert "No attention product found" in str(report)
