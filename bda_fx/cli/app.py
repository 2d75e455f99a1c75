"""The commands of ``bda-fx`` and their options; what they do is in the modules beside this one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

import bda_fx
from bda_fx.cli.errors import MEANINGS, CliError, ExitCode, Terminated
from bda_fx.cli.options import (
    MODEL_HELP,
    AsDtype,
    AsJson,
    Batch,
    Budget,
    Cache,
    Calibration,
    Compiler,
    DrawnSite,
    Dtype,
    Dynamic,
    ExportBudget,
    Force,
    GraphFile,
    InputFile,
    KvCache,
    Length,
    ModelName,
    NoMemoryCheck,
    ProofBudget,
    Quiet,
    Side,
    Target,
    Task,
    Unsafe,
    Weights,
    WhichSide,
)
from bda_fx.cli.run_command import TRACEBACK, Output, run_command

EXIT_CODES = "Exit codes: " + "; ".join(f"{int(code)} {text}" for code, text in MEANINGS.items())

app = typer.Typer(
    name="bda-fx",
    help="Smaller attention without loss: inspect, rewrite, export, verify and time models.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"bda-fx {bda_fx.__version__}")
        raise typer.Exit()


@app.callback()
def common(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose, and all warnings.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and leave.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    if traceback:
        os.environ[TRACEBACK] = "1"


@app.command(epilog=EXIT_CODES)
def inspect(
    model: ModelName,
    task: Task = None,
    dtype: AsDtype = Dtype.auto,
    dynamic: Dynamic = True,
    kv_cache: KvCache = Cache.none,
    noise_budget: Budget = None,
    side: WhichSide = Side.auto,
    calibration: Calibration = None,
    inputs: InputFile = None,
    weights: Weights = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Read no weights: sizes from the config alone.")
    ] = False,
    batch: Batch = 2,
    length: Length = 32,
    graph: GraphFile = None,
    site: DrawnSite = None,
    unsafe: Unsafe = False,
    no_memory_check: NoMemoryCheck = False,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what could be saved in each attention, and why not elsewhere. Changes nothing.

    A config.json alone will do: sizes are then found on the meta device.
    """
    if site is not None and graph is None:
        raise typer.BadParameter("--site says what --graph draws: give that too")

    def work(stages: Any) -> Any:
        from bda_fx.cli.convert_model import inspect_model
        from bda_fx.cli.write_picture import Picture

        settings = _settings(
            task=task, dtype=dtype, dynamic=dynamic, kv_cache=kv_cache, calibration=calibration,
            inputs=inputs, weights=weights, batch=batch, length=length, unsafe=unsafe,
            no_memory_check=no_memory_check, config_only=config_only,
        )  # fmt: skip
        options = _options(noise_budget, kv_cache, side)
        picture = None if graph is None else Picture(graph, site, force)
        return inspect_model(model, settings, options, picture)(stages)

    run_command(work, Output(json, quiet))


@app.command(epilog=EXIT_CODES)
def rewrite(
    model: ModelName,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .pt2 or .onnx file to write.")],
    task: Task = None,
    dtype: AsDtype = Dtype.auto,
    dynamic: Dynamic = True,
    kv_cache: KvCache = Cache.none,
    noise_budget: Budget = None,
    side: WhichSide = Side.auto,
    calibration: Calibration = None,
    inputs: InputFile = None,
    weights: Weights = None,
    batch: Batch = 2,
    length: Length = 32,
    unsafe: Unsafe = False,
    no_memory_check: NoMemoryCheck = False,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the rewritten model as an ExportedProgram, which loads without bda_fx, or as ONNX,
    which is proved in ONNX Runtime against the original."""

    def work(stages: Any) -> Any:
        from bda_fx.cli.convert_model import rewrite_model

        settings = _settings(
            task=task, dtype=dtype, dynamic=dynamic, kv_cache=kv_cache, calibration=calibration,
            inputs=inputs, weights=weights, batch=batch, length=length, unsafe=unsafe,
            no_memory_check=no_memory_check,
        )  # fmt: skip
        options = _options(noise_budget, kv_cache, side)
        return rewrite_model(model, out, settings, options, force=force)(stages)

    run_command(work, Output(json, quiet))


@app.command(epilog=EXIT_CODES)
def export(
    model: ModelName,
    to: Annotated[Target, typer.Option("--to", help="What to write.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    task: Task = None,
    dtype: AsDtype = Dtype.auto,
    dynamic: Dynamic = True,
    kv_cache: KvCache = Cache.none,
    noise_budget: Budget = None,
    side: WhichSide = Side.auto,
    calibration: Calibration = None,
    inputs: InputFile = None,
    weights: Weights = None,
    budget: ExportBudget = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="Time it against the original in its runtime, or not."
        ),
    ] = True,
    opset: Annotated[
        int | None, typer.Option(help="ONNX operator set [default: a current one].")
    ] = None,
    batch: Batch = 2,
    length: Length = 32,
    unsafe: Unsafe = False,
    no_memory_check: NoMemoryCheck = False,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the rewritten model for another runtime, with proof that it is the same model."""

    def work(stages: Any) -> Any:
        from bda_fx.cli.convert_model import export_model

        settings = _settings(
            task=task, dtype=dtype, dynamic=dynamic, kv_cache=kv_cache, calibration=calibration,
            inputs=inputs, weights=weights, batch=batch, length=length, unsafe=unsafe,
            no_memory_check=no_memory_check,
        )  # fmt: skip
        options = _options(noise_budget, kv_cache, side)
        arguments: dict[str, Any] = {} if budget is None else {"budget": budget}
        if to is not Target.tensorrt:
            arguments["measure"] = measure
        if opset is not None:
            if to is Target.aoti:
                raise CliError("--opset does not apply to aoti", "leave it out", ExitCode.USAGE)
            arguments["opset"] = opset
        return export_model(model, to, out, settings, options, force=force, arguments=arguments)(
            stages
        )

    run_command(work, Output(json, quiet))


@app.command(epilog=EXIT_CODES)
def verify(
    reference: Annotated[str, typer.Argument(metavar="A", help=f"The reference. {MODEL_HELP}")],
    candidate: Annotated[str, typer.Argument(metavar="B", help="What should equal it.")],
    budget: ProofBudget = 4.0,
    task: Task = None,
    dtype: AsDtype = Dtype.auto,
    calibration: Calibration = None,
    inputs: InputFile = None,
    weights: Weights = None,
    count: Annotated[int, typer.Option(min=1, help="Inputs to compare on.")] = 4,
    batch: Batch = 2,
    length: Length = 32,
    unsafe: Unsafe = False,
    no_memory_check: NoMemoryCheck = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare two models: any two of Hugging Face directory, .pt2 file, ONNX file, factory.

    Errors are measured against a float64 run of A. Exit code 1 if B is beyond the budget.
    """

    def work(stages: Any) -> Any:
        from bda_fx.cli.verify_models import verify_models

        settings = _settings(
            task=task, dtype=dtype, dynamic=True, kv_cache=Cache.none, calibration=calibration,
            inputs=inputs, weights=weights, batch=batch, length=length, unsafe=unsafe,
            no_memory_check=no_memory_check,
        )  # fmt: skip
        return verify_models(reference, candidate, settings, budget, count)(stages)

    run_command(work, Output(json, quiet))


@app.command(epilog=EXIT_CODES)
def bench(
    model: ModelName,
    compiler: Annotated[Compiler, typer.Option(help="What runs both models.")] = Compiler.inductor,
    rounds: Annotated[int, typer.Option(min=3, help="Pairs of timed runs.")] = 20,
    task: Task = None,
    dtype: AsDtype = Dtype.auto,
    noise_budget: Budget = None,
    side: WhichSide = Side.auto,
    inputs: InputFile = None,
    weights: Weights = None,
    batch: Batch = 2,
    length: Length = 128,
    unsafe: Unsafe = False,
    no_memory_check: NoMemoryCheck = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time the rewritten model against the original, in interleaved pairs under one compiler."""

    def work(stages: Any) -> Any:
        from bda_fx.cli.bench_model import bench_model

        settings = _settings(
            task=task, dtype=dtype, dynamic=False, kv_cache=Cache.none, calibration=None,
            inputs=inputs, weights=weights, batch=batch, length=length, unsafe=unsafe,
            no_memory_check=no_memory_check,
        )  # fmt: skip
        options = _options(noise_budget, Cache.none, side)
        return bench_model(model, settings, options, str(compiler), rounds)(stages)

    run_command(work, Output(json, quiet))


@app.command(epilog=EXIT_CODES)
def doctor(json: AsJson = False) -> None:
    """Show versions, compilers and accelerators, which exporters work, and what others need."""

    def work(stages: Any) -> Any:
        from bda_fx.cli.doctor import examine

        with stages.stage("looking around"):
            return examine()

    run_command(work, Output(json))


def _settings(
    *,
    calibration: Path | None,
    no_memory_check: bool,
    dtype: Dtype,
    kv_cache: Cache,
    **others: Any,
) -> Any:
    from bda_fx.cli.foresee_memory import check_memory
    from bda_fx.cli.open_model import Settings

    return Settings(
        texts=None if calibration is None else _lines(calibration),
        check_memory=lambda weight_bytes: check_memory(weight_bytes, ignore=no_memory_check),
        dtype=str(dtype),
        kv_cache=str(kv_cache),
        **others,
    )


def _lines(path: Path) -> tuple[str, ...]:
    """Lines of a text file that are not empty."""
    remedy = "pass a UTF-8 text file with a text on each line"
    try:
        lines = tuple(line for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(
            f"--calibration {path} cannot be read: {error}", remedy, ExitCode.CANNOT_OPEN
        ) from error
    if not lines:
        raise CliError(f"--calibration {path} holds no text", remedy, ExitCode.USAGE)
    return lines


def _options(noise_budget: float | None, kv_cache: Cache, side: Side) -> dict[str, Any]:
    options: dict[str, Any] = {"side": str(side)}
    if noise_budget is not None:
        options["noise_budget"] = noise_budget
    if kv_cache is Cache.opaque:
        options["kv_cache"] = "opaque"
    return options


def main() -> None:
    """The entry point: ``bda-fx``."""

    def terminate(*_: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    app()
