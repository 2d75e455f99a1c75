"""What an entry of the zoo is: how to build a tiny model, and which sites its mathematics has."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

B, S, T, VOCAB = 3, 7, 5, 99
"""Batch, tokens, decoder tokens, vocabulary of the tiny models."""

SDPA, EAGER, FLEX = "sdpa", "eager", "flex_attention"
BOTH = (SDPA, EAGER)
ALL = (SDPA, EAGER, FLEX)

Inputs = dict[str, Any]
Build = Callable[[str], tuple[nn.Module, Inputs]]
"""From the attention implementation to a model and keyword inputs, under a fixed seed."""


@dataclass(frozen=True)
class Example:
    """A model in ``eval()`` and keyword inputs that fit it."""

    model: nn.Module
    kwargs: Inputs


@dataclass(frozen=True)
class Case:
    """An architecture and how its attention is computed: "sdpa", "eager" or "flex_attention"."""

    architecture: str
    attention: str

    def __str__(self) -> str:
        return f"{self.architecture}-{self.attention}"


@dataclass(frozen=True)
class Sites:
    """``count`` equal sites: ``heads`` × D ``decomposed`` features, made of E ``in_features``."""

    count: int
    decomposed: int
    in_features: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Expected:
    """Sites of each product, and how many products are skipped for which reason."""

    qk: tuple[Sites, ...] = ()
    vo: tuple[Sites, ...] = ()
    skipped: tuple[tuple[str, str, int], ...] = ()
    """(product, name of the reason, how many)."""

    def __add__(self, other: Expected) -> Expected:
        return Expected(self.qk + other.qk, self.vo + other.vo, self.skipped + other.skipped)


def sites(
    count: int, decomposed: int, in_features: int, heads: int, kv_heads: int | None = None
) -> Expected:
    """``count`` attentions of which QK and VO are decomposed, with all D features."""
    some = Sites(count, decomposed, in_features, heads, heads if kv_heads is None else kv_heads)
    return Expected((some,), (some,))


def partly(
    count: int,
    unrotated: int,
    head_dim: int,
    in_features: int,
    heads: int,
    kv_heads: int | None = None,
) -> Expected:
    """QK on the ``unrotated`` features of a head alone, VO on all."""
    kv_heads = heads if kv_heads is None else kv_heads
    qk = Sites(count, unrotated, in_features, heads, kv_heads)
    return Expected((qk,), (Sites(count, head_dim, in_features, heads, kv_heads),))


def values(
    count: int,
    head_dim: int,
    in_features: int,
    heads: int,
    kv_heads: int | None = None,
    reason: str = "ROTATED",
) -> Expected:
    """VO alone; each QK is skipped for ``reason``."""
    vo = Sites(count, head_dim, in_features, heads, heads if kv_heads is None else kv_heads)
    return Expected((), (vo,), (("qk", reason, count),))


def neither(count: int, qk: str, vo: str) -> Expected:
    """Both products of ``count`` attentions are skipped, for these reasons."""
    return Expected(skipped=(("qk", qk, count), ("vo", vo, count)))


SIMILARITY = Expected(skipped=(("qk", "NORMALISED", 1),))
"""Texts and images are compared by the cosine of two projections, which is a product too."""


@dataclass(frozen=True)
class Entry:
    """One architecture."""

    name: str
    build: Build
    expected: Expected
    attentions: tuple[str, ...] = BOTH
    needs: str = "transformers"
    """The package that has it; its tests are skipped where that is not installed."""


def make(entry: Entry, attention: str) -> Example:
    """The tiny model of an entry; the same weights and inputs at every call."""
    if importlib.util.find_spec(entry.needs) is None:
        pytest.skip(f"{entry.needs} is not installed")
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model, kwargs = entry.build(attention)
        with torch.no_grad():
            # Biases often start at zero and norms at one, where their errors cannot show; matrices
            # start so small for these widths that every softmax would be flat.
            for parameter in model.parameters():
                spread = 0.1 if parameter.dim() > 1 else 0.02
                parameter.add_(spread * torch.randn_like(parameter))
    finally:
        torch.random.set_rng_state(state)
    return Example(model.eval(), kwargs)


def ids(tokens: int = S, batch: int = B) -> Tensor:
    """Token ids without special tokens."""
    return torch.randint(3, VOCAB - 9, (batch, tokens))


def padded(tokens: int = S) -> Tensor:
    """An attention mask that leaves out the last two tokens of the second row."""
    mask = torch.ones(B, tokens, dtype=torch.long)
    mask[1, tokens - 2 :] = 0
    return mask


def configured(model: str, config: str, inputs: Callable[[], Inputs], **settings: Any) -> Build:
    """A transformers model class built from its config class, both given by name."""

    def build(attention: str) -> tuple[nn.Module, Inputs]:
        transformers = importlib.import_module("transformers")
        chosen = getattr(transformers, config)(**settings)
        return with_attention(getattr(transformers, model), chosen, attention), inputs()

    return build


def with_attention(model: Any, config: Any, attention: str) -> nn.Module:
    """``model`` from ``config``, its attention computed as asked for; a backbone has none."""
    chosen: Any = attention
    if getattr(config, "backbone_config", None) is not None:
        chosen = {"": attention, "backbone_config": EAGER}
    return model._from_config(config, attn_implementation=chosen)
