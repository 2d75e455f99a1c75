"""Any part of a plan is a plan: linears are left out at random, folds go with their bases."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import bda_fx
from bda_fx import profitability
from bda_fx.measure_projection import ORIGINAL, Case
from tests import tolerances
from tests.programs import Attention, FusedAttention, example
from tests.zoo import latent
from tests.zoo.entry import make


class Random:
    """Some forms are twice as fast as the original, the others half as fast."""

    how = "measured"

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def known(self, case: Case, tokens: int) -> bool:
        return True

    def __call__(self, case: Case, tokens: int) -> dict[str, float]:
        return {ORIGINAL: 1.0} | {c.name: self.random.choice([0.5, 2.0]) for c in case.candidates}


def mla() -> Any:
    (entry,) = [entry for entry in latent.ENTRIES if entry.name == "deepseek_v2"]
    built = make(entry, "sdpa")
    return built.model.double().eval(), (), built.kwargs


# Norms of the latent are computed in float32, whatever the model's dtype.
TOLERANCE = {"latent": tolerances.FLOAT32_MODEL}
MODELS: dict[str, Any] = {
    "separate": lambda: (Attention().double(), (example().double(),), {}),
    "fused": lambda: (FusedAttention().double(), (example().double(),), {}),
    "latent": mla,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["auto", "qo"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_whatever_is_left_out(
    name: str, side: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args, kwargs = MODELS[name]()
    assert isinstance(model, nn.Module)
    price = Random(seed)
    monkeypatch.setattr(profitability, "price_for", lambda options, device: price)
    options = {"basis_size": 0.75, "side": side, "profitability": "measure"}
    rewrite = bda_fx.rewrite(model, args, kwargs, options=options)
    with torch.no_grad():
        truth, value = model(*args, **kwargs), rewrite.program.module()(*args, **kwargs)
    limit = TOLERANCE.get(name, tolerances.FLOAT64_FRESH)
    for a, b in zip(leaves(truth), leaves(value), strict=True):
        assert float((a - b).norm() / a.norm()) <= limit
    left = [site for site in rewrite.report.skipped if site.reason_code == "NOT_PROFITABLE"]
    assert left or rewrite.report.rewritten


def leaves(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
