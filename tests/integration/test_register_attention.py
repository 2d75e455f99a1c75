"""Attention ops of the user's own: unknown until ``register_attention`` says how to read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator

import bda_fx
from bda_fx.passes.op_rules import ATTENTION, argument
from tests import tolerances
from tests.programs import (
    FULL,
    B,
    D,
    E,
    H,
    S,
    assert_close,
    example,
    randn,
    rewrite_in_float64,
    seeded,
)

CAP = 5.0
EAGER = {"inner": "eager", "strict": True, **FULL}


@pytest.fixture(autouse=True)
def _unregister() -> Iterator[None]:
    """Forget what a test registers, and the graphs compiled with it."""
    before = dict(ATTENTION)
    torch._dynamo.reset()
    yield
    ATTENTION.clear()
    ATTENTION.update(before)
    torch._dynamo.reset()


def capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of [*, h, t, d] with a softcap, and the log-sum-exp of its scores."""
    times = q.shape[-3] // k.shape[-3]
    k, v = (t.repeat_interleave(times, -3) for t in (k, v))
    scores = CAP * (q @ k.mT / (CAP * q.shape[-1] ** 0.5)).tanh()
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@torch.library.custom_op("bda_fx_register::bhtd", mutates_args=())
def attend_bhtd(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return capped(query, key, value)[0].contiguous()


@torch.library.custom_op("bda_fx_register::bthd", mutates_args=())
def attend_bthd(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = (t.transpose(1, 2) for t in (query, key, value))
    return capped(*heads)[0].transpose(1, 2).contiguous()


@torch.library.custom_op("bda_fx_register::thd", mutates_args=())
def attend_thd(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = (t.transpose(0, 1) for t in (query, key, value))
    return capped(*heads)[0].transpose(0, 1).contiguous()


@torch.library.custom_op("bda_fx_register::named", mutates_args=())
def attend_named(
    scale: float, v: Tensor, k: Tensor, q: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Arguments in an order and under names of its own; the log-sum-exp beside the output."""
    out, lse = capped(scale * q, k, v, bias)
    return out.contiguous(), lse.contiguous()


for op in (attend_bhtd, attend_bthd, attend_thd):
    op.register_fake(lambda query, key, value: query.new_empty(query.shape))


@attend_named.register_fake
def _(
    scale: float, v: Tensor, k: Tensor, q: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1])


OPS = {"bhtd": attend_bhtd, "bthd": attend_bthd, "thd": attend_thd}


class Custom(nn.Module):
    """q, k, v, o linears around an op of the given layout."""

    def __init__(self, layout: str = "bthd", kv_heads: int = H) -> None:
        super().__init__()
        self.layout = layout
        self.q = nn.Linear(E, H * D)
        self.k, self.v = nn.Linear(E, kv_heads * D), nn.Linear(E, kv_heads * D)
        self.o = nn.Linear(H * D, E)
        seeded(self)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, heads, D] each."""
        q, k, v = (f(x).unflatten(-1, (-1, D)) for f in (self.q, self.k, self.v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, T, heads, D]"""
        if self.layout == "bhtd":
            return attend_bhtd(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        if self.layout == "thd":
            return attend_thd(*(t.flatten(0, 1) for t in (q, k, v))).unflatten(0, q.shape[:2])
        return attend_bthd(q, k, v)

    def forward(self, x: Tensor) -> Any:
        return self.o(self.attend(*self.heads(x)).flatten(-2))


def names(report: bda_fx.Report) -> list[tuple[str, str]]:
    return sorted((s.product, s.name) for s in report.rewritten)


BOTH = [("qk", "k.weight"), ("vo", "v.weight")]


@pytest.mark.parametrize("layout", OPS)
def test_unknown_at_first_and_the_remedy_is_named(layout: str) -> None:
    report = rewrite_in_float64(Custom(layout))
    assert not report.rewritten
    assert {s.product: s.reason_code for s in report.skipped} == {
        "qk": "UNKNOWN_OP",
        "vo": "UNKNOWN_OP",
    }
    for skip in report.skipped:
        assert "bda_fx.register_attention" in (skip.remedy or "")
        assert layout in (skip.node or "")


@pytest.mark.parametrize("kv_heads", [1, 2, H])
@pytest.mark.parametrize("layout", OPS)
def test_registered(layout: str, kv_heads: int) -> None:
    bda_fx.register_attention(OPS[layout], layout=layout)
    report = rewrite_in_float64(Custom(layout, kv_heads))
    assert names(report) == BOTH
    assert not report.skipped
    sizes = {(s.heads, s.kv_heads, s.decomposed, s.in_features) for s in report.rewritten}
    assert sizes == {(H, kv_heads, D, E)}


@pytest.mark.parametrize("layout", OPS)
def test_dynamic_tokens(layout: str) -> None:
    bda_fx.register_attention(OPS[layout], layout=layout)
    report = rewrite_in_float64(
        Custom(layout),
        others=((randn(B, 9, E),), (randn(B, 2, E),)),
        dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}},
    )
    assert names(report) == BOTH


@pytest.mark.parametrize("layout", OPS)
@pytest.mark.parametrize("kv_heads", [2, H])
def test_compiled(layout: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Custom(layout, kv_heads).double().requires_grad_(False)
    bda_fx.register_attention(OPS[layout], layout=layout)
    found = _plans(monkeypatch)
    compiled = torch.compile(model, backend="bda", options=EAGER)
    for tokens in (S, 9, 2):
        x = randn(B, tokens, E, dtype=torch.float64)
        assert_close(compiled(x), model(x), tolerances.FLOAT64_FRESH)
    assert found
    assert all(products == ["qk", "vo"] for products in found)


def test_compiled_without_a_rule_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Custom().double().requires_grad_(False)
    found = _plans(monkeypatch)
    x = example(dtype=torch.float64)
    compiled = torch.compile(model, backend="bda", options=EAGER)
    assert torch.equal(compiled(x), model(x))
    assert found == [[]]


def _plans(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The products that each compiled graph has rewritten."""
    import bda_fx.rewrite_dynamo as rewrite_dynamo

    found: list[list[str]] = []
    transform = rewrite_dynamo.transform

    def noting(*args: Any, **kwargs: Any) -> Any:
        outcome = transform(*args, **kwargs)
        found.append(sorted(item.site.product for item in outcome.plan.sites))
        return outcome

    monkeypatch.setattr(rewrite_dynamo, "transform", noting)
    return found


class Named(Custom):
    """``how``: what is done with keys, mask and log-sum-exp."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        bias = None
        if self.how == "mask of the input":
            bias = x[:, None, None, :, 0].expand(-1, H, x.shape[1], -1).contiguous()
        if self.how == "mask of keys":
            bias = k[..., 0][:, :, None].expand(-1, -1, x.shape[1], -1).contiguous()
        if self.how == "rotated":
            k = k + k.flip(-1)
        if self.how == "values unlike features":
            v = v * torch.arange(1.0, D + 1).to(x)
        out, lse = attend_named(0.7, k=k, v=v, q=q, bias=bias)
        y = self.o(out.transpose(1, 2).flatten(-2))
        return (y, lse) if self.how == "log-sum-exp returned" else y


@pytest.mark.parametrize(
    ("how", "rewritten", "skipped"),
    [
        ("", BOTH, []),
        ("mask of the input", BOTH, []),
        ("log-sum-exp returned", BOTH, []),
        ("rotated", BOTH[1:], [("qk", "ROTATED")]),
        ("values unlike features", BOTH[:1], [("vo", "NOTHING_SAVED")]),
    ],
)
def test_names_and_order_of_arguments(
    how: str, rewritten: list[tuple[str, str]], skipped: list[tuple[str, str]]
) -> None:
    bda_fx.register_attention(attend_named, q="q", k="k", v="v")
    report = rewrite_in_float64(Named(how))
    assert names(report) == rewritten
    assert [(s.product, s.reason_code) for s in report.skipped] == skipped


def test_features_that_a_mask_reads_are_left_out() -> None:
    bda_fx.register_attention(attend_named, q="q", k="k", v="v")
    report = rewrite_in_float64(Named("mask of keys"))
    assert {s.product: s.decomposed for s in report.rewritten} == {"qk": D - 1, "vo": D}


@pytest.mark.parametrize("side", ["kv", "qo"])
def test_either_side(side: str) -> None:
    bda_fx.register_attention(attend_bthd, layout="bthd")
    report = rewrite_in_float64(Custom(), options={**FULL, "side": side})
    assert [s.side for s in report.rewritten] == [side, side]


# -- what may be registered -------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        attend_bthd,
        torch.ops.bda_fx_register.bthd,
        torch.ops.bda_fx_register.bthd.default,
    ],
    ids=["custom_op", "packet", "overload"],
)
def test_every_name_of_an_op(op: Any) -> None:
    bda_fx.register_attention(op, layout="bthd")
    assert names(rewrite_in_float64(Custom())) == BOTH


def test_the_last_registration_counts() -> None:
    bda_fx.register_attention(attend_bthd, q="value", v="query")
    bda_fx.register_attention(attend_bthd, layout="bthd")
    assert names(rewrite_in_float64(Custom())) == BOTH


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_an_unknown_argument_is_named_with_those_there_are(argument: str) -> None:
    with pytest.raises(ValueError, match=r"no argument 'queries'.*query.*key.*value"):
        bda_fx.register_attention(attend_bthd, **{argument: "queries"})
    assert attend_bthd._opoverload not in ATTENTION


@pytest.mark.parametrize("layout", ["", "bht", "bhd", "hhtd", "bhttd", "bhtdd", "bhsd", "BHTD"])
def test_a_layout_that_is_none(layout: str) -> None:
    with pytest.raises(ValueError, match=r"layout .*expected one t and one d"):
        bda_fx.register_attention(attend_bthd, layout=layout)
    assert attend_bthd._opoverload not in ATTENTION


@pytest.mark.parametrize("op", [capped, "aten::bmm", None, torch.bmm, nn.MultiheadAttention])
def test_what_is_no_op(op: Any) -> None:
    with pytest.raises(TypeError, match=r"op is an op of torch\.ops or what .*custom_op"):
        bda_fx.register_attention(op)


class OwnOrder(HigherOrderOperator):
    """A higher-order op, which has no schema: its call says what its arguments are."""

    def __init__(self) -> None:
        super().__init__("bda_fx_register_own_order")

    def __call__(self, keys: Tensor, values: Tensor, queries: Tensor, score_mod: Any) -> Any:
        return super().__call__(keys, values, queries, score_mod)


class Unnamed(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__("bda_fx_register_unnamed")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_a_higher_order_op_is_registered_by_the_names_of_its_call() -> None:
    op = OwnOrder()
    with pytest.raises(ValueError, match=r"no argument 'query'.*keys.*values.*queries"):
        bda_fx.register_attention(op)
    bda_fx.register_attention(op, q="queries", k="keys", v="values")
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("k", "v", "q")]
    node = graph.call_function(op, (*nodes, None))
    rule = ATTENTION[op]
    assert [argument(node, name) for name in (rule.k, rule.v, rule.q)] == nodes


def test_a_higher_order_op_that_names_no_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no argument 'query'; it has \[\]"):
        bda_fx.register_attention(Unnamed())
