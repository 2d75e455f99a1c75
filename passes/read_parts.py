"""Read parts: whatever reads some pieces of a linear's outputs reads these pieces alone.

    y = cat([a, b])                           a, b computed by themselves
    k, v = split(transpose(view(y)))    →     k = transpose(view(a)),  v = transpose(view(b))

Pieces of one linear come out of products of their own (``forms``). To put them together costs a
pass over the outputs, and most models take them apart at once: fused projections into queries, keys
and values, MLA's ``kv_b_proj`` into keys and values. So readers are followed through data movement
to where each holds some of the pieces, and the same movement is emitted for these pieces.

Requires: a linear and its form. Leaves: its readers on the pieces. Where one of them needs all
pieces together, or moves them in a way that is not followed, it says so and leaves the graph alone.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes.emit_node import EMITTED, emit, emit_view
from bda_fx.passes.forms import Form, arrangement_of
from bda_fx.passes.op_rules import argument, overloads

aten = torch.ops.aten
_VIEWS = overloads("view.default", "_unsafe_view", "reshape.default")
_UNFLATTENS = overloads("unflatten.int")
_SPLITS = overloads(
    "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "split_copy",
    "split_with_sizes_copy", "chunk", "unsafe_chunk", "tensor_split.sections",
    "tensor_split.indices",
)  # fmt: skip
_UNBINDS = overloads("unbind.int")
# Of what they read, the type and the device alone.
_NEWS = overloads("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full")
_CHECKS = overloads("_assert_tensor_metadata")  # unless sizes are given
_SIZES = overloads("sym_size.int")
_SLICES, _SELECTS = overloads("slice.Tensor"), overloads("select.int")
# Axes in another order, or more or fewer of size one: followed by trying them on a shape.
_ORDERS = overloads(
    "transpose.int", "t.default", "permute", "movedim", "swapaxes", "swapdims", "numpy_T", "mT",
    "unsqueeze", "squeeze.dim", "squeeze.dims",
)  # fmt: skip
_COPIES = overloads("clone", "contiguous", "alias", "detach", "_to_copy", "to.dtype")
_MARK = 7919
"""A size that no other axis of a tried shape has."""

Apply = Callable[[fx.Graph, fx.Node], fx.Node]


@dataclass(frozen=True, eq=False)
class _Move:
    """What a ``reader`` of the whole does, done to one part of it."""

    reader: fx.Node
    apply: Apply


@dataclass(frozen=True)
class _Part:
    """Some of a piece of the linear after some moves; ``size`` of them along its value's axis."""

    piece: int
    size: int
    moves: tuple[_Move, ...] = ()

    def then(self, reader: fx.Node, apply: Apply, size: int | None = None) -> _Part:
        size = self.size if size is None else size
        return replace(self, size=size, moves=(*self.moves, _Move(reader, apply)))


@dataclass(frozen=True)
class _Value:
    """Parts that follow each other along an axis, together of a shape: what a node holds.

    Unless it is ``viewed``: then the node is a view of that in which parts do not follow each
    other, and which another view may undo.
    """

    parts: tuple[_Part, ...]
    axis: int
    shape: tuple[Any, ...]
    viewed: bool = False

    def each(self, reader: fx.Node, axis: int | None = None) -> _Value:
        """What ``reader`` makes of this by its own op on each part, which may move the axis."""
        parts = tuple(part.then(reader, _same(reader)) for part in self.parts)
        if self.viewed:
            return replace(self, parts=parts)
        shape = tuple(reader.meta["val"].shape)
        return _Value(parts, self.axis if axis is None else axis, shape)


@dataclass(frozen=True)
class Reads:
    """How the readers of a linear read its pieces."""

    held: tuple[tuple[fx.Node, _Value], ...]
    """Nodes to be replaced by parts."""
    passed: tuple[fx.Node, ...]
    """All nodes on the way there, in an order in which each comes before its readers."""

    def redirect(self, graph: fx.Graph, pieces: Sequence[fx.Node]) -> None:
        """Let the readers read ``pieces``, and erase what led to them."""
        made: dict[tuple[int, tuple[_Move, ...]], fx.Node] = {}

        def node_of(piece: int, moves: tuple[_Move, ...]) -> fx.Node:
            if not moves:
                return pieces[piece]
            if (piece, moves) not in made:
                before = node_of(piece, moves[:-1])
                with graph.inserting_before(moves[-1].reader):
                    made[piece, moves] = moves[-1].apply(graph, before)
            return made[piece, moves]

        for node, value in self.held:
            parts = [node_of(part.piece, part.moves) for part in value.parts]
            held = parts[0]
            if len(parts) > 1:
                with graph.inserting_before(node):
                    held = emit(graph, aten.cat.default, parts, value.axis, like=node)
            node.replace_all_uses_with(held)
        for node in reversed(self.passed):
            graph.erase_node(node)
        for node in reversed(made.values()):
            if not node.users and not node.is_impure():  # a view that was viewed again
                graph.erase_node(node)


def read_parts(node: fx.Node, form: Form) -> Reads | None:
    """How the readers of the linear ``node`` read the several pieces of its form, if not together.

    Changes nothing: :meth:`Reads.redirect` does.
    """
    arrangement = arrangement_of(form)
    if arrangement is None:
        return None
    lead, groups = tuple(node.meta["val"].shape[:-1]), arrangement.groups
    shape = (*lead, *((groups,) if groups > 1 else ()), sum(arrangement.widths))
    parts = [_Part(*part) for part in zip(arrangement.order, arrangement.widths, strict=True)]
    value = _Value(tuple(parts), len(shape) - 1, shape, viewed=groups > 1)
    held: list[tuple[fx.Node, _Value]] = []
    passed: list[fx.Node] = []
    todo = [(node, value)]
    while todo:
        whole, value = todo.pop()
        taken = [_taken(reader, value) for reader in whole.users if reader.args[:1] == (whole,)]
        if len(taken) == len(whole.users) and None not in taken:
            passed += [reader for reader in whole.users if reader.target in _SPLITS | _UNBINDS]
            for reader, after in itertools.chain.from_iterable(found or () for found in taken):
                passed.append(reader)
                if len(after.parts) == 1 and not after.viewed:
                    held.append((reader, after))
                else:
                    todo.append((reader, after))
        elif value.viewed or {part.piece for part in value.parts} == set(arrangement.order):
            return None
        else:
            held.append((whole, value))
    return Reads(tuple(held), tuple(passed))


def _taken(reader: fx.Node, value: _Value) -> list[tuple[fx.Node, _Value]] | None:
    """What ``reader`` makes of a value: the nodes that hold it, or None if it is not followed."""
    target = reader.target
    if target in _VIEWS:
        return [(reader, _viewed(reader, value))]
    checks = target in _CHECKS and argument(reader, "size") is argument(reader, "stride") is None
    if target in _NEWS or checks:
        return [(reader, _alone(_Part(value.parts[0].piece, 0), reader))]
    if target in _COPIES and not (value.viewed and "memory_format" in reader.kwargs):
        return [(reader, value.each(reader))]
    if target in _UNFLATTENS and not (value.viewed and any(part.moves for part in value.parts)):
        return [(reader, _viewed(reader, value))]
    if value.viewed:
        return None
    after = None
    if target in _ORDERS:
        after = _reordered(reader, value)
    elif target in _SLICES:
        after = _sliced(reader, value)
    elif target in _SELECTS:
        after = _selected(reader, value)
    elif target in _SPLITS or target in _UNBINDS:
        return _split(reader, value)
    elif target in _SIZES and argument(reader, "dim") % len(value.shape) != value.axis:
        after = _alone(value.parts[0], reader)
    return None if after is None else [(reader, after)]


# -- moves -----------------------------------------------------------------------------------------


def _same(reader: fx.Node) -> Apply:
    """The reader's own op."""

    def apply(graph: fx.Graph, part: fx.Node) -> fx.Node:
        target: Any = reader.target
        return emit(graph, target, part, *reader.args[1:], like=reader, **reader.kwargs)

    return apply


def _alone(part: _Part, reader: fx.Node) -> _Value:
    """What ``reader`` finds in any part."""
    return _Value((part.then(reader, _same(reader)),), -1, ())


def _op(reader: fx.Node, target: Any, *args: Any) -> Apply:
    return lambda graph, part: emit(graph, target, part, *args, like=reader)


def _viewed(reader: fx.Node, value: _Value) -> _Value:
    """A view that is one of each part, along one axis; or a ``viewed`` value."""
    shape = tuple(reader.meta["val"].shape)
    run = value.shape[value.axis :]  # sizes of what runs through one part and then the next
    if not all(isinstance(size, int) and size > 0 for size in run):
        return replace(value, viewed=True)
    whole, inner, axis = math.prod(run), 1, len(shape) - 1
    while axis >= 0 and isinstance(shape[axis], int) and inner * shape[axis] < whole:
        inner *= shape[axis]
        axis -= 1
    sizes = [part.size * whole // run[0] for part in value.parts]
    fits = axis >= 0 and isinstance(shape[axis], int) and inner * shape[axis] == whole
    if not fits or any(size % inner for size in sizes):
        return replace(value, viewed=True)
    parts = [
        part.then(reader, _view(reader, axis, size // inner), size // inner)
        for part, size in zip(value.parts, sizes, strict=True)
    ]
    return _Value(tuple(parts), axis, shape)


def _view(reader: fx.Node, axis: int, size: int) -> Apply:
    """The reader's view, but for the size of an axis."""
    given: Any = reader.args

    def apply(graph: fx.Graph, part: fx.Node) -> fx.Node:
        if reader.target in _UNFLATTENS:
            split = argument(reader, "dim") % part.meta["val"].dim()
            sizes = list(argument(reader, "sizes"))
            sizes[axis - split] = size
            return emit(graph, reader.target, part, split, sizes, like=reader)
        sizes = list(given[1])
        sizes[axis] = size
        source: Any = part
        while source.target in _VIEWS and EMITTED in source.meta:
            source = source.args[0]
        return emit_view(graph, source, sizes, like=reader)

    return apply


def _reordered(reader: fx.Node, value: _Value) -> _Value | None:
    """Axes in another order, or more or fewer of size one; not if a part's own axis would go."""
    target: Any = reader.target
    ones = [isinstance(size, int) and size == 1 for size in value.shape]
    tried = [1 if one else 2 + at for at, one in enumerate(ones)]

    def result(size: int) -> torch.Size:
        tried[value.axis] = size
        moved: Tensor = target(torch.empty(tried, device="meta"), *reader.args[1:], **reader.kwargs)
        return moved.shape

    sizes = result(_MARK)
    if len(result(1)) != len(sizes):
        return None
    return value.each(reader, sizes.index(_MARK))


def _sliced(reader: fx.Node, value: _Value) -> _Value | None:
    """Some of an axis: of all parts, or some of the parts."""
    dim, start, end, step = (argument(reader, name) for name in ("dim", "start", "end", "step"))
    if (dim or 0) % len(value.shape) != value.axis:
        return value.each(reader)
    whole = value.shape[value.axis]
    if not all(bound is None or isinstance(bound, int) for bound in (start, end)):
        return None
    first, last, step = slice(start, end, step).indices(whole)
    return _within(reader, value, first, last) if step == 1 and first < last else None


def _selected(reader: fx.Node, value: _Value) -> _Value | None:
    """One index of an axis: of all parts, or of one of them."""
    dim, index = argument(reader, "dim") % len(value.shape), argument(reader, "index")
    if dim != value.axis:
        return value.each(reader, value.axis - (dim < value.axis))
    if not isinstance(index, int):
        return None
    return _picked(reader, value, index % value.shape[dim])


def _split(reader: fx.Node, value: _Value) -> list[tuple[fx.Node, _Value]] | None:
    """Some parts for each node that reads the list; along their axis alone."""
    dim = argument(reader, "dim")
    if (dim or 0) % len(value.shape) != value.axis:
        return None
    if reader.target in _UNBINDS:
        bounds = list(range(value.shape[value.axis] + 1))
    else:
        sizes = [piece.shape[value.axis] for piece in reader.meta["val"]]
        bounds = list(itertools.accumulate(sizes, initial=0))
    found = []
    for node in reader.users:
        if node.target is not operator.getitem:
            return None
        at: Any = node.args[1]
        if reader.target in _UNBINDS:
            found.append((node, _picked(node, value, at % (len(bounds) - 1))))
        else:
            first, last = bounds[at], bounds[at + 1]
            if first == last:
                return None
            found.append((node, _within(node, value, first, last)))
    return found


def _within(reader: fx.Node, value: _Value, first: int, last: int) -> _Value:
    """From one index of the axis to another."""
    parts, begin = [], 0
    for part in value.parts:
        low, high = max(first - begin, 0), min(last - begin, part.size)
        if low < high:
            cut = _op(reader, aten.slice.Tensor, value.axis, low, high)
            parts.append(part if high - low == part.size else part.then(reader, cut, high - low))
        begin += part.size
    return _Value(tuple(parts), value.axis, tuple(reader.meta["val"].shape))


def _picked(reader: fx.Node, value: _Value, index: int) -> _Value:
    """One index of the axis, which is there no longer."""
    for part in value.parts:
        if index < part.size:
            pick = _op(reader, aten.select.int, value.axis, index)
            shape = tuple(reader.meta["val"].shape)
            return _Value((part.then(reader, pick),), -1, shape)
        index -= part.size
    raise IndexError(f"{reader.format_node()}: {index} beyond the last part")
