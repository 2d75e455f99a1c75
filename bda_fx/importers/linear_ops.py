"""ONNX ops that multiply by weights: products of matrices, convolutions, pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bda_fx.importers.known_values import Value, tensor
from bda_fx.importers.op_table import Node, is_static, onnx_op


@onnx_op("MatMul")
def matmul(node: Node, x: Value, y: Value) -> Tensor:
    return torch.matmul(tensor(x), tensor(y))


@onnx_op("Gemm")
def gemm(node: Node, a: Value, b: Value, c: Value | None = None) -> Tensor:
    """alpha a b + beta c, with a and b transposed if so asked."""
    x, weight = tensor(a), tensor(b)
    x = x.t() if node.get("transA", 0) else x
    weight = weight if node.get("transB", 0) else weight.t()
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    bias = None if c is None or beta == 0 else tensor(c)
    width = list(weight.shape[:1])
    if alpha == beta == 1 and bias is not None and list(bias.shape) == width:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    y = y if alpha == 1 else y * alpha
    if bias is None:
        return y
    return y + (bias if beta == 1 else bias * beta)


@onnx_op("Einsum")
def einsum(node: Node, *operands: Value) -> Tensor:
    return torch.einsum(node.get("equation").replace(" ", ""), *[tensor(v) for v in operands])


@onnx_op("Conv")
def conv(node: Node, x: Value, weight: Value, bias: Value | None = None) -> Tensor:
    image, kernel = tensor(x), tensor(weight)
    axes = kernel.dim() - 2
    compute = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}.get(axes)
    if compute is None:
        raise node.refused(f"it convolves along {axes} axes")
    stride, dilation = node.get("strides") or [1] * axes, node.get("dilations") or [1] * axes
    image, padding = _padded(node, image, list(kernel.shape[2:]), stride, dilation, 0.0)
    offset = None if bias is None else tensor(bias)
    return compute(image, kernel, offset, stride, padding, dilation, node.get("group", 1))


@onnx_op("MaxPool", "AveragePool")
def pool(node: Node, x: Value) -> Tensor:
    image, size = tensor(x), node.get("kernel_shape")
    axes, biggest = len(size), node.op == "MaxPool"
    if node.wants(1) or node.get("storage_order", 0):
        raise node.refused("indices of the largest elements are not supported")
    if axes not in (1, 2, 3):
        raise node.refused(f"it pools along {axes} axes")
    stride, ceil = node.get("strides") or [1] * axes, bool(node.get("ceil_mode", 0))
    dilation = node.get("dilations") or [1] * axes
    counts = bool(node.get("count_include_pad", 0))
    fill = -math.inf if biggest else 0.0
    image, padding = _padded(node, image, size, stride, dilation, fill)
    if biggest:
        pooled = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[axes]
        return pooled(image, size, stride, padding, dilation, ceil)
    if image is not tensor(x) and not counts:
        raise node.refused("uneven paddings that do not count")
    if any(d != 1 for d in dilation) or (ceil and counts):
        raise node.refused("dilations, or a ceil_mode in which paddings count")
    average: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
    return average(image, size, stride, padding, ceil, counts)


@onnx_op("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: Node, x: Value) -> Tensor:
    axes = list(range(2, tensor(x).dim()))
    reduce = torch.mean if node.op == "GlobalAveragePool" else torch.amax
    return reduce(tensor(x), axes, True)


def _padded(
    node: Node, x: Tensor, size: list[Any], stride: list[int], dilation: list[int], fill: float
) -> tuple[Tensor, list[int]]:
    """Paddings along each axis; uneven ones, which PyTorch's ops do not take, are put in front."""
    axes, way = len(size), node.get("auto_pad", "NOTSET")
    given = node.get("pads") or [0] * (2 * axes)
    before, after = given[:axes], given[axes:]
    if way == "VALID":
        before = after = [0] * axes
    elif way in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for at, n in enumerate(x.shape[2:]):
            if stride[at] != 1 and not is_static(n):
                raise node.refused("auto_pad with strides along an open axis")
            steps = n if stride[at] == 1 else -(-n // stride[at])
            span = (steps - 1) * stride[at] + (size[at] - 1) * dilation[at] + 1
            missing = (size[at] - 1) * dilation[at] if stride[at] == 1 else max(span - n, 0)
            small, large = missing // 2, missing - missing // 2
            before.append(small if way == "SAME_UPPER" else large)
            after.append(large if way == "SAME_UPPER" else small)
    elif way != "NOTSET":
        raise node.refused(f"auto_pad {way!r} is unknown")
    if before == after:
        return x, list(before)
    flat = [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair]
    return F.pad(x, flat, value=fill), [0] * axes
