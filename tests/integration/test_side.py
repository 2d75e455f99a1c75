"""The other side: projections of queries and outputs are decomposed where that saves more."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bda_fx
from bda_fx.report import Report, SiteReport
from tests import tolerances, zoo
from tests.programs import (
    FULL,
    Attention,
    B,
    D,
    E,
    FusedAttention,
    H,
    assert_close,
    example,
    randn,
    rewrite_in_float64,
    seeded,
)

MANY, FEW = 11, 3
BUDGET = 2.0
DYNAMIC = torch.export.Dim.DYNAMIC


def tokens(n: int, seed: int = 0) -> Tensor:
    return randn(B, n, E, seed=200 + seed)


def many_queries(seed: int = 0) -> tuple[Tensor, Tensor]:
    return tokens(MANY, seed), tokens(FEW, seed + 1)


def few_queries(seed: int = 0) -> tuple[Tensor, Tensor]:
    return tokens(FEW, seed), tokens(MANY, seed + 1)


def decomposed(report: Report) -> dict[str, tuple[str, str | None]]:
    """Product → name and side of what is decomposed."""
    assert not report.skipped
    return {s.product: (s.name, s.side) for s in report.rewritten}


KV = {"qk": ("k.weight", "kv"), "vo": ("v.weight", "kv")}
QO = {"qk": ("q.weight", "qo"), "vo": ("o.weight", "qo")}


def saved(site: SiteReport) -> int:
    assert site.params_before is not None
    assert site.params_after is not None
    return site.params_before - site.params_after


@pytest.mark.parametrize("core", ["sdpa", "spelled"])
@pytest.mark.parametrize(
    ("args", "side", "expected"),
    [
        ((example(),), "auto", KV),
        ((example(),), "kv", KV),
        ((example(),), "qo", QO),
        (many_queries(), "auto", QO),
        (many_queries(), "kv", KV),
        (many_queries(), "qo", QO),
        (few_queries(), "auto", KV),
        (few_queries(), "kv", KV),
        (few_queries(), "qo", QO),
    ],
    ids=[
        f"{tokens}-{side}"
        for tokens in ("self", "many queries", "few queries")
        for side in ("auto", "kv", "qo")
    ],
)
def test_side(core: str, args: tuple[Any, ...], side: str, expected: Any) -> None:
    report = rewrite_in_float64(Attention(core=core), args, options={**FULL, "side": side})
    assert decomposed(report) == expected
    assert [(s.heads, s.kv_heads, s.decomposed) for s in report.rewritten] == [(H, H, D)] * 2
    assert [s.in_features for s in report.rewritten] == [E, E]


@pytest.mark.parametrize("basis", ["pivot", "window", "first", "residual-min"])
@pytest.mark.parametrize("size", ["full", 0.5])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_bases_and_sizes(basis: str, size: Any, bias: bool) -> None:
    """r · D parameters a head are saved on either side, less the two indices of a scattered one."""
    options = {"side": "qo", "basis": basis, "basis_size": size}
    report = rewrite_in_float64(Attention(bias=bias), options=options)
    assert decomposed(report) == QO
    rank = D if size == "full" else D // 2
    for site in report.rewritten:
        assert site.basis_size == rank
        assert site.macs_per_token_before == H * D * E
        assert site.macs_per_token_after == H * D * (E - rank)
        index = H * D * rank - saved(site)
        assert index == 0 if basis != "pivot" else 0 <= index <= 2 * E


def test_weights_of_the_program_shrink() -> None:
    options = {"side": "qo", "basis": "window", "basis_size": "full"}
    rewritten = bda_fx.rewrite(Attention(), (example(),), options=options)
    report = rewritten.report
    assert report.bytes_before is not None
    assert report.bytes_after is not None
    assert report.bytes_before - report.bytes_after == 2 * 4 * H * D * D
    assert not {"q.weight", "o.weight"} & set(rewritten.program.state_dict)


@pytest.mark.parametrize("basis", ["window", "first"])
def test_contiguous_rows_need_no_gather(basis: str) -> None:
    options = {"side": "qo", "basis": basis, "basis_size": "full"}
    program = bda_fx.rewrite(Attention(), (example(),), options=options).program
    counts = Counter(str(node.target) for node in program.graph.nodes)
    assert not counts["aten.index_select.default"]
    assert not counts["aten.index.Tensor"]


def test_the_basis_is_all_outputs() -> None:
    """A head at least as wide as the model: the output projection has r = E."""
    report = rewrite_in_float64(Attention(heads=1, head_dim=E), options={**FULL, "side": "qo"})
    assert decomposed(report) == QO
    assert [s.basis_size for s in report.rewritten] == [E, E]
    assert [s.macs_per_token_after for s in report.rewritten] == [0, 0]


@pytest.mark.parametrize("outputs", [D - 1, D, D + 1])
def test_few_outputs(outputs: int) -> None:
    """An output projection onto about as many features as a head has."""
    model = Attention()
    model.o = seeded(nn.Linear(H * D, outputs), seed=3)  # type: ignore[assignment]
    report = rewrite_in_float64(model, options={**FULL, "side": "qo"})
    (vo,) = (s for s in report.rewritten if s.product == "vo")
    assert (vo.name, vo.side, vo.in_features) == ("o.weight", "qo", outputs)
    assert vo.basis_size == min(D, outputs)


def test_heads_wider_than_the_model() -> None:
    report = rewrite_in_float64(Attention(heads=2, head_dim=E + 4), options={**FULL, "side": "qo"})
    assert decomposed(report) == QO


@pytest.mark.parametrize("order", ["chunk", "interleaved", "permuted", "strided"])
@pytest.mark.parametrize("size", ["full", 0.5])
def test_fused_queries(order: str, size: Any) -> None:
    report = rewrite_in_float64(FusedAttention(order), options={"side": "qo", "basis_size": size})
    names = {s.product: (s.name, s.side) for s in report.rewritten}
    assert names == {"qk": ("qkv.weight", "qo"), "vo": ("o.weight", "qo")}


class StridedOutput(Attention):
    """Features of a head are ``H`` columns apart in the output projection, and last to first."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x, x if memory is None else memory)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.permute(0, 2, 3, 1).flatten(-2).flip(-1))


@pytest.mark.parametrize("basis", ["pivot", "window"])
@pytest.mark.parametrize("side", ["kv", "qo"])
def test_an_output_projection_with_strided_heads(basis: str, side: str) -> None:
    options = {"side": side, "basis": basis, "basis_size": "full"}
    report = rewrite_in_float64(StridedOutput(), options=options)
    assert decomposed(report) == {"kv": KV, "qo": QO}[side]


def test_grouped_queries_have_no_other_side() -> None:
    """One identity cannot serve the queries of a group."""
    report = rewrite_in_float64(Attention(kv_heads=2), options={**FULL, "side": "qo"})
    assert not report.rewritten
    assert {s.product: s.reason_code for s in report.skipped} == {
        "qk": "NOT_REQUESTED",
        "vo": "NOT_REQUESTED",
    }
    assert all("side='qo'" in str(s.reason) and s.remedy for s in report.skipped)


def test_grouped_queries_take_their_only_side() -> None:
    report = rewrite_in_float64(Attention(kv_heads=2), many_queries())
    assert decomposed(report) == KV


def test_one_product_alone() -> None:
    for product in ("qk", "vo"):
        options = {**FULL, "side": "qo", "products": (product,)}
        report = rewrite_in_float64(Attention(), options=options)
        assert [(s.name, s.side) for s in report.rewritten] == [QO[product]]
        assert [s.reason_code for s in report.skipped] == ["NOT_REQUESTED"]


def test_each_attention_of_a_model_has_a_side_of_its_own() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.cross = Attention(seed=1), Attention(seed=2)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.cross(x + self.own(x), memory)

    report = rewrite_in_float64(Both(), many_queries())
    assert sorted((s.name, s.side) for s in report.rewritten) == [
        ("cross.o.weight", "qo"),
        ("cross.q.weight", "qo"),
        ("own.k.weight", "kv"),
        ("own.v.weight", "kv"),
    ]


@pytest.mark.parametrize("side", ["auto", "kv", "qo"])
def test_dynamic_sizes(side: str) -> None:
    """The example's sizes choose the side; it serves all others."""
    shapes = {"x": {0: DYNAMIC, 1: DYNAMIC}, "memory": {0: DYNAMIC, 1: DYNAMIC}}
    others = (few_queries(5), (randn(1, 4, E), randn(1, 17, E)))
    report = rewrite_in_float64(
        Attention(),
        many_queries(),
        others=others,
        dynamic_shapes=shapes,
        options={**FULL, "side": side},
    )
    assert decomposed(report) == {"auto": QO, "kv": KV, "qo": QO}[side]


@pytest.mark.parametrize("args", [(example(),), many_queries()], ids=["self", "many queries"])
def test_within_the_noise_budget(args: tuple[Any, ...]) -> None:
    report = rewrite_in_float64(Attention(), args, options={"side": "qo", "noise_budget": BUDGET})
    assert decomposed(report) == QO
    assert report.noise_ratio is not None
    assert report.noise_ratio <= BUDGET


# -- through the backend ----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["auto", "kv", "qo"])
@pytest.mark.parametrize("basis", ["pivot", "window"])
def test_compiled(side: str, basis: str) -> None:
    """At the example's sizes, at others, and after the weights have changed."""
    torch._dynamo.reset()
    model = Attention().double().requires_grad_(False)
    options = {"inner": "eager", "strict": True, "side": side, "basis": basis, **FULL}
    compiled = torch.compile(model, backend="bda", options=options)
    sizes = (many_queries(), many_queries(3), few_queries(), (tokens(6), tokens(5)))
    for step in range(2):
        for args in sizes:
            q, kv = (a.double() for a in args)
            assert_close(compiled(q, kv), model(q, kv), tolerances.FLOAT64_FRESH)
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(randn(*parameter.shape, seed=10 * step + i, dtype=torch.float64) / 9)


# -- a model that needs it --------------------------------------------------------------------


def test_cross_attention_of_a_diffusion_model() -> None:
    """Image tokens outnumber those of the text: every attn2 is decomposed on their side."""
    case = next(c for c in zoo.CASES if (c.architecture, c.attention) == ("diffusers_unet", "sdpa"))
    made = zoo.make(case)
    report = bda_fx.analyze(made.model, kwargs=made.kwargs, options=FULL)
    sides = {
        attention: {s.side for s in report.rewritten if f".{attention}." in s.name}
        for attention in ("attn1", "attn2")
    }
    assert sides == {"attn1": {"kv"}, "attn2": {"qo"}}
    cross = Counter(s.name.rsplit(".attn2.")[-1] for s in report.rewritten if "attn2" in s.name)
    assert cross == {"to_q.weight": 4, "to_out.0.weight": 4}
    assert not report.skipped
