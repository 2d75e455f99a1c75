"""Spend a noise budget: how far to go at each site so that all together save most within it.

Independent errors add up in squares, so a model whose sites have noise N_s (1 is the original's
own), and where the rounding of site s makes the share w_s of the error of an output, is

    sqrt( 1 + Σ_s w_s (N_s² - 1) )

times as noisy there as the original. Each site has a ladder of steps, from what saves most to what
saves least. The descent starts at the top of each and steps down, over the convex hull of its
costs, where a multiplication given up buys most noise, until the sum is within the allowance at
every output. A larger allowance stops earlier on the same way, so it never saves less (with one
output; with several the way may differ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class Ladder(Protocol):
    """Steps of a site: ``worth[i]`` falls with i, and so, usually, does the cost."""

    @property
    def worth(self) -> Sequence[float]:
        """What each step saves, in any unit that all ladders share."""
        ...

    def costs(self, step: int) -> Sequence[float]:
        """w (N² - 1) of a step for each output, inf where it cannot be taken.

        Step ``len(worth)`` is to leave the site as it is.
        """
        ...


def spend_budget(ladders: Sequence[Ladder], allowance: float) -> list[int]:
    """The step to take on each ladder; their costs come to at most ``allowance`` (≥ 0) together.

    An allowance of inf takes whatever can be taken.
    """
    steps = [0] * len(ladders)
    while ladders:
        totals = [
            sum(costs)
            for costs in zip(
                *(ladder.costs(s) for ladder, s in zip(ladders, steps, strict=True)), strict=True
            )
        ]
        output = max(range(len(totals)), key=lambda at: totals[at])
        if totals[output] <= allowance and math.isfinite(totals[output]):
            break
        moves = [
            (_gain(ladder, step, below, output), -at, -below)
            for at, (ladder, step) in enumerate(zip(ladders, steps, strict=True))
            for below in range(step + 1, len(ladder.worth) + 1)
        ]
        _, at, below = max(moves)
        steps[-at] = -below
    return steps


def _gain(ladder: Ladder, step: int, below: int, output: int) -> float:
    """Noise at ``output`` that stepping down takes away, for each unit of what it gives up."""
    before, after = ladder.costs(step)[output], ladder.costs(below)[output]
    if math.isinf(before):
        return math.inf  # cannot be taken: go on, whatever comes next
    worth = [*ladder.worth, 0.0]
    given_up = worth[step] - worth[below]
    if given_up == 0:
        return math.copysign(math.inf, before - after)
    return (before - after) / given_up
