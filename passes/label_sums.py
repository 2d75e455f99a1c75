"""Rules for factors, sums and mixtures: what multiplies features and what adds them up.

    y = a · x                 a is the same for all features of a head: they stay in one class
    y = a · x + b · z         a sum of features is a feature: each of its terms changes basis alike
    y[i] = Σ_t a[i, t] x[t]   the same, with as many terms as there are tokens

What is alike is told by numbers: features whose terms lie in the same rows and carry the same
factors get equal rows of the result, all others get different ones and are never mixed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.label_moves import Moves, moves_one, scale_of
from bda_fx.passes.labels import (
    PLAIN,
    ZERO,
    Labels,
    Outer,
    Source,
    Value,
    distinct_pairs,
    hashed,
    hashed_lines,
)
from bda_fx.passes.run_moves import pads_with_values, tensors_of
from bda_fx.passes.sites import Reason

MAX_STEPS = 16  # a factor is followed back so far to tell which of its elements are equal

_MULTIPLIES = rules.overloads("mul", "multiply")


class Sums(Moves):
    """Rules that leave every element a multiple of a feature, or a sum of such."""

    # -- factors ------------------------------------------------------------------------------

    def scale(self, node: fx.Node) -> Value:
        """Multiply by a factor; elements with equal factors stay in one class."""
        left, right = (*node.args, None)[0:2]
        value, factor = self.value(left), right
        if isinstance(value, int) and node.target in _MULTIPLIES:
            value, factor = self.value(right), left
        if isinstance(value, Outer) and not isinstance(factor, fx.Node):
            return value
        if not isinstance(value, Source | Labels):
            return self.spoil(node)
        return self.scaled(self.materialise(value), factor, node) or self.spoil(node)

    def scaled(self, labels: Labels, factor: Any, node: fx.Node) -> Labels | None:
        """``labels`` times a factor, as ``node`` multiplies them; None for a factor of features."""
        if not isinstance(self.value(factor), int) or not _is_floating(node):
            return None
        classes = self.classes(factor)
        if node.target in rules.INDEX_PUTS:  # a mask of the leading axes
            classes = classes[(..., *[None] * (labels.ids.dim() - classes.dim()))]
        # One number for all elements is a class too: features it leaves out have another.
        ids, scale, classes = (
            t.expand(self.shape(node)) for t in (labels.ids, scale_of(labels), classes)
        )
        return Labels(ids, hashed(scale, self.salt(ids), classes))

    def write(self, node: fx.Node) -> Value:
        """Zeros in the places of a mask, ``x[mask] = 0``, are a factor."""
        value = self.value(node.args[0])
        if node.target in rules.INDEX_PUTS and isinstance(value, Source | Labels):
            places: Any = node.args[1]
            mask, *others = places
            masked = isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool
            if masked and not others and self.is_zero(node.args[2]):
                return self.scaled(self.materialise(value), mask, node) or self.spoil(node)
        return super().write(node)

    def classes(self, factor: Any, steps: int = MAX_STEPS) -> Tensor:
        """A number for each element of a factor, equal only where elements are so for certain.

        Masks and gates are often expanded along the features before they are used.
        """
        value = factor.meta.get("val") if isinstance(factor, fx.Node) else None
        if not isinstance(value, Tensor):
            return torch.zeros((), dtype=torch.int64)
        shape, inputs = self.shape(factor), tensors_of(factor)
        if factor.target in rules.FILLS:
            return torch.zeros(shape, dtype=torch.int64)
        if steps and moves_one(factor) and not pads_with_values(factor):
            classes = self.classes(inputs[0], steps - 1)
            if factor.target in rules.KEEPS:
                return classes
            moved = self.run(factor, {inputs[0]: Labels(classes)})
            if isinstance(moved, Labels):
                return moved.ids
        if steps and inputs and _is_pointwise(factor):
            return hashed(*(self.classes(arg, steps - 1).expand(shape) for arg in inputs))
        return torch.arange(torch.Size(shape).numel()).view(shape)

    def salt(self, like: Tensor) -> Tensor:
        """A number for the node that is run now: what two nodes make is not alike."""
        return torch.tensor(len(self.values)).expand(like.shape)

    # -- sums ---------------------------------------------------------------------------------

    def add(self, node: fx.Node) -> Value:
        """Add up the terms that the table names; those that are zero are left out."""
        places = [
            (rules.argument(node, term), factor and rules.argument(node, factor))
            for term, factor in rules.SUMS[node.target]
        ]
        if not any(isinstance(self.value(arg), Source | Labels) for arg, _ in places):
            return self.spoil(node)
        terms = []
        for arg, factor in places:
            if self.is_zero(arg):
                continue
            term = self.term(arg, node)
            scaled = None if term is None else self.scaled(term, factor, node)
            if scaled is None:
                return self.spoil(node)
            terms.append(scaled)
        return terms[0] if len(terms) == 1 else self.sum_of(node, *terms)

    def sum_of(self, node: fx.Node, a: Labels, b: Labels) -> Value:
        (features_a, rows_a), (features_b, rows_b) = (self.sources.locate(t.ids) for t in (a, b))
        labelled_a, labelled_b = a.ids >= 0, b.ids >= 0
        empty_a, empty_b = a.ids == ZERO, b.ids == ZERO
        if not bool(((labelled_a | empty_a) & (labelled_b | empty_b)).all()):
            return self.spoil(node)
        both = labelled_a & labelled_b
        if self.rotates(features_a[both], features_b[both]):
            return self.spoil(node, Reason.ROTATED)
        features = torch.where(labelled_a, features_a, features_b)
        features[both] = self.sums(features_a[both], features_b[both])
        rows = hashed(
            *(torch.where(t.ids >= 0, r, -1) for t, r in ((a, rows_a), (b, rows_b))),
            *(scale_of(t) for t in (a, b)),
        )
        return self.sources.derive(features, rows, mixed=self.is_mixed(a.ids, b.ids))

    def term(self, arg: Any, node: fx.Node) -> Labels | None:
        value = self.value(arg)
        if isinstance(value, Source | Labels):
            return self.materialise(value)
        return self.constant(arg, node) if value == PLAIN else None

    def is_mixed(self, *ids: Tensor) -> bool:
        return any(bool(self.sources.mixed(x).any()) for x in ids)

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """Numbers of the sums of features, element by element."""
        pairs, of = distinct_pairs(left, right)
        numbers = [self.sources.sum_of(pair) for pair in pairs.tolist()]
        return torch.tensor(numbers, dtype=torch.int64)[of]

    def rotates(self, left: Tensor, right: Tensor) -> bool:
        """Whether different features of one tensor are added up."""
        for a, b in distinct_pairs(left, right)[0].tolist():
            owners = [{self.ports.owner(t) for t in self.sources.terms(f)} for f in (a, b)]
            if a != b and owners[0] & owners[1]:
                return True
        return False

    # -- mixtures -----------------------------------------------------------------------------

    def mix_along(self, node: fx.Node) -> Value:
        """Mix elements along axes on which each line holds one feature, which then comes out."""
        value = self.value(node.args[0])
        if not isinstance(value, Source | Labels) or not _is_floating(node):
            return self.spoil(node)
        labels = self.materialise(value)
        axes = rules.mixed_axes(node, labels.ids.dim())
        found, rows = self.sources.locate(labels.ids)
        rows = torch.where(labels.ids >= 0, rows, -1)
        lines, rows, scale = (_lines(t, axes) for t in (found, rows, scale_of(labels)))
        features = lines.amax(-1, keepdim=True)
        if not bool(((lines == features) | (lines == ZERO)).all()):
            return self.spoil(node)
        features, rows = features.squeeze(-1), hashed_lines(rows, scale)
        shape = self.shape(node)
        place = torch.zeros((), dtype=torch.int64)
        if len(shape) == labels.ids.dim():
            for axis in axes:
                features, rows = features.unsqueeze(axis), rows.unsqueeze(axis)
            along = [size if axis in axes else 1 for axis, size in enumerate(shape)]
            place = torch.arange(torch.Size(along).numel()).view(along)
        features, rows, place = (t.expand(shape) for t in (features, rows, place))
        rows = hashed(rows, place, self.salt(rows))
        return self.sources.derive(features, rows, mixed=self.is_mixed(labels.ids))


def _lines(x: Tensor, axes: Iterable[int]) -> Tensor:
    """x with ``axes`` flattened into a last one."""
    axes = list(axes)
    last = range(-len(axes), 0)
    return x.movedim(axes, list(last)).flatten(-len(axes)) if axes else x.unsqueeze(-1)


def _is_floating(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)


def _is_pointwise(node: fx.Node) -> bool:
    """Whether equal elements of all that is read make equal elements."""
    tags = getattr(node.target, "tags", ())
    pointwise = torch.Tag.pointwise in tags or node.target in rules.UNTAGGED_POINTWISE
    return pointwise and torch.Tag.nondeterministic_seeded not in tags
