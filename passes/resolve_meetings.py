"""From meetings to components: blocks of features that must change basis together.

A *meeting* pairs the features of a K or V head with what they meet, one to one, in one product.
Whatever meets is tied: if one side turns by S⁻¹, the other turns by Sᵀ. So the meetings are edges
of a graph whose vertices are *blocks*, sets of features that only ever occur together, and a change
of basis is one S for each connected component, S⁻¹ on one side of it and Sᵀ on the other.

    K ── Q              one key, one query head: the plain case
    K ── Q₁, Q₂         grouped queries
    K, P_k ── Q, P_q    content and position keys and queries, all pairs (DeBERTa)
    K, R ── Q + u + v   relative positions, and biases added to the queries (Transformer-XL)

Not every graph can be coloured so: where a block meets itself, or the features of two blocks are
tied in two different orders, the component is lost.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

from bda_fx.passes.labels import Cause, Meets
from bda_fx.passes.sites import BOTH, Reason


@dataclass(frozen=True)
class Block:
    """Features that change basis together, in the order in which the component's are numbered.

    ``near`` is whether the block is on the side of keys and values.
    """

    features: tuple[int, ...]
    near: bool


@dataclass(frozen=True)
class Component:
    """Blocks that share one change of basis, and the products that they take part in."""

    product: str
    blocks: tuple[Block, ...]

    @property
    def width(self) -> int:
        return len(self.blocks[0].features)


def resolve(meets: Meets, touched: dict[int, Cause]) -> list[Component]:
    """Components of features that nothing but their own products reads.

    ``touched`` grows by the features that are lost on the way, each with the cause that lost it.
    """
    meets = {pair: set(kinds) for pair, kinds in meets.items()}
    _spread(meets, touched)
    _drop(meets, touched)
    for kv, partner in list(meets):
        if len(set(kv)) < len(kv) or len(set(partner)) < len(partner) or set(kv) & set(partner):
            reason = Reason.SHARED_WEIGHT if set(kv) & set(partner) else Reason.MISMATCHED
            _lose((*kv, *partner), reason, touched)
    _spread(meets, touched)
    _drop(meets, touched)
    return _components(_refined(meets), touched)


def _spread(meets: Meets, touched: dict[int, Cause]) -> None:
    """A feature that meets a lost one is lost."""
    spreading = True
    while spreading:
        spreading = False
        for kv, partner in meets:
            if touched.keys().isdisjoint(kv) and touched.keys().isdisjoint(partner):
                continue
            for a, b in zip(kv, partner, strict=True):
                if (a in touched) != (b in touched):
                    cause = touched.get(a) or touched[b]
                    touched[a] = touched[b] = cause
                    spreading = True


def _drop(meets: Meets, touched: dict[int, Cause]) -> None:
    for (kv, partner), kinds in list(meets.items()):
        if touched.keys().isdisjoint(kv):
            continue
        kept = [(a, b) for a, b in zip(kv, partner, strict=True) if a not in touched]
        del meets[kv, partner]
        if kept:
            left, right = zip(*kept, strict=True)
            meets.setdefault((left, right), set()).update(kinds)


def _lose(features: tuple[int, ...], reason: Reason, touched: dict[int, Cause]) -> None:
    for feature in features:
        touched.setdefault(feature, Cause(reason, ""))


def _refined(meets: Meets) -> Meets:
    """Meetings split until two blocks share all of their features or none of them.

    An output projection that sees half of every head, for one, leaves two blocks a head.
    """
    blocks = set(chain.from_iterable(meets))
    if len(set(chain.from_iterable(blocks))) == sum(map(len, blocks)):
        return meets  # the common case: every feature is in one block
    while True:
        seen: dict[int, list[int]] = defaultdict(list)
        for at, (kv, partner) in enumerate(meets):
            for feature in kv:
                seen[feature].append(2 * at)
            for feature in partner:
                seen[feature].append(2 * at + 1)
        number: dict[tuple[int, ...], int] = {}
        signature = {f: number.setdefault(tuple(ats), len(number)) for f, ats in seen.items()}
        split: Meets = {}
        for (kv, partner), kinds in meets.items():
            parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for a, b in zip(kv, partner, strict=True):
                parts.setdefault((signature[a], signature[b]), []).append((a, b))
            for part in parts.values():
                left, right = zip(*part, strict=True)
                split.setdefault((left, right), set()).update(kinds)
        if split.keys() == meets.keys():
            return split
        meets = split


def _components(meets: Meets, touched: dict[int, Cause]) -> list[Component]:
    edges: dict[frozenset[int], list[tuple[tuple[int, ...], tuple[int, ...], str]]] = defaultdict(
        list
    )
    for (kv, partner), kinds in meets.items():
        for kind in sorted(kinds):
            edges[frozenset(kv)].append((kv, partner, kind))
            edges[frozenset(partner)].append((partner, kv, kind))
    found, done = [], set()
    for kv, _ in meets:
        if frozenset(kv) not in done:
            component = _grow(kv, edges)
            if isinstance(component, Component):
                found.append(component)
                done |= {frozenset(b.features) for b in component.blocks}
            else:
                done |= component
                reason = Reason.MISMATCHED
                _lose(tuple(f for block in component for f in block), reason, touched)
    votes: dict[frozenset[int], int] = defaultdict(int)
    for kv, partner in meets:
        votes[frozenset(kv)] += 1
        votes[frozenset(partner)] -= 1
    return [_keys_near(component, votes) for component in found]


def _grow(
    start: tuple[int, ...],
    edges: dict[frozenset[int], list[tuple[tuple[int, ...], tuple[int, ...], str]]],
) -> Component | set[frozenset[int]]:
    """The component of ``start``, or the blocks of one that allows no change of basis."""
    order = {frozenset(start): start}
    near = {frozenset(start): True}
    kinds: set[str] = set()
    stack, sound = [frozenset(start)], True
    while stack:
        block = stack.pop()
        for mine, other, kind in edges[block]:
            kinds.add(kind)
            wanted = other
            if mine != order[block]:
                meets = dict(zip(mine, other, strict=True))
                wanted = tuple(meets[f] for f in order[block])
            met = frozenset(other)
            if met not in order:
                order[met], near[met] = wanted, not near[block]
                stack.append(met)
            sound &= order[met] == wanted and near[met] != near[block]
    if not sound:
        return set(order)
    product = BOTH if len(kinds) > 1 else kinds.pop()
    return Component(product, tuple(Block(order[b], near[b]) for b in order))


def _keys_near(component: Component, votes: dict[frozenset[int], int]) -> Component:
    """Call the side near that holds more of what the products took for keys and values."""
    near = sum(votes[frozenset(b.features)] * (1 if b.near else -1) for b in component.blocks)
    if near >= 0:
        return component
    turned = tuple(Block(b.features, not b.near) for b in component.blocks)
    return Component(component.product, turned)
