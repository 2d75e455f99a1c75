"""``inspect``, ``rewrite`` and ``export``: what could be saved, and models that save it."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram

import bda_fx
from bda_fx.api import Calibration
from bda_fx.cli.errors import CliError, ExitCode, first_line
from bda_fx.cli.open_model import Opened, Settings, kind_of, open_model
from bda_fx.cli.progress import Stages
from bda_fx.cli.run_command import Result
from bda_fx.cli.show_report import report_table, saved_params
from bda_fx.cli.write_output import Sink
from bda_fx.cli.write_picture import Picture
from bda_fx.exporters.exported import Exported
from bda_fx.exporters.identify_model import identify_model
from bda_fx.exporters.place_output import check_destination, place_output
from bda_fx.exporters.write_evidence import write_evidence
from bda_fx.freed_memory import return_freed_memory
from bda_fx.options import Options
from bda_fx.outcome import on_step

STEPS = 11
"""Steps of the pipeline, with the export: what the bar counts to."""
CALIBRATIONS = 8
"""Batches of text that shares of noise are estimated on: each takes a backward pass."""
PROOFS = 4
"""Inputs that an export is proved on, where there are real ones."""
EXPORTERS = {"onnx": "export_onnx", "tensorrt": "export_tensorrt", "aoti": "export_aoti"}
SUFFIXES = {"onnx": ".onnx", "tensorrt": ".engine", "aoti": ".pt2"}


def inspect_model(
    name: str,
    settings: Settings,
    options: Mapping[str, Any],
    picture: Picture | None = None,
) -> Any:
    """What could be saved in each layer; a :class:`Result` for ``run_command``.

    With a ``picture`` the rewrite is made, too, and one site of it drawn.
    """

    def work(stages: Stages) -> Result:
        if picture is not None:
            picture.check()
        return_freed_memory()
        opened = _open(name, settings, stages)
        with _steps(stages, "inspecting"):
            program = program_of(opened, stages)
            texts = _calibration(opened, settings)
            if picture is None:
                report = bda_fx.analyze(program, options=options, calibration=texts)
            else:
                done = bda_fx.rewrite(program, options=options, calibration=texts)
                report = done.report
                picture.write(program, done)
        data = {"model": name, **report.to_dict(), "could_save_params": saved_params(report)}
        return Result(data, report_table(report))

    return work


def rewrite_model(
    name: str, out: Path, settings: Settings, options: Mapping[str, Any], *, force: bool
) -> Any:
    """Write the rewritten program to ``out``, a ``.pt2`` file; as ONNX, where that is asked for by
    its suffix, or the model is an ONNX file and ``out`` has none. That is proved like any export,
    and like any rewrite it leaves no site out for its speed."""

    def work(stages: Stages) -> Result:
        if out.suffix == ".onnx" or (not out.suffix and kind_of(name) == "onnx"):
            to_onnx = export_model(
                name, "onnx", out.with_suffix(".onnx"), settings, options, force=force,
                arguments={"measure": False},
            )  # fmt: skip
            return cast(Result, to_onnx(stages))
        _check_suffix(out, ".pt2")
        check_destination(out, overwrite=force)
        return_freed_memory()
        opened = _open(name, _with_space(settings, out, force), stages)
        with _steps(stages, "rewriting"):
            program = program_of(opened, stages)
            rewrite = bda_fx.rewrite(
                program, options=options, calibration=_calibration(opened, settings)
            )
        with (
            stages.stage(f"writing {out}"),
            place_output(out, overwrite=force) as staging,
        ):
            with Sink(staging.path) as file:
                torch.export.save(rewrite.program, cast(IO[bytes], file))
            written = Exported(
                path=out,
                files=(out,),
                target="program",
                report=rewrite.report,
                fidelity=None,
                bytes_before=rewrite.report.bytes_before,
                bytes_after=rewrite.report.bytes_after or 0,
                file_bytes=staging.path.stat().st_size,
                fidelity_reason=f"bda-fx verify MODEL {out.name} measures it",
                identity=identify_model(program, Options.of(options), command_line()),
                details={"inputs": open_sizes(rewrite.program)},
            )
            written = write_evidence(written, staging)
        return Result({"model": name, **written.to_dict()}, str(written))

    return work


def export_model(
    name: str,
    target: str,
    out: Path,
    settings: Settings,
    options: Mapping[str, Any],
    *,
    force: bool,
    arguments: Mapping[str, Any],
) -> Any:
    """Write ``out`` with the exporter for ``target``; it proves itself, or leaves no file."""

    def work(stages: Stages) -> Result:
        if target not in EXPORTERS:
            raise CliError(
                f"unknown target {target!r}", f"--to is {', '.join(EXPORTERS)}", ExitCode.USAGE
            )
        _check_suffix(out, SUFFIXES[target])
        check_destination(out, overwrite=force)
        exporter, known = getattr(bda_fx, EXPORTERS[target]), dict(arguments)
        opened = _open(name, _with_space(settings, out, force), stages)
        with _steps(stages, f"exporting to {target}", None):  # how many plans it takes shows later
            program = program_of(opened, stages)
            if target == "onnx" and opened.source is not None:
                known["source"] = opened.source
            exported = exporter(
                program,
                out,
                opened.args,
                opened.kwargs,
                dynamic_shapes=opened.dynamic_shapes,
                options=options,
                overwrite=force,
                inputs=opened.more_inputs(PROOFS) if opened.more_inputs else None,
                calibration=_calibration(opened, settings),
                command=command_line(),
                **known,
            )
        return Result({"model": name, **exported.to_dict()}, str(exported))

    return work


# -- opening ----------------------------------------------------------------------------------


def _open(name: str, settings: Settings, stages: Stages) -> Opened:
    with stages.stage(f"opening {name}"):
        opened = open_model(name, settings)
    for text in opened.notes:
        stages.note(text)
    return opened


def _with_space(settings: Settings, out: Path, force: bool) -> Settings:
    """Settings under which the space for ``out`` is checked, too, once the size is known."""

    def check(weight_bytes: int) -> None:
        settings.check_memory(weight_bytes)
        check_destination(out, overwrite=force, needed=weight_bytes)

    return dataclasses.replace(settings, check_memory=check)


def _check_suffix(out: Path, suffix: str) -> None:
    if out.suffix != suffix:
        raise CliError(
            f"{out} has the wrong suffix", f"name it {out.with_suffix(suffix)}", ExitCode.USAGE
        )


def _calibration(opened: Opened, settings: Settings) -> Calibration | None:
    """Text that the user gave for it. Made-up inputs are left to the planner."""
    if settings.texts is None or opened.more_inputs is None:
        return None
    return [
        (args, kwargs, "attention_mask" if "attention_mask" in kwargs else None)
        for args, kwargs in opened.more_inputs(CALIBRATIONS)
    ]


def program_of(opened: Opened, stages: Stages) -> ExportedProgram:
    """``opened`` as a program, with named open sizes where the model lets them be open.

    Else ``opened.dynamic_shapes`` is None afterwards.

    Raises:
        CliError: the model does not export.
    """
    if isinstance(opened.model, ExportedProgram):
        return opened.model
    try:
        try:
            return _export(opened, opened.dynamic_shapes)
        except torch._dynamo.exc.UserError:
            # A size that was to be open cannot be, or only within limits: the export settles it.
            program = _export(opened, _settled(opened.dynamic_shapes))
            opened.dynamic_shapes = None
            stages.note(f"some sizes are fixed by the model or limited: {open_sizes(program)}")
            return program
    except Exception as error:  # tracing a stranger's model fails in any way
        raise CliError(
            f"{opened.name} does not export: {first_line(error)}",
            "--static exports it for one size; --inputs passes other examples",
            ExitCode.CANNOT_CONVERT,
        ) from error


def command_line() -> str:
    """The command that is being run, for the evidence."""
    return shlex.join(["bda-fx", *sys.argv[1:]])


def _export(opened: Opened, dynamic_shapes: Any) -> ExportedProgram:
    from bda_fx.passes.canonicalize import composite_attention

    assert isinstance(opened.model, nn.Module)
    with composite_attention(), torch.no_grad():
        return torch.export.export(
            opened.model,
            opened.args,
            opened.kwargs,
            dynamic_shapes=dynamic_shapes,
            strict=False,
        )


def _settled(dynamic_shapes: Any) -> Any:
    """Every open axis as ``Dim.AUTO``."""
    if isinstance(dynamic_shapes, dict):
        return {key: _settled(value) for key, value in dynamic_shapes.items()}
    return None if dynamic_shapes is None else torch.export.Dim.AUTO


def open_sizes(program: ExportedProgram) -> dict[str, list[str | int]]:
    """The shape of each tensor input, with open sizes as symbols."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names = program.graph_signature.user_inputs
    tensors = {name: values.get(name) for name in names if isinstance(name, str)}
    return {
        name: [n if isinstance(n, int) else str(n) for n in value.shape]
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor)
    }


@contextlib.contextmanager
def _steps(stages: Stages, name: str, total: int | None = STEPS) -> Iterator[None]:
    """A stage that counts the steps of the pipeline and names them."""
    with stages.stage(name, total) as stage:
        token = on_step.set(stage.advance)
        try:
            yield
        finally:
            on_step.reset(token)
