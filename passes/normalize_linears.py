"""Spell every linear with a constant weight as ``aten.linear``; undo it where it was for nothing.

    addmm(b, x, w)              →  linear(x, wᵀ, b)
    mm(x, w), matmul(x, w)      →  linear(x, wᵀ)
    mm(w, x), matmul(w, x)      →  linear(xᵀ, w)ᵀ
    bmm(x, w expanded)          →  linear(x, wᵀ)                     (what core ATen leaves)
    bmm(x[1,·,·], w[1,·,·])     →  linear(x[0], w[0]ᵀ)[None]        (what einsum leaves)
    1×1 convolution             →  linear over x moved to channels-last, moved back
    linear(x, w) + b            →  linear(x, w, b)                   for a bias of shape [F]

Requires: a functional ATen graph. Leaves: the original nodes in the graph, without users, and the
:class:`Spelling` of each in ``Program.spellings``; :func:`restore_spellings` puts the originals
back for every linear that was not rewritten, so that a program changes at its sites alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes.canonicalize import Program, Spelling, constant_nodes
from bda_fx.passes.emit_node import emit
from bda_fx.passes.op_rules import overloads

aten = torch.ops.aten
_MATMULS = overloads("mm.default", "matmul.default")
_BATCHED = overloads("bmm.default", "matmul.default")
_VIEWS = overloads("view.default", "_unsafe_view", "reshape", "clone")
_REPEATS = _VIEWS | overloads("expand", "unsqueeze")
_ADDMM = overloads("addmm.default")
_ADDS = overloads("add.Tensor")
_CONVOLUTIONS = overloads("conv1d.default", "conv2d.default", "conv3d.default")


def normalize_linears(program: Program) -> None:
    """Rewrite the spellings above into ``aten.linear`` nodes, in place."""
    constants = set(constant_nodes(program))
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.name in constants:
            continue
        speller = _Speller(program.graph, node, constants)
        with program.graph.inserting_before(node):
            replacement = speller.spell()
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            program.spellings.append(Spelling(replacement.name, node.name, speller.made))
    if program.spellings:
        program.module.recompile()


def restore_spellings(program: Program) -> None:
    """Put back the original node wherever its linear was left as it is."""
    nodes = {node.name: node for node in program.graph.nodes}
    for spelling in reversed(program.spellings):
        if spelling.linear in nodes and nodes[spelling.replacement].users:
            nodes[spelling.replacement].replace_all_uses_with(nodes[spelling.original])
    program.spellings.clear()
    program.graph.eliminate_dead_code()


class _Speller:
    def __init__(self, graph: fx.Graph, node: fx.Node, constants: set[str]) -> None:
        self.graph, self.node, self.constants = graph, node, constants
        self.made = ""
        """The linear that was emitted."""

    def spell(self) -> fx.Node | None:
        target: Any = self.node.target
        args: tuple[Any, ...] = self.node.args
        if target in _ADDMM and self.matrix(args[2]) and not self.node.kwargs:
            return self.linear(args[1], self.constant(aten.t.default, args[2]), args[0])
        if target in _MATMULS and self.matrix(args[1]) and _rank(args[0]) >= 2:
            return self.linear(args[0], self.constant(aten.t.default, args[1]))
        if target in _MATMULS and self.matrix(args[0]) and _rank(args[1]) >= 2:
            y = self.linear(self.emit(aten.transpose.int, args[1], -1, -2), args[0])
            return self.emit(aten.transpose.int, y, -1, -2)
        if target in _BATCHED and _rank(args[0]) == _rank(args[1]) == 3:
            matrix = self.shared_matrix(args[1])
            if matrix is not None:
                return self.linear(args[0], self.constant(aten.t.default, matrix))
            return self.batch_of_one(args[0], args[1])
        if target in _CONVOLUTIONS:
            return self.convolution()
        if target in _ADDS and not self.node.kwargs:
            for y, bias in (args, args[::-1]):
                if self.folds(y, bias):
                    return self.linear(y.args[0], y.args[1], bias)
        return None

    def shared_matrix(self, node: fx.Node) -> fx.Node | None:
        """The matrix [E, F] that ``node`` repeats for every sample of a batch."""
        shape = node.meta["val"].shape
        while node.target in _REPEATS and tuple(node.meta["val"].shape[-2:]) == tuple(shape[-2:]):
            before = node.args[0]
            assert isinstance(before, fx.Node)
            if node.target in _VIEWS and before.meta["val"].shape != node.meta["val"].shape:
                return None
            node = before
        return node if self.matrix(node) and node.meta["val"].shape == shape[-2:] else None

    def batch_of_one(self, a: fx.Node, b: fx.Node) -> fx.Node | None:
        swap = self.is_constant(a)
        x, w = (b, a) if swap else (a, b)
        if not self.is_constant(w) or w.meta["val"].shape[0] != 1 or x.meta["val"].shape[0] != 1:
            return None
        matrix = self.constant(aten.select.int, w, 0, 0)
        rows = self.emit(aten.select.int, x, 0, 0)
        if swap:
            y = self.linear(self.emit(aten.t.default, rows), matrix)
            y = self.emit(aten.t.default, y)
        else:
            y = self.linear(rows, self.constant(aten.t.default, matrix))
        return self.emit(aten.unsqueeze.default, y, 0)

    def convolution(self) -> fx.Node | None:
        given: tuple[Any, ...] = self.node.args
        defaults = (None, 1, 0, 1, 1)[len(given) - 2 :]
        x, w, bias, stride, padding, _, groups = given + defaults
        if not self.is_constant(w) or any(int(k) != 1 for k in w.meta["val"].shape[2:]):
            return None
        if groups != 1 or any(s != 1 for s in _many(stride)) or any(p != 0 for p in _many(padding)):
            return None
        if _rank(x) != _rank(w) or (bias is not None and not self.is_constant(bias)):
            return None
        matrix = self.constant(aten.view.default, w, list(w.meta["val"].shape[:2]))
        axes = range(_rank(x))
        last = [0, *axes[2:], 1]  # channels last, and back
        y = self.linear(self.emit(aten.permute.default, x, last), matrix, bias)
        return self.emit(aten.permute.default, y, [0, axes[-1], *axes[1:-1]])

    def folds(self, y: Any, bias: Any) -> bool:
        """``y`` is a linear without bias that nobody else reads, and ``bias`` its constant [F]."""
        if not isinstance(y, fx.Node) or y.target is not aten.linear.default or len(y.args) > 2:
            return False
        readers = [user for user in y.users if user.users]
        same_type = isinstance(bias, fx.Node) and self.is_constant(bias)
        if readers != [self.node] or not same_type or not self.matrix(y.args[1]):
            return False
        shape, width = bias.meta["val"].shape, y.args[1].meta["val"].shape[0]
        return tuple(shape) == (width,) and bias.meta["val"].dtype == y.meta["val"].dtype

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        if bias is not None and (not self.is_constant(bias) or _rank(bias) != 1):
            return None
        args = (x, weight) if bias is None else (x, weight, bias)
        node = self.emit(aten.linear.default, *args)
        self.made = node.name
        return node

    def emit(self, target: Any, *args: Any) -> fx.Node:
        return emit(self.graph, target, *args, like=self.node)

    def constant(self, target: Any, *args: Any) -> fx.Node:
        """An expression of weights, emitted once: an equal one that is there already is taken."""
        for user in args[0].users:
            if user.target is target and user.args == args and user.name in self.constants:
                return user
        with self.graph.inserting_after(args[0]):
            node = emit(self.graph, target, *args, like=self.node)
        self.constants.add(node.name)
        return node

    def is_constant(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.name in self.constants

    def matrix(self, node: Any) -> bool:
        return self.is_constant(node) and _rank(node) == 2


def _rank(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else -1


def _many(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
