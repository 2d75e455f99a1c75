"""ONNX ops that compute element by element, and casts of what they compute."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bda_fx.importers.known_values import Known, Value, elementwise, known, operand, tensor
from bda_fx.importers.op_table import Node, onnx_op

# -- of two operands --------------------------------------------------------------------------


@onnx_op("Add", "Sub", "Mul")
def add(node: Node, x: Value, y: Value) -> Value:
    compute = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}[node.op]
    if (made := elementwise(compute, x, y)) is not None:
        return made
    if node.op != "Sub" and isinstance(x, Known):
        return compute(tensor(y), operand(x))
    return compute(tensor(x), operand(y))


@onnx_op("Div")
def div(node: Node, x: Value, y: Value) -> Value:
    """Whole numbers are divided towards zero."""
    if x.dtype.is_floating_point:
        if (made := elementwise(np.divide, x, y)) is not None:
            return made
        return torch.div(tensor(x), operand(y))
    if isinstance(x, Known) and isinstance(y, Known):
        whole = functools.partial(_whole_quotient, node)
        return known(np.frompyfunc(whole, 2, 1)(_objects(x), _objects(y)), x.dtype)
    return torch.div(tensor(x), operand(y), rounding_mode="trunc")


def _objects(x: Known) -> np.ndarray[Any, Any]:
    return x.array.astype(object)


def _whole_quotient(node: Node, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return -(-a // b) if (a < 0) != (b < 0) else a // b
    if any(isinstance(n, int) and n < 0 for n in (a, b)):
        raise node.refused("it divides an open size by a negative number")
    return a // b  # sizes are not negative


@onnx_op("Mod")
def mod(node: Node, x: Value, y: Value) -> Value:
    """With the sign of the divisor, or with fmod that of the dividend."""
    fmod = bool(node.get("fmod", 0))
    if not fmod and (made := elementwise(np.mod, x, y)) is not None:
        return made
    return (torch.fmod if fmod else torch.remainder)(tensor(x), operand(y))


@onnx_op("Pow")
def power(node: Node, x: Value, y: Value) -> Value:
    """The result is of the type of x."""
    if x.dtype == y.dtype and (made := elementwise(np.power, x, y)) is not None:
        return made
    result = torch.pow(tensor(x), operand(y))
    return result if result.dtype == x.dtype else result.to(x.dtype)


_COMPARISONS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Equal": (torch.eq, operator.eq),
    "Less": (torch.lt, operator.lt),
    "LessOrEqual": (torch.le, operator.le),
    "Greater": (torch.gt, operator.gt),
    "GreaterOrEqual": (torch.ge, operator.ge),
}


@onnx_op(*_COMPARISONS)
def compare(node: Node, x: Value, y: Value) -> Value:
    on_tensors, on_numbers = _COMPARISONS[node.op]
    if isinstance(x, Known) and isinstance(y, Known):
        each = np.frompyfunc(lambda a, b: bool(on_numbers(a, b)), 2, 1)
        return known(each(_objects(x), _objects(y)), torch.bool)
    return on_tensors(tensor(x), operand(y))


_LOGIC: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "And": (torch.logical_and, np.logical_and),
    "Or": (torch.logical_or, np.logical_or),
    "Xor": (torch.logical_xor, np.logical_xor),
}


@onnx_op(*_LOGIC)
def logic(node: Node, x: Value, y: Value) -> Value:
    on_tensors, on_arrays = _LOGIC[node.op]
    made = elementwise(on_arrays, x, y)
    return on_tensors(tensor(x), tensor(y)) if made is None else made


@onnx_op("PRelu")
def prelu(node: Node, x: Value, slope: Value) -> Tensor:
    return torch.where(tensor(x) < 0, tensor(x) * tensor(slope), tensor(x))


# -- of any number of operands ----------------------------------------------------------------


@onnx_op("Max", "Min")
def extreme(node: Node, *values: Value) -> Value:
    name = node.op
    numbers = torch.sym_max if name == "Max" else torch.sym_min
    if all(isinstance(v, Known) for v in values) and not values[0].dtype.is_floating_point:
        pick = np.frompyfunc(numbers, 2, 1)
        arrays = [_objects(v) for v in values if isinstance(v, Known)]
        return known(np.asarray(functools.reduce(pick, arrays), dtype=object), values[0].dtype)
    pick = torch.maximum if name == "Max" else torch.minimum
    return functools.reduce(pick, [tensor(v) for v in values])


@onnx_op("Sum", "Mean")
def total(node: Node, *values: Value) -> Tensor:
    made = functools.reduce(operator.add, [tensor(v) for v in values])
    return made / len(values) if node.op == "Mean" else made


@onnx_op("Clip")
def clip(node: Node, x: Value, low: Value | None = None, high: Value | None = None) -> Tensor:
    bounds = [node.get("min"), node.get("max")]
    for at, value in enumerate((low, high)):
        if value is not None:
            bounds[at] = operand(value)
    made = tensor(x)
    if bounds[0] is not None:
        made = torch.clamp(made, min=bounds[0])
    return made if bounds[1] is None else torch.clamp(made, max=bounds[1])


# -- of one operand ---------------------------------------------------------------------------

_KNOWN: Mapping[str, Callable[..., Any]] = {
    "Abs": np.abs,
    "Ceil": np.ceil,
    "Floor": np.floor,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Reciprocal": np.reciprocal,
    "Sqrt": np.sqrt,
}
"""What is computed of known values: as exact as PyTorch does it."""

_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Asin": torch.asin,
    "Atan": torch.atan,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}


@onnx_op(*_UNARY)
def unary(node: Node, x: Value) -> Value:
    if node.op in _KNOWN and (made := elementwise(_KNOWN[node.op], x)) is not None:
        return made
    return _UNARY[node.op](tensor(x))


@onnx_op("Gelu")
def gelu(node: Node, x: Value) -> Tensor:
    return F.gelu(tensor(x), approximate=node.get("approximate", "none"))


@onnx_op("LeakyRelu")
def leaky_relu(node: Node, x: Value) -> Tensor:
    return F.leaky_relu(tensor(x), node.get("alpha", 0.01))


@onnx_op("Elu")
def elu(node: Node, x: Value) -> Tensor:
    return F.elu(tensor(x), node.get("alpha", 1.0))


@onnx_op("HardSigmoid")
def hard_sigmoid(node: Node, x: Value) -> Tensor:
    return torch.clamp(tensor(x) * node.get("alpha", 0.2) + node.get("beta", 0.5), 0, 1)


@onnx_op("Swish")
def swish(node: Node, x: Value) -> Tensor:
    return tensor(x) * torch.sigmoid(tensor(x) * node.get("alpha", 1.0))


@onnx_op("IsInf")
def is_inf(node: Node, x: Value) -> Tensor:
    high, low = torch.isposinf(tensor(x)), torch.isneginf(tensor(x))
    if not node.get("detect_negative", 1):
        return high
    return torch.logical_or(high, low) if node.get("detect_positive", 1) else low


@onnx_op("ThresholdedRelu")
def thresholded_relu(node: Node, x: Value) -> Tensor:
    return torch.where(tensor(x) > node.get("alpha", 1.0), tensor(x), 0.0)


@onnx_op("Selu")
def selu(node: Node, x: Value) -> Tensor:
    value, alpha = tensor(x), node.get("alpha", 1.6732632)
    below = alpha * torch.exp(value) - alpha
    return node.get("gamma", 1.050701) * torch.where(value > 0, value, below)
