"""What a run of the pipeline comes to, and how its steps are named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from bda_fx.cache_bases import CacheConflict

if TYPE_CHECKING:
    from bda_fx.passes.canonicalize import Program
    from bda_fx.passes.derived_inputs import Computed
    from bda_fx.passes.read_weights import Constants
    from bda_fx.passes.sites import Plan

on_step: ContextVar[Callable[[str], None] | None] = ContextVar("on_step", default=None)
"""Called with the name of each step as it begins, for those who show progress."""


class StepError(RuntimeError):
    """A pipeline step failed. ``step`` is its name; the cause is chained."""

    def __init__(self, step: str, error: Exception) -> None:
        super().__init__(f"bda_fx: {step} failed: {type(error).__name__}: {error}")
        self.step = step


@dataclass
class Outcome:
    """A rewritten program (or the original, where ``plan.sites`` is empty)."""

    program: Program
    plan: Plan
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Derived tensors that the new graph reads, by key."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Key → placeholder, in order, in front of the original placeholders."""
    fixed: frozenset[str] = frozenset()
    """Keys of tensors that depend on the plan alone, not on the weights."""
    constants: Constants | None = None
    """How the weights that the plan reads follow from the original placeholders."""
    computed: dict[str, Computed] = field(default_factory=dict)
    """How tensors that are made of other derived ones follow from these (packed weights)."""
    roots: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Placeholders of each linear weight, where caches are opaque."""
    fit: bool = False
    """Whether the weights that were planned for are exact, in range and within the budget."""


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Name the pipeline step that an error came from."""
    watch = on_step.get()
    if watch is not None:
        watch(name)
    try:
        yield
    except StepError:
        raise
    except Exception as error:
        from torch._dynamo.exc import RestartAnalysis

        # Dynamo will trace once more; a conflict must not end in a fall-back.
        if isinstance(error, RestartAnalysis | CacheConflict):
            raise
        raise StepError(name, error) from error
