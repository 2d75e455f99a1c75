"""``export_onnx``: a model as a smaller ONNX file, proved and timed in ONNX Runtime."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from bda_fx.api import Calibration
from bda_fx.exporters.exported import Exported, ExportError, Timing, root_cause
from bda_fx.exporters.identify_model import call_of, identify_model
from bda_fx.exporters.meet_budget import meet_budget
from bda_fx.exporters.place_output import check_destination, place_output
from bda_fx.exporters.prove import prove
from bda_fx.exporters.rewrite_pair import Pair, require, rewrite_pair
from bda_fx.exporters.time_pairs import time_pairs
from bda_fx.exporters.write_evidence import write_evidence
from bda_fx.fidelity_report import Fidelity
from bda_fx.generate_inputs import Inputs
from bda_fx.options import Options
from bda_fx.report import Report

if TYPE_CHECKING:
    import onnx_ir as ir

    from bda_fx.exporters.run_onnx import Session
    from bda_fx.exporters.source_onnx import Source

EXTERNAL_FROM = 2**31 - 2**26
"""Bytes of weights from which on they go into a file of their own: protobuf ends at 2 GiB, and the
graph needs room too."""


def export_onnx(
    model_or_program: nn.Module | ExportedProgram | Pair | str | os.PathLike[str],
    path: str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | Mapping[str, Any] | None = None,
    opset: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    inputs: Sequence[Inputs] | None = None,
    budget: float | None = None,
    measure: bool = True,
    keep_slower: bool | None = None,
    calibration: Calibration | None = None,
    external_data: bool | None = None,
    threads: int = 0,
    command: str | None = None,
    source: str | os.PathLike[str] | None = None,
) -> Exported:
    """Rewrite a model and write it as ONNX, with the proof that it is the same model beside it.

    The file holds standard ops alone and runs wherever ONNX does. Beside ``model.onnx`` lie
    ``model.onnx.bda.json`` and ``model.onnx.bda.md``: identity, sizes, noise, latency, sites.

    Args:
        model_or_program: a module in ``eval()``, a program, what ``rewrite_pair`` made of one, or
            an ONNX file, which ``import_onnx`` reads.
        path: where to write; external data is put beside it as ``<name>.data``.
        args, kwargs: example inputs for a module.
        dynamic_shapes: as in ``torch.export.export``; names of ``Dim`` become names of axes.
        options: of the rewrite. A basis left "auto" is "slices": ONNX Runtime gathers along the
            last axis element by element, which costs more than the smaller product saves.
        opset: the operator set, by default 23; of an ONNX file that is rewritten its own, from 18
            on.
        overwrite: replace existing files.
        check: check the model, load it at every optimisation level of ONNX Runtime, and compare it
            there with the original (``prove``).
        inputs: what to compare on, each (args, kwargs). By default the example and inputs made
            from the signature, with open axes drawn from their ranges.
        budget: largest noise ratio that passes; by default the ``noise_budget`` of the options.
            Where the first plan does not hold it in ONNX Runtime, smaller bases are planned
            (``meet_budget``); a basis size that the options fix stays, and has to be within 4.0.
        measure: time original and rewritten model in ONNX Runtime.
        keep_slower: whether a site that is slower in its new form is rewritten all the same.
            By default it is not, if ``measure`` and ``check`` are set: single sites are timed too,
            and while the whole model is slower than it was, the slowest half of its sites goes.
        calibration: as in ``bda_fx.rewrite``.
        external_data: whether weights go into a file of their own; by default from 2 GB on.
        threads: of ONNX Runtime, for what is measured; 0 is all cores.
        command: how the user called this, for the evidence.
        source: the ONNX file that a program was read from. Names of inputs and axes are then as
            they are there, and the original of proof and timings is that file itself; a program
            that is not the same model is refused.

    Raises:
        ExportError: a package is missing, the output cannot be written, the model does not
            translate or load, or the proof failed. Nothing is left behind.
        ValueError, TypeError: as ``bda_fx.rewrite``.

    Cost: the rewrite, two translations (twice the weights on disk for a while) and, with ``check``,
    two runs in float64 for each input.
    """
    require("onnx", "'bda-fx[onnx]'", "export_onnx")
    require("onnxscript", "'bda-fx[onnx]'", "export_onnx")
    if check:
        require("onnxruntime", "'bda-fx[onnx]'", "export_onnx(check=True)")
    with place_output(path, overwrite=overwrite) as staging:
        if isinstance(model_or_program, str | os.PathLike):
            from bda_fx.importers.import_onnx import import_onnx

            source = model_or_program
            model_or_program = import_onnx(source)
        pair = rewrite_pair(model_or_program, args, kwargs, dynamic_shapes, options, calibration)
        names: dict[str, str] = {}
        given: Source | None = None
        if source is not None:
            from bda_fx.exporters.source_onnx import prove_source, read_source

            given = read_source(Path(source), pair.original)
            names, dynamic_shapes, opset = given.names, given.axes, opset or given.opset
        needed = 2 * (pair.report.bytes_before or 0)
        check_destination(staging.destination, overwrite=overwrite, needed=needed)
        original = staging.scratch / "original.onnx"
        write_onnx(pair.original, original, dynamic_shapes, opset, external_data, input_names=names)
        sites: dict[str, Timing] = {}
        details: dict[str, Any] = {}
        fidelity: Fidelity | None = None
        timings: tuple[Timing, ...] = ()
        identity: dict[str, Any] = {}
        chooses = keep_slower is None and check and measure

        def settle(pair: Pair) -> Pair:
            if chooses:
                return _without_slower(pair, calibration, threads, sites)
            return pair

        def write(pair: Pair, limit: float | None) -> None:
            """Write the rewritten model."""
            nonlocal identity
            call = command or call_of(
                "export_onnx", staging.destination.name, pair.options, opset=opset, budget=limit
            )
            packages = ("onnx", "onnxscript", "onnxruntime")
            identity = identify_model(pair.original, pair.options, call, packages)
            metadata = {
                "bda_fx.identity": json.dumps(identity, default=str),
                "bda_fx.report": json.dumps(pair.report.to_dict(), default=str),
                "bda_fx.summary": pair.report.summary(),
            }
            model = write_onnx(
                pair.rewritten, staging.path, dynamic_shapes, opset, external_data, metadata,
                input_names=names,
            )  # fmt: skip
            details["opset"] = model.opset_imports[""]

        if check:
            from bda_fx.exporters.check_onnx import check_onnx
            from bda_fx.exporters.run_onnx import Session

            batches, made = pair.inputs(inputs)
            before = reference = Session(original, pair.original, threads=threads, names=names)
            if given is not None:
                reference = Session(given.path, pair.original, threads=threads, names=names)
                same = prove_source(given, pair.original, reference, before, batches, made=made)
                details["source"] = {**given.to_dict(), "noise_of_reading": same.noise_ratio}

            def attempt(pair: Pair, limit: float) -> Fidelity:
                write(pair, limit)
                after = Session(staging.path, pair.original, threads=threads, names=names)
                return prove(pair.original, reference, after, batches, made=made, budget=limit)

            while True:
                pair, fidelity, way = meet_budget(pair, attempt, budget, calibration, settle)
                if measure:
                    after = Session(staging.path, pair.original, threads=threads, names=names)
                    timings = _time(before, after, batches[:2])
                if not (chooses and pair.report.rewritten and any(map(is_slower, timings))):
                    break
                pair = pair.without(_slowest_half(pair.report, sites), calibration)
            if measure and reference is not before:
                timings = _time(reference, after, batches[:2])
            details |= {"proof": way, **check_onnx(pair, original, staging)}
        else:
            write(pair, budget)
        from bda_fx.exporters.measure_onnx import weight_bytes

        files = staging.files()
        result = Exported(
            path=staging.destination,
            files=tuple(files),
            target="onnx",
            report=pair.report,
            fidelity=fidelity,
            fidelity_reason=None if check else "check=False",
            bytes_before=weight_bytes(original if given is None else given.path),
            bytes_after=weight_bytes(staging.path),
            file_bytes=sum((staging.directory / file.name).stat().st_size for file in files),
            timings=timings,
            site_timings=tuple(sites.values()),
            identity=identity,
            details=details,
        )
        return write_evidence(result, staging)


def write_onnx(
    program: ExportedProgram,
    path: Path,
    dynamic_shapes: Any,
    opset: int | None,
    external_data: bool | None,
    metadata: Mapping[str, str] | None = None,
    broadcast: bool = False,
    input_names: Mapping[str, str] | None = None,
) -> ir.Model:
    """Translate ``program``, save it and return it.

    ``broadcast`` keeps the broadcast sums of the rewritten form (see ``spell_sums``).
    ``input_names``: name in the file → input of the program, where they differ.

    Raises:
        ExportError: an op has no translation; with the translator's reason.
    """
    import onnx_ir as ir

    from bda_fx.exporters.spell_sums import spell_sums
    from bda_fx.exporters.translate_onnx import drop_notes, rename_inputs, translate_onnx

    try:
        model = translate_onnx(program, dynamic_shapes, opset)
    except Exception as error:  # the translator wraps whatever a node's function raises
        raise ExportError(
            f"torch.onnx does not translate the program: {root_cause(error)}; "
            "torch.onnx.export(program, report=True) shows where"
        ) from error
    if not broadcast:
        model = spell_sums(model)
    drop_notes(model)
    rename_inputs(model, input_names or {})
    model.metadata_props.update(metadata or {})
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)  # of an earlier attempt
    large = _bytes(model) > EXTERNAL_FROM if external_data is None else external_data
    ir.save(model, path, external_data=f"{path.name}.data" if large else None)
    return model


def _bytes(model: ir.Model) -> int:
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def _without_slower(
    pair: Pair,
    calibration: Calibration | None,
    threads: int,
    every: dict[str, Timing],
) -> Pair:
    """Leave out sites that are slower in their new form, until none is left; all timings go into
    ``every``."""
    from bda_fx.exporters.time_sites import slower, time_sites

    while True:
        timings = time_sites(pair.original, pair.report, threads)
        every |= {timing.name: timing for timing in timings}
        left_out = slower(pair.report, timings)
        if not left_out:
            return pair
        pair = pair.without(left_out, calibration)


def is_slower(timing: Timing) -> bool:
    """Whether the rewritten model is slower, with the confidence of the interval."""
    return timing.interval[1] < 1.0


def _slowest_half(report: Report, timings: Mapping[str, Timing]) -> list[str]:
    """Weights of the half of all sites that gained least by themselves; at least one."""
    speed: dict[str, float] = {}
    for site in report.rewritten:
        timing = timings.get(f"{site.name} ({site.product})")
        gained = 1.0 if timing is None else timing.speedup
        speed[site.name] = min(gained, speed.get(site.name, gained))
    return sorted(speed, key=speed.__getitem__)[: (len(speed) + 1) // 2]


def _time(before: Session, after: Session, batches: Sequence[Inputs]) -> tuple[Timing, ...]:
    timings = []
    for batch in batches:
        feeds = before.feeds(batch)
        name = ", ".join(f"{key} {list(value.shape)}" for key, value in feeds.items())
        timings.append(time_pairs(name, lambda: before.run(feeds), lambda: after.run(feeds)))  # noqa: B023
    return tuple(timings)
