"""``bench``: the rewritten model against the original, in pairs of runs in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

import bda_fx
from bda_fx.cli.convert_model import program_of
from bda_fx.cli.open_model import Settings, open_model
from bda_fx.cli.progress import Stages
from bda_fx.cli.run_command import Result
from bda_fx.generate_inputs import generate_inputs

LEAST_SECONDS = 0.02
"""A timed run repeats a call until it takes at least so long: clocks and schedulers jitter."""


def bench_model(
    name: str, settings: Settings, options: Mapping[str, Any], compiler: str, rounds: int
) -> Any:
    """The ratio of medians of ``rounds`` pairs of runs on the example input."""

    def work(stages: Stages) -> Result:
        with stages.stage(f"opening {name}"):
            opened = open_model(name, settings)
            program = program_of(opened, stages)
            args, kwargs = opened.args, opened.kwargs
            if not (args or kwargs):
                args, kwargs = generate_inputs(program, 1)[0]
                stages.note(
                    "sizes are made up from the program's signature: pass yours with --inputs"
                )
        with stages.stage("rewriting"):
            rewrite = bda_fx.rewrite(program, options=options)
        with stages.stage(f"compiling with {compiler}"), torch.no_grad():
            runs = [_compiled(p, compiler) for p in (program, rewrite.program)]
            for run in runs:
                run(*args, **kwargs)
        with torch.no_grad():
            times = _time(stages, runs, args, kwargs, rounds)
        ratios = [original / new for original, new in times]
        original, new = (statistics.median(column) for column in zip(*times, strict=True))
        low, high = _interval(ratios)
        data = {
            "model": name,
            "compiler": compiler,
            "device": _device(rewrite.program),
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "seconds_original": original,
            "seconds_rewritten": new,
            "speed": original / new,
            "speed_interval": [low, high],
            "report": rewrite.report.to_dict(),
        }
        text = (
            f"{original / new:.3f} × as fast ({low:.3f} … {high:.3f}): "
            f"{1e3 * original:.2f} ms → {1e3 * new:.2f} ms, {compiler}, {data['device']}, "
            f"{data['threads']} threads, medians of {rounds} pairs\n{rewrite.report.summary()}"
        )
        return Result(data, text)

    return work


def _compiled(program: ExportedProgram, compiler: str) -> Callable[..., Any]:
    module = program.module()
    return module if compiler == "eager" else torch.compile(module, backend=compiler)


def _time(
    stages: Stages,
    runs: list[Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rounds: int,
) -> list[tuple[float, float]]:
    """Seconds of a call of each, pair after pair; the order within a pair alternates."""

    def seconds(run: Callable[..., Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run(*args, **kwargs)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    for run in runs:
        seconds(run, 3)
    calls = max(1, math.ceil(LEAST_SECONDS / max(seconds(runs[0], 3), 1e-6)))
    pairs = []
    for at in stages.each("timing", range(rounds), rounds):
        order = (0, 1) if at % 2 == 0 else (1, 0)
        taken = {which: seconds(runs[which], calls) for which in order}
        pairs.append((taken[0], taken[1]))
    return pairs


def _interval(ratios: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, from the order statistics (binomial)."""
    count, values = len(ratios), sorted(ratios)
    reach = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    return values[reach], values[count - 1 - reach]


def _device(program: ExportedProgram) -> str:
    devices = {str(t.device) for t in program.state_dict.values() if isinstance(t, torch.Tensor)}
    return ", ".join(sorted(devices)) or "cpu"
