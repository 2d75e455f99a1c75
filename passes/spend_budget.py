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

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


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


class _Known:
    """A ladder whose costs are asked for once."""

    def __init__(self, ladder: Ladder) -> None:
        self.worth, self._ladder = ladder.worth, ladder
        self._costs: dict[int, Sequence[float]] = {}

    def costs(self, step: int) -> Sequence[float]:
        if step not in self._costs:
            self._costs[step] = self._ladder.costs(step)
        return self._costs[step]


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
    ladders = [_Known(ladder) for ladder in ladders]
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

    @functools.cache
    def best_move(at: int, step: int, weights: tuple[float, ...]) -> tuple[float, int, int]:
        """(gain, ladder, step below), the last two negative."""
        below = range(step + 1, len(ladders[at].worth) + 1)
        moves = [(_gain(ladders[at], step, to, weights), -at, -to) for to in below]
        return max(moves, default=(-math.inf, -at, -step))

    while not _within(ladders, steps, allowance):
        weights = tuple(weigh(_totals(ladders, steps)))
        _, at, below = max(best_move(at, step, weights) for at, step in enumerate(steps))
        steps[-at] = -below
    return steps


def _climb(ladders: Sequence[Ladder], steps: list[int], allowance: float) -> None:
    """Raise ``steps`` while that saves more: one to any higher step; where none can be, one by one
    step while another goes down by one."""
    while any(steps):
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
        pair = _best_exchange(ladders, steps, allowance)
        if pair is None:
            return
        up, down = pair
        steps[up] -= 1
        steps[down] += 1


def _best_exchange(
    ladders: Sequence[Ladder], steps: Sequence[int], allowance: float
) -> tuple[int, int] | None:
    """The ladders of which one goes up a step and the other down, so that most more is saved."""
    ways = list(zip(ladders, steps, strict=True))
    ups = [_moves(ladder, step, range(step)[-1:]) for ladder, step in ways]
    ends = [len(ladder.worth) for ladder in ladders]
    downs = [
        _moves(ladder, step, range(step + 1, end + 1)[:1])
        for (ladder, step), end in zip(ways, ends, strict=True)
    ]
    totals = torch.tensor(_totals(ladders, steps), dtype=torch.float64)
    none = [(0, -math.inf, [0.0] * len(totals))]
    (gain, cost), (loss, freed) = (
        (
            torch.tensor([(moves or none)[0][1] for moves in side], dtype=torch.float64),
            torch.tensor([(moves or none)[0][2] for moves in side], dtype=torch.float64),
        )
        for side in (ups, downs)
    )
    after = totals + cost.unsqueeze(1) + freed
    more = gain.unsqueeze(1) + loss
    allowed = (after.isfinite() & (after <= allowance)).all(2) & (more > 0)
    more = more.where(allowed.fill_diagonal_(False), -math.inf)
    best = int(more.argmax())
    up, down = divmod(best, len(ladders))
    return (up, down) if more[up, down] > 0 else None


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
