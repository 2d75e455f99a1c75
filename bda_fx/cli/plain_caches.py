"""Key-value caches that a model of transformers returns, as plain lists of tensors.

``torch.export`` does not know the cache classes, other runtimes have no such thing, and a program
that returned them could be loaded only where somebody registers them with PyTorch's pytrees.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


def return_plain_caches(model: nn.Module) -> None:
    """Let ``model.forward`` return each cache as a list of (keys, values), one pair a layer.

    Of an encoder-decoder's cache: those of self-attention, then those of cross-attention.
    """
    forward = model.forward

    @functools.wraps(forward)
    def with_plain_caches(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, dict):
            return type(output)(**{name: _plain(value) for name, value in output.items()})
        return tuple(_plain(value) for value in output) if isinstance(output, tuple) else output

    model.forward = with_plain_caches


def _plain(value: Any) -> Any:
    from transformers.cache_utils import Cache, EncoderDecoderCache

    if isinstance(value, EncoderDecoderCache):
        return [*_plain(value.self_attention_cache), *_plain(value.cross_attention_cache)]
    if not isinstance(value, Cache):
        return value
    pairs = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in value.layers
    ]
    return [(k, v) for k, v in pairs if isinstance(k, Tensor) and isinstance(v, Tensor)]
