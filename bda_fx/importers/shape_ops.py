"""ONNX ops that tell, make and take shapes: what they give is known where shapes alone tell it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bda_fx.importers.known_values import MOST, Known, Value, fits, known, operand, tensor
from bda_fx.importers.op_table import Node, ints, is_static, onnx_op

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""Types by their number in onnx.TensorProto.DataType."""


def dtype_of(node: Node, code: int) -> torch.dtype:
    if code not in DTYPES:
        raise node.refused(f"type {code} of TensorProto.DataType has no counterpart in PyTorch")
    return DTYPES[code]


def shape_of(value: Value) -> list[Any]:
    """Sizes of a value, open ones as ``torch.SymInt``."""
    return list(value.array.shape if isinstance(value, Known) else value.shape)


@onnx_op("Shape")
def shape(node: Node, x: Value) -> Known:
    sizes = shape_of(x)
    return known(sizes[slice(node.get("start", 0), node.get("end"))])


@onnx_op("Size")
def size(node: Node, x: Value) -> Known:
    return known(math.prod(shape_of(x)))


@onnx_op("ConstantOfShape")
def constant_of_shape(node: Node, sizes: Value) -> Value:
    shape = ints(node, sizes, "sizes")
    fill: Any = node.get("value")
    fill = torch.zeros(1) if fill is None else fill
    if is_static(*shape) and math.prod(shape) <= MOST and fits(fill.dtype, shape):
        return known(np.full(shape, fill.item()), fill.dtype)
    return torch.full(shape, fill.item(), dtype=fill.dtype)


@onnx_op("Range")
def arange(node: Node, start: Value, limit: Value, delta: Value) -> Tensor:
    if not (isinstance(start, Known) and isinstance(limit, Known) and isinstance(delta, Known)):
        raise node.refused("its ends depend on values, not on shapes alone")
    return torch.arange(start.item, limit.item, delta.item, dtype=start.dtype)


@onnx_op("Cast")
def cast(node: Node, x: Value) -> Value:
    return _converted(x, dtype_of(node, node.get("to")))


@onnx_op("CastLike")
def cast_like(node: Node, x: Value, like: Value) -> Value:
    return _converted(x, like.dtype)


def _converted(x: Value, dtype: torch.dtype) -> Value:
    if isinstance(x, Known):
        if not x.symbolic and dtype != torch.bfloat16:
            with np.errstate(all="ignore"):
                return known(x.array, dtype)
        if x.symbolic and not (dtype.is_floating_point or dtype == torch.bool):
            return Known(x.array, dtype)
    x = tensor(x)
    return x if x.dtype == dtype else x.to(dtype)


@onnx_op("Reshape")
def reshape(node: Node, x: Value, sizes: Value) -> Value:
    """0 keeps a size and -1 stands for what is left."""
    asked, have = ints(node, sizes, "sizes"), shape_of(x)
    keeps = not node.get("allowzero", 0)
    target = [
        have[at] if keeps and is_static(size) and size == 0 else size
        for at, size in enumerate(asked)
    ]
    if isinstance(x, Known):
        return known(x.array.reshape(target), x.dtype)
    return x.reshape(target)


@onnx_op("Flatten")
def flatten(node: Node, x: Value) -> Tensor:
    x, axis = tensor(x), node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    front, back = x.shape[:axis], x.shape[axis:]
    return x.reshape(math.prod(front), math.prod(back))


@onnx_op("Expand")
def expand(node: Node, x: Value, sizes: Value) -> Tensor:
    """Broadcasting both ways: a size of 1 in the shape asked for keeps that of x."""
    asked, x = ints(node, sizes, "sizes"), tensor(x)
    have = [1] * (len(asked) - x.dim()) + list(x.shape)
    asked = [1] * (x.dim() - len(asked)) + asked
    return x.expand([want if _is_one(size) else size if _is_one(want) else _same(size, want)
                     for size, want in zip(have, asked, strict=True)])  # fmt: skip


def _is_one(size: Any) -> bool:
    return is_static(size) and size == 1


def _same(size: Any, want: Any) -> Any:
    """Either of two sizes that have to be the same, a fixed one if there is."""
    if not is_static(size, want):
        torch._check(size == want)
    return want if is_static(want) else size


@onnx_op("Tile")
def tile(node: Node, x: Value, repeats: Value) -> Tensor:
    return tensor(x).repeat(ints(node, repeats, "repeats"))


@onnx_op("Where")
def where(node: Node, condition: Value, x: Value, y: Value) -> Value:
    parts = (condition, x, y)
    if all(isinstance(v, Known) for v in parts) and not condition.symbolic:  # type: ignore[union-attr]
        c, a, b = (v.array for v in parts if isinstance(v, Known))
        if a.dtype == object or b.dtype == object:
            a, b = a.astype(object), b.astype(object)
        return known(np.where(c, a, b), x.dtype)
    first, second = operand(x), operand(y)
    if not isinstance(first, Tensor) and not isinstance(second, Tensor):
        first = tensor(x)  # two numbers would give the default type
    return torch.where(tensor(condition), first, second)
