"""What is exported in the tests: the zoo's tiny models as they are deployed, with open axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tests import models
from tests.models import Case


@dataclass(frozen=True)
class Deployed:
    """A model in ``eval()``, example inputs, and which of their axes are open."""

    model: nn.Module
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, dict[int, Any]]

    def to(self, dtype: torch.dtype) -> Deployed:
        """The same model and inputs in another floating-point type."""
        kwargs = {
            key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for key, value in self.kwargs.items()
        }  # fmt: skip
        return Deployed(self.model.to(dtype), kwargs, self.dynamic_shapes)


BATCH, LENGTH = Dim("batch", min=1, max=8), Dim("length", min=2, max=16)


def tokens(model: nn.Module, kwargs: dict[str, Any]) -> Deployed:
    """Open batch and length for every tensor input."""
    axes = {k: {0: BATCH, 1: LENGTH} if isinstance(v, Tensor) else None for k, v in kwargs.items()}
    return Deployed(model, kwargs, axes)  # type: ignore[arg-type]


def bert() -> Deployed:
    example = models.make(Case("bert", "sdpa"))
    return tokens(example.model, example.kwargs)


def deepseek_v2() -> Deployed:
    example = models.make(Case("deepseek_v2", "sdpa"))
    return tokens(example.model, example.kwargs)


def vit() -> Deployed:
    example = models.make(Case("vit", "sdpa"))
    return Deployed(example.model, example.kwargs, {"pixel_values": {0: BATCH}})


def t5_encoder() -> Deployed:
    example = models.make(Case("t5", "sdpa"))
    encoder = example.model.encoder
    assert isinstance(encoder, nn.Module)
    return tokens(encoder, {"input_ids": example.kwargs["input_ids"]})


def whisper_encoder() -> Deployed:
    example = models.make(Case("whisper", "sdpa"))
    encoder = example.model.encoder
    assert isinstance(encoder, nn.Module)
    features = example.kwargs["input_features"]
    return Deployed(encoder, {"input_features": features}, {"input_features": {0: BATCH}})


MODELS: dict[str, Callable[[], Deployed]] = {
    "bert": bert,
    "deepseek_v2": deepseek_v2,
    "vit": vit,
    "t5_encoder": t5_encoder,
    "whisper_encoder": whisper_encoder,
}
