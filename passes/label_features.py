"""Labelled execution: which feature of which linear sits where, found by running the graph.

Every output element of a linear gets a number of its own. The data-movement ops that follow run
for real, on tensors of these numbers, so at a contraction each element still says which linear,
token and feature it is. Whatever else reads labelled elements *touches* their features and yields
a code (a negative number) that carries the reason. Nothing here knows a model, a module or a name:
an op is a row in ``op_rules`` or it is opaque.

    x ──linear──▶ ids = arange(B·S·F)  ──view, transpose, cat …──▶  contraction reads (token, feature)

Two kinds of contraction matter, both of a left [*, m, c] with a right operand [*, n, c]:

* *meeting* (Q Kᵀ): features of both sides lie along c and meet one to one;
* *passing* (P V): features lie along a free axis and come out unchanged, mixed over tokens. The
  result is a new, *derived* source whose elements carry the features of V; when a linear reads it,
  V's features meet that linear's input columns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.sites import QK, VO, Reason

ZERO = -1  # a constant zero: meets anything harmlessly
PLAIN = -2  # an input, a constant, or computed from these alone
SCORES = -3  # computed from a product of two activations
FIRST_CAUSE = -4  # -4 - k: spoilt by causes[k]

MAX_HEADS = 65536  # more distinct heads than this is a permutation per token, not a head layout


@dataclass(frozen=True)
class Cause:
    reason: Reason
    node: str


@dataclass(frozen=True)
class Source:
    """A range of element ids: a linear's output, or (``features`` given) an attention output."""

    first: int
    shape: tuple[int, ...]
    first_feature: int
    features: Tensor | None = None
    rows: Tensor | None = None

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    def ids(self) -> Tensor:
        ids = torch.arange(self.first, self.first + self.numel).view(self.shape)
        if self.features is None:
            return ids
        spoilt = self.features.view(self.shape)
        return torch.where(spoilt >= 0, ids, spoilt)


@dataclass(frozen=True)
class Labels:
    """Element ids or codes of a tensor, and the class of factors each was multiplied by."""

    ids: Tensor
    scale: Tensor | None = None


Value = int | Source | Labels | list[Any] | None


@dataclass(frozen=True)
class Product:
    """An attention product as it was met: its kv-side features, or the code that spoilt them."""

    contraction: str
    kind: str
    features: frozenset[int]
    code: int


@dataclass
class Labelling:
    """What one run over the graph found. Features and columns are numbers in one common space."""

    touched: dict[int, Cause] = field(default_factory=dict)
    meets: dict[tuple[tuple[int, ...], tuple[int, ...]], set[str]] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    contractions: dict[int, set[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ports:
    """Where the features and columns of each linear weight lie in the common number space."""

    first_feature: Mapping[str, int]
    first_column: Mapping[str, int]


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


class _Labeller:
    def __init__(self, linears, constants, ports, size, constant_value) -> None:  # type: ignore[no-untyped-def]
        self.linears, self.constants, self.ports = linears, constants, ports
        self.size, self.constant_value = size, constant_value
        self.sources: list[Source] = []
        self.values: dict[fx.Node, Value] = {}
        self.found = Labelling()

    # -- the walk ---------------------------------------------------------------------------

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
        if target is operator.getitem:
            value = self.value(node.args[0])
            return value[node.args[1]] if isinstance(value, list) else value  # type: ignore[index]
        if target in rules.METADATA:
            return ZERO if target in rules.ZEROS else PLAIN
        if target in rules.ZEROS or _is_zero_fill(node):
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

    def value(self, arg: Any) -> Value:
        return self.values[arg] if isinstance(arg, fx.Node) else PLAIN

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.size(s) for s in node.meta["val"].shape)

    # -- opaque ops -------------------------------------------------------------------------

    def code(self, reason: Reason, node: fx.Node) -> int:
        self.found.causes.append(Cause(reason, node.name))
        return FIRST_CAUSE - (len(self.found.causes) - 1)

    def cause(self, code: int) -> Cause:
        return self.found.causes[FIRST_CAUSE - code]

    def spoil(self, node: fx.Node, reason: Reason | None = None) -> int:
        """``node`` reads its arguments: labelled features are touched, the result is opaque."""
        reason = reason or rules.reason_for(node.target)
        seen = []
        for arg in node.all_input_nodes:
            value = self.values[arg]
            self.touch(value, reason, node)
            seen.append(self.summary(value, reason, node))
        return self.merge(seen)

    def touch(self, value: Value, reason: Reason, node: fx.Node) -> None:
        if isinstance(value, list):
            for item in value:
                self.touch(item, reason, node)
        elif isinstance(value, Source) and value.features is None:
            width = value.shape[-1]
            self.touch_features(range(value.first_feature, value.first_feature + width), reason, node)
        elif isinstance(value, Source | Labels):
            labels = self.materialise(value)
            self.touch_features(self.distinct_features(labels.ids), reason, node)

    def touch_features(self, features: Iterable[int], reason: Reason, node: fx.Node) -> None:
        cause = Cause(reason, node.name)
        for feature in features:
            self.found.touched.setdefault(feature, cause)

    def summary(self, value: Value, reason: Reason, node: fx.Node) -> int:
        """One code for a whole value as an opaque op sees it."""
        if isinstance(value, int):
            return value
        if isinstance(value, list):
            return self.merge([self.summary(v, reason, node) for v in value])
        if isinstance(value, Labels):
            codes = value.ids[value.ids < 0].unique().tolist()
            if (value.ids >= 0).any():
                codes.append(self.code(reason, node))
            return self.merge(codes)
        return PLAIN if value is None else self.code(reason, node)

    @staticmethod
    def merge(codes: list[int]) -> int:
        if SCORES in codes:
            return SCORES
        spoilt = [c for c in codes if c <= FIRST_CAUSE]
        return max(spoilt) if spoilt else PLAIN

    # -- ids, features, rows ----------------------------------------------------------------

    def new_source(self, shape: tuple[int, ...], first_feature: int, **derived: Tensor) -> Source:
        first = self.sources[-1].first + self.sources[-1].numel if self.sources else 0
        self.sources.append(Source(first, shape, first_feature, **derived))
        return self.sources[-1]

    def materialise(self, value: Value, shape: tuple[int, ...] | None = None) -> Labels:
        if isinstance(value, Labels):
            return value
        if isinstance(value, Source):
            return Labels(value.ids())
        code = value if isinstance(value, int) else PLAIN
        return Labels(torch.full((), code).expand(shape or ()))

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features (codes kept) and token rows of element ids."""
        features, rows = ids.clone(), ids.clone()
        if not (ids >= 0).any():
            return features, rows
        firsts = torch.tensor([s.first for s in self.sources])
        which = torch.bucketize(ids.contiguous(), firsts, right=True) - 1
        for index in which[ids >= 0].unique().tolist():
            source = self.sources[index]
            mask = (which == index) & (ids >= 0)
            local = ids[mask] - source.first
            if source.features is None or source.rows is None:
                column = local % source.shape[-1]
                features[mask] = source.first_feature + column
                rows[mask] = source.first + local - column
            else:
                features[mask] = source.features[local]
                rows[mask] = source.rows[local]
        return features, rows

    def distinct_features(self, ids: Tensor) -> list[int]:
        features, _ = self.locate(ids.reshape(-1).unique())
        return [f for f in features.unique().tolist() if f >= 0]

    # -- data movement ----------------------------------------------------------------------

    def keep(self, node: fx.Node) -> Value:
        result = node.meta["val"]
        result = result[0] if isinstance(result, tuple | list) else result
        training = node.target in rules.overloads("dropout", "feature_dropout", "alpha_dropout")
        if training and len(node.args) > 2 and node.args[2]:
            return self.spoil(node)
        if not result.dtype.is_floating_point:
            return self.spoil(node)
        value = self.value(node.args[0])
        return [value, PLAIN] if node.target in rules.overloads("native_dropout") else value

    def move(self, node: fx.Node) -> Value:
        nodes = node.all_input_nodes
        tensors = [n for n in nodes if isinstance(n.meta.get("val"), Tensor)]
        if all(isinstance(self.values[n], int) for n in tensors):
            codes = [self.values[n] for n in tensors]
            return codes[0] if len(set(codes)) == 1 else self.merge(codes)  # type: ignore[arg-type]
        indices = _index_arguments(node)
        constants = {n: self.constant_value(n) for n in indices}
        if any(v is None for v in constants.values()) or _pads_with_values(node):
            return self.spoil(node, Reason.DATA_DEPENDENT if indices else None)
        inputs = {
            n: self.materialise(self.values[n], self.shape(n)) for n in tensors if n not in constants
        }
        scaled = any(v.scale is not None for v in inputs.values())

        def run(pick: Callable[[Labels], Tensor], fill: int) -> Any:
            def argument(n: fx.Node) -> Any:
                if n in constants:
                    return constants[n]
                return pick(inputs[n]) if n in inputs else self.size(n.meta["val"])

            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
            return _run_move(node.target, args, kwargs, fill)

        try:
            ids = run(lambda v: v.ids, ZERO)
            scale = run(lambda v: _scale_of(v), 0) if scaled else None
        except (RuntimeError, IndexError, ValueError, TypeError):
            return self.spoil(node, Reason.UNPROVEN)
        if isinstance(ids, Tensor):
            return Labels(ids, scale)
        return [Labels(x, scale[i] if scaled else None) for i, x in enumerate(ids)]

    def scale(self, node: fx.Node) -> Value:
        """Multiply by a factor; elements with equal factors stay in one class."""
        left, right = (*node.args, None)[:2]
        value, factor = self.value(left), right
        if isinstance(value, int) and node.target in rules.overloads("mul", "multiply"):
            value, factor = self.value(right), left
        other = self.value(factor)
        if isinstance(value, int) or not isinstance(other, int):
            return self.spoil(node)
        if not isinstance(factor, fx.Node) or not isinstance(factor.meta["val"], Tensor):
            return value
        shape = self.shape(factor)
        if torch.Size(shape).numel() == 1:
            return value if len(shape) <= len(self.shape(node)) else self.spoil(node)
        if other == SCORES or not node.meta["val"].dtype.is_floating_point:
            return self.spoil(node)
        labels = self.materialise(value)
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
            mine = self.distinct_features(self.materialise(left).ids)
            theirs = self.distinct_features(self.materialise(right).ids)
            if set(mine) & set(theirs):
                return self.spoil(node, Reason.ROTATED)
        return self.spoil(node)

    # -- contractions -----------------------------------------------------------------------

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
        return self.new_source(self.shape(node), self.ports.first_feature[weight])

    def meet_columns(self, node: fx.Node, weight: str, x: Labels) -> None:
        """A linear reads x [tokens, E]: attention outputs in it meet the linear's columns."""
        flat = Labels(
            x.ids.reshape(-1, x.ids.shape[-1]),
            None if x.scale is None else x.scale.reshape(-1, x.ids.shape[-1]),
        )
        derived = torch.zeros_like(flat.ids, dtype=torch.bool)
        for source in self.sources:
            if source.features is not None:
                derived |= (flat.ids >= source.first) & (flat.ids < source.first + source.numel)
        plain = flat.ids[(flat.ids >= 0) & ~derived]
        self.touch_features(self.distinct_features(plain), Reason.READ_ELSEWHERE, node)
        kv_heads, kv_of = self.heads(flat, node)
        if kv_heads is None:
            return
        first = self.ports.first_column[weight]
        columns = torch.arange(first, first + flat.ids.shape[-1])
        whole = torch.zeros_like(columns)
        for features, parts in kv_heads:
            self.pair(node, VO, columns, whole, features, parts)

    def matmul(self, node: fx.Node) -> Value:
        a, b = node.args[:2] if node.target not in rules.overloads("baddbmm.default") else node.args[1:3]
        if node.target in rules.overloads("baddbmm.default"):
            self.touch(self.value(node.args[0]), Reason.ADDED, node)
        if len(a.meta["val"].shape) < 2 or len(b.meta["val"].shape) < 2:  # type: ignore[union-attr]
            return self.spoil(node)
        left = self.operand(a)
        right = self.operand(b)
        right = Labels(
            right.ids.transpose(-1, -2),
            None if right.scale is None else right.scale.transpose(-1, -2),
        )
        return self.contract(node, left, right, self.value(a), self.value(b))

    def attention(self, node: fx.Node) -> Value:
        """softmax(q kᵀ) v: a meeting and a passing in one node. q, k, v: [*, tokens, features]."""
        q, k, v = (self.operand(arg) for arg in node.args[:3])
        for arg in node.args[3:]:
            self.touch(self.value(arg), Reason.COMPUTED, node)
        if node.kwargs.get("enable_gqa"):
            k, v = (_repeat_heads(t, q.ids.shape[-3]) for t in (k, v))
        self.meet(node, q, k)
        passed = Labels(
            v.ids.transpose(-1, -2), None if v.scale is None else v.scale.transpose(-1, -2)
        )
        lead = torch.broadcast_shapes(q.ids.shape[:-2], passed.ids.shape[:-2])
        return self.pass_through(node, passed, (*lead, q.ids.shape[-2], passed.ids.shape[-2]))

    def operand(self, arg: Any) -> Labels:
        return self.materialise(self.value(arg), self.shape(arg))

    def contract(self, node: fx.Node, left: Labels, right: Labels, a: Value, b: Value) -> Value:
        """left [*, m, c] with right [*, n, c]."""
        kinds = [self.orientation(x.ids) for x in (left, right)]
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
            return _transposed(self, passed)
        plain = [isinstance(v, int) and v in (PLAIN, ZERO) for v in (a, b)]
        if any(plain):
            return self.spoil(node, Reason.READ_ELSEWHERE)
        if "passes" in kinds or "mixed" in kinds:
            self.found.products.append(self.product(node, QK, right.ids))
            self.spoil(node, Reason.MISMATCHED)
            return SCORES
        self.meet(node, left, right)
        return SCORES

    def orientation(self, ids: Tensor) -> str:
        """Where the features of [*, free, c] lie: along c ("meets"), free ("passes"), or neither."""
        if not (ids >= 0).any():
            return "opaque"
        features, rows = self.locate(ids)
        free, c = ids.shape[-2:]
        one_row = [_constant_along(rows, d, ids) for d in (-1, -2)]
        one_feature = [_constant_along(features, d, ids) for d in (-1, -2)]
        meets = one_row[0] or (one_feature[1] and not one_feature[0])
        passes = one_row[1] or (one_feature[0] and not one_feature[1])
        if meets and passes:
            if c > 1 and free == 1:
                return "meets"
            return "passes" if free > 1 and c == 1 else "mixed"
        return "meets" if meets else "passes" if passes else "mixed"

    def product(self, node: fx.Node, kind: str, ids: Tensor) -> Product:
        codes = [c for c in ids[ids < 0].unique().tolist() if c != ZERO]
        return Product(node.name, kind, frozenset(self.distinct_features(ids)), self.merge(codes))

    def meet(self, node: fx.Node, q: Labels, k: Labels) -> None:
        """q [*, m, c] and k [*, n, c]: note which features meet, head by head."""
        lead = torch.broadcast_shapes(q.ids.shape[:-2], k.ids.shape[:-2])
        q, k = (_expand(t, lead) for t in (q, k))
        sides = [q, k]
        counts = [len(self.distinct_features(t.ids)) for t in sides]
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
        for i, g in _pairs(q_of, k_of):
            self.pair(node, QK, *q_heads[i], *k_heads[g])

    def heads(
        self, x: Labels, node: fx.Node
    ) -> tuple[list[tuple[Tensor, Tensor]] | None, Tensor | None]:
        """Distinct heads along the last axis of x [*, tokens, c], and each token's head.

        A head is a vector of features (or codes) and of parts: features in one part belong to one
        token of one source and carry one factor, so that a change of basis may mix them.
        """
        features, rows = self.locate(x.ids)
        parts = _parts(rows, x.scale, x.ids)
        keys = torch.cat([features, parts], -1)
        flat = keys.reshape(-1, keys.shape[-1])
        distinct, of = _distinct_rows(flat)
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
            for feature in kv:
                self.found.contractions.setdefault(feature, set()).add(node.name)

    def pass_through(self, node: fx.Node, v: Labels, shape: tuple[int, ...]) -> Value:
        """v [*, n, c] is mixed over c: its features come out along the last axis of ``shape``."""
        self.found.products.append(self.product(node, VO, v.ids))
        if not (v.ids >= 0).any():
            codes = v.ids.unique().tolist()
            return self.merge([c for c in codes if c != SCORES])
        features, rows = self.locate(v.ids)
        parts = _parts(rows.transpose(-1, -2), _t(v.scale), v.ids.transpose(-1, -2))
        best = features.amax(-1)
        same = ((features == best.unsqueeze(-1)) | (features == ZERO)).all(-1)
        lost = features[~same.unsqueeze(-1).expand_as(features)].unique()
        self.touch_features([f for f in lost.tolist() if f >= 0], Reason.MISMATCHED, node)
        best = torch.where(same | (best < 0), best, self.code(Reason.MISMATCHED, node))
        best = torch.where(best == SCORES, PLAIN, best)
        part = _merge_parts(parts)
        lead, (m, n) = shape[:-2], shape[-2:]
        best, part = (t.expand(*lead, n).unsqueeze(-2).expand(shape) for t in (best, part))
        first = self.sources[-1].first + self.sources[-1].numel
        row = torch.arange(torch.Size((*lead, m)).numel()).view(*lead, m, 1) * n + first
        source = self.new_source(
            shape, -1, features=best.reshape(-1), rows=(row + part).reshape(-1)
        )
        return source


def _transposed(labeller: _Labeller, value: Value) -> Value:
    if isinstance(value, int):
        return value
    return Labels(labeller.materialise(value).ids.transpose(-1, -2))


def _t(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.transpose(-1, -2)


def _scale_of(value: Labels) -> Tensor:
    return torch.zeros_like(value.ids) if value.scale is None else value.scale


def _expand(x: Labels, lead: tuple[int, ...]) -> Labels:
    ids = x.ids.expand(*lead, *x.ids.shape[-2:])
    return Labels(ids, None if x.scale is None else x.scale.expand(ids.shape))


def _repeat_heads(x: Labels, heads: int) -> Labels:
    times = heads // x.ids.shape[-3]
    scale = None if x.scale is None else x.scale.repeat_interleave(times, -3)
    return Labels(x.ids.repeat_interleave(times, -3), scale)


def _constant_along(x: Tensor, dim: int, ids: Tensor) -> bool:
    """Whether the labelled elements of x agree along ``dim``."""
    big = torch.iinfo(torch.int64).max
    low = torch.where(ids >= 0, x, big).amin(dim, keepdim=True)
    return bool(((x == low) | (ids < 0)).all())


def _first_equal(keys: Tensor) -> Tensor:
    """For each element of [*, c], the smallest index along c that holds the same key."""
    order = keys.argsort(dim=-1, stable=True)
    ordered = keys.gather(-1, order)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    start = torch.where(fresh, torch.arange(keys.shape[-1]).expand_as(order), 0).cummax(-1).values
    return torch.empty_like(order).scatter_(-1, order, order.gather(-1, start))


def _parts(rows: Tensor, scale: Tensor | None, ids: Tensor) -> Tensor:
    """Part numbers along the last axis: labelled elements of one token row and one factor."""
    labelled = ids >= 0
    first = torch.where(labelled, rows, -1).amax(-1, keepdim=True)
    if scale is None and bool(((rows == first) | ~labelled).all()):
        return torch.where(labelled, 0, -1)
    keys = rows if scale is None else rows * 1_000_003 + scale
    return torch.where(labelled, _first_equal(torch.where(labelled, keys, -1)), -1)


def _merge_parts(parts: Tensor) -> Tensor:
    """The common refinement over tokens of parts [*, c, n] → [*, n]; all-constant rows are free."""
    free = (parts == -1).all(-1, keepdim=True)
    parts = torch.where(free, 0, parts)
    merged = parts[..., 0, :]
    for token in range(1, parts.shape[-2]):
        if not torch.equal(parts[..., token, :], parts[..., 0, :]):
            merged = _first_equal(merged * parts.shape[-1] + parts[..., token, :] + 1)
    return merged


def _distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of [N, k] and each row's index among them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2**62, (rows.shape[-1],), generator=generator)
    hashes, of = (rows * weights).sum(-1).unique(return_inverse=True)
    first = torch.full((len(hashes),), len(rows)).scatter_reduce(
        0, of, torch.arange(len(rows)), "amin"
    )
    distinct = rows[first]
    if not torch.equal(distinct[of], rows):
        return torch.unique(rows, dim=0, return_inverse=True)  # type: ignore[return-value]
    return distinct, of


def _pairs(q_of: Tensor, k_of: Tensor) -> list[tuple[int, int]]:
    """Which query head meets which key head: q_of [*, m], k_of [*, n] of the same batch."""
    q_of, k_of = q_of.reshape(-1, q_of.shape[-1]), k_of.reshape(-1, k_of.shape[-1])
    if bool((q_of == q_of[:, :1]).all()) and bool((k_of == k_of[:, :1]).all()):
        both = torch.stack([q_of[:, 0], k_of[:, 0]], -1).unique(dim=0)
        return [(int(i), int(g)) for i, g in both]
    found = set()
    for q_row, k_row in zip(q_of, k_of, strict=True):
        for i in q_row.unique().tolist():
            found |= {(i, g) for g in k_row.unique().tolist()}
    return sorted(found)


_INDEXED = rules.overloads("index_select", "index.Tensor")


def _index_arguments(node: fx.Node) -> list[fx.Node]:
    """Tensor arguments that say *where* to read rather than what."""
    if node.target not in _INDEXED:
        return []
    found: list[fx.Node] = []
    fx.map_arg(node.args[1:], found.append)
    return found


def _pads_with_values(node: fx.Node) -> bool:
    padded = node.target in rules.overloads("constant_pad_nd", "pad")
    if not padded:
        return False
    if node.target in rules.overloads("pad") and (*node.args, "constant")[2] != "constant":
        return True
    value = node.args[-1] if len(node.args) > 2 else node.kwargs.get("value", 0)
    return not isinstance(value, str) and value not in (0, 0.0, None, "constant")


def _is_zero_fill(node: fx.Node) -> bool:
    fills = rules.overloads("full", "scalar_tensor")
    return node.target in fills and node.args[-1] in (0, 0.0)


_VIEWS = rules.overloads("view.default", "_unsafe_view")
_PADS = rules.overloads("constant_pad_nd", "pad")


def _run_move(target: Any, args: Any, kwargs: dict[str, Any], fill: int) -> Any:
    """Run a movement op on labels, which need not have the strides of the real tensors."""
    if target in _VIEWS:
        return args[0].reshape(args[1])
    if target in _PADS:
        return torch.ops.aten.constant_pad_nd.default(args[0], args[1], fill)
    if target in rules.overloads("copy"):
        return args[1].expand_as(args[0])
    return target(*args, **{k: v for k, v in kwargs.items() if k != "dtype"})
