"""``export_tensorrt``: a model as a smaller TensorRT engine, with the builder's own figures."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.export import ExportedProgram

from bda_fx.api import Calibration
from bda_fx.exporters.build_engine import Engine, Shapes, build_engine, layers_with, load_runtime
from bda_fx.exporters.export_onnx import write_onnx
from bda_fx.exporters.exported import Exported, ExportError
from bda_fx.exporters.identify_model import call_of, identify_model
from bda_fx.exporters.meet_budget import meet_budget
from bda_fx.exporters.place_output import check_destination, place_output
from bda_fx.exporters.prove import prove
from bda_fx.exporters.rewrite_pair import Pair, require, rewrite_pair
from bda_fx.exporters.write_evidence import write_evidence
from bda_fx.fidelity_report import Fidelity
from bda_fx.generate_inputs import Inputs
from bda_fx.options import Options

OPSET = 20
"""Before ``Attention`` was an op: TensorRT recognises attention spelled out and fuses it, but has
no kernel for the op itself in every dtype and refuses it in float32."""

SURVIVES = 0.95
"""Part of the report's saving that the engine's weight memory must show."""

PADDING = 512
"""Bytes by which TensorRT may pad a weight, at most: its rows and its place are aligned."""

STRETCH = 8
"""An axis without an upper end is built for sizes up to so many times the example's."""


def export_tensorrt(
    model_or_program: nn.Module | ExportedProgram | Pair,
    path: str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | Mapping[str, Any] | None = None,
    profiles: Mapping[str, Shapes] | None = None,
    runtime: str = "rtx",
    capabilities: Sequence[str] = (),
    opset: int = OPSET,
    overwrite: bool = False,
    check: bool = True,
    compare: bool = True,
    inputs: Sequence[Inputs] | None = None,
    budget: float | None = None,
    calibration: Calibration | None = None,
    command: str | None = None,
) -> Exported:
    """Rewrite a model and build a TensorRT engine of it, strongly typed, for a range of shapes.

    Beside ``model.engine`` lie ``model.engine.layers.json`` (every layer and the ONNX nodes in it)
    and the evidence, as for :func:`bda_fx.export_onnx`.

    Args:
        model_or_program, args, kwargs, dynamic_shapes, options, calibration, overwrite, command:
            as in ``export_onnx``.
        profiles: for each input its smallest, best and largest shape. By default the range that
            each open axis has in the program, with the example as the best; an open end is eight
            times the example.
        runtime: "rtx" (TensorRT-RTX: builds on any machine, runs on RTX GPUs from Ampere on) or
            "tensorrt" (builds for, and on, the GPU of this machine).
        capabilities: with "rtx", GPUs to build for, such as "SM89"; none is all.
        opset: of the ONNX model that the engine is built from.
        check: prove that model in ONNX Runtime, as ``export_onnx`` does. Engines themselves run on
            GPUs alone. Models in bfloat16 are not checked: ONNX Runtime cannot run them.
        compare: build the original too, and require that the engine's own weight memory is smaller
            by what the report says.
        inputs, budget: of the check.

    Raises:
        ExportError: as ``export_onnx``; TensorRT refuses the model; the saving did not survive.

    Cost: a build takes seconds to minutes.
    """
    load_runtime(runtime, capabilities)
    require("onnxscript", "'bda-fx[onnx]'", "export_tensorrt")
    from bda_fx.exporters.spell_sums import basis_sums

    with place_output(path, overwrite=overwrite) as staging:
        pair = rewrite_pair(model_or_program, args, kwargs, dynamic_shapes, options, calibration)
        needed = 4 * (pair.report.bytes_before or 0)
        check_destination(staging.destination, overwrite=overwrite, needed=needed)
        shapes = {**default_profiles(pair.original), **(profiles or {})}
        original, rewritten = (staging.scratch / f"{name}.onnx" for name in ("before", "after"))
        write_onnx(pair.original, original, dynamic_shapes, opset, None, broadcast=True)
        fidelity: Fidelity | None = None
        proof: dict[str, Any] = {}
        sums: list[str] = []

        def write(pair: Pair) -> None:
            nonlocal sums
            sums = basis_sums(
                write_onnx(pair.rewritten, rewritten, dynamic_shapes, opset, None, broadcast=True)
            )

        reason = _no_proof(pair) if check else "check=False"
        if reason is None:
            require("onnxruntime", "'bda-fx[onnx]'", "export_tensorrt(check=True)")
            from bda_fx.exporters.run_onnx import Session

            runner = Session(original, pair.original)
            batches, made = pair.inputs(inputs)

            def attempt(pair: Pair, limit: float) -> Fidelity:
                write(pair)
                after = Session(rewritten, pair.original)
                return prove(pair.original, runner, after, batches, made=made, budget=limit)

            pair, fidelity, way = meet_budget(pair, attempt, budget, calibration)
            proof["proof"] = way
        else:
            write(pair)
        after = build_engine(rewritten, shapes, runtime, capabilities)
        before = build_engine(original, shapes, runtime, capabilities) if compare else None
        if before is not None:
            _require_saving(pair, before, after)
        staging.path.write_bytes(after.plan)
        listing = staging.directory / f"{staging.destination.name}.layers.json"
        listing.write_text(json.dumps(_listing(before, after), indent=1) + "\n")
        if command is None:
            command = call_of(
                "export_tensorrt", staging.destination.name, pair.options,
                profiles=dict(profiles) if profiles else None, runtime=runtime,
                budget=budget,
            )  # fmt: skip
        distributions = ("onnx", "onnxscript", "onnxruntime", "tensorrt-rtx-cu12-bindings")
        result = Exported(
            path=staging.destination,
            files=tuple(staging.files()),
            target="tensorrt",
            report=pair.report,
            fidelity=fidelity,
            fidelity_reason=reason,
            bytes_before=None if before is None else before.weight_bytes,
            bytes_after=after.weight_bytes,
            file_bytes=len(after.plan),
            identity=identify_model(pair.original, pair.options, command, distributions),
            details=proof | _details(before, after, shapes, runtime, sums),
        )
        return write_evidence(result, staging)


def default_profiles(program: ExportedProgram) -> dict[str, Shapes]:
    """Smallest, best and largest shape of every tensor input, from the program's own ranges."""
    from bda_fx.exporters.translate_onnx import user_inputs

    found: dict[str, Shapes] = {}
    for node in user_inputs(program):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            ends = [_range(program, size) for size in value.shape]
            low, best, high = zip(*ends, strict=True) if ends else ((), (), ())
            found[node.name] = (low, best, high)
    return found


def _range(program: ExportedProgram, size: Any) -> tuple[int, int, int]:
    if not isinstance(size, SymInt):
        return int(size), int(size), int(size)
    example = int(size.node.hint)
    ends = program.range_constraints.get(size.node.expr)
    if ends is None:
        return example, example, STRETCH * example
    low = max(1, int(ends.lower))
    # Compared, not converted: an open range ends in one of several infinities.
    high = int(ends.upper) if ends.upper < 2**31 else STRETCH * example
    return min(low, example), example, max(high, example)


def _no_proof(pair: Pair) -> str | None:
    """Why the ONNX model cannot be proved here, if it cannot."""
    values = (v for v in pair.original.state_dict.values() if isinstance(v, Tensor))
    if any(value.dtype == torch.bfloat16 for value in values):
        return "ONNX Runtime does not run bfloat16, and engines run on GPUs alone"
    return None


def _require_saving(pair: Pair, before: Engine, after: Engine) -> None:
    promised = (pair.report.bytes_before or 0) - (pair.report.bytes_after or 0)
    saved = before.weight_bytes - after.weight_bytes
    padding = PADDING * len(pair.report.rewritten)
    if pair.report.rewritten and saved + padding < SURVIVES * promised:
        raise ExportError(
            f"TensorRT undoes the rewrite: of {promised:,} bytes saved {saved:,} are left in the "
            "engine's weight memory; please report this, or pass compare=False"
        )


def _details(
    before: Engine | None,
    after: Engine,
    shapes: Mapping[str, Shapes],
    runtime: str,
    sums: Sequence[str],
) -> dict[str, Any]:
    both = {"original": before, "rewritten": after}
    built = {name: engine for name, engine in both.items() if engine is not None}
    return {
        "runtime": f"{runtime} {after.version}",
        "profiles": {name: str(ends) for name, ends in shapes.items()},
        "engine_bytes": {name: len(engine.plan) for name, engine in built.items()},
        "build_seconds": {name: round(engine.seconds, 1) for name, engine in built.items()},
        "layers": {n: dict(Counter(x.kind for x in e.layers)) for n, e in built.items()},
        "basis_sums": len(sums),
        "basis_sums_by_layer": layers_with(after.layers, sums),
        "fidelity_of": "the ONNX model that the engine is built from, in ONNX Runtime",
    }


def _listing(before: Engine | None, after: Engine) -> dict[str, Any]:
    engines = {"rewritten": after} if before is None else {"original": before, "rewritten": after}
    return {
        name: [
            {"name": layer.name, "type": layer.kind, "onnx": list(layer.origins)}
            for layer in engine.layers
        ]
        for name, engine in engines.items()
    }
