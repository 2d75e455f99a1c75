"""ONNX ops that reduce along axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bda_fx.importers.known_values import Known, Value, known, tensor
from bda_fx.importers.op_table import Node, axes_of, onnx_op
from bda_fx.importers.shape_ops import shape_of


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _extreme(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return of(x.to(torch.uint8), axes, keep).to(torch.bool)
        return of(x, axes, keep)

    return reduce


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


_REDUCTIONS: Mapping[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(_sum(x * x, axes, keep)),
    "ReduceLogSum": lambda x, axes, keep: torch.log(_sum(x, axes, keep)),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": _extreme(torch.amax),
    "ReduceMean": torch.mean,
    "ReduceMin": _extreme(torch.amin),
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
}

_KNOWN: Mapping[str, Any] = {"ReduceProd": np.multiply, "ReduceSum": np.add}


@onnx_op(*_REDUCTIONS)
def reduce(node: Node, x: Value, given: Value | None = None) -> Value:
    rank, keep = len(shape_of(x)), bool(node.get("keepdims", 1))
    axes = axes_of(node, given, rank)
    if not axes:
        if node.get("noop_with_empty_axes", 0):
            return x
        axes = list(range(rank))
    if isinstance(x, Known) and node.op in _KNOWN:
        made = _KNOWN[node.op].reduce(x.array.astype(object), tuple(axes), keepdims=keep)
        return known(made, x.dtype)
    value = tensor(x)
    if not axes:
        return value
    if not value.is_floating_point() and node.op == "ReduceMean":
        raise node.refused("a mean of whole numbers is rounded differently by each runtime")
    return _REDUCTIONS[node.op](value, axes, keep)
