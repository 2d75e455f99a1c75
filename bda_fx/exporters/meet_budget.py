"""Plan for the runtime that a model goes to: prove, and plan anew with less until the proof holds.

A plan reckons with every value being rounded to the dtype of the program, as eager PyTorch does it.
Runtimes round elsewhere. Measured in float16 (MiniLM-L6, ONNX Runtime 1.32 on CPU and eager): the
original's error is 5.7e-4 and 1.3e-3, what the rewrite adds to it (root of the difference of
squares) 1.2e-3 and 1.1e-3. The same excess is a larger part of less. In float32 the runtime's GEMMs
add up in other runs than the plan reckons with.

So the gain g of a runtime is measured where a plan was for an excess P² - 1 and the proof shows
M² - 1, and the next plan is for

    P'² - 1 = (budget² - 1) / g,       g = (M² - 1) / (P² - 1)

Planning from a runtime's own rates of rounding would start nearer and end at the same. What is left
is new weights rounded anew: ONNX Runtime on CPU computes most of a float16 graph in float32, on
float16 weights that are exact by definition. Six products of MiniLM-L6, each alone and on windows,
add 0.25 … 0.4 of the original's squared noise there at r = D / 2 and 0.4 … 0.52 at 7/8 D (two of
them on pivoted rows 0.27, 0.29 and 0.33, 0.39), where a budget of 1.25 allows 0.56 in all.

The last plan is for no excess at all. What is measured need not be in proportion, so a plan that
passes with less than half of what it may add is followed by one or two between it and the smallest
that failed, where a line through both measurements meets the budget; the largest that passes is
what is delivered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bda_fx.api import Calibration
from bda_fx.exporters.exported import ExportError
from bda_fx.exporters.rewrite_pair import Pair
from bda_fx.fidelity_report import Fidelity
from bda_fx.outcome import on_step
from bda_fx.passes.plan_sites import CHANCE

PLANS = 6
"""Most plans until one passes, with the first one and the one for no excess."""

LARGER = 2
"""Most plans after one that passed."""

SAME_MODEL = 4.0
"""Where an explicit basis size was asked for, and no budget: above it something is wrong."""


def meet_budget(
    pair: Pair,
    attempt: Callable[[Pair, float], Fidelity],
    budget: float | None,
    calibration: Calibration | None,
    settle: Callable[[Pair], Pair] = lambda pair: pair,
) -> tuple[Pair, Fidelity, dict[str, Any]]:
    """Make and prove an artefact of ``pair``, with smaller bases if need be.

    ``attempt`` makes it and proves it within the limit that it is given; ``settle`` changes each
    pair before that. ``budget`` None is the noise budget of the options, or ``SAME_MODEL`` where
    those fix the basis size and leave the budget open.

    Returns:
        The pair that passed, its proof, and the way there: limit, budgets of the plans, noise.

    Raises:
        ExportError: of the last attempt; or the first, where the basis size is fixed.
    """
    fixed = pair.options.basis_size != "auto"
    if budget is None:
        open_end = fixed and pair.options.noise_budget == "auto"
        budget = SAME_MODEL if open_end else pair.noise_budget
    planned: list[float] = []
    measured: list[float] = []
    failed: tuple[float, float] | None = None  # budget of the plan, noise measured
    larger = LARGER
    passed: tuple[Pair, Fidelity] | None = None
    while True:
        pair = settle(pair)
        planned.append(pair.noise_budget)
        if (say := on_step.get()) is not None:
            say(f"plan {len(planned)}, translate and prove")
        try:
            fidelity = attempt(pair, budget)
        except ExportError as error:
            out_of_plans = len(planned) == PLANS and passed is None
            if error.fidelity is None or fixed or out_of_plans or not pair.report.rewritten:
                raise
            measured.append(error.fidelity.noise_ratio)
            failed = pair.noise_budget, measured[-1]
        else:
            measured.append(fidelity.noise_ratio)
            passed = pair, fidelity
        if passed is None:
            smaller = _smaller(pair, budget, measured[-1], last=len(planned) == PLANS - 1)
        elif not larger or failed is None or not _has_room(passed[1], budget):
            break
        else:
            larger -= 1
            smaller = _between((passed[0].noise_budget, passed[1].noise_ratio), failed, budget)
        pair = pair.replanned(smaller, calibration)
    if passed[0] is not pair:
        passed = passed[0], attempt(passed[0], budget)  # what failed lies where it had been written
    way = {"limit": budget, "planned_for": planned, "measured": measured}
    return *passed, way


def _has_room(fidelity: Fidelity, budget: float) -> bool:
    """Whether less than half of the noise that may be added was."""
    return 2 * (fidelity.noise_ratio**2 - 1) < budget**2 - 1


def _between(low: tuple[float, float], high: tuple[float, float], budget: float) -> float:
    """The budget of a plan between one that passed and one that failed, each with its measured
    noise: where a line through the two (in excess, planned and measured) meets ``budget``."""
    (planned, found), (most, too_much) = ([b**2 - 1 for b in end] for end in (low, high))
    allowed = max((budget / CHANCE) ** 2 - 1, 0.0)
    part = (allowed - found) / (too_much - found) if math.isfinite(too_much) else 0.5
    return math.sqrt(1 + planned + min(max(part, 0.1), 0.9) * (most - planned))


def _smaller(pair: Pair, budget: float, measured: float, *, last: bool) -> float:
    """The noise budget of the next plan, less than that of ``pair``."""
    if last or not math.isfinite(measured):
        return 1.0
    predicted = pair.report.noise_ratio or pair.noise_budget / CHANCE
    gain = max((measured**2 - 1) / max(predicted**2 - 1, 1e-6), 1.0)
    allowance = max((budget / CHANCE) ** 2 - 1, 0.0) / gain
    return max(1.0, min(CHANCE * math.sqrt(1 + allowance), 1 + 0.9 * (pair.noise_budget - 1)))
