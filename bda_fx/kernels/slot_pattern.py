"""How basis features enter the outputs, as a kernel is compiled for it: a few runs that repeat."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

MAX_RUNS = 8
"""Most runs that are compiled into a kernel, each two comparisons per output feature."""

Runs = tuple[tuple[int, int, int], ...]


class Pattern(NamedTuple):
    """The operator's ``slots`` in short."""

    period: tuple[int, ...]
    """The shortest pattern whose repetition is ``slots``: that of one head where all are alike."""
    runs: Runs
    """The period's maximal runs (begin, end, slot of begin) of slots that rise by one."""

    @property
    def by_table(self) -> bool:
        """Whether the period is of so many runs that a kernel reads it from memory instead."""
        return len(self.runs) > MAX_RUNS

    @property
    def spread(self) -> float:
        """Share of output features that a basis feature enters."""
        return sum(end - begin for begin, end, _ in self.runs) / len(self.period)


def period_of(pattern: tuple[int, ...]) -> int:
    """Smallest p that divides the length and with which the pattern repeats."""
    width = len(pattern)
    for size in range(1, width):
        if width % size == 0 and pattern[size:] == pattern[:-size]:
            return size
    return width


@lru_cache(maxsize=1024)
def pattern_of(slots: tuple[int, ...]) -> Pattern:
    period = slots[: period_of(slots)]
    runs: list[tuple[int, int, int]] = []
    for feature, slot in enumerate(period):
        if slot < 0:
            continue
        if runs and runs[-1][1] == feature and slot == period[feature - 1] + 1:
            runs[-1] = (runs[-1][0], feature + 1, runs[-1][2])
        else:
            runs.append((feature, feature + 1, slot))
    return Pattern(period, tuple(runs))
