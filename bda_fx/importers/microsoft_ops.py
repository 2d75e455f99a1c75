"""Ops of ``com.microsoft``: what ONNX Runtime's optimisers fuse the standard's into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bda_fx.importers.attention_ops import attend, heads_first, heads_last
from bda_fx.importers.index_ops import indices_of
from bda_fx.importers.known_values import Value, tensor
from bda_fx.importers.linear_ops import gemm
from bda_fx.importers.op_table import Node, onnx_op

MICROSOFT = "com.microsoft"
_EPSILON = 1e-12
"""Of a normalisation, where a node does not say another: SkipLayerNormalization's default."""


@onnx_op("Gelu", "BiasGelu", domain=MICROSOFT)
def gelu(node: Node, x: Value, bias: Value | None = None) -> Tensor:
    return F.gelu(tensor(x) if bias is None else tensor(x) + tensor(bias))


@onnx_op("FastGelu", domain=MICROSOFT)
def fast_gelu(node: Node, x: Value, bias: Value | None = None) -> Tensor:
    return F.gelu(tensor(x) if bias is None else tensor(x) + tensor(bias), approximate="tanh")


@onnx_op("QuickGelu", domain=MICROSOFT)
def quick_gelu(node: Node, x: Value) -> Tensor:
    return tensor(x) * torch.sigmoid(tensor(x) * node.get("alpha", 1.702))


@onnx_op("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(
    node: Node, x: Value, skip: Value, scale: Value, *others: Value | None
) -> tuple[Tensor | None, ...]:
    """The norm of a sum, and the sum itself as the fourth output."""
    plain = node.op == "SkipSimplifiedLayerNormalization"
    beta, bias = (None, *others, None)[:2] if plain else (*others, None, None)[:2]
    if node.wants(1) or node.wants(2):
        raise node.refused("its mean or deviation is read")
    total = tensor(x) + tensor(skip)
    total = total if bias is None else total + tensor(bias)
    shape, epsilon = total.shape[-1:], node.get("epsilon", _EPSILON)
    if plain:
        normed = F.rms_norm(total, list(shape), tensor(scale), epsilon)
    else:
        offset = None if beta is None else tensor(beta)
        normed = F.layer_norm(total, shape, tensor(scale), offset, epsilon)
    return normed, None, None, total


@onnx_op("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_norm(
    node: Node, ids: Value, segments: Value | None, words: Value, places: Value,
    kinds: Value | None, scale: Value, beta: Value, mask: Value | None = None,
    positions: Value | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The norm of the sum of a token's embeddings: word, position and segment. ids [B, S].

    The second output is how many tokens of each text count.
    """
    at: list[Any] = [indices_of(ids)]
    total = torch.ops.aten.index.Tensor(tensor(words), at)
    if positions is None:
        total = total + tensor(places)[: at[0].shape[1]]
    else:
        total = total + torch.ops.aten.index.Tensor(tensor(places), [indices_of(positions)])
    if segments is not None and kinds is not None:
        total = total + torch.ops.aten.index.Tensor(tensor(kinds), [indices_of(segments)])
    epsilon = node.get("epsilon", _EPSILON)
    normed = F.layer_norm(total, total.shape[-1:], tensor(scale), tensor(beta), epsilon)
    counts = tensor(ids)[:, 0] * 0 if mask is None else (tensor(mask) == 1).sum(1)
    return normed, counts.to(torch.int32), total


@onnx_op("FusedMatMul", domain=MICROSOFT)
def fused_matmul(node: Node, x: Value, y: Value) -> Tensor:
    """alpha x y, with the last two axes of either swapped if so asked."""
    if node.get("transBatchA", 0) or node.get("transBatchB", 0):
        raise node.refused("transBatchA and transBatchB are not supported")
    a = tensor(x).transpose(-1, -2) if node.get("transA", 0) else tensor(x)
    b = tensor(y).transpose(-1, -2) if node.get("transB", 0) else tensor(y)
    product, alpha = torch.matmul(a, b), node.get("alpha", 1.0)
    return product if alpha == 1 else product * alpha


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


@onnx_op("FusedGemm", domain=MICROSOFT)
def fused_gemm(node: Node, a: Value, b: Value, c: Value | None = None) -> Tensor:
    name = node.get("activation", "")
    if name not in _ACTIVATIONS:
        raise node.refused(f"activation {name!r} is not supported")
    return _ACTIVATIONS[name](gemm(node, a, b, c))


@onnx_op("Attention", domain=MICROSOFT)
def fused_attention(
    node: Node, x: Value, weight: Value, bias: Value | None = None, *others: Value | None
) -> Tensor:
    """Projections and attention in one: weight [E, 3 H D] holds those of q, k and v in turn."""
    mask, *rest = (*others, None)[: max(1, len(others))]
    added = rest[1] if len(rest) > 1 else None
    _refuse_caches(node, [value for at, value in enumerate(rest) if at != 1])
    if node.get("do_rotary", 0):
        raise node.refused("do_rotary is not supported")
    projected = torch.matmul(tensor(x), tensor(weight))
    projected = projected if bias is None else projected + tensor(bias)
    widths = node.get("qkv_hidden_sizes") or [tensor(weight).shape[1] // 3] * 3
    return _attended(node, list(projected.split(widths, -1)), mask, added)


@onnx_op("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    node: Node, q: Value, k: Value | None = None, v: Value | None = None, *others: Value | None
) -> Tensor:
    """q, k, v [B, S, H D], projected already, with what is added to each in one bias [3 H D]."""
    bias, mask, added, *rest = (*others, None, None, None)[: max(3, len(others))]
    _refuse_caches(node, rest)
    if k is None or v is None or any(tensor(part).dim() != 3 for part in (q, k, v)):
        raise node.refused("packed or transposed keys and values are not supported")
    parts = [tensor(q), tensor(k), tensor(v)]
    if bias is not None:
        offsets = tensor(bias).split([part.shape[-1] for part in parts])
        parts = [part + offset for part, offset in zip(parts, offsets, strict=True)]
    return _attended(node, parts, mask, added)


def _refuse_caches(node: Node, values: list[Any]) -> None:
    if any(value is not None for value in values) or any(node.wants(at) for at in (1, 2, 3)):
        raise node.refused("caches of an attention are not supported")


def _attended(node: Node, parts: list[Tensor], mask: Value | None, added: Value | None) -> Tensor:
    """Attention of q, k, v [B, S, H D]; ``mask`` [B, T] is 0 where keys do not count, or [B] tells
    how many do. Those that do not get ``mask_filter_value`` added; ``added`` is a term of the
    scores."""
    q, k, v = (heads_first(part, node.get("num_heads")) for part in parts)
    term = None if added is None else tensor(added)
    if mask is not None:
        counts = tensor(mask)
        if counts.dim() == 1:
            if str(counts.shape[0]) != str(q.shape[0]):
                raise node.refused("a mask of one axis is not as long as the batch")
            counts = torch.arange(k.shape[2]) < counts.unsqueeze(1)
        if counts.dim() != 2:
            raise node.refused("only masks of [batch, keys] or [batch] are supported")
        hidden = (1.0 - counts.to(q.dtype)) * node.get("mask_filter_value", -10000.0)
        hidden = hidden[:, None, None, :]
        term = hidden if term is None else term + hidden
    causal, scale = bool(node.get("unidirectional", 0)), node.get("scale")
    return heads_last(attend(q, k, v, term, causal=causal, scale=scale))
