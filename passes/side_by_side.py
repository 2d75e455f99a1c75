"""Do work on many small matrices side by side: they are too small for several threads each."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def side_by_side() -> Iterator[ThreadPoolExecutor]:
    """Workers as many as PyTorch has threads, each with one thread for its own operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def in_turn(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results of ``work`` in the order of ``items``, with few of them in memory at a time.

    One by one where the caller's thread has modes (those that compute symbols instead of numbers,
    say), as other threads would not have them.
    """
    threads = torch.get_num_threads()
    if threads == 1 or function_modes() or dispatch_modes():
        yield from map(work, items)
        return
    ahead: deque[Future[Result]] = deque()
    with side_by_side() as pool:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
