"""Values that are known while a graph is traced: sizes, axes, factors.

ONNX computes shapes with the ops that it computes with: Shape, Gather, Concat, Mul. Traced as
tensors they would be values that nobody knows before the model runs, and every open axis would be
lost with them. So what is made of sizes and of small constants is computed at once, with numpy. An
open size is a ``torch.SymInt``; arrays that hold one have dtype object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST = 64
"""Elements of the largest array that is kept so: shapes and paddings have fewer, tables more."""

_TYPES: dict[torch.dtype, Any] = {
    torch.bool: np.bool_,
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


@dataclass(frozen=True)
class Known:
    """An array that is known, of ``dtype`` in the model. Elements are numbers, or open sizes."""

    array: np.ndarray[Any, Any]
    dtype: torch.dtype

    @property
    def symbolic(self) -> bool:
        """Whether an element is an open size."""
        return bool(self.array.dtype == object)

    @property
    def item(self) -> Any:
        """The only element, as a Python number or an open size."""
        value = self.array.reshape(-1)[0] if self.symbolic else self.array.item()
        return value

    @property
    def items(self) -> list[Any]:
        """All elements in order, as Python numbers or open sizes."""
        return list(self.array.reshape(-1)) if self.symbolic else self.array.reshape(-1).tolist()

    def tensor(self) -> Tensor:
        """The same as a tensor of the graph that is being traced."""
        if self.array.ndim == 0:
            return torch.full((), self.item, dtype=self.dtype)
        if not self.symbolic:
            return torch.tensor(self.array, dtype=self.dtype)
        made = torch.stack([torch.scalar_tensor(v, dtype=self.dtype) for v in self.items])
        return made.reshape(self.array.shape)


Value = Tensor | Known


def known(values: Any, dtype: torch.dtype = torch.int64) -> Known:
    """``values``: a number, an open size, an array of either, or nested lists of them."""
    array = values if isinstance(values, np.ndarray) else _object_array(values)
    if array.dtype == object:
        whole = [_whole(v) for v in array.reshape(-1)]
        if not any(isinstance(v, torch.SymInt | torch.SymFloat | torch.SymBool) for v in whole):
            array = np.array(whole, dtype=_TYPES[dtype]).reshape(array.shape)
    elif array.dtype != _TYPES[dtype]:
        array = array.astype(_TYPES[dtype])
    return Known(array, dtype)


def fits(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether a constant of this type and shape is kept as a known value: a number, or a short
    vector that is no weight."""
    if dtype not in _TYPES:
        return False
    if dtype.is_floating_point:
        return len(shape) == 0
    return len(shape) == 0 or (len(shape) == 1 and int(shape[0]) <= MOST)


def tensor(value: Value) -> Tensor:
    """``value`` as a tensor."""
    return value.tensor() if isinstance(value, Known) else value


def operand(value: Value) -> Any:
    """``value`` as the second operand of an op: a number where it is one.

    ONNX has both operands of one type, so that a number changes that of no result.
    """
    if isinstance(value, Known) and value.array.ndim == 0:
        return value.item
    return tensor(value)


def elementwise(
    compute: Callable[..., Any], *values: Value, dtype: torch.dtype | None = None
) -> Known | None:
    """``compute`` on arrays, if all ``values`` are known and none is an open size of a floating
    type; in ``dtype``, by default that of the first."""
    if not all(isinstance(v, Known) for v in values):
        return None
    arrays = [v.array for v in values if isinstance(v, Known)]
    types = [v.dtype for v in values if isinstance(v, Known)]
    if any(a.dtype == object for a in arrays):
        if any(t.is_floating_point for t in types):
            return None
        arrays = [a.astype(object) for a in arrays]
    with np.errstate(all="ignore"):
        return known(np.asarray(compute(*arrays)), dtype or types[0])


def _object_array(values: Any) -> np.ndarray[Any, Any]:
    if not isinstance(values, list | tuple):
        array = np.empty((), dtype=object)
        array[()] = values
        return array
    flat = [_object_array(v) for v in values]
    if not flat:
        return np.empty((0,), dtype=object)
    return np.stack(flat)


def _whole(value: Any) -> Any:
    """An open size that turned out to have one value as that number."""
    if isinstance(value, torch.SymInt):
        settled = value.node.maybe_as_int()
        return value if settled is None else settled
    return value
