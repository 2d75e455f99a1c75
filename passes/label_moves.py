"""Rules for everything between a projection and its attention: moves, factors, sums, caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.canonicalize import roots_of
from bda_fx.passes.labels import PLAIN, SCORES, ZERO, Labels, Outer, Source, Value, hashed
from bda_fx.passes.run_moves import index_arguments, pads_with_values, run_move
from bda_fx.passes.sites import Constant, Reason
from bda_fx.passes.track_features import Tracker

MAX_CONSTANT = 1 << 20  # constants up to this many elements are followed element by element

_MULTIPLIES = rules.overloads("mul", "multiply")
_CATS = rules.overloads("cat", "concat", "concatenate")


class Moves(Tracker):
    """Rules that leave every element one feature, or a sum of features, of one token."""

    def move(self, node: fx.Node) -> Value:
        tensors = _tensors(node)
        if all(isinstance(self.values[n], int) for n in tensors):
            codes = [self.values[n] for n in tensors]
            return codes[0] if len(set(codes)) == 1 else self.merge(codes)  # type: ignore[arg-type]
        if len(tensors) == 1 and isinstance(self.values[tensors[0]], Outer):
            return self.move_outer(node, tensors[0])
        indices = {n: self.setting.constant_value(n) for n in index_arguments(node)}
        if any(v is None for v in indices.values()) or pads_with_values(node):
            return self.spoil(node, Reason.DATA_DEPENDENT if indices else None)
        inputs = {n: self.moved(n, node) for n in tensors if n not in indices}
        self.adopt(node, inputs)
        return self.run(node, {**inputs, **indices})

    def move_outer(self, node: fx.Node, arg: fx.Node) -> Value:
        outer = self.values[arg]
        assert isinstance(outer, Outer)
        a, b = self.run(node, {arg: outer.a}), self.run(node, {arg: outer.b})
        return Outer(a, b) if isinstance(a, Labels) and isinstance(b, Labels) else self.spoil(node)

    def moved(self, arg: fx.Node, node: fx.Node) -> Labels:
        """An input of a move that has labelled ones too: constants are followed as well."""
        if self.values[arg] == PLAIN:
            constant = self.constant(arg, node)
            if constant is not None:
                return constant
        return self.materialise(self.values[arg], self.shape(arg))

    def run(self, node: fx.Node, inputs: Mapping[fx.Node, Labels | Tensor | None]) -> Value:
        """Run a move on labels."""
        scaled = any(isinstance(v, Labels) and v.scale is not None for v in inputs.values())

        def perform(pick: Callable[[Labels], Tensor], fill: int) -> Any:
            def argument(n: fx.Node) -> Any:
                given = inputs.get(n)
                if isinstance(given, Labels):
                    return pick(given)
                return given if given is not None else self.size(n.meta["val"])

            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
            return run_move(node.target, args, kwargs, fill)

        try:
            ids = perform(lambda v: v.ids, ZERO)
            scale: Any = perform(_scale_of, 0) if scaled else None
        except (RuntimeError, IndexError, ValueError, TypeError):
            return self.spoil(node, Reason.UNPROVEN)
        if isinstance(ids, Tensor):
            return Labels(ids, scale)
        return [Labels(x, scale[i] if scaled else None) for i, x in enumerate(ids)]

    # -- constants ----------------------------------------------------------------------------

    def constant(self, arg: Any, user: fx.Node) -> Labels | None:
        """Labels of a constant that ``user`` reads: every element is a feature of its own.

        Only this use counts: the rewrite gives it a copy of its own, so other readers do not.
        """
        if not isinstance(arg, fx.Node):
            return None
        path: list[fx.Node] = []
        root = arg
        while _moves_one(root):
            path.append(root)
            (root,) = _tensors(root)
        value = root.meta.get("val")
        if not self.is_constant(root) or not isinstance(value, Tensor):
            return None
        if not value.dtype.is_floating_point or not 1 < value.numel() <= MAX_CONSTANT:
            return None
        if sum(r.meta["val"].numel() for r in roots_of(root)) < value.numel():
            return None  # a copy of it would be larger than what it is made of
        names = tuple(n.name for n in reversed(path))
        constant = Constant(
            self.setting.names.get(root.name, root.name), root.name, names, user.name, value.numel()
        )
        first = self.ports.constant(constant).first
        features = torch.arange(first, first + value.numel()).view(tuple(value.shape))
        labels: Value = Labels(self.sources.derive(features, torch.zeros_like(features)).ids())
        for node in reversed(path):
            if node.target in rules.KEEPS:
                continue
            labels = self.run(node, {_tensors(node)[0]: labels})  # type: ignore[dict-item]
            if not isinstance(labels, Labels):
                return None
        assert isinstance(labels, Labels)
        return labels

    def comes_from_constant(self, node: fx.Node) -> bool:
        """Whether ``node`` is a constant, moved at most."""
        return self.is_constant(_origin(node))

    # -- caches -------------------------------------------------------------------------------

    def adopt(self, node: fx.Node, inputs: dict[fx.Node, Labels]) -> None:
        """Features join those of earlier calls in a program input: ``cat([past, k])``.

        With an opaque cache the past holds the same features, changed by the same basis. Without,
        it is the cause that they cannot be rewritten.
        """
        past = [n for n in inputs if self.values[n] == PLAIN and self.is_input(n)]
        fresh = [v for n, v in inputs.items() if n not in past and bool((v.ids >= 0).any())]
        if not past or not fresh or node.target not in _CATS | rules.SCATTERS:
            return
        if bool(self.sources.mixed(fresh[0].ids).any()):
            return  # attention outputs are not what a cache holds
        dim = (*node.args, 0)[1 if node.target in _CATS else 2]
        axis = int(node.kwargs.get("dim", dim)) % fresh[0].ids.dim()  # type: ignore[arg-type]
        for n in past:
            if not inputs[n].ids.numel():
                continue
            held = None
            if self.setting.opaque_cache:
                held = self.held(fresh[0], self.shape(n), axis, node)
            if held is None:
                self.touch(fresh[0], Reason.CACHED, node)
                held = Labels(torch.full(self.shape(n), self.code(Reason.CACHED, node)))
            inputs[n] = held

    def write(self, node: fx.Node) -> Value:
        """Features are written at given positions into a program input (a static cache)."""
        past, value = node.args[0], self.value(node.args[-1])
        if node.target in rules.INDEX_PUTS:
            places = node.args[1]
            axes = [i for i, at in enumerate(places) if at is not None]  # type: ignore[arg-type]
            value = self.value(node.args[2])
        else:
            axes = [node.args[1]]  # type: ignore[list-item]
        if not isinstance(value, Source | Labels):
            return self.spoil(node)
        fresh = self.materialise(value)
        axis = int(axes[0]) % len(self.shape(past))  # type: ignore[arg-type]
        empty = self.values[past] == ZERO  # type: ignore[index]
        ours = empty or (self.setting.opaque_cache and self.is_input(past))
        held = None
        if ours and len(axes) == 1 and len(node.args) < 5:
            held = self.held(fresh, self.shape(node), axis, None if empty else node)
        if held is None and self.is_input(past):
            return self.spoil(node, Reason.CACHED)
        return held or self.spoil(node)

    def held(
        self, fresh: Labels, shape: tuple[int, ...], axis: int, joined: fx.Node | None
    ) -> Labels | None:
        """What a cache of ``shape`` holds: along ``axis`` the features that are written now.

        ``joined`` is the node where they join those of earlier calls, if there are any.
        """
        if fresh.ids.dim() != len(shape):
            return None
        features, rows = self.sources.locate(fresh.ids)
        first = features.select(axis, 0).unsqueeze(axis)
        wanted = (*shape[:axis], first.shape[axis], *shape[axis + 1 :])
        if first.shape != wanted or not bool((features == first).all()):
            return None
        scale = None
        if fresh.scale is not None:
            one = fresh.scale.select(axis, 0).unsqueeze(axis)
            if not bool((fresh.scale == one).all()):
                return None
            scale = one.expand(shape)
        if joined is not None:
            for feature in self.sources.distinct_features(fresh.ids):
                self.found.appended.setdefault(feature, joined.name)
        row = rows.select(axis, 0).unsqueeze(axis).expand(shape)
        position = torch.arange(shape[axis]).view(
            [-1 if i == axis else 1 for i in range(len(shape))]
        )
        return Labels(
            self.sources.derive(first.expand(shape), hashed(row, position.expand(shape))).ids(),
            scale,
        )

    def is_input(self, node: Any) -> bool:
        """Whether ``node`` is an input of the program, moved at most."""
        origin = _origin(node)
        return origin.op == "placeholder" and not self.is_constant(origin)

    # -- factors and sums ---------------------------------------------------------------------

    def scale(self, node: fx.Node) -> Value:
        """Multiply by a factor; elements with equal factors stay in one class."""
        left, right = (*node.args, None)[0:2]
        value, factor = self.value(left), right
        if isinstance(value, int) and node.target in _MULTIPLIES:
            value, factor = self.value(right), left
        other = self.value(factor)
        if isinstance(value, int) or not isinstance(other, int):
            return self.spoil(node)
        if isinstance(value, Outer):
            return self.spoil(node) if isinstance(factor, fx.Node) else value
        if isinstance(value, list) or not node.meta["val"].dtype.is_floating_point:
            return self.spoil(node)
        labels = self.materialise(value)
        # One number for all elements is a class too: features it leaves out have another.
        classes = torch.zeros((), dtype=torch.int64)
        if isinstance(factor, fx.Node) and isinstance(factor.meta["val"], Tensor):
            shape = self.shape(factor)
            if other == SCORES or len(shape) > labels.ids.dim():
                return self.spoil(node)
            classes = torch.arange(torch.Size(shape).numel()).view(shape)
        ids, classes = torch.broadcast_tensors(labels.ids, classes)
        old = torch.zeros_like(ids) if labels.scale is None else labels.scale.expand(ids.shape)
        salt = torch.tensor(len(self.values)).expand(ids.shape)
        return Labels(ids, hashed(old, salt, classes))

    def add(self, node: fx.Node) -> Value:
        """A sum of features is a feature: each of its terms changes basis alike."""
        left, right = self.value(node.args[0]), self.value(node.args[1])
        for value, other, number in ((left, right, node.args[1]), (right, left, node.args[0])):
            nothing = (isinstance(other, int) and other == ZERO) or number == 0
            if nothing and not isinstance(value, int) and value is left:
                same = isinstance(value, Source | Labels) and (
                    tuple(self.materialise(value).ids.shape) == self.shape(node)
                )
                return value if same else self.spoil(node)
        terms = [self.term(arg, node) for arg in node.args[:2]]
        if (
            terms[0] is None
            or terms[1] is None
            or (isinstance(left, int) and isinstance(right, int))
        ):
            return self.spoil(node)
        if not node.meta["val"].dtype.is_floating_point:
            return self.spoil(node)
        a, b = (Labels(t.ids.expand(self.shape(node)), t.scale) for t in terms)
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
            *(_scale_of(t).expand(self.shape(node)) for t in (a, b)),
        )
        mixed = bool((self.sources.mixed(a.ids) | self.sources.mixed(b.ids)).any())
        return self.sources.derive(features, rows, mixed=mixed)

    def term(self, arg: Any, node: fx.Node) -> Labels | None:
        value = self.value(arg)
        if isinstance(value, Source | Labels):
            return self.materialise(value)
        return self.constant(arg, node) if value == PLAIN else None

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """Numbers of the sums of features, element by element."""
        pairs, of = torch.stack([left, right], -1).unique(dim=0, return_inverse=True)
        numbers = [self.sources.sum_of(pair) for pair in pairs.tolist()]
        return torch.tensor(numbers, dtype=torch.int64)[of]

    def rotates(self, left: Tensor, right: Tensor) -> bool:
        """Whether different features of one tensor are added up."""
        for a, b in torch.stack([left, right], -1).unique(dim=0).tolist():
            owners = [{self.ports.owner(t) for t in self.sources.terms(f)} for f in (a, b)]
            if a != b and owners[0] & owners[1]:
                return True
        return False


def _moves_one(node: fx.Node) -> bool:
    """Whether ``node`` moves the elements of a single tensor."""
    moves = node.target in rules.MOVES or node.target in rules.KEEPS
    return moves and len(_tensors(node)) == 1 and isinstance(node.meta.get("val"), Tensor)


def _origin(node: fx.Node) -> fx.Node:
    """What ``node`` is moved from."""
    while _moves_one(node):
        (node,) = _tensors(node)
    return node


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _scale_of(value: Labels) -> Tensor:
    return torch.zeros_like(value.ids) if value.scale is None else value.scale
