"""Two oracles that know nothing of the finder: equal outputs, and legality tried on the module.

*Legality.* A product may be rewritten in some features of a head iff these may change basis
together: insert a random invertible matrix in the rows that make them and its counterpart in what
they meet, and see whether the outputs of the original module stay. Features that may be mixed form
the blocks that a rewrite could decompose; their number is what there is to be found.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bda_fx
from tests import tolerances
from tests.fuzz.grammar import Spec
from tests.fuzz.render import group_of, query_row, render, rows_of

Slot = tuple[str, int, tuple[int, ...], bool]
"""A parameter, the axis along which it is indexed, the indices of the features, and whether they
turn by S⁻¹ (else by Sᵀ)."""


@dataclass(frozen=True)
class Verdict:
    """What one spec came to."""

    spec: Spec
    legal: dict[str, int]
    """Features that may be decomposed, summed over key/value heads, by product."""
    found: dict[str, int]
    wrong: str = ""
    """Why the rewrite is wrong, if it is."""

    @property
    def beyond(self) -> bool:
        """Whether more was rewritten than the legality oracle allows."""
        return any(self.found[p] > self.legal[p] for p in self.legal)

    @property
    def missed(self) -> dict[str, int]:
        return {p: max(0, self.legal[p] - self.found[p]) for p in self.legal}


def build(spec: Spec) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module of a spec and its example inputs."""
    space: dict[str, Any] = {}
    exec(compile(render(spec), "<fuzzed module>", "exec"), space)
    return space["model"], space["inputs"]


def judge(spec: Spec, options: dict[str, Any] | None = None, dynamic: bool = False) -> Verdict:
    """Rewrite the module of a spec and hold it against both oracles."""
    model, inputs = build(spec)
    legal = legal_features(spec, model, inputs)
    chosen = options or {"basis_size": "full"}
    shapes = _dynamic(inputs) if dynamic and not spec.cached else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rewritten = bda_fx.rewrite(
                copy.deepcopy(model), inputs, dynamic_shapes=shapes, options=chosen
            )
        except ValueError:
            if shapes is None:
                raise
            shapes = None  # the module fixes a size
            rewritten = bda_fx.rewrite(copy.deepcopy(model), inputs, options=chosen)
    found = {"qk": 0, "vo": 0}
    for site in rewritten.report.rewritten:
        for product in site.product.split("+"):
            found[product] += (site.kv_heads or 0) * (site.decomposed or 0)
    bound = tolerances.program([s.condition or 0.0 for s in rewritten.report.rewritten])
    wrong = ""
    module = rewritten.program.module()
    for given in _samples(inputs, larger=shapes is not None):
        with torch.no_grad():
            error = _difference(module(*given), model(*given))
        if not error <= max(bound, tolerances.FLOAT64_IDENTITY):
            wrong = f"outputs differ by {error:.1e}, bound {bound:.1e}"
    return Verdict(spec, legal, found, wrong)


def _samples(inputs: tuple[Tensor, ...], *, larger: bool) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    yield inputs
    for tokens in (0, 3) if larger else (0,):
        yield tuple(
            torch.randn(t.shape[0], t.shape[1] + tokens, *t.shape[2:], generator=generator).double()
            for t in inputs
        )


def _dynamic(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple({1: torch.export.Dim.DYNAMIC} for _ in inputs)


def _difference(got: Any, expected: Any) -> float:
    """Largest relative difference of any output; inf where one is not finite or shaped alike."""
    worst = 0.0
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if a.shape != b.shape or not bool(a.isfinite().all()):
            return float("inf")
        worst = max(worst, float((a - b).norm() / b.norm().clamp_min(1e-300)))
    return worst


# -- legality, tried on the module ---------------------------------------------------------------


def legal_features(spec: Spec, model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """How many features of each product may be decomposed, over all key/value heads."""
    with torch.no_grad():
        expected = tree_leaves(model(*inputs))
    joint = spec.shared == "kv"

    def invisible(slots: list[Slot] | None) -> bool:
        if slots is None:
            return False
        with torch.no_grad():
            changed = copy.deepcopy(model)
            _insert(changed, slots)
            return _difference(tree_leaves(changed(*inputs)), expected) <= tolerances.INVISIBLE

    totals = {}
    for product, slots_of in (("qk", key_slots), ("vo", value_slots)):
        total = 0
        for group in range(spec.kv_heads):

            def mixable(
                features: tuple[int, ...], group: int = group, slots_of: Any = slots_of
            ) -> bool:
                slots = slots_of(spec, group, features)
                if joint and slots is not None:
                    others = (value_slots if slots_of is key_slots else key_slots)(
                        spec, group, features
                    )
                    slots = None if others is None else _merged(slots, others)
                return invisible(slots)

            total += sum(len(block) for block in _blocks(spec.head_dim, mixable) if len(block) > 1)
        # One weight for K and Q: a change of some key features is one of the query features that
        # they meet, whose own role as key features it serves too. Both blocks were counted, and
        # only one of them can be the identity.
        totals[product] = total // 2 if product == "qk" and spec.shared == "kq" else total
    return totals


def _merged(slots: list[Slot], others: list[Slot]) -> list[Slot]:
    return list(dict.fromkeys([*slots, *others]))


def _blocks(size: int, mixable: Callable[[tuple[int, ...]], bool]) -> list[tuple[int, ...]]:
    """Blocks of features that may be mixed with each other."""
    blocks: list[tuple[int, ...]] = []
    for feature in range(size):
        for i, block in enumerate(blocks):
            if mixable((*block, feature)):
                blocks[i] = (*block, feature)
                break
        else:
            blocks.append((feature,))
    return blocks


def key_slots(spec: Spec, group: int, features: tuple[int, ...]) -> list[Slot] | None:
    """What changes with some features of key head ``group``."""
    d, rows = spec.head_dim, rows_of(spec)
    key_flipped = spec.permuted in ("k", "both") or (
        spec.permuted == "heads" and spec.kv_heads > 1 and group == spec.kv_heads - 1
    )
    place = tuple(d - 1 - f if key_flipped else f for f in features)
    asked = tuple(d - 1 - f if spec.permuted in ("q", "both") else f for f in place)
    k = rows["k"]
    slots = _projection(k.weight, k.bias, tuple(k.at(group, f) for f in features), True)
    slots += _added(spec, "k", group, features, True)
    for head in range(spec.heads):
        if group_of(spec, head) != group:
            continue
        q = rows["q"]
        at = tuple(q.first + query_row(spec, head) + f for f in asked)
        slots += _projection(q.weight, q.bias, at, False)
        slots += _added(spec, "q", head, asked, False)
        if spec.second_query:
            slots.append(("w_second", 0, tuple(head * d + f for f in place), False))
    return slots


def value_slots(spec: Spec, group: int, features: tuple[int, ...]) -> list[Slot] | None:
    """What changes with some features of value head ``group``."""
    d, v = spec.head_dim, rows_of(spec)["v"]
    slots = _projection(v.weight, v.bias, tuple(v.at(group, f) for f in features), True)
    slots += _added(spec, "v", group, features, True)
    place = tuple(d - 1 - f if spec.change_out == "flip" else f for f in features)
    for head in range(spec.heads):
        if group_of(spec, head) != group:
            continue
        at = spec.heads - 1 - head if spec.change_out == "swap_heads" else head
        slots.append(("w_o", 1, tuple(at * d + f for f in place), False))
        if spec.outputs == "two":
            slots.append(("w_o2", 1, tuple(at * d + f for f in place), False))
        if spec.outputs == "half_heads" and at == 0:
            slots.append(("w_o2", 1, place, False))
        if spec.outputs == "half_features":
            seen = [f for f in place if f < 2]
            if 0 < len(seen) < len(place):
                return None
            if seen:
                slots.append(("w_o2", 1, tuple(at * 2 + f for f in place), False))
    return slots


def _projection(weight: str, bias: str | None, at: tuple[int, ...], near: bool) -> list[Slot]:
    return [(name, 0, at, near) for name in (weight, bias) if name is not None]


def _added(spec: Spec, part: str, head: int, features: tuple[int, ...], near: bool) -> list[Slot]:
    """A constant or a second linear that is added to a projection."""
    kind, d = getattr(spec, f"change_{part}"), spec.head_dim
    if kind == "add_linear":
        return [(f"w_{part}2", 0, tuple(head * d + f for f in features), near)]
    if kind == "add_constant":
        return [(f"c_{part}", 0, tuple(head * d + f for f in features), near)]
    return []


def _insert(model: nn.Module, slots: list[Slot]) -> None:
    """Change basis: vectors of some features become M⁻ᵀ v (near) or M v, for one random M."""
    generator, size = torch.Generator().manual_seed(2), len(slots[0][2])
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64) + 2 * torch.eye(size)
    near = torch.linalg.inv(matrix).T
    for name, axis, at, inverse in slots:
        value = getattr(model, name).data
        view = value.flatten() if name.startswith("c_") else value.movedim(axis, 0)
        turned = (near if inverse else matrix) @ view[list(at)].reshape(size, -1)
        if name.startswith("c_"):
            value.view(-1)[list(at)] = turned.flatten()
        else:
            view[list(at)] = turned.reshape(size, *view.shape[1:])


def smaller(spec: Spec, failing: Callable[[Spec], bool]) -> Spec:
    """The spec with as many plain choices as possible that still fails."""
    plain = Spec()
    for rounds in itertools.count():
        before = spec
        for name in list(spec.unusual):
            candidate = type(spec)(**{**spec.__dict__, name: getattr(plain, name)}).sensible()
            if candidate != spec and failing(candidate):
                spec = candidate
        if spec == before or rounds > 3:
            return spec
    raise AssertionError
