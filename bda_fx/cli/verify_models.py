"""``verify A B``: how equal two models are, whichever form each has.

A is a PyTorch model    bda_fx.verify: float64 run of A's program, errors of A and of B
A is an ONNX file       the same figures, with the truth from onnx's reference implementation
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import bda_fx
from bda_fx.cli.convert_model import program_of
from bda_fx.cli.errors import CliError, ExitCode, first_line
from bda_fx.cli.open_model import Opened, Settings, kind_of, open_model
from bda_fx.cli.progress import Stages
from bda_fx.cli.run_command import Result
from bda_fx.cli.run_onnx import OnnxModel, signature_inputs
from bda_fx.compare_outputs import OutputTally
from bda_fx.generate_inputs import Inputs, generate_inputs

Side = Opened | OnnxModel


def verify_models(a: str, b: str, settings: Settings, budget: float, count: int) -> Any:
    """Compare ``b`` with ``a`` on ``count`` inputs; a :class:`Result` for ``run_command``."""

    def work(stages: Stages) -> Result:
        with stages.stage(f"opening {a}"):
            reference = _open(a, settings, stages)
        with stages.stage(f"opening {b}"):
            candidate = _open(b, settings, stages)
        with stages.stage("finding inputs"):
            program = program_of(reference, stages) if isinstance(reference, Opened) else None
            inputs, real = _inputs(reference, candidate, program, count)
        with stages.stage("comparing", 2 * len(inputs)) as stage:
            run = _counted(_runner(candidate), stage.advance)
            try:
                if isinstance(reference, OnnxModel):
                    fidelity = _against_onnx(reference, run, inputs, budget)
                else:
                    assert program is not None
                    fidelity = bda_fx.verify(
                        program,
                        run,
                        inputs=inputs,
                        mask=_mask(program, inputs),
                        budget=budget,
                        localize=None if isinstance(candidate, Opened) else False,
                    )
            except ValueError as error:
                raise _incomparable(error) from error
        if not real:
            stages.note(
                "inputs were made up: pass real ones with --inputs, or text with --calibration"
            )
        code = ExitCode.DONE if fidelity.passed else ExitCode.DIFFERENT
        data = {"reference": a, "candidate": b, "inputs_are_real": real, **fidelity.to_dict()}
        return Result(data, str(fidelity), code)

    return work


def _open(name: str, settings: Settings, stages: Stages) -> Side:
    if kind_of(name) == "onnx":
        return OnnxModel(Path(name))
    opened = open_model(name, settings)
    for text in opened.notes:
        stages.note(text)
    return opened


def _runner(side: Side) -> Callable[..., Any]:
    if isinstance(side, OnnxModel):
        return side
    return side.model.module() if isinstance(side.model, ExportedProgram) else side.model


def _counted(run: Callable[..., Any], advance: Callable[[], None]) -> Callable[..., Any]:
    """``run``, and a step of the bar after each call."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        advance()
        return result

    return counted


# -- inputs -----------------------------------------------------------------------------------


def _inputs(
    reference: Side, candidate: Side, program: ExportedProgram | None, count: int
) -> tuple[list[Inputs], bool]:
    """Inputs that both take, and whether they are real: of a tokenizer or a file rather than made
    up from a config or a signature."""
    sides = [side for side in (reference, candidate) if isinstance(side, Opened)]
    programs = [program] if program is not None else []
    programs += [
        s.model for s in sides if isinstance(s.model, ExportedProgram) and s.model not in programs
    ]
    names = _common_names(reference, candidate)
    for side in sorted(sides, key=lambda side: not side.real):
        if not (side.args or side.kwargs):
            continue
        batches = side.more_inputs(count) if side.more_inputs else [(side.args, side.kwargs)]
        batches = [(args, _only(kwargs, names)) for args, kwargs in batches]
        if all(_fits(made, batch) for made in programs for batch in batches):
            return batches, side.real
    if programs:
        return generate_inputs(programs[0], count), False
    assert isinstance(reference, OnnxModel)
    return signature_inputs(reference.path, count), False


def _common_names(*sides: Side) -> set[str] | None:
    """Keyword inputs that no side leaves out; None where nobody's names are known."""
    known: list[set[str]] = []
    for side in sides:
        if isinstance(side, OnnxModel):
            known.append(set(side.inputs))
        elif isinstance(side.model, ExportedProgram):
            known.append({n for n in side.model.graph_signature.user_inputs if isinstance(n, str)})
    return set.intersection(*known) if known else None


def _only(kwargs: dict[str, Any], names: set[str] | None) -> dict[str, Any]:
    if names is None or not set(kwargs) & names:
        return kwargs
    return {name: value for name, value in kwargs.items() if name in names}


def _fits(program: ExportedProgram, batch: Inputs) -> bool:
    """Whether a program takes a batch: its structure, and the sizes that are fixed."""
    try:
        flat = program._graph_module_flat_inputs(*batch)
    except (TypeError, ValueError, RuntimeError, KeyError):
        return False
    nodes = program.graph.find_nodes(op="placeholder")
    for node, value in zip(nodes, flat, strict=False):
        like = node.meta.get("val")
        if isinstance(value, Tensor) and isinstance(like, Tensor):
            if value.dim() != like.dim() or value.dtype != like.dtype:
                return False
            sizes = zip(value.shape, like.shape, strict=True)
            if any(isinstance(fixed, int) and size != fixed for size, fixed in sizes):
                return False
    return True


def _mask(program: ExportedProgram, inputs: list[Inputs]) -> str | None:
    """``attention_mask``, where it is given and an output has a place for each of its tokens."""
    if not all(isinstance(kwargs.get("attention_mask"), Tensor) for _, kwargs in inputs):
        return None
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    mask = values.get("attention_mask")
    if not isinstance(mask, Tensor):
        return None
    outputs = [values.get(name) for name in program.graph_signature.user_outputs]
    fits = [
        isinstance(v, Tensor)
        and v.dim() >= mask.dim()
        and all(str(a) == str(b) for a, b in zip(mask.shape, v.shape, strict=False))
        for v in outputs
    ]
    return "attention_mask" if any(fits) else None


# -- an ONNX file as the reference ------------------------------------------------------------


def _against_onnx(
    reference: OnnxModel, run: Callable[..., Any], inputs: list[Inputs], budget: float
) -> bda_fx.Fidelity:
    tallies: dict[int, OutputTally] = {}
    for args, kwargs in inputs:
        with torch.no_grad():
            theirs = _tensors(run(*args, **kwargs))
        ours, exact = reference(*args, **kwargs), reference.truth(args, kwargs)
        if len(ours) != len(theirs):
            raise ValueError(f"the reference has {len(ours)} outputs, the candidate {len(theirs)}")
        for at, (mine, other, true) in enumerate(zip(ours, theirs, exact, strict=True)):
            if mine.shape != other.shape or mine.dtype != other.dtype:
                raise ValueError(
                    f"output {at}: the reference gives {mine.dtype} {list(mine.shape)}, "
                    f"the candidate {other.dtype} {list(other.shape)}"
                )
            if mine.is_floating_point():
                name = f"output {at} ({reference.outputs[at]})"
                tallies.setdefault(at, OutputTally(name)).add(
                    mine, other, true, mask=_front(kwargs.get("attention_mask"), mine)
                )
    if not tallies:
        raise ValueError("no output is a floating-point tensor: there is nothing to compare")
    return bda_fx.Fidelity(
        tuple(tally.result(budget) for tally in tallies.values()), budget, num_inputs=len(inputs)
    )


def _front(mask: Any, output: Tensor) -> Tensor | None:
    fits = isinstance(mask, Tensor) and mask.shape == output.shape[: mask.dim()]
    return mask if fits else None


def _tensors(results: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor)]


def _incomparable(error: ValueError) -> CliError:
    """Outputs that cannot be compared at all are different ones."""
    text = first_line(error)
    if "the candidate" not in text:
        raise error
    return CliError(
        f"the outputs cannot be compared: {text}",
        "open both in the same --dtype and with the same --task",
        ExitCode.DIFFERENT,
    )
