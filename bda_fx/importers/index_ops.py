"""ONNX ops that pick elements by index, or find the index of an element.

Indices may be negative in ONNX and count from the end. ``aten.index`` does the same; where the op
at hand does not, they are made positive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bda_fx.importers.known_values import Known, Value, known, tensor
from bda_fx.importers.op_table import Node, ints, is_static, number, onnx_op
from bda_fx.importers.shape_ops import shape_of


@onnx_op("Gather")
def gather(node: Node, x: Value, indices: Value) -> Value:
    axis = node.get("axis", 0)
    axis = axis + len(shape_of(x)) if axis < 0 else axis
    if isinstance(indices, Known) and not indices.symbolic:
        if isinstance(x, Known):
            return known(x.array.take(indices.array, axis), x.dtype)
        if indices.array.ndim == 0:
            return tensor(x).select(axis, indices.item)
    at: list[Any] = [None] * axis + [indices_of(indices)]
    return torch.ops.aten.index.Tensor(tensor(x), at)


@onnx_op("GatherElements")
def gather_elements(node: Node, x: Value, indices: Value) -> Tensor:
    x, axis = tensor(x), node.get("axis", 0)
    return torch.gather(x, axis, _positive(indices_of(indices), x.shape[axis]))


@onnx_op("GatherND")
def gather_nd(node: Node, x: Value, indices: Value) -> Tensor:
    """The last axis of the indices holds coordinates, behind the axes of the batch."""
    x, indices, batch = tensor(x), indices_of(indices), node.get("batch_dims", 0)
    if not is_static(indices.shape[-1]):
        raise node.refused("how many coordinates an index has is an open size")
    at = [
        torch.arange(size).reshape([size if a == axis else 1 for a in range(indices.dim() - 1)])
        for axis, size in enumerate(x.shape[:batch])
    ]
    return torch.ops.aten.index.Tensor(x, [*at, *indices.unbind(-1)])


@onnx_op("ScatterND")
def scatter_nd(node: Node, x: Value, indices: Value, updates: Value) -> Tensor:
    reduction = node.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise node.refused(f"reduction {reduction!r} is not supported")
    places: list[Tensor | None] = list(indices_of(indices).unbind(-1))
    return tensor(x).index_put(places, tensor(updates), accumulate=reduction == "add")


@onnx_op("ScatterElements", "Scatter")
def scatter_elements(node: Node, x: Value, indices: Value, updates: Value) -> Tensor:
    x, axis, reduction = tensor(x), node.get("axis", 0), node.get("reduction", "none")
    places = _positive(indices_of(indices), x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, tensor(updates))
    if reduction == "add":
        return x.scatter_add(axis, places, tensor(updates))
    raise node.refused(f"reduction {reduction!r} is not supported")


@onnx_op("OneHot")
def one_hot(node: Node, indices: Value, depth: Value, values: Value) -> Tensor:
    """An index out of range gives a row without a one."""
    count, axis = int(number(node, depth, "depth")), node.get("axis", -1)
    places, (off, on) = tensor(indices), tensor(values).unbind(0)
    axis = axis + places.dim() + 1 if axis < 0 else axis
    shape = [count if at == axis else 1 for at in range(places.dim() + 1)]
    each = torch.arange(count).reshape(shape)
    return torch.where(_positive(places, count).unsqueeze(axis) == each, on, off)


@onnx_op("TopK")
def top_k(node: Node, x: Value, k: Value | None = None) -> tuple[Tensor, Tensor]:
    count = node.get("k") if k is None else number(node, k, "count")
    return torch.topk(
        tensor(x), count, node.get("axis", -1), bool(node.get("largest", 1)),
        bool(node.get("sorted", 1)),
    )  # fmt: skip


@onnx_op("ArgMax", "ArgMin")
def arg_max(node: Node, x: Value) -> Tensor:
    if node.get("select_last_index", 0):
        raise node.refused("select_last_index is not supported")
    find = torch.argmax if node.op == "ArgMax" else torch.argmin
    return find(tensor(x), node.get("axis", 0), bool(node.get("keepdims", 1)))


@onnx_op("CumSum")
def cumsum(node: Node, x: Value, along: Value) -> Tensor:
    x, (axis,) = tensor(x), ints(node, along, "axis")
    x = x.flip(axis) if node.get("reverse", 0) else x
    total = torch.cumsum(x, axis, dtype=x.dtype)
    if node.get("exclusive", 0):  # shifted by one, not less x: that would round once more
        first = torch.zeros_like(x.narrow(axis, 0, 1))
        total = torch.cat([first, total.narrow(axis, 0, x.shape[axis] - 1)], axis)
    return total.flip(axis) if node.get("reverse", 0) else total


def indices_of(value: Value) -> Tensor:
    """Indices as int64: the only type that each of PyTorch's and ONNX's ops takes."""
    return tensor(value).to(torch.int64)


def _positive(indices: Tensor, size: Any) -> Tensor:
    return torch.where(indices < 0, indices + size, indices)
