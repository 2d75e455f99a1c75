"""``prove``: what passes, what fails, and the figures of both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bda_fx.api import export_module
from bda_fx.exporters.exported import ExportError
from bda_fx.exporters.prove import prove
from bda_fx.generate_inputs import Inputs
from tests.programs import Attention, example

INPUTS: list[Inputs] = [((example(seed=at),), {}) for at in range(3)]


def runs(model: torch.nn.Module, change: Callable[[Tensor], Tensor] = lambda y: y) -> Callable[
    [Inputs], list[Tensor]
]:  # fmt: skip
    def run(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return [change(model(*inputs[0], **inputs[1]))]

    return run


def test_the_original_proves_itself() -> None:
    model = Attention()
    found = prove(
        export_module(model, (example(),)), runs(model), runs(model), INPUTS, made=False, budget=1.0
    )
    assert found.passed
    assert found.noise_ratio == 1.0
    assert (found.num_inputs, found.inputs, found.truth) == (3, "given", "float64")


def test_a_wrong_weight_fails() -> None:
    """The smallest change that is no rounding: one weight of 480 by one per mille."""
    model, wrong = Attention(), Attention()
    with torch.no_grad():
        wrong.k.weight[0, 0] *= 1.001
    program = export_module(model, (example(),))
    with pytest.raises(ExportError, match=r"the proof failed: .* the budget 4; pass options") as e:
        prove(program, runs(model), runs(wrong), INPUTS, made=False, budget=4.0)
    assert e.value.fidelity is not None
    assert e.value.fidelity.noise_ratio > 4


def test_noise_is_judged_by_the_originals_own() -> None:
    """Twice the error passes a budget of four and fails one of 1.5."""
    model = Attention()
    program = export_module(model, (example(),))
    exact = Attention().double()

    def twice(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            truth = exact(*(x.double() for x in inputs[0]))
            return [(truth + 2 * (model(*inputs[0]).double() - truth)).float()]

    found = prove(program, runs(model), twice, INPUTS, made=False, budget=4.0)
    assert found.noise_ratio == pytest.approx(2.0, rel=0.2)  # rounded to float32 once more
    with pytest.raises(ExportError, match="the proof failed"):
        prove(program, runs(model), twice, INPUTS, made=False, budget=1.5)


def test_outputs_that_do_not_correspond() -> None:
    model = Attention()
    program = export_module(model, (example(),))
    with pytest.raises(ExportError, match="the runtime gives outputs"):
        prove(program, runs(model), runs(model, lambda y: y[:1]), INPUTS, made=False, budget=4.0)
