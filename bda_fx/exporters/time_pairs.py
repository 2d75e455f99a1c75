"""Time two calls in turns, so that whatever else the machine does hits both alike.

The speedup is the median over pairs of the ratio of the two times. Its 95 % interval is between
order statistics: with n pairs the median lies between the k-th smallest and the k-th largest with
probability 1 − 2 P(Binomial(n, 1/2) < k), whatever the distribution.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from math import comb

from bda_fx.exporters.exported import Timing

SECONDS = 1.0
"""What a comparison may take. Warm-up comes on top."""
PAIRS = 9, 201
"""Least and most pairs; nine is where an interval of 95 % has room for an outlier at either end."""


def time_pairs(
    name: str,
    original: Callable[[], object],
    rewritten: Callable[[], object],
    seconds: float = SECONDS,
) -> Timing:
    """Median latencies of both and their ratio; the order in a pair alternates."""
    for call in (original, rewritten, original, rewritten):
        call()
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    low, high = PAIRS
    while len(pairs) < low or (time.perf_counter() - start < seconds and len(pairs) < high):
        if len(pairs) % 2:
            second, first = _timed(rewritten), _timed(original)
        else:
            first, second = _timed(original), _timed(rewritten)
        pairs.append((first, second))
    ratios = sorted(a / b for a, b in pairs)
    k = _order(len(ratios))
    return Timing(
        name,
        1e3 * statistics.median(a for a, _ in pairs),
        1e3 * statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        (ratios[k - 1], ratios[-k]),
        len(pairs),
    )


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _order(n: int) -> int:
    """The largest k for which the k-th order statistics hold the median with 95 %."""
    tail, k = 0, 0
    while 2 * (tail + comb(n, k)) <= 0.05 * 2**n:
        tail += comb(n, k)
        k += 1
    return max(k, 1)
