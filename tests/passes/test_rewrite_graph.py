"""The rewritten graph: plain ATen, true fake values, live symbols, no dead weights, idempotent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import bda_fx
from bda_fx.passes.emit_node import EMITTED
from tests.programs import (
    FULL,
    Attention,
    B,
    D,
    E,
    FusedAttention,
    H,
    example,
    randn,
    rewrite_in_float64,
    seeded,
)

PLAIN_OPS = {
    "aten.linear.default", "aten.index_select.default", "aten.slice.Tensor", "aten.cat.default",
    "aten.view.default", "aten.add.Tensor", "aten.unsqueeze.default", "aten.expand.default",
    "aten.constant_pad_nd.default", "aten.clone.default", "aten.sym_size.int",
}  # fmt: skip


def rewritten(model: nn.Module, *, dynamic: bool = False, **options: Any) -> ExportedProgram:
    shapes = {"x": {1: torch.export.Dim.DYNAMIC}} if dynamic else None
    result = bda_fx.rewrite(model, (example(),), dynamic_shapes=shapes, options={**FULL, **options})
    assert result.report.rewritten
    return result.program


def emitted(program: ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if EMITTED in node.meta]


def test_emits_plain_aten_with_fake_values_and_source() -> None:
    program = rewritten(Attention())
    assert emitted(program)
    for node in emitted(program):
        assert str(node.target) in PLAIN_OPS
        assert "val" in node.meta
        assert "programs.py" in node.meta["stack_trace"]


def test_fake_values_are_what_the_graph_computes() -> None:
    program = rewritten(Attention(kv_heads=2))

    class Compare(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            expected = n.meta.get("val")
            if isinstance(expected, Tensor):
                assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
            return result

    Compare(program.graph_module).run(*program._graph_module_flat_inputs((example(),), {}))


def test_symbols_stay_symbolic() -> None:
    program = rewritten(Attention(), dynamic=True)
    assert len(program.range_constraints) == 1
    module = program.module()
    for length in (2, 3, 11, 64):
        assert module(randn(B, length, E)).shape == (B, length, E)


@pytest.mark.parametrize("basis", ["window", "first"])
def test_contiguous_rows_are_slices(basis: str) -> None:
    counts = Counter(str(n.target) for n in emitted(rewritten(Attention(), basis=basis)))
    assert counts["aten.slice.Tensor"]
    assert not counts["aten.index_select.default"]


def test_scattered_rows_are_gathered_once_for_each_projection() -> None:
    counts = Counter(str(n.target) for n in emitted(rewritten(Attention(), basis="pivot")))
    assert counts["aten.index_select.default"] == 4  # basis and rest, for K and for V


def test_one_basis_for_k_and_v_of_one_linear_is_gathered_once() -> None:
    program = rewritten(FusedAttention("chunk"), basis="first", noise_budget=1e9)
    (x,) = (n for n in program.graph.find_nodes(op="placeholder") if n.name == "x")
    assert sum(n.target is torch.ops.aten.slice.Tensor for n in x.users) == 2


@pytest.mark.parametrize("order", ["chunk", "interleaved", "permuted", "strided"])
@pytest.mark.parametrize("size", ["full", 0.5])
@pytest.mark.parametrize("budget", [2.0, 1e9], ids=["own bases", "one basis"])
def test_fused_layouts_come_out_in_their_order(order: str, size: Any, budget: float) -> None:
    report = rewrite_in_float64(
        FusedAttention(order), options={"basis_size": size, "noise_budget": budget}
    )
    assert sorted(s.product for s in report.rewritten) == ["qk", "vo"]


def test_no_projection_is_left_where_the_basis_is_everything() -> None:
    """One head as wide as the input: K' = x and V' = x, r = E."""
    model = Attention(heads=1, head_dim=E)
    program = rewritten(model)
    matrices = [name for name, value in program.state_dict.items() if value.dim() == 2]
    assert sorted(matrices) == ["o.weight", "q.weight"]
    rewrite_in_float64(model)


def test_heads_wider_than_the_input() -> None:
    rewrite_in_float64(Attention(heads=2, head_dim=E + 4))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("gqa", ["repeat_interleave", "expand", "enable_gqa"])
@pytest.mark.parametrize("core", ["sdpa", "spelled"])
@pytest.mark.parametrize("bias", [True, False])
def test_groups(kv_heads: int, gqa: str, core: str, bias: bool) -> None:
    if core == "spelled" and gqa == "enable_gqa":
        gqa = "expand"
    report = rewrite_in_float64(Attention(kv_heads=kv_heads, gqa=gqa, core=core, bias=bias))
    assert [(s.heads, s.kv_heads) for s in report.rewritten] == [(H, kv_heads)] * 2


def test_no_dead_weights() -> None:
    program = rewritten(Attention())
    read = {n.name for n in program.graph.find_nodes(op="placeholder") if n.users}
    targets = {s.target for s in program.graph_signature.input_specs if s.arg.name in read}
    assert set(program.state_dict) <= targets
    assert not {"k.weight", "v.weight"} & set(program.state_dict)
    assert {"q.weight", "o.weight"} <= set(program.state_dict)


def test_a_weight_that_another_op_reads_stays() -> None:
    class Tied(Attention):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            return super().forward(x) * self.k.weight.sum()

    program = rewritten(seeded(Tied()))
    assert "k.weight" in program.state_dict
    assert "v.weight" not in program.state_dict


@pytest.mark.parametrize("basis", ["pivot", "window"])
@pytest.mark.parametrize(
    "model", [Attention(), Attention(kv_heads=2), FusedAttention("interleaved")], ids=str
)
def test_a_second_pass_changes_nothing(model: nn.Module, basis: str) -> None:
    once = rewritten(model, basis=basis)
    again = bda_fx.rewrite(once, options={**FULL, "basis": basis})
    assert again.report.rewritten == ()
    assert set(again.program.state_dict) == set(once.state_dict)
    ops = [[str(n.target) for n in p.graph.nodes] for p in (once, again.program)]
    assert ops[0] == ops[1]


def test_an_output_linear_may_be_the_program_output() -> None:
    program = rewritten(Attention())
    specs = program.graph_signature.output_specs
    assert [s.arg.name for s in specs] == [n.name for n in program.graph.output_node().args[0]]


def test_params_and_macs_in_the_report() -> None:
    report = bda_fx.rewrite(Attention(), (example(),), options={**FULL, "basis": "first"}).report
    site = next(s for s in report.rewritten if s.product == "qk")
    features = H * D
    assert site.params_before == features * E + features
    assert site.params_after == features * (E - D) + features
    assert site.macs_per_token_before == features * E
    assert site.macs_per_token_after == features * (E - D)
