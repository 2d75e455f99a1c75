"""optimize_for: sizes chosen for weights that are quantised after the rewrite."""

from __future__ import annotations

import pytest
import torch

import bda_fx
from bda_fx.fidelity import relative_error
from tests.programs import Attention, example, seeded
from tests.tolerances import FLOAT32_MODEL


@pytest.mark.parametrize("grid", ["int8", "fp8"])
def test_a_larger_budget_never_saves_less(grid):
    model, x = seeded(Attention()).half(), example(dtype=torch.float16)
    saved = []
    for budget in (1.1, 1.25, 2.0, 8.0):
        options = {"optimize_for": grid, "noise_budget": budget}
        report = bda_fx.analyze(model, (x,), options=options)
        saved.append(sum(s.params_before - s.params_after for s in report.rewritten))
    assert saved == sorted(saved)
    assert saved[-1] > 0


def test_noise_is_that_of_the_grid():
    """One large feature coarsens the int8 grid of an output projection, but not that of fp8."""
    model, x = seeded(Attention()), example()
    with torch.no_grad():
        model.v.weight[0] /= 100
        model.o.weight[:, 0] *= 100
    noise = {}
    for grid in (None, "int8", "fp8"):
        options = {"optimize_for": grid, "basis_size": "full", "side": "kv"}
        report = bda_fx.analyze(model, (x,), options=options)
        (site,) = [s for s in report.rewritten if s.product == "vo"]
        noise[grid] = site.noise
    assert len(set(noise.values())) == 3


def test_a_compiled_model_derives_its_weights():
    """They are predicted on the plan's own grid; ``strict`` makes a refusal fail."""
    torch._dynamo.reset()
    model, x = seeded(Attention()), example()
    options = {"optimize_for": "int8", "noise_budget": 8.0, "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="bda", options=options)
    assert relative_error(compiled(x), model(x)) < FLOAT32_MODEL
