"""Seconds that each step of the pipeline takes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TypeVar

from bda_fx import api, pipeline

Result = TypeVar("Result")


def step_times(run: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """What ``run()`` gives, and seconds per pipeline step and in total, wall and CPU."""
    seconds: dict[str, float] = defaultdict(float)
    original = pipeline.step

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        with original(name):
            yield
        seconds[name] += time.perf_counter() - start

    api.step = pipeline.step = timed  # type: ignore[attr-defined]
    try:
        start, cpu = time.perf_counter(), time.process_time()
        result = run()
        seconds["total"] = time.perf_counter() - start
        seconds["total, CPU"] = time.process_time() - cpu
    finally:
        api.step = pipeline.step = original  # type: ignore[attr-defined]
    return result, dict(seconds)
