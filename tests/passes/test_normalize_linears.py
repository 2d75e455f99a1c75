"""Every spelling of a linear comes out as ``aten.linear``, and goes back if it was for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bda_fx.passes.canonicalize import canonicalize_module
from bda_fx.passes.label_features import live_nodes
from bda_fx.passes.normalize_linears import normalize_linears, restore_spellings
from tests import tolerances
from tests.programs import B, E, S, assert_close, randn

aten = torch.ops.aten
OUT = 6


class Spelled(nn.Module):
    def __init__(
        self, shape: tuple[int, ...], body: Callable[[Tensor, Tensor, Tensor], Any]
    ) -> None:
        super().__init__()
        self.w = nn.Parameter(randn(*shape))
        self.b = nn.Parameter(randn(OUT, seed=1))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x, self.w, self.b)


FIRES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Any]]] = {
    "addmm": ((E, OUT), lambda x, w, b: torch.addmm(b, x.view(-1, E), w)),
    "mm": ((E, OUT), lambda x, w, b: x.view(-1, E) @ w),
    "matmul": ((E, OUT), lambda x, w, b: x @ w),
    "matmul with the weight first": ((OUT, E), lambda x, w, b: w @ x.transpose(1, 2)),
    "matmul and bias": ((E, OUT), lambda x, w, b: x @ w + b),
    "bias first": ((E, OUT), lambda x, w, b: b + x @ w),
    "einsum": ((E, OUT), lambda x, w, b: torch.einsum("bse,ef->bsf", x, w)),
    "einsum by heads": ((E, 2, 3), lambda x, w, b: torch.einsum("bse,ehd->bshd", x, w)),
    "conv1d": ((OUT, E, 1), lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b)),
    "conv2d": ((OUT, E, 1, 1), lambda x, w, b: F.conv2d(x.transpose(1, 2)[..., None], w, b)),
    "tensordot": ((E, OUT), lambda x, w, b: torch.tensordot(x, w, 1)),
}
STAYS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Any]]] = {
    "kernel of three": ((OUT, E, 3), lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b)),
    "groups": ((OUT, E // 2, 1), lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b, groups=2)),
    "stride": ((OUT, E, 1), lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b, stride=2)),
    "padding": ((OUT, E, 1), lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b, padding=1)),
    "alpha": ((E, OUT), lambda x, w, b: torch.addmm(b, x.view(-1, E), w, alpha=2.0)),
    "weight that is computed": ((E, OUT), lambda x, w, b: x @ (w * x.mean())),
}


def run(name: str, cases: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    shape, body = cases[name]
    model = Spelled(shape, body)
    x = randn(B, S, E)
    program = canonicalize_module(model, (x,))
    normalize_linears(program)
    live = [n.target for n in live_nodes(program.graph)]
    inputs = [{"w": model.w, "b": model.b}.get(program.names.get(p.name, ""), x)
              for p in program.graph.find_nodes(op="placeholder")]  # fmt: skip
    with torch.no_grad():
        return program, (program.module(*inputs)[0], model(x)), live


@pytest.mark.parametrize("name", FIRES)
def test_spelled_as_linear(name: str) -> None:
    _, (got, expected), live = run(name, FIRES)
    assert live.count(aten.linear.default) == 1
    assert_close(got, expected, tolerances.FLOAT32_PRODUCT)


@pytest.mark.parametrize("name", ["matmul and bias", "bias first", "addmm", "conv1d"])
def test_the_bias_is_taken_in(name: str) -> None:
    program, _, _ = run(name, FIRES)
    linear = [n for n in program.graph.nodes if n.target is aten.linear.default and n.users][-1]
    assert len(linear.args) == 3


@pytest.mark.parametrize("name", STAYS)
def test_left_as_it_is(name: str) -> None:
    _, (got, expected), live = run(name, STAYS)
    assert aten.linear.default not in live
    assert_close(got, expected, tolerances.FLOAT32_PRODUCT)


@pytest.mark.parametrize("name", FIRES)
def test_restored_where_nothing_was_rewritten(name: str) -> None:
    shape, body = FIRES[name]
    x = randn(B, S, E)
    before = [n.target for n in canonicalize_module(Spelled(shape, body), (x,)).graph.nodes]
    program, _, _ = run(name, FIRES)
    restore_spellings(program)
    assert [n.target for n in program.graph.nodes if n.op != "placeholder"] == before[
        len(program.graph.find_nodes(op="placeholder")) :
    ]


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    program = canonicalize_module(Conv1D(OUT, E), (randn(B, S, E),))
    normalize_linears(program)
    assert aten.linear.default in [n.target for n in program.graph.nodes if n.users]
