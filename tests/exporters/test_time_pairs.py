"""``time_pairs``: the ratio, its interval, and which of the two comes first."""

from __future__ import annotations

import time
from math import comb

import pytest

from bda_fx.exporters.time_pairs import _order, time_pairs


@pytest.mark.parametrize("n", [6, 9, 20, 201])
def test_order_statistics_hold_the_median_with_95_percent(n: int) -> None:
    """P(x_(k) < median < x_(n+1−k)) = 1 − 2 P(Binomial(n, 1/2) < k), and k + 1 would be too few."""

    def outside(k: int) -> float:
        return 2 * sum(comb(n, i) for i in range(k)) / 2**n

    k = _order(n)
    assert outside(k) <= 0.05 < outside(k + 1)


def test_too_few_pairs_give_the_whole_range() -> None:
    assert _order(3) == 1


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that the calls themselves advance: two seconds against one, and every other pair the
    other way round."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls: list[str] = []

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    found = time_pairs("x", lambda: call("a", 2.0), lambda: call("b", 1.0), seconds=1.0)
    assert (found.speedup, found.interval, found.pairs) == (2.0, (2.0, 2.0), 9)
    assert (found.original_ms, found.rewritten_ms) == (2000.0, 1000.0)
    assert calls[4:10] == ["a", "b", "b", "a", "a", "b"]
