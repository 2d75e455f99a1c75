"""Resolve meetings: drop lost features until what is left pairs up, one head to one head."""

from __future__ import annotations

from collections import defaultdict

from bda_fx.passes.labels import Cause
from bda_fx.passes.sites import Reason

Meets = dict[tuple[tuple[int, ...], tuple[int, ...]], set[str]]
"""(features of a K or V head, what they meet in order) → the products in which they do."""


def resolve(meets: Meets, touched: dict[int, Cause]) -> None:
    """Drop lost features from ``meets`` until what is left pairs up, one head to one head.

    ``touched`` grows by the features that are lost on the way, each with the cause that lost it.
    """
    while True:
        _spread(meets, touched)
        _drop(meets, touched)
        clashes = _clashes(meets)
        if not clashes:
            return
        for feature, where in clashes.items():
            touched.setdefault(feature, Cause(Reason.MISMATCHED, where))


def _spread(meets: Meets, touched: dict[int, Cause]) -> None:
    """A feature that meets a lost one is lost."""
    edges: dict[int, set[int]] = defaultdict(set)
    for kv, partner in meets:
        for a, b in zip(kv, partner, strict=True):
            edges[a].add(b)
            edges[b].add(a)
    stack = [f for f in edges if f in touched]
    while stack:
        feature = stack.pop()
        for other in edges[feature]:
            if other not in touched:
                touched[other] = touched[feature]
                stack.append(other)


def _drop(meets: Meets, touched: dict[int, Cause]) -> None:
    for (kv, partner), kinds in list(meets.items()):
        kept = [(a, b) for a, b in zip(kv, partner, strict=True) if a not in touched]
        if len(kept) == len(kv):
            continue
        del meets[kv, partner]
        if kept:
            left, right = zip(*kept, strict=True)
            meets[left, right] |= kinds


def _clashes(meets: Meets) -> dict[int, str]:
    """Features that sit in two different heads, or whose head meets two different heads."""
    heads: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    owner: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    roles: dict[int, set[str]] = defaultdict(set)
    for (kv, partner), kinds in meets.items():
        owner[partner].add(kv)
        for feature in kv:
            heads[feature].add(kv)
            roles[feature] |= {f"kv {kind}" for kind in kinds}
        for feature in partner:
            heads[feature].add(partner)
            roles[feature].add("partner")
    found = {}
    for kv, partner in meets:
        clash = len(owner[partner]) > 1 or any(
            len(heads[f]) > 1 or len(roles[f]) > 1 or len(set(head)) < len(head)
            for head in (kv, partner)
            for f in head
        )
        if clash:
            found.update(dict.fromkeys((*kv, *partner), ""))
    return found
