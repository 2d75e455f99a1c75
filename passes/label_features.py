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
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.label_contractions import Contractions
from bda_fx.passes.labels import PLAIN, ZERO, Labelling, Labels, Product, Source, Value
from bda_fx.passes.run_moves import is_zero_fill
from bda_fx.passes.sites import QK, VO, Reason
from bda_fx.passes.track_features import Setting

_NATIVE_DROPOUT = rules.overloads("native_dropout")


def label_features(graph: fx.Graph, setting: Setting) -> Labelling:
    """Run ``graph`` on labels at one choice of sizes."""
    return _Labeller(setting).label(graph)


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

    def label(self, graph: fx.Graph) -> Labelling:
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
            return self.leave(node)
        if node.op != "call_function" or self.is_constant(node):
            return PLAIN
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator) and target not in rules.ATTENTION:
            self.note_nested(node)
        if target is operator.getitem:
            value = self.value(node.args[0])
            return value[node.args[1]] if isinstance(value, list) else value  # type: ignore[index]
        if target in rules.ZEROS or is_zero_fill(node):
            return ZERO
        if target in rules.METADATA:
            return PLAIN
        table: tuple[tuple[Container[Any], Callable[[fx.Node], Value]], ...] = (
            (rules.LINEAR, self.linear),
            (rules.KEEPS, self.keep),
            (rules.MOVES, self.move),
            (rules.CONVOLUTIONS, self.convolution),
            (rules.WRITES, self.write),
            (rules.STORES, self.leave),
            (rules.SCALES, self.scale),
            (rules.SUMS, self.add),
            (rules.MIXES, self.mix_along),
            (rules.MATMULS, self.matmul),
            (rules.ATTENTION, self.attention),
        )
        rule = next((method for ops, method in table if target in ops), self.unknown)
        return rule(node)

    def unknown(self, node: fx.Node) -> Value:
        """An op without a rule. One of the user's own that reads several projections may well be an
        attention: it is reported as one."""
        own = getattr(node.target, "namespace", "aten") not in ("aten", "prims", "higher_order")
        features: set[int] = set()
        read = 0
        for arg in node.all_input_nodes if own else ():
            value = self.values[arg]
            if isinstance(value, Source | Labels):
                features |= set(self.sources.distinct_features(self.materialise(value).ids))
                read += 1
        if read < 2:
            return self.spoil(node)
        code = self.code(Reason.UNKNOWN_OP, node)
        self.found.products += [
            Product(node.name, kind, frozenset(features), code) for kind in (QK, VO)
        ]
        return self.spoil(node, Reason.UNKNOWN_OP)

    def convolution(self, node: fx.Node) -> Value:
        self.spoil(node)
        return PLAIN

    def leave(self, node: fx.Node) -> Value:
        """Features leave the program: as an output, or written into an input of it."""
        for arg in node.all_input_nodes:
            value = self.values[arg]
            cached = isinstance(value, Source | Labels) and self.is_cached(arg)
            if cached:
                features = self.sources.distinct_features(self.materialise(value).ids)
                self.found.kept.update(dict.fromkeys(features, node.name))
            if not (cached and self.setting.opaque_cache):
                self.touch(value, Reason.RETURNED, node)
        return PLAIN

    def is_cached(self, node: fx.Node) -> bool:
        """Whether ``node`` is what attention reads as keys or values, moved at most."""
        stack = [node]
        while stack:
            current = stack.pop()
            if current in self.found.cached:
                return True
            if current.target in rules.MOVES or current.target in rules.KEEPS:
                stack += current.all_input_nodes
        return False

    def note_nested(self, node: fx.Node) -> None:
        """Attention inside the body of a higher-order op is not followed, but reported."""
        code = self.code(Reason.NESTED, node)
        for arg in node.all_input_nodes:
            body = getattr(node.graph.owning_module, str(arg.target), None)
            if arg.op != "get_attr" or not isinstance(body, fx.GraphModule):
                continue
            targets = {inner.target for inner in body.graph.nodes}
            if targets & (rules.ATTENTION.keys() | rules.MATMULS):
                products = (Product(node.name, kind, frozenset(), code) for kind in (QK, VO))
                self.found.products += [p for p in products if p not in self.found.products]

    def keep(self, node: fx.Node) -> Value:
        result = node.meta["val"]
        result = result[0] if isinstance(result, tuple | list) else result
        if rules.is_random(node) or not result.dtype.is_floating_point:
            return self.spoil(node)
        value = self.value(node.args[0])
        return [value, PLAIN] if node.target in _NATIVE_DROPOUT else value
