"""What a rewrite holds at a time. `make cli-memory` measures it on a gigabyte of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bda_fx
from bda_fx.passes import fit_basis, transform_weights
from tests.programs import Attention, example


def test_float64_copies_are_those_of_one_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are turned in float64, and rounded as soon as no other site needs them."""
    held: list[int] = []
    turn = transform_weights._turn

    def watch(site: Any, factors: Any, values: Any, turned: Any) -> None:
        held.append(len(turned.matrices))
        turn(site, factors, values, turned)

    monkeypatch.setattr(transform_weights, "_turn", watch)
    model = nn.Sequential(*(Attention(seed=seed) for seed in range(4))).eval()
    rewrite = bda_fx.rewrite(model, (example(),), options={"basis_size": "full"})
    assert len(rewrite.report.rewritten) == len(held) == 8
    assert max(held) <= 4  # q, k, v, o of one layer


def test_the_planner_keeps_weights_in_their_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[fit_basis.BasisFits] = []
    create = fit_basis.BasisFits.__init__

    def watch(self: fit_basis.BasisFits, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        kept.append(self)

    monkeypatch.setattr(fit_basis.BasisFits, "__init__", watch)
    bda_fx.analyze(Attention().to(torch.bfloat16), (example(dtype=torch.bfloat16),))
    assert kept
    sites = [weights for fits in kept for weights in fits.weights]
    assert {weights.heads.dtype for weights in sites} == {torch.bfloat16}
    assert not any(partner.weight.numel() for weights in sites for partner in weights.partners)
