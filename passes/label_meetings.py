"""What meets, feature by feature, and what passes: the two things a contraction does to labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.label_sums import Sums
from bda_fx.passes.labels import (
    FIRST_CAUSE,
    FIRST_SUM,
    MAX_HEADS,
    PLAIN,
    SCORES,
    ZERO,
    Cause,
    Labels,
    Product,
    Source,
    Value,
    distinct,
    distinct_rows,
    expand,
    head_pairs,
    merge_parts,
    parts_of,
    transposed,
)
from bda_fx.passes.sites import QK, VO, Linear, Reason

MAX_TERMS = 256  # more different vectors than this along the tokens are not followed one by one


@dataclass(frozen=True)
class Operand:
    """One side of a contraction: the node it is read from, and its labels with c last."""

    node: Any
    labels: Labels


class Meetings(Sums):
    """Notes which features meet, and carries those that pass through a mixing of tokens."""

    def note_cached(self, arg: Any) -> None:
        """The tensors from a K or V linear to its attention: what a cache may hold."""
        stack = [arg]
        while stack:
            current = stack.pop()
            movement = current.target in rules.MOVES | rules.KEEPS | rules.SCALES | rules.WRITES
            if current in self.found.cached or not movement:
                continue
            self.found.cached.add(current)
            stack += current.all_input_nodes

    def product(self, node: fx.Node, kind: str, ids: Tensor) -> Product:
        codes = [c for c in distinct(ids[ids < 0]).tolist() if c != ZERO]
        return Product(
            node.name, kind, frozenset(self.sources.distinct_features(ids)), self.merge(codes)
        )

    def meet(self, node: fx.Node, a: Operand, b: Operand) -> None:
        """Queries a [*, m, c] and keys b [*, n, c]: note which features meet, head by head."""
        self.found.operands.append((a.node, b.node))
        lead = torch.broadcast_shapes(a.labels.ids.shape[:-2], b.labels.ids.shape[:-2])
        sides = [expand(x.labels, lead) for x in (a, b)]
        counts = [self.features_of_a_token(t.ids) for t in sides]
        swap = 0 < counts[0] < counts[1]  # the side with fewer heads is the key side
        if swap:
            sides.reverse()
        self.note_cached(a.node if swap else b.node)
        product = self.product(node, QK, sides[1].ids)
        if product.code == PLAIN and not product.features:
            product = self.product(node, QK, sides[0].ids) if not counts[0] else product
        self.found.products.append(product)
        (q_heads, q_of), (k_heads, k_of) = (self.heads(t, node) for t in sides)
        if q_heads is None or k_heads is None or q_of is None or k_of is None:
            return
        for i, g in head_pairs(q_of, k_of):
            self.pair(node, QK, *q_heads[i], *k_heads[g])

    def features_of_a_token(self, ids: Tensor) -> int:
        """How many features there are at the first token of [*, tokens, c], but for constants."""
        features, _ = self.sources.locate(distinct(ids[..., 0, :]))
        owners = [
            [self.ports.owner(t).tensor for t in self.sources.terms(f)]
            for f in distinct(features).tolist()
            if f >= 0
        ]
        return sum(any(isinstance(owner, Linear) for owner in found) for found in owners)

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
            for code in distinct(other[lost]).tolist():
                reason = Reason.NO_PROJECTION if code > FIRST_CAUSE else self.cause(code).reason
                where = node.name if code > FIRST_CAUSE else self.cause(code).node
                self.lose(mine[lost & (other == code)].tolist(), Cause(reason, where))
        both = (q >= 0) & (k >= 0)
        q, k, q_parts, k_parts = q[both], k[both], q_parts[both], k_parts[both]
        if not len(q):
            return
        keys = torch.stack([q_parts, k_parts, self.owners(q), self.owners(k)], -1)
        for inside in _equal_rows(keys):
            # Every term of a sum meets every term of the other: one block for each two tensors.
            for kv in self.vectors(k[inside]):
                for partner in self.vectors(q[inside]):
                    self.found.meets.setdefault((kv, partner), set()).add(kind)

    def owners(self, features: Tensor) -> Tensor:
        """A number for the tensors that a feature is made of, equal for equal ones."""
        owners = torch.bucketize(features, torch.tensor(self.ports.firsts), right=True)
        for at in (features >= FIRST_SUM).nonzero().flatten().tolist():
            terms = self.sources.terms(int(features[at]))
            key = tuple(self.ports.owner(term).first for term in terms)
            owners[at] = -1 - self.owner_sets.setdefault(key, len(self.owner_sets))
        return owners

    def vectors(self, features: Tensor) -> list[tuple[int, ...]]:
        """The vectors of features that a vector of sums of the same tensors is made of."""
        values = features.tolist()
        if values[0] < FIRST_SUM:
            return [tuple(values)]
        return list(zip(*(self.sources.terms(f) for f in values), strict=True))

    # -- passing ------------------------------------------------------------------------------

    def pass_through(self, node: fx.Node, v: Labels, shape: tuple[int, ...]) -> Value:
        """v [*, n, c] is mixed over c: its features come out along the last axis of ``shape``."""
        self.found.products.append(self.product(node, VO, v.ids))
        if not (v.ids >= 0).any():
            codes = distinct(v.ids).tolist()
            return self.merge([c for c in codes if c != SCORES])
        return self.spread(*self.mix(node, v), shape)

    def spread(self, features: Tensor, parts: Tensor, shape: tuple[int, ...]) -> Source:
        """``features`` [*, n] with their parts, for every row of ``shape`` [*, m, n]."""
        lead, (m, n) = shape[:-2], shape[-2:]
        features, parts = (
            t.expand(*lead, n).unsqueeze(-2).expand(shape) for t in (features, parts)
        )
        first = self.sources.next_id
        row = torch.arange(torch.Size((*lead, m)).numel()).view(*lead, m, 1) * n + first
        return self.sources.derive(features, row + parts, mixed=True)

    def mix(self, node: fx.Node, v: Labels) -> tuple[Tensor, Tensor]:
        """Features and parts [*, n] of v [*, n, c] after any mixing over c."""
        features, rows = self.sources.locate(v.ids)
        parts = merge_parts(
            parts_of(rows.transpose(-1, -2), transposed(v).scale, v.ids.transpose(-1, -2))
        )
        best = features.amax(-1)
        same = ((features == best.unsqueeze(-1)) | (features == ZERO)).all(-1)
        if not bool(same.all()):
            best = self.sum_over(node, features)
        return torch.where(best == SCORES, PLAIN, best), parts

    def sum_over(self, node: fx.Node, features: Tensor) -> Tensor:
        """Sums over c of features [*, n, c] that differ along it: one term for each vector."""
        n, c = features.shape[-2:]
        blocks, of = distinct_rows(features.mT.reshape(-1, c * n))
        sums = [self.sum_of_vectors(node, block.view(c, n)) for block in blocks]
        return torch.stack(sums)[of].view(features.shape[:-1])

    def sum_of_vectors(self, node: fx.Node, vectors: Tensor) -> Tensor:
        """The sum [n] of vectors [c, n]; a feature for the sum of features in the same place."""
        different = list(dict.fromkeys(tuple(row) for row in vectors.tolist()))
        code = self.code(Reason.MISMATCHED, node)
        found = []
        for place in zip(*different, strict=True):
            terms = list(dict.fromkeys(f for f in place if f != ZERO))
            lost = [f for f in terms if f < 0]
            if lost or len(different) > MAX_TERMS:
                reason = self.cause(lost[0]).reason if lost and lost[0] <= FIRST_CAUSE else None
                self.touch_features([f for f in terms if f >= 0], reason or Reason.MISMATCHED, node)
                found.append(lost[0] if lost and len(terms) == len(lost) else code)
            else:
                found.append(self.sources.sum_of(terms) if terms else ZERO)
        return torch.tensor(found, dtype=torch.int64)


def _equal_rows(keys: Tensor) -> tuple[Tensor, ...]:
    """Indices of the rows of [n, k], together where the rows are equal."""
    if bool((keys == keys[0]).all()):
        return (torch.arange(len(keys)),)
    _, blocks, sizes = keys.unique(dim=0, return_inverse=True, return_counts=True)
    return blocks.argsort(stable=True).split(sizes.tolist())
