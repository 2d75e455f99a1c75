"""Plan for the runtime that a model goes to: prove, and plan anew with less until the proof holds.

A plan reckons with every value being rounded to the dtype of the program, as eager PyTorch does it.
Runtimes round elsewhere. Measured in float16 (MiniLM-L6, ONNX Runtime 1.32 on CPU and eager): the
original's error is 5.7e-4 and 1.3e-3, what the rewrite adds to it (root of the difference of
squares) 1.2e-3 and 1.1e-3. The same excess is a larger part of less. In float32 the runtime's GEMMs
add up in other runs than the plan reckons with.

So the gain g of a runtime is measured where a plan was for an excess P² - 1 and the proof shows
M² - 1, and the next plan is for

    P'² - 1 = (budget² - 1) / g,       g = (M² - 1) / (P² - 1)

The last plan is for no excess at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bda_fx.exporters.exported import ExportError
from bda_fx.exporters.rewrite_pair import Pair
from bda_fx.fidelity_report import Fidelity
from bda_fx.generate_inputs import Inputs
from bda_fx.passes.plan_sites import CHANCE

PLANS = 6
"""Most plans, with the first one and the one for no excess."""

SAME_MODEL = 4.0
"""Where an explicit basis size was asked for, and no budget: above it something is wrong."""


def meet_budget(
    pair: Pair,
    attempt: Callable[[Pair, float], Fidelity],
    budget: float | None,
    calibration: Sequence[Inputs] | None,
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
    while True:
        pair = settle(pair)
        planned.append(pair.noise_budget)
        try:
            fidelity = attempt(pair, budget)
        except ExportError as error:
            hopeless = fixed or len(planned) == PLANS or not pair.report.rewritten
            if error.fidelity is None or hopeless:
                raise
            measured.append(error.fidelity.noise_ratio)
            smaller = _smaller(pair, budget, measured[-1], last=len(planned) == PLANS - 1)
            pair = pair.replanned(smaller, calibration)
            continue
        measured.append(fidelity.noise_ratio)
        way = {"limit": budget, "planned_for": planned, "measured": measured}
        return pair, fidelity, way


def _smaller(pair: Pair, budget: float, measured: float, *, last: bool) -> float:
    """The noise budget of the next plan, less than that of ``pair``."""
    if last or not math.isfinite(measured):
        return 1.0
    predicted = pair.report.noise_ratio or pair.noise_budget / CHANCE
    gain = max((measured**2 - 1) / max(predicted**2 - 1, 1e-6), 1.0)
    allowance = max((budget / CHANCE) ** 2 - 1, 0.0) / gain
    return max(1.0, min(CHANCE * math.sqrt(1 + allowance), 1 + 0.9 * (pair.noise_budget - 1)))
