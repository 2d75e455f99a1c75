"""``assert_equivalent``: a rewritten model against the original, run in every way there is."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bda_fx
from bda_fx.generate_inputs import Inputs
from bda_fx.passes.canonicalize import composite_attention
from bda_fx.testing import WAYS
from bda_fx.testing.run_ways import run_way, unavailable

BUDGET = 2.0
"""Error of a rewritten model over the original's own: the promise that bda_fx makes by default."""


class NotEquivalent(AssertionError):
    """A model is not what it was. ``fidelities`` holds what was measured, by way."""

    def __init__(self, message: str, fidelities: Mapping[str, bda_fx.Fidelity]) -> None:
        super().__init__(message)
        self.fidelities = dict(fidelities)


@dataclass(frozen=True)
class Equivalence:
    """What was measured: a :class:`bda_fx.Fidelity` for each way that ran, and why others did not.

    ``report`` says what was rewritten; None where the caller brought the candidate.
    """

    fidelities: dict[str, bda_fx.Fidelity]
    skipped: dict[str, str]
    report: bda_fx.Report | None

    @property
    def passed(self) -> bool:
        return all(fidelity.passed for fidelity in self.fidelities.values())

    def __str__(self) -> str:
        """A line for each way, and below the table of outputs of each that failed."""
        width = max(map(len, (*self.fidelities, *self.skipped)))
        lines = []
        for way, fidelity in self.fidelities.items():
            verdict = "equivalent" if fidelity.passed else "NOT EQUIVALENT"
            lines.append(
                f"{way:{width}}  {verdict}, {fidelity.noise_ratio:.2f} × the original's own error "
                f"(budget {fidelity.budget:g})"
            )
        lines += [f"{way:{width}}  not run: {reason}" for way, reason in self.skipped.items()]
        for way, fidelity in self.fidelities.items():
            if not fidelity.passed:
                table = fidelity.to_markdown().partition("\n\n|")[2]
                lines += ["", f"{way}:", f"|{table}"]
        if self.report is not None and not self.passed:
            lines += ["", str(self.report)]
        return "\n".join(lines)


def assert_equivalent(
    model: nn.Module,
    inputs: tuple[Any, ...] | Mapping[str, Any] | Sequence[Inputs],
    budget: float = BUDGET,
    *,
    candidate: Callable[..., Any] | None = None,
    ways: Sequence[str] = WAYS,
    dtype: torch.dtype | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    mask: Any = None,
) -> Equivalence:
    """Rewrite ``model``, run it in every way that is installed, and compare with the original.

    Args:
        model: in the mode in which it will run, usually ``eval()``. It is not changed.
        inputs: a tuple of positional inputs, a dict of keyword inputs, or a list of (args, kwargs)
            over which errors are pooled. The first one is what the model is exported with.
        budget: largest error against a float64 run, × the original's own in the same dtype.
        candidate: compare this callable instead of a rewrite of the model.
        ways: of ``bda_fx.testing.WAYS``. What one needs may be missing here: then it is skipped,
            and the result says why.
        dtype: run in this dtype: floating-point weights and inputs are converted.
        options: as for ``bda_fx.rewrite``.
        dynamic_shapes: as for ``torch.export.export``.
        mask: which positions count, as for ``bda_fx.verify``.

    Returns:
        What was measured.

    Raises:
        NotEquivalent: an ``AssertionError`` whose text shows a table for each way that failed.
        ValueError: none of the ``ways`` can run here, or there is no such way.
    """
    batches = _batches(inputs)
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
        batches = pytree.tree_map(lambda value: _cast(value, dtype), batches)
    if candidate is not None:
        fidelity = bda_fx.verify(model, candidate, inputs=batches, mask=mask, budget=budget)
        return _passed(Equivalence({"candidate": fidelity}, {}, None))
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise ValueError(f"there is no way {', '.join(unknown)}: the ways are {', '.join(WAYS)}")
    skipped = {way: reason for way in ways if (reason := unavailable(way)) is not None}
    if len(skipped) == len(ways):
        reasons = "; ".join(f"{way}: {reason}" for way, reason in skipped.items())
        raise ValueError(f"none of the ways can run here: {reasons}")
    args, kwargs = copy.deepcopy(batches[0])
    with composite_attention(), torch.no_grad():
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    found: dict[str, bda_fx.Fidelity] = {}
    for way in ways:
        if way in skipped:
            continue
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            run = run_way(way, model, program, options or {}, Path(folder))
            found[way] = bda_fx.verify(
                model, run, inputs=batches, mask=mask, budget=budget, localize=False
            )
            del run
    report = bda_fx.analyze(program, options=options)
    return _passed(Equivalence(found, skipped, report))


def _passed(result: Equivalence) -> Equivalence:
    if not result.passed:
        raise NotEquivalent(f"the models are not equivalent\n{result}", result.fidelities)
    return result


def _batches(inputs: Any) -> list[Inputs]:
    """Inputs as a list of (args, kwargs)."""
    if isinstance(inputs, Tensor):
        return [((inputs,), {})]
    if isinstance(inputs, Mapping):
        return [((), dict(inputs))]
    if isinstance(inputs, tuple):
        return [(inputs, {})]
    batches = [(tuple(args), dict(kwargs)) for args, kwargs in inputs]
    if not batches:
        raise ValueError("inputs is empty: pass a tuple, a dict, or a list of (args, kwargs)")
    return batches


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value
