"""Spell complex numbers as pairs of reals: ONNX has none, and rotary embeddings are often made so.

    z [*] complex                   →   z [*, 2]
    view_as_complex, view_as_real   →   nothing
    polar(r, φ)                     →   [r cos φ | r sin φ]
    z w                             →   [z₀ w₀ − z₁ w₁ | z₀ w₁ + z₁ w₀]
    z r, r real                     →   [z₀ r | z₁ r]
    moves of axes of z              →   the same axes of the pair

Requires: no complex inputs, outputs or weights. What else is done to complex numbers is left as it
is, and the translator says so. DeepSeek-V2 and Llama 4 rotate like this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from bda_fx.passes.canonicalize import _copied
from bda_fx.passes.emit_node import emit
from bda_fx.passes.op_rules import overloads

aten = torch.ops.aten
_NOTHING = overloads("view_as_complex", "view_as_real", "alias", "detach", "contiguous")
_CASTS = overloads("to.device", "to.dtype", "to.dtype_layout", "_to_copy")
_MUL = overloads("mul.Tensor")
_POLAR = overloads("polar")
_ONE_AXIS = overloads("unsqueeze", "slice.Tensor", "select.int", "squeeze.dim")
_CHECKS = overloads("_assert_tensor_metadata")


def spell_complex(program: ExportedProgram) -> ExportedProgram:
    """``program`` without complex numbers, or as it is if it has none or they cannot be spelled."""
    if not any(is_complex(node) for node in program.graph.nodes):
        return program
    spelled = _copied(program)
    graph = spelled.graph
    pairs: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        touched = is_complex(node) or any(is_complex(other) for other in node.all_input_nodes)
        if not touched or node.target in _CHECKS:
            continue
        with graph.inserting_before(node):
            pair = _pair(graph, node, pairs)
        if pair is None:
            return program
        pairs[node] = pair
    for node, pair in reversed(pairs.items()):
        for user in list(node.users):
            if user.target in _CHECKS:
                graph.erase_node(user)
        if not is_complex(node):
            node.replace_all_uses_with(pair)
        graph.erase_node(node)
    spelled.graph_module.recompile()
    return spelled


def is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _pair(graph: fx.Graph, node: fx.Node, pairs: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The pair that stands for ``node``, or None where its op is not known."""

    def new(target: Callable[..., Any], *args: Any) -> fx.Node:
        return emit(graph, target, *args, like=node)

    def part(pair: fx.Node, at: int) -> fx.Node:
        return new(aten.select.int, pair, -1, at)

    def joined(real: fx.Node, imaginary: fx.Node) -> fx.Node:
        return new(aten.stack.default, [real, imaginary], -1)

    args: tuple[Any, ...] = node.args
    first = pairs.get(args[0], args[0]) if args and isinstance(args[0], fx.Node) else None
    if first is None:
        return None
    if node.target in _POLAR:
        parts = (new(op, args[1]) for op in (aten.cos.default, aten.sin.default))
        return joined(*(new(aten.mul.Tensor, first, turned) for turned in parts))
    if node.target in _NOTHING:
        return first
    if node.target in _CASTS:  # to the same: complex128 is not told from complex64 here
        same = node.meta["val"].dtype == args[0].meta["val"].dtype
        return first if same else None
    if node.target in _ONE_AXIS and isinstance(args[1], int):
        axes = args[0].meta["val"].dim() + (node.target in overloads("unsqueeze"))
        return new(node.target, first, args[1] % axes, *args[2:])
    if node.target not in _MUL:
        return None
    other = args[1]
    if not isinstance(other, fx.Node):
        return None if isinstance(other, complex) else new(aten.mul.Tensor, first, other)
    if is_complex(args[0]) and is_complex(other):
        z, w = first, pairs[other]
        z0, z1, w0, w1 = part(z, 0), part(z, 1), part(w, 0), part(w, 1)
        products = [new(aten.mul.Tensor, a, b) for a, b in ((z0, w0), (z1, w1), (z0, w1), (z1, w0))]
        return joined(
            new(aten.sub.Tensor, products[0], products[1]),
            new(aten.add.Tensor, products[2], products[3]),
        )
    z, r = (first, other) if is_complex(args[0]) else (pairs[other], first)
    return new(aten.mul.Tensor, z, new(aten.unsqueeze.default, r, -1))
