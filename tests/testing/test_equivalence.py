"""``assert_equivalent``: one call, every way that is installed."""

from __future__ import annotations

import copy

import pytest
import torch

from bda_fx.testing import WAYS, NotEquivalent, assert_equivalent, unavailable
from tests.programs import Attention, SharedLayers, example


def test_every_installed_way_runs() -> None:
    model = Attention()
    before = copy.deepcopy(model.state_dict())
    found = assert_equivalent(model, (example(),), budget=4)
    missing = {way for way in WAYS if unavailable(way)}
    assert set(found.fidelities) == set(WAYS) - missing
    assert set(found.skipped) == missing
    assert found.passed
    assert found.report is not None
    assert len(found.report.rewritten) == 2
    for fidelity in found.fidelities.values():
        assert fidelity.inputs == "given"
        assert fidelity.truth == "float64"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_dtype_of_choice(dtype: torch.dtype) -> None:
    model = SharedLayers()
    found = assert_equivalent(model, {"x": example()}, ways=("eager", "program"), dtype=dtype)
    names = {fidelity.outputs[0].dtype for fidelity in found.fidelities.values()}
    assert names == {str(dtype).removeprefix("torch.")}
    assert next(model.parameters()).dtype == torch.float32


def test_several_inputs_are_pooled() -> None:
    inputs = [((example(seed=seed),), {}) for seed in range(3)]
    found = assert_equivalent(Attention(), inputs, ways=("eager",))
    assert found.fidelities["eager"].num_inputs == 3


def test_a_broken_candidate_is_named_with_its_figures() -> None:
    model = Attention()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.v.weight[0, 0] += 0.01
    with pytest.raises(NotEquivalent) as caught:
        assert_equivalent(model, (example(),), candidate=wrong)
    assert isinstance(caught.value, AssertionError)
    assert not caught.value.fidelities["candidate"].passed
    assert "| output 0 | float32 |" in str(caught.value)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="there is no way warp: the ways are eager"):
        assert_equivalent(Attention(), (example(),), ways=("warp",))
    with pytest.raises(ValueError, match="inputs is empty"):
        assert_equivalent(Attention(), [])
