"""Attention modules of ``torch.nn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import SDPA, B, Build, Entry, Expected, Inputs, S, Sites, T, sites


class Attention(nn.Module):
    """``nn.MultiheadAttention``; with ``need_weights`` it spells the softmax out."""

    def __init__(self, width: int, heads: int, need_weights: bool, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **settings)
        self.need_weights = need_weights

    def forward(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        k, v = x if k is None else k, x if v is None else v
        return self.attention(x, k, v, need_weights=self.need_weights)[0]


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, which chooses its attention itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Decoder(nn.Module):
    """``nn.TransformerDecoder`` on a memory; tokens come first, as is its default."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48), 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[0], dtype=x.dtype)
        return self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)


def self_attention(width: int = 32, heads: int = 4, **settings: Any) -> Build:
    def build(attention: str) -> tuple[nn.Module, Inputs]:
        model = Attention(width, heads, attention != SDPA, **settings)
        return model, {"x": torch.randn(B, S, width)}

    return build


def cross_attention(attention: str) -> tuple[nn.Module, Inputs]:
    model = Attention(32, 4, attention != SDPA, kdim=24, vdim=40)
    return model, {
        "x": torch.randn(B, S, 32),
        "k": torch.randn(B, 11, 24),
        "v": torch.randn(B, 11, 40),
    }


def encoder(attention: str) -> tuple[nn.Module, Inputs]:
    return Encoder(), {"x": torch.randn(B, S, 32)}


def decoder(attention: str) -> tuple[nn.Module, Inputs]:
    return Decoder(), {"x": torch.randn(T, B, 32), "memory": torch.randn(S, B, 32)}


ENTRIES = (
    Entry("mha", self_attention(), sites(1, 8, 32, 4), needs="torch"),
    # K of 24 features, V of 40.
    Entry(
        "mha_cross",
        cross_attention,
        Expected((Sites(1, 8, 24, 4, 4),), (Sites(1, 8, 40, 4, 4),)),
        needs="torch",
    ),
    # As many features in a head as in the input: no projection is left.
    Entry("mha_one_head", self_attention(20, 1), sites(1, 20, 20, 1), needs="torch"),
    # A token of zeros is one in every basis.
    Entry("mha_zero_token", self_attention(add_zero_attn=True), sites(1, 8, 32, 4), needs="torch"),
    # A token that is a parameter is part of K and V, and turns with them.
    Entry(
        "mha_bias_kv",
        self_attention(add_bias_kv=True),
        sites(1, 8, 32, 4),
        needs="torch",
    ),
    Entry("encoder", encoder, sites(2, 8, 32, 4), (SDPA,), needs="torch"),
    Entry("decoder", decoder, sites(4, 8, 32, 4), (SDPA,), needs="torch"),
)
