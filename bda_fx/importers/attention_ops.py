"""The attention and the rotary embedding of operator set 23."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bda_fx.importers.index_ops import indices_of
from bda_fx.importers.known_values import Value, tensor
from bda_fx.importers.op_table import Node, onnx_op


@onnx_op("Attention")
def attention(node: Node, q: Value, k: Value, v: Value, *others: Value | None) -> Tensor:
    """As ``scaled_dot_product_attention``, heads first; results as the queries come.

    q [B, H, S, D], k [B, G, T, D] and v, or [B, S, H D] with the numbers of heads as attributes.
    """
    mask, *cached = (*others, None)[: max(1, len(others))]
    if any(value is not None for value in cached) or any(node.wants(at) for at in (1, 2, 3)):
        raise node.refused("caches and scores of an attention are not supported")
    if node.get("softcap", 0.0):
        raise node.refused("softcap is not supported")
    flat = tensor(q).dim() == 3
    query, key, value = tensor(q), tensor(k), tensor(v)
    if flat:
        heads, kv_heads = node.get("q_num_heads"), node.get("kv_num_heads")
        query = heads_first(query, heads)
        key, value = heads_first(key, kv_heads), heads_first(value, kv_heads)
    y = attend(
        query, key, value, None if mask is None else tensor(mask),
        causal=bool(node.get("is_causal", 0)), scale=node.get("scale"),
    )  # fmt: skip
    return heads_last(y) if flat else y


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None
) -> Tensor:
    """Attention with heads first; causal is: a query sees the keys up to its own place."""
    if causal and mask is not None:
        sees = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        hidden = torch.logical_not(sees)
        if mask.dtype == torch.bool:
            mask = torch.logical_and(mask, sees)
        else:
            mask = mask.masked_fill(hidden, -torch.inf)
        causal = False
    return F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, causal, scale=scale or None, enable_gqa=q.shape[1] != k.shape[1]
    )


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, S, H D] as [B, H, S, D]."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(1, 2)


def heads_last(x: Tensor) -> Tensor:
    """[B, H, S, D] as [B, S, H D]."""
    batch, heads, tokens, width = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * width)


@onnx_op("RotaryEmbedding")
def rotary_embedding(
    node: Node, x: Value, cos: Value, sin: Value, places: Value | None = None
) -> Tensor:
    """Features in pairs, the halves of a head or its neighbours, are turned by the angles of their
    place. x [B, H, S, D], or [B, S, H D] with num_heads; tables [P, D / 2], or [B, S, D / 2]."""
    value, cosines, sines = tensor(x), tensor(cos), tensor(sin)
    flat = value.dim() == 3
    value = heads_first(value, node.get("num_heads")) if flat else value
    if places is not None:
        at: Any = [indices_of(places)]
        cosines, sines = (torch.ops.aten.index.Tensor(t, at) for t in (cosines, sines))
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    width = node.get("rotary_embedding_dim", 0) or value.shape[-1]
    turned, kept = value[..., :width], value[..., width:]
    if node.get("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack([a * cosines - b * sines, a * sines + b * cosines], -1)
        turned = pairs.flatten(-2)
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
        turned = torch.cat([a * cosines - b * sines, a * sines + b * cosines], -1)
    y = turned if width == value.shape[-1] else torch.cat([turned, kept], -1)
    return heads_last(y) if flat else y
