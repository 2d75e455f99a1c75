"""ONNX ops that normalise: layers, groups, and the softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bda_fx.importers.known_values import Value, tensor
from bda_fx.importers.op_table import Node, onnx_op

_EPSILON = 1e-5
"""Where a node does not say another."""


@onnx_op("Softmax", "LogSoftmax")
def softmax(node: Node, x: Value) -> Tensor:
    """Along an axis; before operator set 13 along all axes from one on, taken together."""
    value, compute = tensor(x), F.softmax if node.op == "Softmax" else F.log_softmax
    together = node.opset < 13
    axis = node.get("axis", 1 if together else -1) % value.dim()
    if not together or axis == value.dim() - 1:
        return compute(value, axis if axis < value.dim() - 1 else -1)
    flat = value.reshape(*value.shape[:axis], math.prod(value.shape[axis:]))
    return compute(flat, -1).reshape(value.shape)


@onnx_op("LayerNormalization")
def layer_norm(node: Node, x: Value, scale: Value, bias: Value | None = None) -> Tensor:
    value = tensor(x)
    _refuse_statistics(node)
    shape = value.shape[node.get("axis", -1) % value.dim() :]
    weight = _as_shape(tensor(scale), shape)
    offset = None if bias is None else _as_shape(tensor(bias), shape)
    return F.layer_norm(value, shape, weight, offset, node.get("epsilon", _EPSILON))


@onnx_op("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(node: Node, x: Value, scale: Value) -> Tensor:
    value = tensor(x)
    _refuse_statistics(node)
    shape = value.shape[node.get("axis", -1) % value.dim() :]
    return F.rms_norm(
        value, list(shape), _as_shape(tensor(scale), shape), node.get("epsilon", _EPSILON)
    )


@onnx_op("GroupNormalization")
def group_norm(node: Node, x: Value, scale: Value, bias: Value) -> Tensor:
    """Before operator set 21 scale and bias are those of groups, afterwards of channels."""
    value, groups = tensor(x), node.get("num_groups")
    weight, offset = tensor(scale), tensor(bias)
    if node.opset < 21:
        each = value.shape[1] // groups
        weight, offset = weight.repeat_interleave(each), offset.repeat_interleave(each)
    return F.group_norm(value, groups, weight, offset, node.get("epsilon", _EPSILON))


@onnx_op("InstanceNormalization")
def instance_norm(node: Node, x: Value, scale: Value, bias: Value) -> Tensor:
    value = tensor(x)
    axes = list(range(2, value.dim()))
    shape = [1, -1] + [1] * len(axes)
    mean = value.mean(axes, True)
    spread = (value - mean).square().mean(axes, True) + node.get("epsilon", _EPSILON)
    scaled = (value - mean) / torch.sqrt(spread) * tensor(scale).reshape(shape)
    return scaled + tensor(bias).reshape(shape)


@onnx_op("BatchNormalization")
def batch_norm(
    node: Node, x: Value, scale: Value, bias: Value, mean: Value, variance: Value
) -> Tensor:
    if node.get("training_mode", 0) or any(node.wants(at) for at in range(1, 5)):
        raise node.refused("it is in training mode")
    value = tensor(x)
    shape = [1, -1] + [1] * (value.dim() - 2)
    factor = tensor(scale) / torch.sqrt(tensor(variance) + node.get("epsilon", _EPSILON))
    offset = tensor(bias) - tensor(mean) * factor
    return value * factor.reshape(shape) + offset.reshape(shape)


@onnx_op("LpNormalization")
def lp_norm(node: Node, x: Value) -> Tensor:
    value = tensor(x)
    length = torch.linalg.vector_norm(value, node.get("p", 2), node.get("axis", -1), keepdim=True)
    return value / length


def _as_shape(part: Tensor, shape: torch.Size) -> Tensor:
    return part if part.dim() == len(shape) and part.shape == shape else part.expand(shape)


def _refuse_statistics(node: Node) -> None:
    if node.wants(1) or node.wants(2):
        raise node.refused("its mean or deviation is read")
