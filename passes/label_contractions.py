"""Contractions on labels: which features meet, and which pass through an attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.labels import (
    FIRST_CAUSE,
    PLAIN,
    SCORES,
    ZERO,
    Cause,
    Labels,
    Product,
    Source,
    Value,
    distinct_rows,
    expand,
    head_pairs,
    merge_parts,
    parts_of,
    repeat_heads,
    transposed,
)
from bda_fx.passes.sites import QK, VO, Reason
from bda_fx.passes.track_features import Tracker

MAX_HEADS = 65536  # more distinct heads than this is a permutation per token, not a head layout
_BADDBMM = rules.overloads("baddbmm.default")


class Contractions(Tracker):
    """Rules for linears, matrix products and fused attention."""

    def linear(self, node: fx.Node) -> Value:
        x = self.value(node.args[0])
        weight = self.linears.get(node.name)
        if weight is None:
            return self.spoil(node)
        if x == SCORES:
            return SCORES
        if isinstance(x, Source) and x.features is None:
            self.touch(x, Reason.READ_ELSEWHERE, node)
        elif isinstance(x, Source | Labels):
            self.meet_columns(node, weight, self.materialise(x))
        return self.sources.new(self.shape(node), self.ports.first_feature[weight])

    def meet_columns(self, node: fx.Node, weight: str, x: Labels) -> None:
        """A linear reads x [tokens, E]: attention outputs in it meet the linear's columns."""
        flat = Labels(
            x.ids.reshape(-1, x.ids.shape[-1]),
            None if x.scale is None else x.scale.reshape(-1, x.ids.shape[-1]),
        )
        derived = self.sources.derived(flat.ids)
        plain = flat.ids[(flat.ids >= 0) & ~derived]
        self.touch_features(self.sources.distinct_features(plain), Reason.READ_ELSEWHERE, node)
        kv_heads, _ = self.heads(flat, node)
        if kv_heads is None:
            return
        first = self.ports.first_column[weight]
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
        left = self.operand(a)
        right = self.operand(b)
        right = transposed(right)
        return self.contract(node, left, right, self.value(a), self.value(b))

    def attention(self, node: fx.Node) -> Value:
        """softmax(q kᵀ) v: a meeting and a passing in one node. q, k, v: [*, tokens, features]."""
        q, k, v = (self.operand(arg) for arg in node.args[:3])
        for arg in (*node.args[3:], *node.kwargs.values()):
            self.touch(self.value(arg), Reason.COMPUTED, node)
        if node.kwargs.get("enable_gqa"):
            k, v = (repeat_heads(t, q.ids.shape[-3]) for t in (k, v))
        self.meet(node, q, k)
        passed = transposed(v)
        lead = torch.broadcast_shapes(q.ids.shape[:-2], passed.ids.shape[:-2])
        out = self.pass_through(node, passed, (*lead, q.ids.shape[-2], passed.ids.shape[-2]))
        result = node.meta["val"]
        return out if isinstance(result, Tensor) else [out, *[SCORES] * (len(result) - 1)]

    def operand(self, arg: Any) -> Labels:
        return self.materialise(self.value(arg), self.shape(arg))

    def contract(self, node: fx.Node, left: Labels, right: Labels, a: Value, b: Value) -> Value:
        """left [*, m, c] with right [*, n, c]."""
        kinds = [self.sources.orientation(x.ids) for x in (left, right)]
        scores = [isinstance(v, int) and v == SCORES for v in (a, b)]
        out = self.shape(node)
        if all(scores):
            return SCORES
        if scores[0] or kinds == ["opaque", "passes"]:
            if kinds[1] == "meets":
                return self.spoil(node)
            return self.pass_through(node, right, out)
        if scores[1] or kinds == ["passes", "opaque"]:
            if kinds[0] == "meets":
                return self.spoil(node)
            passed = self.pass_through(node, left, (*out[:-2], out[-1], out[-2]))
            return passed if isinstance(passed, int) else transposed(self.materialise(passed))
        plain = [isinstance(v, int) and v in (PLAIN, ZERO) for v in (a, b)]
        if any(plain):
            return self.spoil(node, Reason.READ_ELSEWHERE)
        if "passes" in kinds or "mixed" in kinds:
            self.found.products.append(self.product(node, QK, right.ids))
            self.spoil(node, Reason.MISMATCHED)
            return SCORES
        self.meet(node, left, right)
        return SCORES

    def product(self, node: fx.Node, kind: str, ids: Tensor) -> Product:
        codes = [c for c in ids[ids < 0].unique().tolist() if c != ZERO]
        return Product(
            node.name, kind, frozenset(self.sources.distinct_features(ids)), self.merge(codes)
        )

    def meet(self, node: fx.Node, q: Labels, k: Labels) -> None:
        """q [*, m, c] and k [*, n, c]: note which features meet, head by head."""
        lead = torch.broadcast_shapes(q.ids.shape[:-2], k.ids.shape[:-2])
        q, k = (expand(t, lead) for t in (q, k))
        sides = [q, k]
        counts = [len(self.sources.distinct_features(t.ids)) for t in sides]
        swap = 0 < counts[0] < counts[1]  # the side with fewer heads is the key side
        if swap:
            sides.reverse()
        product = self.product(node, QK, sides[1].ids)
        if product.code == PLAIN and not product.features:
            product = self.product(node, QK, sides[0].ids) if not counts[0] else product
        self.found.products.append(product)
        (q_heads, q_of), (k_heads, k_of) = (self.heads(t, node) for t in sides)
        if q_heads is None or k_heads is None or q_of is None or k_of is None:
            return
        for i, g in head_pairs(q_of, k_of):
            self.pair(node, QK, *q_heads[i], *k_heads[g])

    def heads(
        self, x: Labels, node: fx.Node
    ) -> tuple[list[tuple[Tensor, Tensor]] | None, Tensor | None]:
        """Distinct heads along the last axis of x [*, tokens, c], and each token's head.

        A head is a vector of features (or codes) and of parts: features in one part belong to one
        token of one source and carry one factor, so that a change of basis may mix them.
        """
        features, rows = self.sources.locate(x.ids)
        parts = parts_of(rows, x.scale, x.ids)
        keys = torch.cat([features, parts], -1)
        flat = keys.reshape(-1, keys.shape[-1])
        distinct, of = distinct_rows(flat)
        if len(distinct) > MAX_HEADS:
            self.touch(x, Reason.MISMATCHED, node)
            return None, None
        c = x.ids.shape[-1]
        return [(row[:c], row[c:]) for row in distinct], of.view(keys.shape[:-1])

    def pair(
        self, node: fx.Node, kind: str, q: Tensor, q_parts: Tensor, k: Tensor, k_parts: Tensor
    ) -> None:
        """Query head q meets key head k: record the blocks of features that may be mixed."""
        for mine, other in ((q, k), (k, q)):
            lost = (mine >= 0) & (other < 0) & (other != ZERO)
            for code in other[lost].unique().tolist():
                reason = Reason.NO_PROJECTION if code > FIRST_CAUSE else self.cause(code).reason
                where = node.name if code > FIRST_CAUSE else self.cause(code).node
                for feature in mine[lost & (other == code)].tolist():
                    self.found.touched.setdefault(feature, Cause(reason, where))
        both = ((q >= 0) & (k >= 0)).nonzero().flatten().tolist()
        blocks: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        q_list, k_list = q.tolist(), k.tolist()
        q_part, k_part = q_parts.tolist(), k_parts.tolist()
        for d in both:
            block = blocks.setdefault((q_part[d], k_part[d]), ([], []))
            block[0].append(k_list[d])
            block[1].append(q_list[d])
        for kv, partner in blocks.values():
            self.found.meets.setdefault((tuple(kv), tuple(partner)), set()).add(kind)

    def pass_through(self, node: fx.Node, v: Labels, shape: tuple[int, ...]) -> Value:
        """v [*, n, c] is mixed over c: its features come out along the last axis of ``shape``."""
        self.found.products.append(self.product(node, VO, v.ids))
        if not (v.ids >= 0).any():
            codes = v.ids.unique().tolist()
            return self.merge([c for c in codes if c != SCORES])
        features, rows = self.sources.locate(v.ids)
        parts = parts_of(rows.transpose(-1, -2), transposed(v).scale, v.ids.transpose(-1, -2))
        best = features.amax(-1)
        same = ((features == best.unsqueeze(-1)) | (features == ZERO)).all(-1)
        lost = features[~same.unsqueeze(-1).expand_as(features)].unique()
        self.touch_features([f for f in lost.tolist() if f >= 0], Reason.MISMATCHED, node)
        best = torch.where(same | (best < 0), best, self.code(Reason.MISMATCHED, node))
        best = torch.where(best == SCORES, PLAIN, best)
        part = merge_parts(parts)
        lead, (m, n) = shape[:-2], shape[-2:]
        best, part = (t.expand(*lead, n).unsqueeze(-2).expand(shape) for t in (best, part))
        first = self.sources.next_id
        row = torch.arange(torch.Size((*lead, m)).numel()).view(*lead, m, 1) * n + first
        return self.sources.new(shape, -1, features=best.reshape(-1), rows=(row + part).reshape(-1))
