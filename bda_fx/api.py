"""``analyze`` and ``rewrite``: from a model or an exported program to a report or a new program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bda_fx.assemble_program import assemble_program, constant_bytes
from bda_fx.estimate_shares import Example
from bda_fx.generate_inputs import Inputs
from bda_fx.options import Options
from bda_fx.outcome import step
from bda_fx.passes.canonicalize import Program, canonicalize_exported, composite_attention
from bda_fx.pipeline import find_and_plan, transform
from bda_fx.report import Report, report_of

Calibration = Sequence[Inputs | tuple[tuple[Any, ...], dict[str, Any], str | Tensor | None]]
"""Typical inputs: (args, kwargs), or with a third element that tells which positions count."""


@dataclass(frozen=True)
class Rewrite:
    """A rewritten program and the report of what was done to it.

    ``program`` is an ordinary ``ExportedProgram``: it saves with ``torch.export.save``, runs as
    ``program.module()(…)`` and loads where bda_fx is not installed. Where nothing could be
    rewritten it is the original program.
    """

    program: ExportedProgram
    report: Report


def analyze(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Find and plan every attention product of ``model``; change nothing.

    Args:
        model: a module in the mode in which it will run (usually ``eval()``), or a program.
        args: example inputs for a module; not needed for a program.
        kwargs: example keyword inputs.
        dynamic_shapes: as in ``torch.export.export``.
        options: :class:`Options` or a dict of them.
        calibration: typical inputs, each (args, kwargs), on which to estimate how much of the
            outputs' rounding noise each attention product makes; the more a product makes, the
            smaller its basis. Without them inputs are made up. Where some positions are padding,
            (args, kwargs, mask): a tensor that is nonzero where outputs count, or the name of the
            keyword input that is one ("attention_mask"). It applies to the outputs whose shape
            begins with its own.

    Returns:
        The report; each site says what would be done and what it would save.

    Raises:
        OptionError: an unknown option or a value it cannot take.
        TypeError: ``model`` or ``args`` is of the wrong kind.
        ValueError: the model cannot be exported with these inputs.
    """
    chosen = Options.of(options)
    _, program = _canonical(model, args, kwargs, dynamic_shapes)
    before = constant_bytes(program.exported)
    return report_of(find_and_plan(program, chosen, _flat(program, calibration)), None, before)


def rewrite(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Rewrite:
    """Rewrite every attention of ``model`` that may be, as an exported program.

    Takes and raises what :func:`analyze` does. The outputs of the program equal the model's up to
    rounding; ``bda_fx.verify`` measures how far. Cost: an export, and a basis choice per site.
    """
    chosen = Options.of(options)
    original, program = _canonical(model, args, kwargs, dynamic_shapes)
    before = constant_bytes(original)
    inputs = _flat(program, calibration)
    outcome = transform(program, chosen, fixed_rows=True, calibration=inputs)
    if not outcome.plan.sites:
        return Rewrite(original, report_of(outcome.plan, None, before, before))
    with step("assemble program"):
        result = assemble_program(outcome)
    report = report_of(outcome.plan, outcome.tensors, before, constant_bytes(result))
    return Rewrite(result, report)


def _flat(program: Program, calibration: Calibration | None) -> list[Example] | None:
    """Calibration inputs as the program's placeholders take them."""
    if calibration is None:
        return None
    assert program.exported is not None
    flat = []
    for inputs in calibration:
        try:
            args, kwargs, *others = inputs
            (mask,) = others or (None,)
            given = program.exported._graph_module_flat_inputs(tuple(args), dict(kwargs))
        except (TypeError, ValueError) as error:
            raise TypeError(
                "calibration is a sequence of (args, kwargs) or (args, kwargs, mask), as the model "
                f"takes them: {error}"
            ) from error
        if isinstance(mask, str):
            mask = kwargs.get(mask)
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                "the mask of a calibration input is a tensor or the name of a keyword input that "
                f"is one, got {others[0]!r}; keyword inputs: {sorted(kwargs)}"
            )
        if isinstance(others[0] if others else None, str) and mask is None:
            raise TypeError(
                f"the mask of a calibration input is {others[0]!r}, which is not among its keyword "
                f"inputs: {sorted(kwargs)}"
            )
        flat.append(Example(tuple(given), mask))
    if not flat:
        raise ValueError("calibration holds no inputs: pass some, or None")
    return flat


def _canonical(
    model: Any, args: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> tuple[ExportedProgram, Program]:
    """The exported program as the user knows it, and its canonical form."""
    if isinstance(model, ExportedProgram):
        with step("canonicalize"):
            return model, canonicalize_exported(model)
    exported = export_module(model, args, kwargs, dynamic_shapes)
    with step("canonicalize"):
        program = canonicalize_exported(exported)
    assert program.exported is not None
    return program.exported, program


def export_module(
    model: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = None
) -> ExportedProgram:
    """``torch.export.export`` of a module as the passes want it: attention kept in one piece.

    Raises:
        TypeError: ``model`` or ``args`` is of the wrong kind.
        ValueError: it cannot be exported with these inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is an nn.Module or an ExportedProgram, got {type(model).__name__}; "
            "wrap a function in a module"
        )
    if isinstance(args, torch.Tensor) or not isinstance(args, tuple | list):
        raise TypeError(
            f"args is a tuple of example inputs, got {type(args).__name__}: "
            "write (x,) for one input"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs is a mapping of example inputs, got {type(kwargs).__name__}")
    try:
        with composite_attention(), torch.no_grad():
            return torch.export.export(
                model,
                tuple(args),
                dict(kwargs or {}),
                dynamic_shapes=dynamic_shapes,
                strict=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{type(model).__name__} cannot be exported with the inputs given "
            f"({_describe(args, kwargs)}): {reason}. "
            "Check that the model runs on them; torch.export.export shows the full trace."
        ) from error


def _describe(args: Any, kwargs: Mapping[str, Any] | None) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return type(value).__name__

    parts = [one(a) for a in args] + [f"{k}={one(v)}" for k, v in (kwargs or {}).items()]
    return ", ".join(parts) or "none"
