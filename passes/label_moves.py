"""Rules for what moves between a projection and its attention: features, constants, caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.canonicalize import roots_of
from bda_fx.passes.labels import PLAIN, ZERO, Labels, Outer, Source, Value, hashed
from bda_fx.passes.run_moves import index_arguments, pads_with_values, run_move, tensors_of
from bda_fx.passes.sites import Constant, Reason
from bda_fx.passes.track_features import Tracker

MAX_CONSTANT = 1 << 20  # constants up to this many elements are followed element by element

_CATS = rules.overloads("cat", "concat", "concatenate")


class Moves(Tracker):
    """Rules that leave every element one feature of one token."""

    def move(self, node: fx.Node) -> Value:
        tensors = tensors_of(node)
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
        if self.is_zero(arg):
            return self.materialise(ZERO, self.shape(arg))
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
                if given is None and isinstance(n.meta["val"], Tensor):
                    return torch.zeros((), dtype=torch.int64).expand(self.shape(n))
                return self.size(n.meta["val"]) if given is None else given

            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
            return run_move(node.target, args, kwargs, fill)

        try:
            ids = perform(lambda v: v.ids, ZERO)
            scale: Any = perform(scale_of, 0) if scaled else None
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
        while moves_one(root):
            path.append(root)
            (root,) = tensors_of(root)
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
            labels = self.run(node, {tensors_of(node)[0]: labels})  # type: ignore[dict-item]
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
            if isinstance(self.value(past), Source | Labels) and len(node.args) < 4:
                return self.move(node)  # some elements are replaced
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

    def is_zero(self, arg: Any) -> bool:
        """Whether ``arg`` is zero for certain: a number, a tensor of zeros, a constant scalar."""
        if not isinstance(arg, fx.Node):
            return arg in (0, 0.0)
        if self.values[arg] != PLAIN or arg.meta["val"].dim() > 0:
            return self.values[arg] == ZERO
        value = self.setting.constant_value(arg)
        return value is not None and not bool(value.any())


def moves_one(node: fx.Node) -> bool:
    """Whether ``node`` moves the elements of a single tensor."""
    keeps = node.target in rules.KEEPS and not rules.is_random(node)
    return (
        (node.target in rules.MOVES or keeps)
        and len(tensors_of(node)) == 1
        and isinstance(node.meta.get("val"), Tensor)
    )


def _origin(node: fx.Node) -> fx.Node:
    """What ``node`` is moved from."""
    while moves_one(node):
        (node,) = tensors_of(node)
    return node


def scale_of(value: Labels) -> Tensor:
    return torch.zeros_like(value.ids) if value.scale is None else value.scale
