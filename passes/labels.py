"""Labels: element ids on tensors, where they came from, and the small tensor algebra on them.

Codes (negative) stand for elements that carry no feature. Shapes: an operand of a contraction is
[*, tokens, c]; ``ids`` are int64 throughout.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes.sites import Reason

ZERO = -1  # a constant zero: meets anything harmlessly
PLAIN = -2  # an input, a constant, or computed from these alone
SCORES = -3  # computed from a product of two activations
FIRST_CAUSE = -4  # -4 - k: spoilt by causes[k]

FIRST_SUM = 1 << 32  # numbers of sums of features, above those of features

SPARSE = 8
"""Distinct numbers are found by a table of at most so many places for each."""

MAX_HEADS = 65536  # more distinct heads than this is a permutation per token, not a head layout


@dataclass(frozen=True)
class Cause:
    reason: Reason
    node: str


@dataclass(frozen=True)
class Source:
    """A range of element ids: a linear's output, or what was made of such elements.

    Where ``features`` is given, every element has its own feature and row: attention outputs
    (``mixed`` over tokens), sums, and caches that hold features of earlier calls.
    """

    first: int
    shape: tuple[int, ...]
    first_feature: int
    features: Tensor | None = None
    rows: Tensor | None = None
    mixed: bool = False

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    def ids(self) -> Tensor:
        ids = torch.arange(self.first, self.first + self.numel).view(self.shape)
        if self.features is None:
            return ids
        spoilt = self.features.view(self.shape)
        return torch.where(spoilt >= 0, ids, spoilt)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features and token rows of ids of this source; anything for those of others."""
        local = ids - self.first
        if self.features is None or self.rows is None:
            column = local % self.shape[-1]
            return column + self.first_feature, ids - column
        local = local.clamp_(0, self.numel - 1)
        return self.features[local], self.rows[local]


@dataclass(frozen=True)
class Labels:
    """Element ids or codes of a tensor, and the class of factors each was multiplied by."""

    ids: Tensor
    scale: Tensor | None = None

    def swapped(self, a: int, b: int) -> Labels:
        scale = None if self.scale is None else self.scale.transpose(a, b)
        return Labels(self.ids.transpose(a, b), scale)

    def permuted(self, order: list[int]) -> Labels:
        scale = None if self.scale is None else self.scale.permute(order)
        return Labels(self.ids.permute(order), scale)


@dataclass(frozen=True)
class Outer:
    """Elements that are products, summed over tokens, of a feature of ``a`` and one of ``b``."""

    a: Labels
    b: Labels


Value = int | Source | Labels | Outer | list[Any] | None

Meets = dict[tuple[tuple[int, ...], tuple[int, ...]], set[str]]
"""(features of a K or V head, what they meet in order) → the products in which they do."""


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
    meets: Meets = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    cached: set[fx.Node] = field(default_factory=set)
    """Nodes between a K or V linear and its attention: the tensors that a cache may hold."""
    operands: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    """What meets in each product of queries and keys."""
    kept: dict[int, str] = field(default_factory=dict)
    """Features that leave into a cache, and the node where they do."""
    appended: dict[int, str] = field(default_factory=dict)
    """Features that join those of earlier calls, and the node where they do."""


class Sources:
    """All sources of one run; ids are numbered through, so an id tells its source.

    A sum of features is a feature too, numbered from ``FIRST_SUM``; ``terms`` resolves it.
    """

    def __init__(self) -> None:
        self.all: list[Source] = []
        self.sums: list[tuple[int, ...]] = []
        self.numbers: dict[tuple[int, ...], int] = {}

    @property
    def next_id(self) -> int:
        return self.all[-1].first + self.all[-1].numel if self.all else 0

    def new(self, shape: tuple[int, ...], first_feature: int) -> Source:
        self.all.append(Source(self.next_id, shape, first_feature))
        return self.all[-1]

    def derive(self, features: Tensor, rows: Tensor, *, mixed: bool = False) -> Source:
        """A source whose elements have these ``features`` (or codes) and token ``rows``."""
        shape = tuple(features.shape)
        made = Source(self.next_id, shape, -1, features.reshape(-1), rows.reshape(-1), mixed)
        self.all.append(made)
        return made

    def sum_of(self, features: Iterable[int]) -> int:
        """The number of a sum. The order of terms is kept: it tells which belong together."""
        terms = tuple(dict.fromkeys(t for f in features for t in self.terms(f)))
        if len(terms) == 1:
            return terms[0]
        if terms not in self.numbers:
            self.numbers[terms] = FIRST_SUM + len(self.sums)
            self.sums.append(terms)
        return self.numbers[terms]

    def terms(self, feature: int) -> tuple[int, ...]:
        """The features of linears and constants that a feature is the sum of."""
        return self.sums[feature - FIRST_SUM] if feature >= FIRST_SUM else (feature,)

    def which(self, ids: Tensor) -> Tensor:
        """The number of the source that each element id belongs to; -1 for codes."""
        firsts = torch.tensor([s.first for s in self.all])
        return torch.bucketize(ids.contiguous(), firsts, right=True) - 1

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features (codes kept) and token rows of element ids."""
        labelled = ids >= 0
        if not labelled.any():
            return ids.clone(), ids.clone()
        every = bool(labelled.all())
        low = ids.min() if every else torch.where(labelled, ids, self.next_id).min()
        first, last = (self._source_at(int(i)) for i in (low, ids.max()))
        if first is last:  # most often
            features, rows = first.locate(ids)
            if every:
                return features, rows
            return torch.where(labelled, features, ids), torch.where(labelled, rows, ids)
        features, rows = ids.clone(), ids.clone()
        which = self.which(ids)
        for index in distinct(which).tolist():
            if index >= 0:
                mask = which == index
                features[mask], rows[mask] = self.all[index].locate(ids[mask])
        return features, rows

    def _source_at(self, element: int) -> Source:
        return self.all[bisect.bisect_right(self.all, element, key=lambda s: s.first) - 1]

    def distinct_features(self, ids: Tensor) -> list[int]:
        """Features of linears and constants among the elements ``ids``."""
        features, _ = self.locate(distinct(ids))
        return sorted({t for f in distinct(features).tolist() if f >= 0 for t in self.terms(f)})

    def mixed(self, ids: Tensor) -> Tensor:
        """Which ids are elements of attention outputs."""
        if not self.all:
            return torch.zeros_like(ids, dtype=torch.bool)
        return (ids >= 0) & torch.tensor([s.mixed for s in self.all])[self.which(ids).clamp_min(0)]

    def orientation(self, ids: Tensor) -> str:
        """Where features of [*, free, c] lie: along c ("meets"), free ("passes"), or neither."""
        if not (ids >= 0).any():
            return "opaque"
        features, rows = self.locate(ids)
        free, c = ids.shape[-2:]
        one_row = [constant_along(rows, d, ids) for d in (-1, -2)]
        one_feature = [constant_along(features, d, ids) for d in (-1, -2)]
        meets = one_row[0] or (one_feature[1] and not one_feature[0])
        passes = one_row[1] or (one_feature[0] and not one_feature[1])
        if meets and passes:
            if c > 1 and free == 1:
                return "meets"
            return "passes" if free > 1 and c == 1 else "mixed"
        return "meets" if meets else "passes" if passes else "mixed"


def distinct(x: Tensor) -> Tensor:
    """The distinct values of an int64 tensor, ascending.

    Numbers that lie close together, as ids and features do, need not be sorted for that.
    """
    x = x.reshape(-1)
    if not len(x):
        return x
    low, high = int(x.min()), int(x.max())
    if high - low > SPARSE * len(x):
        return x.unique()
    seen = torch.zeros(high - low + 1, dtype=torch.bool)
    seen[x - low] = True
    return seen.nonzero().flatten() + low


def distinct_pairs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct pairs [n, 2] of values of two int64 vectors, ascending; each element's number."""
    lefts, rights = distinct(left), distinct(right)
    keys = torch.bucketize(left, lefts) * len(rights) + torch.bucketize(right, rights)
    found = distinct(keys)
    pairs = torch.stack([lefts[found // len(rights)], rights[found % len(rights)]], -1)
    return pairs, torch.bucketize(keys, found)


def transposed(x: Labels) -> Labels:
    return x.swapped(-1, -2)


def expand(x: Labels, lead: tuple[int, ...]) -> Labels:
    ids = x.ids.expand(*lead, *x.ids.shape[-2:])
    return Labels(ids, None if x.scale is None else x.scale.expand(ids.shape))


def repeat_heads(x: Labels, heads: int) -> Labels:
    times = heads // x.ids.shape[-3]
    scale = None if x.scale is None else x.scale.repeat_interleave(times, -3)
    return Labels(x.ids.repeat_interleave(times, -3), scale)


def hashed(*parts: Tensor) -> Tensor:
    """One number per element, equal where all ``parts`` are equal (and in practice only there)."""
    generator = torch.Generator().manual_seed(len(parts))
    total = torch.zeros(parts[0].shape, dtype=torch.int64)
    for part in parts:
        multiplier = int(torch.randint(1 << 60, (1 << 61), (1,), generator=generator)) | 1
        total.add_(part).mul_(multiplier)
        total.bitwise_xor_(total >> 29)
    return total


def hashed_lines(*parts: Tensor) -> Tensor:
    """One number per line along the last axis, equal where the lines of all ``parts`` are equal."""
    numbers = hashed(*parts)
    generator = torch.Generator().manual_seed(0)
    return (numbers * torch.randint(1, 1 << 62, numbers.shape[-1:], generator=generator)).sum(-1)


def constant_along(x: Tensor, dim: int, ids: Tensor) -> bool:
    """Whether the labelled elements of x agree along ``dim``."""
    big = torch.iinfo(torch.int64).max
    low = torch.where(ids >= 0, x, big).amin(dim, keepdim=True)
    return bool(((x == low) | (ids < 0)).all())


def first_equal(keys: Tensor) -> Tensor:
    """For each element of [*, c], the smallest index along c that holds the same key."""
    order = keys.argsort(dim=-1, stable=True)
    ordered = keys.gather(-1, order)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    start = torch.where(fresh, torch.arange(keys.shape[-1]).expand_as(order), 0).cummax(-1).values
    return torch.empty_like(order).scatter_(-1, order, order.gather(-1, start))


def parts_of(rows: Tensor, scale: Tensor | None, ids: Tensor) -> Tensor:
    """Part numbers along the last axis: labelled elements of one token row and one factor."""
    labelled = ids >= 0
    lowest = torch.iinfo(torch.int64).min
    # From the highest row of a line on, most lines are alike.
    keys = rows - torch.where(labelled, rows, lowest).amax(-1, keepdim=True)
    keys = keys if scale is None else hashed(keys, scale.expand(rows.shape))
    first = torch.where(labelled, keys, lowest).amax(-1, keepdim=True)
    if bool(((keys == first) | ~labelled).all()):
        return torch.where(labelled, 0, -1)
    lines = torch.where(labelled, keys, lowest).reshape(-1, rows.shape[-1])
    lines, of = distinct_rows(lines)
    return torch.where(labelled, first_equal(lines)[of].view(rows.shape), -1)


def merge_parts(parts: Tensor) -> Tensor:
    """The common refinement over tokens of parts [*, c, n] → [*, n]; all-constant rows are free."""
    free = (parts == -1).all(-1, keepdim=True)
    parts = torch.where(free, 0, parts)
    merged = parts[..., 0, :]
    for token in range(1, parts.shape[-2]):
        if not torch.equal(parts[..., token, :], parts[..., 0, :]):
            merged = first_equal(merged * parts.shape[-1] + parts[..., token, :] + 1)
    return merged


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of [N, k] and each row's index among them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2**62, (rows.shape[-1],), generator=generator)
    hashes, of = (rows * weights).sum(-1).unique(return_inverse=True)
    first = torch.full((len(hashes),), len(rows)).scatter_reduce(
        0, of, torch.arange(len(rows)), "amin"
    )
    distinct = rows[first]
    if not torch.equal(distinct[of], rows):
        return torch.unique(rows, dim=0, return_inverse=True)
    return distinct, of


def head_pairs(q_of: Tensor, k_of: Tensor) -> list[tuple[int, int]]:
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
