"""Is the model still the same when bda_fx has rewritten it?"""

from __future__ import annotations

import copy

import pytest
import torch
from model import Block

from bda_fx.testing import assert_equivalent

INPUTS = (torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)),)


def test_every_dtype_and_way(bda_equivalence) -> None:
    found = bda_equivalence(Block().eval(), INPUTS, budget=2.5)
    assert list(found.fidelities) == [bda_equivalence.way]
    assert found.report.rewritten


def test_my_own_candidate() -> None:
    model = Block().eval()
    assert_equivalent(model, INPUTS, candidate=copy.deepcopy(model))


@pytest.mark.broken
def test_a_candidate_with_a_wrong_weight() -> None:
    model = Block().eval()
    wrong = copy.deepcopy(model)
    wrong.v.weight.data[3, 5] += 0.01
    assert_equivalent(model, INPUTS, candidate=wrong)


@pytest.mark.broken
def test_a_basis_that_is_too_noisy(bda_equivalence) -> None:
    """The paper's First-r basis on weights that suit it badly."""
    model = Block().eval()
    with torch.no_grad():
        for linear in (model.k, model.v):
            linear.weight[:, 1] = linear.weight[:, 0] * (1 + 1e-4)
    options = {"basis": "first", "basis_size": "full"}
    bda_equivalence(model, INPUTS, budget=2.0, options=options)
