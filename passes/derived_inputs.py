"""Nodes for the derived weights of a rewritten graph, and the shapes that need more than one op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes.emit_node import emit, fake_mode_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Computed:
    """A derived tensor that is made of others: ``make`` of those under the keys ``of``."""

    make: Callable[[Any], Tensor]
    of: tuple[str, ...]

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.make(tuple(tensors[key] for key in self.of))


class DerivedInputs:
    """Makes placeholders of derived tensors in front of a graph, and views of symbolic shapes."""

    def __init__(self, graph: fx.Graph, derived: Mapping[str, Tensor]) -> None:
        self.graph, self.derived = graph, dict(derived)
        self.inputs: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.made: dict[str, Computed] = {}
        self.nodes: dict[str, fx.Node] = {}
        placeholders = graph.find_nodes(op="placeholder")
        self.first_input, self.last_input = placeholders[0], placeholders[-1]
        self.mode = fake_mode_of(graph)
        self.symbols = _leading_symbols(graph)

    def input(self, key: str) -> fx.Node:
        """The placeholder of a derived tensor, made at first use."""
        if key not in self.nodes:
            like = self.derived[key]
            with self.graph.inserting_before(self.first_input):
                node = self.graph.placeholder(
                    "bda_" + "".join(c if c.isalnum() else "_" for c in key)
                )
            if self.mode is None:
                node.meta["val"] = like
            else:
                with self.mode:
                    node.meta["val"] = torch.empty_strided(
                        like.shape, like.stride(), dtype=like.dtype, device=like.device
                    )
            self.nodes[key] = node
            self.inputs[key] = node.name
        return self.nodes[key]

    def constant(self, key: str, value: Tensor) -> fx.Node:
        """The placeholder of an index tensor that the plan alone determines."""
        self.constants[key] = self.derived[key] = value
        return self.input(key)

    def computed(self, key: str, make: Callable[[Any], Tensor], of: Sequence[str]) -> fx.Node:
        """The placeholder of ``make`` of other derived tensors."""
        if key not in self.made:
            self.made[key] = Computed(make, tuple(of))
            self.derived[key] = self.made[key](self.derived)
        return self.input(key)

    def pad(self, node: fx.Node, x: fx.Node, width: int) -> fx.Node:
        return emit(self.graph, aten.constant_pad_nd.default, x, [0, width], like=node)

    def repeat(self, node: fx.Node, identity: fx.Node, groups: int, width: int) -> fx.Node:
        if groups == 1:
            return identity
        shape = [*self.lead(node, identity, 2), groups, width]
        spread = emit(self.graph, aten.expand.default, identity, shape, like=node)
        copied = emit(
            self.graph, aten.clone.default, spread, like=node, memory_format=torch.contiguous_format
        )
        return self.split_last(node, copied, (groups * width,), drop=2)

    def split_last(
        self, node: fx.Node, x: fx.Node, sizes: tuple[int, ...], drop: int = 1
    ) -> fx.Node:
        """View x with its last ``drop`` dimensions replaced by ``sizes``."""
        shape = [*self.lead(node, x, drop), *sizes]
        return emit(self.graph, aten.view.default, x, shape, like=node)

    def lead(self, node: fx.Node, x: fx.Node, drop: int) -> list[Any]:
        """Sizes of x but for the last ``drop``; symbolic ones as ``sym_size`` nodes."""
        sizes = x.meta["val"].shape[: x.meta["val"].dim() - drop]
        return [
            self.symbol(node, x, i) if isinstance(s, torch.SymInt) else s
            for i, s in enumerate(sizes)
        ]

    def symbol(self, node: fx.Node, x: fx.Node, axis: int) -> fx.Node:
        """A node that holds this symbolic size: one of the graph's, or a new ``sym_size``."""
        expression = x.meta["val"].shape[axis].node.expr
        if expression not in self.symbols:
            return emit(self.graph, aten.sym_size.int, x, axis, like=node)
        return self.symbols[expression]


def _leading_symbols(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Symbolic sizes that are nodes before anything is computed: usable everywhere."""
    found: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            found.setdefault(value.node.expr, node)
        elif node.op != "placeholder":
            break
    return found


def device_of(node: fx.Node) -> torch.device:
    return node.meta["val"].device
