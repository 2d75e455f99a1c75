"""ONNX ops that move elements: each element of the result is one of the operand, or a filling."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bda_fx.importers.known_values import Known, Value, known, tensor
from bda_fx.importers.op_table import Node, axes_of, ints, is_static, number, onnx_op
from bda_fx.importers.shape_ops import shape_of

_FAR = 2**31 - 1
"""From here on an end of a slice stands for that of the axis."""


@onnx_op("Identity")
def identity(node: Node, x: Value) -> Value:
    return x


@onnx_op("Dropout")
def dropout(
    node: Node, x: Value, ratio: Value | None = None, training: Value | None = None
) -> Value:
    """Nothing, but in training mode."""
    drops = training is not None and bool(number(node, training, "mode"))
    if drops and (ratio is None or number(node, ratio, "ratio") != 0):
        raise node.refused("it drops elements (training_mode)")
    if node.wants(1):
        raise node.refused("its mask is read")
    return x


@onnx_op("Transpose")
def transpose(node: Node, x: Value) -> Value:
    order = node.get("perm") or list(range(len(shape_of(x))))[::-1]
    if isinstance(x, Known):
        return known(x.array.transpose(order), x.dtype)
    return x.permute(order)


@onnx_op("Unsqueeze")
def unsqueeze(node: Node, x: Value, given: Value | None = None) -> Value:
    """Axes are counted in the result."""
    asked = node.get("axes") if given is None else ints(node, given, "axes")
    rank = len(shape_of(x)) + len(asked)
    axes = sorted(int(axis) % rank for axis in asked)
    if isinstance(x, Known):
        return known(np.expand_dims(x.array, tuple(axes)), x.dtype)
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


@onnx_op("Squeeze")
def squeeze(node: Node, x: Value, given: Value | None = None) -> Value:
    sizes = shape_of(x)
    axes = axes_of(node, given, len(sizes))
    if axes is None:
        axes = [at for at, size in enumerate(sizes) if is_static(size) and size == 1]
    if isinstance(x, Known):
        return known(x.array.squeeze(tuple(axes)), x.dtype)
    for axis in axes:
        if not is_static(x.shape[axis]):
            torch._check(x.shape[axis] == 1)  # ONNX refuses to squeeze any other
        elif x.shape[axis] != 1:
            raise node.refused(f"axis {axis} has {x.shape[axis]} elements")
    return x.squeeze(axes) if axes else x


@onnx_op("Concat")
def concat(node: Node, *parts: Value) -> Value:
    axis = node.get("axis", 0)
    if all(isinstance(part, Known) for part in parts):
        arrays = [part.array for part in parts if isinstance(part, Known)]
        if any(array.dtype == object for array in arrays):
            arrays = [array.astype(object) for array in arrays]
        return known(np.concatenate(arrays, axis), parts[0].dtype)
    return torch.cat([tensor(part) for part in parts], axis)


@onnx_op("Split")
def split(node: Node, x: Value, given: Value | None = None) -> tuple[Value, ...]:
    """By the sizes given, else into parts of one size, of which the last may be smaller."""
    axis, sizes = node.get("axis", 0), node.get("split")
    if given is not None:
        sizes = ints(node, given, "sizes")
    if sizes is None:
        count = len(node.outputs)
        whole = shape_of(x)[axis]
        if not is_static(whole) and count > 1:
            raise node.refused("an open size is split into parts")
        each = -(-whole // count)
        sizes = [each] * (count - 1) + [whole - each * (count - 1)]
    if isinstance(x, Known):
        parts = np.split(x.array, np.cumsum(sizes)[:-1].tolist(), axis)
        return tuple(known(part, x.dtype) for part in parts)
    return torch.split(x, sizes, axis)


@onnx_op("Slice")
def slices(node: Node, x: Value, *given: Value | None) -> Value:
    """Along each axis as Python slices, ends beyond the axis cut off."""
    names = ("starts", "ends", "axes", "steps")
    asked: dict[str, list[Any]] = {name: node.get(name) for name in names}  # before operator set 10
    for name, value in zip(names, given, strict=False):
        if value is not None:
            asked[name] = ints(node, value, name)
    rank, starts, ends = len(shape_of(x)), asked["starts"], asked["ends"]
    axes = asked["axes"] or list(range(len(starts)))
    steps = asked["steps"] or [1] * len(starts)
    if isinstance(x, Known):
        if is_static(*starts, *ends):
            places = [slice(None)] * rank
            for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
                places[axis % rank] = _python_slice(start, end, step)
            return known(x.array[tuple(places)], x.dtype)
        x = tensor(x)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _sliced(node, x, axis % rank, start, end, step)
    return x


def _python_slice(start: int, end: int, step: int) -> slice:
    """A negative end far out means "to the first element", which Python spells as None."""
    return slice(start, None if step < 0 and end <= -_FAR else end, step)


def _sliced(node: Node, x: Tensor, axis: int, start: Any, end: Any, step: Any) -> Tensor:
    if not is_static(step):
        raise node.refused("its step is an open size")
    if step > 0:
        if is_static(end) and end >= _FAR:
            end = sys.maxsize
        if is_static(start, end, x.shape[axis]):  # the same numbers every time: no clamps to trace
            start, end, _ = slice(start, end).indices(x.shape[axis])
            end = max(start, end)
        if is_static(start) and start == 0 and _reaches(x.shape[axis], end) and step == 1:
            return x
        return torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    size = x.shape[axis]
    if is_static(start, end, size):
        places = list(range(*_python_slice(start, end, step).indices(size)))
        return x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    whole = is_static(start, end) and (start == -1 or start >= _FAR) and end <= -_FAR
    if not (whole and step == -1):
        raise node.refused("it counts down along an open axis")
    return x.flip(axis)


def _reaches(size: Any, end: Any) -> bool:
    """Whether ``end`` is known to be that of an axis of this size."""
    if is_static(end):
        return bool(end == sys.maxsize or (is_static(size) and end >= size))
    return not is_static(size) and size.node.expr == end.node.expr


@onnx_op("Pad")
def pad(node: Node, x: Value, *given: Value | None) -> Tensor:
    x, mode = tensor(x), node.get("mode", "constant")
    pads, value, axes = (*given, None, None, None)[:3]
    amounts = node.get("pads") if pads is None else ints(node, pads, "paddings")
    fill = node.get("value", 0.0) if value is None else number(node, value, "value")
    chosen = axes_of(node, axes, x.dim())
    chosen = list(range(x.dim())) if chosen is None else chosen
    before = dict(zip(chosen, amounts[: len(chosen)], strict=True))
    after = dict(zip(chosen, amounts[len(chosen) :], strict=True))
    if mode == "constant":
        flat = [n for at in reversed(range(x.dim())) for n in (before.get(at, 0), after.get(at, 0))]
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), flat, value=int(fill)).to(torch.bool)
        return F.pad(x, flat, value=fill)
    for axis in chosen:
        if not (is_static(before[axis], after[axis]) and before[axis] == after[axis] == 0):
            places = _padded_places(node, mode, x.shape[axis], before[axis], after[axis])
            x = x.index_select(axis, places)
    return x


def _padded_places(node: Node, mode: str, size: Any, before: Any, after: Any) -> Tensor:
    """For each place along the padded axis the one that it shows."""
    at = torch.arange(-before, size + after)
    if mode == "edge":
        return at.clamp(min=0).clamp(max=size - 1)
    if mode == "wrap":
        return at % size
    if mode == "reflect":
        at = at.abs() % (2 * size - 2)
        return torch.minimum(at, 2 * size - 2 - at)
    raise node.refused(f"mode {mode!r} is unknown")


@onnx_op("Trilu")
def trilu(node: Node, x: Value, k: Value | None = None) -> Tensor:
    diagonal = 0 if k is None else number(node, k, "diagonal")
    keep = torch.triu if node.get("upper", 1) else torch.tril
    return keep(tensor(x), diagonal)


@onnx_op("DepthToSpace")
def depth_to_space(node: Node, x: Value) -> Tensor:
    b, c, h, w = tensor(x).shape
    n = node.get("blocksize")
    if node.get("mode", "DCR") == "DCR":
        order, shape = (0, 3, 4, 1, 5, 2), (b, n, n, c // (n * n), h, w)
    else:
        order, shape = (0, 1, 4, 2, 5, 3), (b, c // (n * n), n, n, h, w)
    return tensor(x).reshape(shape).permute(order).reshape(b, c // (n * n), h * n, w * n)


@onnx_op("SpaceToDepth")
def space_to_depth(node: Node, x: Value) -> Tensor:
    b, c, h, w = tensor(x).shape
    n = node.get("blocksize")
    moved = tensor(x).reshape(b, c, h // n, n, w // n, n).permute(0, 3, 5, 1, 2, 4)
    return moved.reshape(b, c * n * n, h // n, w // n)
