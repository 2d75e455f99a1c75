"""Modules, exported programs and Dynamo graphs become one functional graph with named weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from bda_fx.passes.canonicalize import (
    Program,
    canonicalize_dynamo,
    canonicalize_exported,
    canonicalize_module,
    constant_nodes,
)
from tests.programs import Attention, B, E, S, example, randn, seeded

aten = torch.ops.aten


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def from_dynamo(model: nn.Module, *args: Tensor, dynamic: bool = False) -> Program:
    found: list[Program] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(canonicalize_dynamo(module, inputs))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    (program,) = found
    return program


def is_functional(program: Program) -> bool:
    return not any(
        t._schema.is_mutable for t in targets(program) if isinstance(t, torch._ops.OpOverload)
    )


NAMES = {f"{linear}.{kind}" for linear in "qkvo" for kind in ("weight", "bias")}


def test_three_ways_in_give_the_same_names_and_linears() -> None:
    model = Attention()
    exported = torch.export.export(model, (example(),))
    programs = (
        canonicalize_module(model, (example(),)),
        canonicalize_exported(exported),
        from_dynamo(model, example()),
    )
    for program in programs:
        assert set(program.names.values()) == NAMES
        assert targets(program).count(aten.linear.default) == 4
        assert is_functional(program)
        assert all(program.tensors[n].shape for n in program.names)


def test_composite_contractions_are_spelled_with_bmm() -> None:
    class Einsum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bsd,btd->bst", x, x)

    for program in (canonicalize_module(Einsum(), (example(),)), from_dynamo(Einsum(), example())):
        assert aten.bmm.default in targets(program)
        assert aten.einsum.default not in targets(program)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(E, E)
        self.calls = nn.Buffer(torch.zeros(()))
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = self.linear(x)
        y[..., 0].mul_(2)
        return y + self.calls


def test_mutated_buffers_are_no_constants() -> None:
    program = canonicalize_module(InPlace(), (example(),))
    assert is_functional(program)
    assert set(program.names.values()) == {"linear.weight", "linear.bias"}


def test_dynamo_writes_input_mutations_back_at_the_end() -> None:
    program = from_dynamo(InPlace(), example())
    assert set(program.names.values()) == {"linear.weight", "linear.bias"}
    stores = [n for n in program.graph.nodes if n.target is aten.copy_.default]
    assert [n.args[0].op for n in stores] == ["placeholder"]
    model = InPlace()
    inputs = [
        {"linear.weight": model.linear.weight, "linear.bias": model.linear.bias}.get(
            program.names.get(node.name, "")
        )
        for node in program.graph.find_nodes(op="placeholder")
    ]
    free = [i for i, value in enumerate(inputs) if value is None]
    for i in free:
        shape = program.graph.find_nodes(op="placeholder")[i].meta["val"].shape
        inputs[i] = model.calls if len(shape) == 0 else example()
    with torch.no_grad():
        (result,) = program.module(*inputs)
        assert float(model.calls) == 1
        assert torch.equal(result, InPlace()(example()))


def test_tied_weights_are_one_placeholder() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(E, E), nn.Linear(E, E)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    program = canonicalize_module(Tied(), (example(),))
    weights = {n.args[1] for n in program.graph.nodes if n.target is aten.linear.default}
    assert len(weights) == 1


def test_equal_expressions_of_weights_are_one_node() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(randn(E, E))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.t() + x @ self.w.t()

    program = canonicalize_module(Twice(), (example(),))
    assert targets(program).count(aten.t.default) + targets(program).count(aten.transpose.int) == 1
    assert len(constant_nodes(program)) == 2


def test_no_fused_fast_path_and_the_switch_is_put_back() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(E, 4, 24, batch_first=True).eval()
    program = canonicalize_module(layer, (example(),))
    assert aten._transformer_encoder_layer_fwd.default not in targets(program)
    assert aten.scaled_dot_product_attention.default in targets(program)
    assert torch.backends.mha.get_fastpath_enabled()


def test_dynamic_sizes_stay_symbolic() -> None:
    shapes = {"x": {1: torch.export.Dim.DYNAMIC}}
    exported = canonicalize_module(Attention(), (example(),), None, shapes)
    for program in (exported, from_dynamo(Attention(), randn(B, S, E), dynamic=True)):
        linear = next(n for n in program.graph.nodes if n.target is aten.linear.default)
        assert isinstance(linear.meta["val"].shape[1], torch.SymInt)


class Cache:
    """An output that, put together, makes tensors and appends to them, as a DynamicCache does."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = torch.cat([torch.tensor([]), kept])


torch.utils._pytree.register_pytree_node(
    Cache,
    lambda cache: ([cache.kept], None),
    lambda parts, _: Cache(*parts),
    serialized_type_name="tests.passes.test_canonicalize.Cache",
)


def test_outputs_that_compute_when_they_are_put_together() -> None:
    class Cached(Attention):
        def forward(self, x: Tensor) -> tuple[Tensor, Cache]:  # type: ignore[override]
            out = super().forward(x).clone().add_(1.0)  # not canonical, so it is traced once more
            return out, Cache(x.flatten())

    model = Cached()
    program = canonicalize_module(model, (example(),))
    assert is_functional(program)
    assert program.exported is not None
    out, cache = program.exported.module()(example())
    assert isinstance(cache, Cache)
    assert torch.equal(cache.kept, example().flatten())
    assert torch.equal(out, model(example())[0])
