"""Labelled execution: which feature of which linear sits where, found by running the graph.

Every output element of a linear gets a number of its own. The data-movement ops that follow run
for real, on tensors of these numbers, so at a contraction each element still says which linear,
token and feature it is. Whatever else reads labelled elements *touches* their features and yields
a code (a negative number) that carries the reason. Nothing here knows a model, a module or a name:
an op is a row in ``op_rules`` or it is opaque.

    x ──linear──▶ ids = arange(B·S·F) ──view, transpose, cat …──▶ contraction reads (token, feature)

Two kinds of contraction matter, both of a left [*, m, c] with a right operand [*, n, c]:

* *meeting* (Q Kᵀ): features of both sides lie along c and meet one to one;
* *passing* (P V): features lie along a free axis and come out unchanged, mixed over tokens. The
  result is a new, *derived* source whose elements carry the features of V; when a linear reads it,
  V's features meet that linear's input columns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.label_contractions import Contractions
from bda_fx.passes.labels import PLAIN, SCORES, ZERO, Labelling, Labels, Product, Source, Value
from bda_fx.passes.run_moves import index_arguments, is_zero_fill, pads_with_values, run_move
from bda_fx.passes.sites import QK, VO, Reason
from bda_fx.passes.track_features import Ports

_MULTIPLIES = rules.overloads("mul", "multiply")
_DROPOUTS = rules.overloads("dropout", "feature_dropout", "alpha_dropout", "native_dropout")
_NATIVE_DROPOUT = rules.overloads("native_dropout")


def label_features(
    graph: fx.Graph,
    linears: Mapping[str, str],
    constants: Mapping[str, Any],
    ports: Ports,
    size: Callable[[Any], int],
    constant_value: Callable[[fx.Node], Tensor | None],
) -> Labelling:
    """Run ``graph`` on labels at one choice of sizes.

    ``linears`` maps linear nodes to the node of their constant weight, ``constants`` holds the
    names of all constant nodes, ``size`` makes a number of a SymInt, ``constant_value`` gives the
    value of a small constant index (or None where it depends on data).
    """
    return _Labeller(linears, constants, ports, size, constant_value).run(graph)


def live_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that the outputs or a side effect depend on."""
    alive: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in alive or node.op == "output" or node.is_impure():
            alive.add(node)
            alive.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in alive]


class _Labeller(Contractions):
    """The walk over the graph, and the rules for everything but contractions."""

    def run(self, graph: fx.Graph) -> Labelling:
        live = live_nodes(graph)
        last_use: dict[fx.Node, fx.Node] = {}
        for node in live:
            for arg in node.all_input_nodes:
                last_use[arg] = node
        expiring: dict[fx.Node, list[fx.Node]] = {}
        for arg, user in last_use.items():
            expiring.setdefault(user, []).append(arg)
        for node in live:
            self.values[node] = self.execute(node)
            for arg in expiring.get(node, ()):
                self.values[arg] = None
        return self.found

    def execute(self, node: fx.Node) -> Value:
        if node.op == "output":
            return self.spoil(node, Reason.RETURNED)
        if node.op != "call_function" or node.name in self.constants:
            return PLAIN
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            self.note_nested(node)
        if target is operator.getitem:
            value = self.value(node.args[0])
            return value[node.args[1]] if isinstance(value, list) else value  # type: ignore[index]
        if target in rules.METADATA:
            return ZERO if target in rules.ZEROS else PLAIN
        if target in rules.ZEROS or is_zero_fill(node):
            return ZERO
        rule: Callable[[fx.Node], Value] | None = None
        for ops, method in (
            (rules.LINEAR, self.linear),
            (rules.KEEPS, self.keep),
            (rules.MOVES, self.move),
            (rules.SCALES, self.scale),
            (rules.ADDS, self.add),
            (rules.MATMULS, self.matmul),
            (rules.ATTENTION, self.attention),
        ):
            if target in ops:
                rule = method
        return rule(node) if rule else self.spoil(node)

    def note_nested(self, node: fx.Node) -> None:
        """Attention inside the body of a higher-order op is not followed, but reported."""
        code = self.code(Reason.NESTED, node)
        for arg in node.all_input_nodes:
            body = getattr(node.graph.owning_module, str(arg.target), None)
            if arg.op != "get_attr" or not isinstance(body, fx.GraphModule):
                continue
            targets = {inner.target for inner in body.graph.nodes}
            if targets & (rules.ATTENTION | rules.MATMULS):
                products = (Product(node.name, kind, frozenset(), code) for kind in (QK, VO))
                self.found.products += [p for p in products if p not in self.found.products]

    def keep(self, node: fx.Node) -> Value:
        result = node.meta["val"]
        result = result[0] if isinstance(result, tuple | list) else result
        training = node.target in _DROPOUTS
        if training and len(node.args) > 2 and node.args[2]:
            return self.spoil(node)
        if not result.dtype.is_floating_point:
            return self.spoil(node)
        value = self.value(node.args[0])
        return [value, PLAIN] if node.target in _NATIVE_DROPOUT else value

    def move(self, node: fx.Node) -> Value:
        nodes = node.all_input_nodes
        tensors = [n for n in nodes if isinstance(n.meta.get("val"), Tensor)]
        if all(isinstance(self.values[n], int) for n in tensors):
            codes = [self.values[n] for n in tensors]
            return codes[0] if len(set(codes)) == 1 else self.merge(codes)  # type: ignore[arg-type]
        indices = index_arguments(node)
        constants = {n: self.constant_value(n) for n in indices}
        if any(v is None for v in constants.values()) or pads_with_values(node):
            return self.spoil(node, Reason.DATA_DEPENDENT if indices else None)
        inputs = {
            n: self.materialise(self.values[n], self.shape(n))
            for n in tensors
            if n not in constants
        }
        scaled = any(v.scale is not None for v in inputs.values())

        def run(pick: Callable[[Labels], Tensor], fill: int) -> Any:
            def argument(n: fx.Node) -> Any:
                if n in constants:
                    return constants[n]
                return pick(inputs[n]) if n in inputs else self.size(n.meta["val"])

            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
            return run_move(node.target, args, kwargs, fill)

        try:
            ids = run(lambda v: v.ids, ZERO)
            scale: Any = run(lambda v: _scale_of(v), 0) if scaled else None
        except (RuntimeError, IndexError, ValueError, TypeError):
            return self.spoil(node, Reason.UNPROVEN)
        if isinstance(ids, Tensor):
            return Labels(ids, scale)
        return [Labels(x, scale[i] if scaled else None) for i, x in enumerate(ids)]

    def scale(self, node: fx.Node) -> Value:
        """Multiply by a factor; elements with equal factors stay in one class."""
        left, right = (*node.args, None)[0:2]
        value, factor = self.value(left), right
        if isinstance(value, int) and node.target in _MULTIPLIES:
            value, factor = self.value(right), left
        other = self.value(factor)
        if isinstance(value, int) or not isinstance(other, int):
            return self.spoil(node)
        if isinstance(value, list) or not node.meta["val"].dtype.is_floating_point:
            return self.spoil(node)
        labels = self.materialise(value)
        # One number for all elements is a class too: features it leaves out have another.
        classes = torch.zeros((), dtype=torch.int64)
        if isinstance(factor, fx.Node) and isinstance(factor.meta["val"], Tensor):
            shape = self.shape(factor)
            if other == SCORES or len(shape) > labels.ids.dim():
                return self.spoil(node)
            classes = torch.arange(torch.Size(shape).numel()).view(shape)
        ids, classes = torch.broadcast_tensors(labels.ids, classes)
        old = 0 if labels.scale is None else labels.scale
        salt = len(self.values)
        return Labels(ids, (old * 1_000_003 + salt) * 1_000_003 + classes + 1)

    def add(self, node: fx.Node) -> Value:
        left, right = self.value(node.args[0]), self.value(node.args[1])
        for value, other, number in ((left, right, node.args[1]), (right, left, node.args[0])):
            nothing = (isinstance(other, int) and other == ZERO) or number == 0
            if nothing and not isinstance(value, int) and value is left:
                same = isinstance(value, Source | Labels) and (
                    tuple(self.materialise(value).ids.shape) == self.shape(node)
                )
                return value if same else self.spoil(node)
        if isinstance(left, Source | Labels) and isinstance(right, Source | Labels):
            mine = self.sources.distinct_features(self.materialise(left).ids)
            theirs = self.sources.distinct_features(self.materialise(right).ids)
            if set(mine) & set(theirs):
                return self.spoil(node, Reason.ROTATED)
        return self.spoil(node)


def _scale_of(value: Labels) -> Tensor:
    return torch.zeros_like(value.ids) if value.scale is None else value.scale
