"""The ONNX file that a program was read from: its names, and proof that they are the same model.

The noise of a rewritten file is measured against the file that was given. That the program computes
the same as that file is a claim of its own, with a proof of its own: both in ONNX Runtime (the
program as translated, unchanged), against the program in float64,

    ‖given file − truth‖  ≤  SAME_MODEL · ‖program, translated − truth‖

An op that were read wrongly would be right in the program's own eyes, and far off in those of the
file. Where float64 itself decides otherwise than both (T5 takes whole numbers from logarithms), the
truth is too far from either to tell, so they are held against one another too, coarsely:

    ‖given file − program, translated‖  ≤  √eps ‖program, translated‖
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from bda_fx.exporters.exported import ExportError
from bda_fx.exporters.meet_budget import SAME_MODEL
from bda_fx.exporters.prove import Run, prove
from bda_fx.fidelity_report import Fidelity
from bda_fx.generate_inputs import Inputs
from bda_fx.importers.read_onnx import Axis, read_signature

OLDEST_WRITTEN = 18
"""Operator set below which the translator writes none."""


@dataclass(frozen=True)
class Source:
    """A file, and the program's names for its inputs.

    Attributes:
        path: the file.
        opset: the operator set to write: that of the file, but at least ``OLDEST_WRITTEN``.
        names: input of the file → input of the program.
        axes: for each input of the program its open axes, as the file calls them.
        outputs: outputs of the file.
    """

    path: Path
    opset: int
    names: dict[str, str]
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]

    def to_dict(self) -> dict[str, str]:
        """What the evidence tells of it."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        return {"name": self.path.name, "sha256": digest.hexdigest()}


def read_source(path: Path, program: ExportedProgram) -> Source:
    """
    Raises:
        OnnxFileError: the file is damaged.
        ExportError: the program has other inputs than the file.
    """
    signature = read_signature(path)
    ours = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    if len(ours) != len(signature.inputs):
        raise ExportError(
            f"{path} has {len(signature.inputs)} inputs and the program {len(ours)}: pass the "
            "file that the program was read from"
        )
    names = {value.name: name for value, name in zip(signature.inputs, ours, strict=True)}

    def named(axes: Sequence[Axis] | None) -> dict[int, str]:
        return {at: axis.name for at, axis in enumerate(axes or ()) if axis.name}

    axes = {names[value.name]: named(value.axes) for value in signature.inputs}
    opset = max(signature.opset, OLDEST_WRITTEN)
    return Source(path, opset, names, axes, signature.outputs)


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether whole numbers are not the same, or others further apart than √eps."""
    if not a.is_floating_point():
        return not torch.equal(a, b)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return True
    x, y = a[finite].double(), b[finite].double()
    return float((x - y).norm()) > torch.finfo(a.dtype).eps ** 0.5 * float(x.norm())


def prove_source(
    source: Source,
    program: ExportedProgram,
    given: Run,
    translated: Run,
    inputs: Sequence[Inputs],
    *,
    made: bool,
) -> Fidelity:
    """The proof that program and file are the same model (module docstring).

    Raises:
        ExportError: they are not.
    """
    for batch in inputs:
        for name, ours, theirs in zip(source.outputs, translated(batch), given(batch), strict=True):
            if ours.dtype != theirs.dtype or ours.shape != theirs.shape or _differ(ours, theirs):
                raise ExportError(
                    f"output {name!r} of {source.path} does not equal that of the program read "
                    "from it: please report this"
                )
    try:
        return prove(program, translated, given, inputs, made=made, budget=SAME_MODEL)
    except ExportError as error:
        if error.fidelity is None:
            raise
        raise ExportError(
            f"{source.path} does not compute what the program read from it computes: its error is "
            f"{error.fidelity.noise_ratio:.3g} times as large; please report this",
            error.fidelity,
        ) from error
