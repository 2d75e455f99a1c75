"""Contractions on labels: which features meet, and which pass through an attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.label_meetings import Meetings, Operand
from bda_fx.passes.labels import (
    FIRST_CAUSE,
    PLAIN,
    SCORES,
    ZERO,
    Cause,
    Labels,
    Outer,
    Source,
    Value,
    distinct,
    repeat_heads,
    transposed,
)
from bda_fx.passes.sites import IN, OUT, QK, VO, Linear, Reason

_BADDBMM = rules.overloads("baddbmm.default")


class Contractions(Meetings):
    """Rules for linears, matrix products and fused attention."""

    def linear(self, node: fx.Node) -> Value:
        x = self.value(node.args[0])
        weight = self.setting.linears.get(node.name)
        if weight is None:
            return self.spoil(node)
        if isinstance(x, int):
            self.lose_columns(node, weight, x)
        if x == SCORES:
            return SCORES
        if isinstance(x, Source) and x.features is None:
            self.lose_columns(node, weight, PLAIN)
            self.touch(x, Reason.READ_ELSEWHERE, node)
        elif isinstance(x, Source | Labels):
            self.meet_columns(node, weight, self.materialise(x))
        return self.sources.new(self.shape(node), self.ports.of(weight, OUT).first)

    def lose_columns(self, node: fx.Node, weight: str, code: int) -> None:
        """A weight that reads attention outputs elsewhere reads something else here."""
        port = self.ports.of(weight, IN)
        if isinstance(port.tensor, Linear) and len(port.tensor.nodes) > 1:
            cause = Cause(Reason.NO_PROJECTION, node.name)
            cause = self.cause(code) if code <= FIRST_CAUSE else cause
            self.lose(port.features, cause)

    def meet_columns(self, node: fx.Node, weight: str, x: Labels) -> None:
        """A linear reads x [tokens, E]: attention outputs in it meet the linear's columns."""
        flat = Labels(
            x.ids.reshape(-1, x.ids.shape[-1]),
            None if x.scale is None else x.scale.reshape(-1, x.ids.shape[-1]),
        )
        mixed = self.sources.mixed(flat.ids)
        plain = flat.ids[(flat.ids >= 0) & ~mixed]
        self.touch_features(self.sources.distinct_features(plain), Reason.READ_ELSEWHERE, node)
        if not mixed.any():
            return self.lose_columns(node, weight, PLAIN)
        kv_heads, _ = self.heads(flat, node)
        if kv_heads is None:
            return
        first = self.ports.of(weight, IN).first
        columns = torch.arange(first, first + flat.ids.shape[-1])
        whole = torch.zeros_like(columns)
        for features, parts in kv_heads:
            self.pair(node, VO, columns, whole, features, parts)

    def matmul(self, node: fx.Node) -> Value:
        a, b = node.args[:2] if node.target not in _BADDBMM else node.args[1:3]
        if node.target in _BADDBMM:
            self.touch(self.value(node.args[0]), Reason.ADDED, node)
        if len(a.meta["val"].shape) < 2 or len(b.meta["val"].shape) < 2:
            return self.spoil(node)
        if any(isinstance(self.value(x), Outer) for x in (a, b)):
            return self.meet_outer(node, a, b)
        left, right = Operand(a, self.operand(a)), Operand(b, transposed(self.operand(b)))
        return self.contract(node, left, right)

    def attention(self, node: fx.Node) -> Value:
        """softmax(q kᵀ) v: a meeting and a passing in one node, as its rule lays them out."""
        rule = rules.ATTENTION[node.target]
        places = [rules.argument(node, name) for name in (rule.q, rule.k, rule.v)]
        for arg in node.all_input_nodes:
            if arg not in places:
                self.touch(self.value(arg), Reason.COMPUTED, node)
        if any(not isinstance(place, fx.Node) for place in places):
            return self.spoil(node)
        q, k, v = (self.constant(arg, node) or self.operand(arg) for arg in places)
        q, k, v = (rule.heads_first(t) for t in (q, k, v))
        if rule.grouped and q.ids.shape[-3] % max(k.ids.shape[-3], 1) == 0:
            k, v = (repeat_heads(t, q.ids.shape[-3]) for t in (k, v))
        self.meet(node, Operand(places[0], q), Operand(places[1], k))
        self.note_cached(places[2])
        passed = transposed(v)
        lead = torch.broadcast_shapes(q.ids.shape[:-2], passed.ids.shape[:-2])
        out = self.pass_through(node, passed, (*lead, q.ids.shape[-2], passed.ids.shape[-2]))
        if not isinstance(out, int):
            out = rule.laid_out(self.materialise(out))
        result = node.meta["val"]
        return out if isinstance(result, Tensor) else [out, *[SCORES] * (len(result) - 1)]

    def operand(self, arg: Any) -> Labels:
        return self.materialise(self.value(arg), self.shape(arg))

    def contract(self, node: fx.Node, a: Operand, b: Operand) -> Value:
        """a [*, m, c] with b [*, n, c]."""
        kinds = [self.sources.orientation(x.labels.ids) for x in (a, b)]
        codes = [self.value(x.node) for x in (a, b)]
        scores = [code == SCORES for code in codes]
        if all(scores):
            return SCORES
        if scores[0] or kinds == ["opaque", "passes"]:
            if kinds[1] == "meets":
                return self.spoil(node)
            self.note_cached(b.node)
            return self.weigh(node, a, b, left=False)
        if scores[1] or kinds == ["passes", "opaque"]:
            if kinds[0] == "meets":
                return self.spoil(node)
            self.note_cached(a.node)
            return self.weigh(node, b, a, left=True)
        if any(isinstance(code, int) and code in (PLAIN, ZERO) for code in codes):
            constant = None
            outputs = any(bool(self.sources.mixed(x.labels.ids).any()) for x in (a, b))
            if outputs:  # a projection by weights that are not one matrix
                return self.spoil(node, Reason.NO_OUTPUT_LINEAR)
            if kinds == ["meets", "opaque"]:
                constant = self.constant(b.node, node)
                b = Operand(b.node, transposed(constant)) if constant else b
            elif kinds == ["opaque", "meets"]:
                constant = self.constant(a.node, node)
                a = Operand(a.node, constant) if constant else a
            if constant is None and kinds == ["opaque", "opaque"]:
                return self.neither_projected(node, a, b)
            if constant is None:
                return self.spoil(node, Reason.READ_ELSEWHERE)
        elif kinds == ["passes", "passes"]:
            return self.outer(node, a.labels, b.labels)
        elif kinds in (["meets", "passes"], ["passes", "meets"]):
            left = kinds[0] == "passes"
            weights, passing = (b, a) if left else (a, b)
            self.touch(weights.labels, Reason.COMPUTED, node)
            return self.weigh(node, weights, passing, left=left)
        elif "passes" in kinds or "mixed" in kinds:
            self.found.products.append(self.product(node, QK, b.labels.ids))
            self.spoil(node, Reason.MISMATCHED)
            return SCORES
        self.meet(node, a, b)
        return SCORES

    def weigh(self, node: fx.Node, weights: Operand, passing: Operand, *, left: bool) -> Value:
        """Mix ``passing``, the left or the right operand, over tokens by weights: mostly scores.

        Weights that are features, or that some op has made of them, are a product of queries and
        keys of which no more is known. Two of them that mix one after the other are one product:
        linear attention, φ(q) (φ(k)ᵀ v).
        """
        made = len(self.sources.all)
        value = self.value(weights.node)
        scores = isinstance(value, int) and value == SCORES
        product = None if scores else self.product(node, QK, weights.labels.ids)
        if product and (product.features or product.code <= FIRST_CAUSE):
            mixed = set(self.sources.which(distinct(passing.labels.ids)).tolist())
            if mixed.isdisjoint(self.weighed):
                self.found.products.append(product)
            self.weighed.add(made)
        if left:
            return self.pass_left(node, passing.labels)
        return self.pass_through(node, passing.labels, self.shape(node))

    def pass_left(self, node: fx.Node, v: Labels) -> Value:
        """The left operand v [*, m, c] is mixed over c: its features stay on the axis of m."""
        *lead, m, n = self.shape(node)
        passed = self.pass_through(node, v, (*lead, n, m))
        return passed if isinstance(passed, int) else transposed(self.materialise(passed))

    def neither_projected(self, node: fx.Node, a: Operand, b: Operand) -> Value:
        """A product of activations that no linear has made; by a constant it is none."""
        if any(self.comes_from_constant(x.node) for x in (a, b)):
            return self.spoil(node)
        self.found.products.append(self.product(node, QK, b.labels.ids))
        self.spoil(node)
        return SCORES

    # -- both sides mixed over tokens, before they meet (linear attention) ---------------------

    def outer(self, node: fx.Node, a: Labels, b: Labels) -> Value:
        """a [*, m, tokens] and b [*, n, tokens]: every element is a feature of a and one of b."""
        shape = self.shape(node)
        left = self.spread(*self.mix(node, a), (*shape[:-2], shape[-1], shape[-2]))
        right = self.spread(*self.mix(node, b), shape)
        return Outer(transposed(self.materialise(left)), self.materialise(right))

    def meet_outer(self, node: fx.Node, a: Any, b: Any) -> Value:
        """Queries meet one side of an outer product; the features of the other side pass."""
        values = [self.value(a), self.value(b)]
        if all(isinstance(value, Outer | int) for value in values):
            return self.spoil(node)
        left = isinstance(values[0], Outer)
        outer: Outer = values[0] if left else values[1]  # type: ignore[assignment]
        sides = (outer.a, outer.b) if left else (transposed(outer.a), transposed(outer.b))
        query = transposed(self.operand(b)) if left else self.operand(a)
        kinds = [self.sources.orientation(side.ids) for side in sides]
        if kinds not in (["meets", "passes"], ["passes", "meets"]):
            return self.spoil(node)
        key, value = sides if kinds[0] == "meets" else sides[::-1]
        self.meet(node, Operand(b if left else a, query), Operand(a if left else b, key))
        if left:
            return self.pass_left(node, value)
        return self.pass_through(node, value, self.shape(node))
