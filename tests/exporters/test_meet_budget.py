"""``meet_budget``: smaller plans until the proof holds, and no more than are worth it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bda_fx.api import export_module
from bda_fx.exporters.exported import ExportError
from bda_fx.exporters.meet_budget import LARGER, PLANS, SAME_MODEL, _between, meet_budget
from bda_fx.exporters.rewrite_pair import Pair, rewrite_pair
from bda_fx.fidelity_report import Fidelity, OutputFidelity
from tests.programs import Attention, example


def pair_for(**options: Any) -> Pair:
    return rewrite_pair(export_module(Attention(), (example(),)), options=options)


def measured(noise: float, limit: float) -> Fidelity:
    """A proof as ``prove`` gives it or fails with it."""
    output = OutputFidelity("y", "float32", 1e-6, noise * 1e-6, noise, 0.0, None, noise <= limit)
    fidelity = Fidelity((output,), limit, inputs="given", num_inputs=1)
    if not fidelity.passed:
        raise ExportError(f"the proof failed: {noise}", fidelity)
    return fidelity


class Runtime:
    """Adds ``gain`` times the excess that was planned for."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.limits: list[float] = []

    def __call__(self, pair: Pair, limit: float) -> Fidelity:
        self.limits.append(limit)
        predicted = pair.report.noise_ratio or pair.noise_budget
        return measured((1 + self.gain * max(predicted**2 - 1, 0)) ** 0.5, limit)


def test_one_plan_is_enough_where_the_runtime_rounds_as_planned() -> None:
    pair = pair_for()
    same, fidelity, way = meet_budget(pair, Runtime(1.0), None, None)
    assert same is pair
    assert fidelity.budget == pair.noise_budget == 1.4
    assert way == {"limit": 1.4, "planned_for": [1.4], "measured": [fidelity.noise_ratio]}


@pytest.mark.parametrize("gain", [3.0, 8.0])
def test_the_next_plan_makes_up_for_what_was_measured(gain: float) -> None:
    pair = pair_for()
    runtime = Runtime(gain)
    assert pair.report.noise_ratio is not None
    assert 1 + gain * (pair.report.noise_ratio**2 - 1) > 1.4**2
    smaller, fidelity, way = meet_budget(pair, runtime, None, None)
    assert fidelity.noise_ratio <= 1.4
    assert way["measured"][1] <= 1.4  # the model of the gain is exact here
    assert smaller.options.noise_budget in way["planned_for"][1:]
    assert set(runtime.limits) == {1.4}  # the limit is the user's all the way


def test_a_plan_that_leaves_room_is_followed_by_a_larger_one() -> None:
    """What a runtime adds need not be in proportion to what was planned for: here it is a step."""
    delivered: list[float] = []

    def attempt(pair: Pair, limit: float) -> Fidelity:
        delivered.append(pair.noise_budget)
        return measured(2.5 if pair.noise_budget > 1.2 else 1.05, limit)

    pair, fidelity, way = meet_budget(pair_for(), attempt, None, None)
    assert fidelity.noise_ratio == 1.05
    first = way["measured"].index(1.05)
    assert len(way["planned_for"]) == first + 1 + LARGER
    assert way["planned_for"][first] < pair.noise_budget <= 1.2
    assert delivered[: first + 1 + LARGER] == way["planned_for"]
    assert delivered[-1] == pair.noise_budget == max(b for b in delivered if b <= 1.2)


def test_a_larger_plan_is_sought_where_the_measurements_point() -> None:
    """The fifth plan of float16 rxnfp failed by a hundredth, and the last one is for nothing."""
    found = _between((1.0, 1.0), (1.0237, 1.264), 1.25)
    assert 1.018 < found < 1.0237
    assert _between((1.0, 1.0), (1.0237, math.inf), 1.25) == pytest.approx(1.0119, abs=1e-4)
    nearly = _between((1.02, 1.2), (1.03, 1.2251), 1.25)  # both almost there: not beyond the end
    assert 1.02 < nearly < 1.03


def test_progress_tells_each_plan() -> None:
    from bda_fx.outcome import on_step

    heard: list[str] = []
    pair = pair_for()
    token = on_step.set(heard.append)
    try:
        _, _, way = meet_budget(pair, Runtime(8.0), None, None)
    finally:
        on_step.reset(token)
    plans = [text for text in heard if text.endswith("translate and prove")]
    assert len(plans) == len(way["planned_for"]) > 1
    assert plans[1] == "plan 2, translate and prove"


def test_the_last_plan_is_for_no_excess() -> None:
    plans: list[float] = []

    def attempt(pair: Pair, limit: float) -> Fidelity:
        plans.append(pair.noise_budget)
        return measured(9.0, limit)

    with pytest.raises(ExportError, match="the proof failed") as error:
        meet_budget(pair_for(), attempt, None, None)
    assert error.value.fidelity is not None
    assert len(plans) == PLANS
    assert plans == sorted(plans, reverse=True)
    assert (plans[0], plans[-1]) == (1.4, 1.0)


def test_a_fixed_size_is_not_changed() -> None:
    pair = pair_for(basis_size="full")
    _, fidelity, way = meet_budget(pair, lambda pair, limit: measured(3.0, limit), None, None)
    assert fidelity.budget == way["limit"] == SAME_MODEL
    tries: list[float] = []

    def attempt(pair: Pair, limit: float) -> Fidelity:
        tries.append(limit)
        return measured(3.0, limit)

    with pytest.raises(ExportError):
        meet_budget(pair_for(basis_size="full", noise_budget=1.5), attempt, None, None)
    assert tries == [1.5]


def test_another_failure_is_not_tried_again() -> None:
    tries: list[float] = []

    def attempt(pair: Pair, limit: float) -> Fidelity:
        tries.append(limit)
        raise ExportError("does not load")

    with pytest.raises(ExportError, match="does not load"):
        meet_budget(pair_for(), attempt, None, None)
    assert len(tries) == 1
