"""Spend a noise budget: how far to go at each site so that all together save most within it.

Independent errors add up in squares, so a model whose sites have noise N_s (1 is the original's
own), and where the rounding of site s makes the share w_s of the error of an output, is

    sqrt( 1 + Σ_s w_s (N_s² - 1) )

times as noisy there as the original. Each site has a ladder of steps, from what saves most to what
saves least. The descent starts at the top of each and steps down, over the convex hull of its
costs, where a multiplication given up buys most noise, until the sum is within the allowance at
every output. A larger allowance stops earlier on the same way, so it never saves less. A single
ladder is descended step by step.

With several outputs the descent may leave room at some: what it gave up for the output that was
noisiest then may not have been needed in the end. So it is followed by climbing: up on one ladder,
or up on one and down on another, as long as that saves more and stays within the allowance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


Weigh = Callable[[Sequence[float]], list[float]]
"""From the totals of all outputs to what noise at each of them counts for."""


def noisiest(totals: Sequence[float]) -> list[float]:
    """All on the first output that is noisiest."""
    loudest = max(range(len(totals)), key=lambda output: totals[output])
    return [float(output == loudest) for output in range(len(totals))]


def all_alike(totals: Sequence[float]) -> list[float]:
    return [1.0 for _ in totals]


def spend_budget(ladders: Sequence[Ladder], allowance: float, weigh: Weigh = noisiest) -> list[int]:
    """The step to take on each ladder; their costs come to at most ``allowance`` (≥ 0) together.

    An infinite allowance takes the first step of each ladder that can be taken. ``weigh``: which
    outputs decide where to step down.
    """
    if len(ladders) == 1:
        steps = [0]
        while not _within(ladders, steps, allowance):
            steps[0] += 1
        return steps
    steps = _descend(ladders, allowance, weigh)
    if len(_totals(ladders, steps)) > 1:
        _climb(ladders, steps, allowance)
    return steps


def _descend(ladders: Sequence[Ladder], allowance: float, weigh: Weigh) -> list[int]:
    """Step down from the top until every output is within the allowance."""
    steps = [0] * len(ladders)
    while not _within(ladders, steps, allowance):
        weights = weigh(_totals(ladders, steps))
        moves = [
            (_gain(ladder, step, below, weights), -at, -below)
            for at, (ladder, step) in enumerate(zip(ladders, steps, strict=True))
            for below in range(step + 1, len(ladder.worth) + 1)
        ]
        _, at, below = max(moves)
        steps[-at] = -below
    return steps


def _climb(ladders: Sequence[Ladder], steps: list[int], allowance: float) -> None:
    """Raise ``steps`` while that saves more: one to any higher step; where none can be, one by one
    step while another goes down by one."""
    while True:
        totals = _totals(ladders, steps)
        ups = [
            _moves(ladder, step, range(step)) for ladder, step in zip(ladders, steps, strict=True)
        ]
        single = [
            (gain, -at, -to)
            for at, moves in enumerate(ups)
            for to, gain, costs in moves
            if gain > 0 and _allowed(totals, [costs], allowance)
        ]
        if single:
            _, at, to = max(single)
            steps[-at] = -to
            continue
        downs = [
            _moves(ladder, step, range(step + 1, min(step + 1, len(ladder.worth)) + 1))
            for ladder, step in zip(ladders, steps, strict=True)
        ]
        pairs = [
            (gain + loss, -at, -to, -other, -lower)
            for at, moves in enumerate(ups)
            for to, gain, costs in moves[-1:]
            for other, below in enumerate(downs)
            for lower, loss, freed in below
            if other != at and gain + loss > 0 and _allowed(totals, [costs, freed], allowance)
        ]
        if not pairs:
            return
        _, at, to, other, lower = max(pairs)
        steps[-at], steps[-other] = -to, -lower


def _moves(
    ladder: Ladder, step: int, others: Sequence[int]
) -> list[tuple[int, float, list[float]]]:
    """(step, what more is saved there, what more it costs at each output) for ``others``."""
    worth, now = [*ladder.worth, 0.0], ladder.costs(step)
    return [
        (other, worth[other] - worth[step], [a - b for a, b in zip(costs, now, strict=True)])
        for other in others
        for costs in [ladder.costs(other)]
    ]


def _allowed(totals: Sequence[float], moves: Sequence[Sequence[float]], allowance: float) -> bool:
    every = zip(totals, *moves, strict=True)
    return all(math.isfinite(total) and total <= allowance for total in map(sum, every))


def _totals(ladders: Sequence[Ladder], steps: Sequence[int]) -> list[float]:
    """Σ costs for each output."""
    costs = [ladder.costs(step) for ladder, step in zip(ladders, steps, strict=True)]
    return [sum(output) for output in zip(*costs, strict=True)]


def _within(ladders: Sequence[Ladder], steps: Sequence[int], allowance: float) -> bool:
    return all(math.isfinite(total) and total <= allowance for total in _totals(ladders, steps))


def _gain(ladder: Ladder, step: int, below: int, weights: Sequence[float]) -> float:
    """Noise that stepping down takes away, for each unit of what it gives up."""
    before, after = (
        sum(w * cost for w, cost in zip(weights, ladder.costs(at), strict=True) if w)
        for at in (step, below)
    )
    if math.isinf(before):
        return math.inf  # cannot be taken: go on, whatever comes next
    worth = [*ladder.worth, 0.0]
    given_up = worth[step] - worth[below]
    if given_up == 0:
        return math.copysign(math.inf, before - after)
    return (before - after) / given_up
