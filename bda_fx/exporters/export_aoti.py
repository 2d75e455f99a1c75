"""``export_aoti``: a model as a smaller AOTInductor package, which runs from C++ without Python."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bda_fx.api import Calibration
from bda_fx.assemble_program import constant_bytes
from bda_fx.exporters.exported import Exported, ExportError, Timing, root_cause
from bda_fx.exporters.identify_model import call_of, identify_model
from bda_fx.exporters.meet_budget import meet_budget
from bda_fx.exporters.place_output import check_destination, place_output
from bda_fx.exporters.prove import Run, prove
from bda_fx.exporters.rewrite_pair import Pair, rewrite_pair
from bda_fx.exporters.time_pairs import time_pairs
from bda_fx.exporters.write_evidence import write_evidence
from bda_fx.fidelity_report import Fidelity
from bda_fx.generate_inputs import Inputs
from bda_fx.options import Options


def export_aoti(
    model_or_program: nn.Module | ExportedProgram | Pair,
    path: str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    options: Options | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    check: bool = True,
    inputs: Sequence[Inputs] | None = None,
    budget: float | None = None,
    measure: bool = True,
    calibration: Calibration | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Exported:
    """Rewrite a model and compile it ahead of time into a ``.pt2`` package.

    The package holds machine code and weights in plain ATen: it runs in C++ with libtorch alone
    (``examples/run_in_cpp``), and in Python without bda_fx (``torch._inductor.aoti_load_package``).

    Args:
        model_or_program, args, kwargs, dynamic_shapes, options, calibration, overwrite, command:
            as in ``export_onnx``.
        path: its name ends with ``.pt2``.
        check: load the package and compare it with the original (``prove``).
        inputs, budget: of the check.
        measure: compile the original too, for its time, its size and its own noise as compiled.
            Without, the noise of the eager original is the yardstick.
        inductor_configs: of ``torch._inductor.aoti_compile_and_package``.

    Raises:
        ExportError: the output cannot be written, there is no C++ compiler, Inductor fails, or the
            proof failed. Nothing is left behind.
        ValueError, TypeError: as ``bda_fx.rewrite``.

    Cost: one compilation, or two with ``measure``, of a minute or so each.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"{path}: the name of a package ends with .pt2")
    with place_output(path, overwrite=overwrite) as staging:
        pair = rewrite_pair(model_or_program, args, kwargs, dynamic_shapes, options, calibration)
        needed = 2 * (pair.report.bytes_before or 0)
        check_destination(staging.destination, overwrite=overwrite, needed=needed)
        settings = dict(inductor_configs or {})
        original: Path | None = None
        if measure:
            original = staging.scratch / "original.pt2"
            compile_package(pair.original, original, settings)
        fidelity: Fidelity | None = None
        proof: dict[str, Any] = {}
        timings: tuple[Timing, ...] = ()
        batches, made = pair.inputs(inputs) if check or measure else ([], False)
        if check:
            before = _runner(original, pair)

            def attempt(pair: Pair, limit: float) -> Fidelity:
                staging.path.unlink(missing_ok=True)
                compile_package(pair.rewritten, staging.path, settings)
                after = package_runner(staging.path, pair.original)
                return prove(pair.original, before, after, batches, made=made, budget=limit)

            pair, fidelity, proof["proof"] = meet_budget(pair, attempt, budget, calibration)
        else:
            compile_package(pair.rewritten, staging.path, settings)
        if measure:
            after = package_runner(staging.path, pair.original)
            timings = _time(_runner(original, pair), after, batches[:2])
        if command is None:
            command = call_of("export_aoti", staging.destination.name, pair.options, budget=budget)
        files = staging.files()
        package_bytes = {"rewritten": staging.path.stat().st_size}
        if original is not None:
            package_bytes["original"] = original.stat().st_size
        result = Exported(
            path=staging.destination,
            files=tuple(files),
            target="aoti",
            report=pair.report,
            fidelity=fidelity,
            fidelity_reason=None if check else "check=False",
            bytes_before=constant_bytes(pair.original),
            bytes_after=constant_bytes(pair.rewritten),
            file_bytes=sum((staging.directory / file.name).stat().st_size for file in files),
            timings=timings,
            identity=identify_model(pair.original, pair.options, command),
            details=proof
            | {
                "package_bytes": package_bytes,
                "device": device_of(pair.original),
                "yardstick": "the original compiled alike" if measure else "the original in eager",
            },
        )
        return write_evidence(result, staging)


def compile_package(program: ExportedProgram, path: Path, settings: Mapping[str, Any]) -> None:
    """Compile ``program`` into the package ``path``.

    Raises:
        ExportError: with the compiler's or Inductor's reason.
    """
    try:
        with torch.no_grad(), _own_copy(program) as own:
            torch._inductor.aoti_compile_and_package(
                own, package_path=str(path), inductor_configs=dict(settings)
            )
    except (OSError, KeyboardInterrupt):
        raise
    except Exception as error:  # a C++ compiler, Triton and Inductor, each with errors of its own
        raise ExportError(
            f"AOTInductor does not compile the program: {root_cause(error)}; it needs a C++ "
            "compiler (CXX), and Triton for a GPU"
        ) from error


def package_runner(path: Path, program: ExportedProgram) -> Run:
    """Runs a package on the inputs of the program that it was made of; flat tensor outputs."""
    loaded = torch._inductor.aoti_load_package(str(path))

    def run(inputs: Inputs) -> list[Tensor]:
        args, kwargs = pytree.tree_map(_copied, inputs)
        with torch.no_grad():
            return _tensors(loaded(*args, **kwargs))

    return run


def _runner(original: Path | None, pair: Pair) -> Run:
    if original is None:
        return eager_runner(pair.original)
    return package_runner(original, pair.original)


def eager_runner(program: ExportedProgram) -> Run:
    module = program.module()

    def run(inputs: Inputs) -> list[Tensor]:
        args, kwargs = pytree.tree_map(_copied, inputs)
        with torch.no_grad():
            return _tensors(module(*args, **kwargs))

    return run


def device_of(program: ExportedProgram) -> str:
    devices = {v.device.type for v in program.state_dict.values() if isinstance(v, Tensor)}
    return ", ".join(sorted(devices)) or "cpu"


def _time(before: Run, after: Run, batches: Sequence[Inputs]) -> tuple[Timing, ...]:
    found = []
    for batch in batches:
        shapes = [list(v.shape) for v in pytree.tree_leaves(batch) if isinstance(v, Tensor)]
        name = ", ".join(map(str, shapes))
        found.append(time_pairs(name, lambda: before(batch), lambda: after(batch)))  # noqa: B023
    return tuple(found)


def _tensors(results: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(results) if isinstance(value, Tensor)]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


@contextlib.contextmanager
def _own_copy(program: ExportedProgram) -> Iterator[ExportedProgram]:
    """Inductor lowers the graph that it is given; the caller's stays as it is."""
    from bda_fx.passes.canonicalize import _copied as copied_program

    yield copied_program(program)
