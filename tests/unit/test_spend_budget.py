"""spend_budget: against every combination of steps, and the odd costs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from bda_fx.passes.spend_budget import spend_budget


@dataclass
class Steps:
    """A ladder written out: ``table[i]`` the costs of step i; the last, to leave it, is added."""

    worth: Sequence[float]
    table: Sequence[Sequence[float]]

    def costs(self, step: int) -> Sequence[float]:
        return self.table[step] if step < len(self.worth) else [0.0] * len(self.table[0])


def one(worth: Sequence[float], costs: Sequence[float]) -> Steps:
    return Steps(worth, [[cost] for cost in costs])


def convex(draw: random.Random, outputs: int = 1) -> Steps:
    """Costs that fall ever more slowly, by what is given up, with shares for each output."""
    count = draw.randint(1, 4)
    drops = [draw.uniform(0.1, 1) for _ in range(count)]
    slopes = sorted((draw.uniform(0.1, 5) for _ in range(count)), reverse=True)
    worth = [sum(drops[i:]) for i in range(count)]
    costs = [sum(d * s for d, s in zip(drops[i:], slopes[i:], strict=True)) for i in range(count)]
    shares = [draw.uniform(0.5, 1) for _ in range(outputs)]
    return Steps(worth, [[share * cost for share in shares] for cost in costs])


def worth_of(ladders: Sequence[Steps], steps: Sequence[int]) -> float:
    return sum([*ladder.worth, 0.0][step] for ladder, step in zip(ladders, steps, strict=True))


def cost_of(ladders: Sequence[Steps], steps: Sequence[int]) -> float:
    """At the worst output."""
    costs = [ladder.costs(step) for ladder, step in zip(ladders, steps, strict=True)]
    return max(map(sum, zip(*costs, strict=True)))


def best(ladders: Sequence[Steps], allowance: float) -> float:
    every = itertools.product(*(range(len(ladder.worth) + 1) for ladder in ladders))
    return max(worth_of(ladders, s) for s in every if cost_of(ladders, s) <= allowance)


def largest_step(ladders: Sequence[Steps]) -> float:
    return max(
        above - below
        for ladder in ladders
        for above, below in itertools.pairwise([*ladder.worth, 0.0])
    )


@pytest.mark.parametrize("seed", range(60))
def test_within_one_step_of_the_best(seed: int) -> None:
    """On convex ladders the greedy descent solves the linear relaxation but for its last step."""
    draw = random.Random(seed)
    ladders = [convex(draw) for _ in range(draw.randint(1, 5))]
    full = cost_of(ladders, [0] * len(ladders))
    for part in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        allowance = part * full
        steps = spend_budget(ladders, allowance)
        assert cost_of(ladders, steps) <= allowance
        optimum = best(ladders, allowance)
        assert optimum - largest_step(ladders) <= worth_of(ladders, steps) <= optimum


@pytest.mark.parametrize("seed", range(30))
def test_a_larger_allowance_never_saves_less(seed: int) -> None:
    draw = random.Random(seed)
    ladders = [convex(draw) for _ in range(4)]
    for ladder in ladders[:2]:  # and not convex: as estimates may be
        ladder.table = [[draw.uniform(0, 5)] for _ in ladder.table]
    worths = [worth_of(ladders, spend_budget(ladders, 0.1 * n)) for n in range(150)]
    assert worths == sorted(worths)


@pytest.mark.parametrize("seed", range(30))
def test_every_output_is_within_the_allowance(seed: int) -> None:
    draw = random.Random(seed)
    ladders = [convex(draw, outputs=3) for _ in range(4)]
    for allowance in (0.0, 0.5, 2.0, 8.0, math.inf):
        steps = spend_budget(ladders, allowance)
        assert cost_of(ladders, steps) <= allowance
        if allowance == math.inf:
            assert steps == [0] * 4


def test_the_noisy_output_decides_where_to_step_down() -> None:
    ladders = [Steps([1.0], [[5.0, 0.0]]), Steps([1.0], [[1.0, 3.0]])]
    assert spend_budget(ladders, 4.0) == [1, 0]
    assert spend_budget(ladders, 1.0) == [1, 1]


def test_what_another_output_did_not_need_is_taken_back() -> None:
    """The first output is noisiest at first, and the first ladder its cheapest remedy; then the
    second output wants the second ladder down, which would have been enough for both."""
    ladders = [Steps([1.0], [[3.0, 0.0]]), Steps([5.0], [[4.0, 6.0]]), Steps([9.0], [[2.0, 1.0]])]
    assert spend_budget(ladders, 5.0) == [0, 1, 0]


def test_a_step_is_exchanged_for_a_better_one() -> None:
    """Neither the first nor the second ladder can be taken beside the other; the second is worth
    more, though the output that is noisiest at the top suffers from it most."""
    ladders = [Steps([1.0], [[1.0, 2.0]]), Steps([1.5], [[3.0, 1.9]])]
    assert spend_budget(ladders, 3.0) == [1, 0]


@pytest.mark.parametrize("seed", range(40))
def test_no_single_step_is_left_that_could_be_taken(seed: int) -> None:
    draw = random.Random(seed)
    ladders = [convex(draw, outputs=2) for _ in range(4)]
    for allowance in (0.5, 1.0, 2.0, 4.0):
        steps = spend_budget(ladders, allowance)
        for at, step in enumerate(steps):
            for higher in range(step):
                raised = [*steps[:at], higher, *steps[at + 1 :]]
                assert cost_of(ladders, raised) > allowance


def test_nothing_to_spend_and_nothing_to_choose() -> None:
    assert spend_budget([], 0.0) == []
    assert spend_budget([one([2, 1], [2, 1])], 0.0) == [2]
    assert spend_budget([one([], [[]])], 1.0) == [0]


def test_the_allowance_is_met_when_equal() -> None:
    assert spend_budget([one([2, 1], [2, 1])], 2.0) == [0]
    assert spend_budget([one([2, 1], [2, 1])], math.nextafter(2.0, 0)) == [1]


def test_a_step_that_cannot_be_taken_is_left() -> None:
    inf = math.inf
    assert spend_budget([one([3, 2, 1], [inf, 1.0, 0.5])], 1.0) == [1]
    assert spend_budget([one([3, 2, 1], [inf, inf, 0.5])], 1.0) == [2]
    assert spend_budget([one([3, 2], [inf, inf])], 1.0) == [2]
    ladders = [one([3, 2], [inf, 1.0]), one([3, 2], [1.0, 0.5])]
    assert spend_budget(ladders, 2.0) == [1, 0]
    assert spend_budget([one([3, 2, 1], [2.0, inf, 0.5])], 1.0) == [2]


def test_an_explicit_size_that_cannot_be_taken_is_left_whatever_may_be_spent() -> None:
    ladders = [one([3], [math.inf]), one([3], [100.0])]
    assert spend_budget(ladders, math.inf) == [1, 0]


def test_of_equal_worth_the_cheaper_step_is_taken() -> None:
    ladders = [one([2, 2, 1], [2.0, 1.0, 0.5]), one([2], [0.5])]
    assert spend_budget(ladders, 1.5) == [1, 0]
    assert spend_budget([one([2, 2, 1], [2.0, 3.0, 0.5])], 1.0) == [2]


def test_a_site_that_is_quieter_makes_room_for_others() -> None:
    """Noise under 1 costs less than nothing, and leaving the site as it is would cost more."""
    ladders = [one([2, 1], [1.5, -0.5]), one([3], [1.0])]
    assert spend_budget(ladders, 0.5) == [1, 0]
    assert spend_budget([one([2, 1], [-0.1, -0.5])], 0.0) == [0]
    assert spend_budget([one([2], [2.0]), one([1], [-1.0])], 0.5) == [1, 0]


def test_the_hull_skips_a_step_that_helps_little() -> None:
    """From 10, one down takes away 0.1 and gives up as much as the step to 1.0 gives up each."""
    ladders = [one([3, 2, 1], [10.0, 9.9, 1.0]), one([1], [0.0])]
    assert spend_budget(ladders, 9.95) == [2, 0]
    assert spend_budget(ladders[:1], 9.95) == [1]  # alone, there is nothing to weigh it against
