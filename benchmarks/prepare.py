"""Time and peak memory of preparing a layer: ours, and the paper's procedure, on the same weights.

    python benchmarks/prepare.py [--quick]

Random bfloat16 weights in the shapes of MLA layers: K with its queries, V with its output
projection (W [H, E, D], partner U [H, n, D]). Timed, from these weights to those that a layer
stores, rounded to bfloat16, per layer (K and V), on one thread and in seconds of CPU, as other work
shares the machine; medians of three rounds (of one for DeepSeek-V3) in which every procedure takes
its turn. ``procedures.py`` says what each does: "paper" is the procedure as published, "paper,
lean" the same with nothing done twice, the others are ours by strategy and r.

Peak memory is what a process of its own gains at most over the weights while it prepares one
projection after the other (peak resident size, Linux's ``VmHWM``). Growth: exponents of E,
D and H, fitted to the logarithms of times and peaks around DeepSeek-V2-Lite's K. The whole model:
27 layers of its shapes with weights of their own, two projections at a time on one thread each; and
``bda_fx.rewrite`` with default options on the attention of all 27 (export apart), step by step.

Writes results/prepare.{md,json,svg} beside this script.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import record
import torch
from procedures import PROCEDURES, SEED, STAGES, Projection, Stages, noise_of
from resident_memory import forget_peak, resident_mib
from step_times import step_times

import bda_fx

LAYERS = 27
V2_LITE = Projection(16, 512, 128, 2048)
MODELS = {
    "DeepSeek-V2-Lite": (V2_LITE, V2_LITE),
    "DeepSeek-V3": (Projection(128, 512, 128, 1536), Projection(128, 512, 128, 7168)),
}
SMALL = Projection(4, 64, 16, 96)
GROWTH = {
    "in_features": (256, 512, 1024, 2048),
    "head_dim": (32, 64, 128, 256),
    "heads": (8, 16, 32, 64),
}
LETTERS = {"in_features": "E", "head_dim": "D", "heads": "H"}
GROWING = ("paper", "paper, lean", "pivot, D")


def times_of(
    projections: tuple[Projection, ...], names: tuple[str, ...], repeats: int
) -> dict[str, Stages]:
    """Medians for all ``projections`` together; in each round every procedure takes its turn."""
    weights = [projection.weights(seed) for seed, projection in enumerate(projections)]
    rounds: dict[str, list[Stages]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            total: Stages = defaultdict(float)
            for near, far in weights:
                for stage, seconds in PROCEDURES[name](near, far).items():
                    total[stage] += seconds
            rounds[name].append(total)
    medians = {}
    for name, runs in rounds.items():
        medians[name] = {s: statistics.median(run[s] for run in runs) for s in runs[0]}
        medians[name]["all"] = statistics.median(sum(run.values()) for run in runs)
    return medians


# -- peak memory, in a process of its own ------------------------------------------------------


def gain_of_peak(projections: tuple[Projection, ...], name: str) -> float:
    """MiB by which a fresh process grows while it prepares the projections."""
    command = [sys.executable, __file__, "--peak", name]
    command += [json.dumps([asdict(projection) for projection in projections])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def measure_peak(name: str, projections: list[Projection]) -> float:
    PROCEDURES[name](*SMALL.weights())  # libraries load and start their threads
    weights = [projection.weights() for projection in projections]
    forget_peak()
    before = resident_mib("VmRSS")
    for near, far in weights:
        PROCEDURES[name](near, far)
    return resident_mib("VmHWM") - before


# -- growth ------------------------------------------------------------------------------------


def growth(base: Projection, sizes: dict[str, tuple[int, ...]], repeats: int) -> dict[str, Any]:
    """Seconds and peaks along each dimension, and the exponents that fit them."""
    found: dict[str, Any] = {}
    for dimension, values in sizes.items():
        points = [(replace(base, **{dimension: value}),) for value in values]
        times = [times_of(point, GROWING, repeats) for point in points]
        found[dimension] = {"sizes": values}
        for name in GROWING:
            seconds = [point[name]["all"] for point in times]
            peaks = [gain_of_peak(point, name) for point in points]
            found[dimension][name] = {
                "seconds": seconds,
                "peak_mib": peaks,
                "time_exponent": exponent(values, seconds),
                "peak_exponent": exponent(values, peaks),
            }
            print(dimension, name, found[dimension][name], file=sys.stderr, flush=True)
    return found


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """Slope of log values over log sizes, by least squares."""
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    ).slope


# -- the whole model ---------------------------------------------------------------------------


def whole_model(projection: Projection, layers: int, name: str, workers: int) -> Stages:
    """Seconds for K and V of all layers, ``workers`` projections at a time, on one thread each;
    and of CPU, which other work on the machine does not lengthen."""
    weights = [projection.weights(seed) for seed in range(2 * layers)]
    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda pair: PROCEDURES[name](*pair), weights))
    return {"all": time.perf_counter() - start, "CPU": time.process_time() - cpu}


def rewrite_steps(layers: int, quick: bool) -> tuple[dict[str, float], int]:
    """Seconds per step of ``bda_fx.rewrite`` on DeepSeek-V2-Lite's attention, after export, and how
    many sites the noise budget let it rewrite.

    Feed-forward parts and vocabulary are small, as nothing is done to them.
    """
    from transformers import DeepseekV2Config, DeepseekV2Model

    small = {"hidden_size": 64, "kv_lora_rank": 32, "num_attention_heads": 2,
             "num_key_value_heads": 2, "qk_nope_head_dim": 8, "v_head_dim": 8,
             "qk_rope_head_dim": 4}  # fmt: skip
    lite = {"hidden_size": 2048, "kv_lora_rank": 512, "num_attention_heads": 16,
            "num_key_value_heads": 16, "qk_nope_head_dim": 128, "v_head_dim": 128,
            "qk_rope_head_dim": 64}  # fmt: skip
    config = DeepseekV2Config(
        **(small if quick else lite),
        q_lora_rank=None,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        intermediate_size=16,
        vocab_size=64,
        use_cache=False,
    )
    torch.manual_seed(SEED)
    model = DeepseekV2Model(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        inputs = {"input_ids": torch.arange(8).view(1, 8)}
        program = torch.export.export(model, (), inputs, strict=False)
    rewrite, seconds = step_times(lambda: bda_fx.rewrite(program))
    assert len(rewrite.report.sites) == 2 * layers
    return seconds, len(rewrite.report.rewritten)


# -- results -----------------------------------------------------------------------------------


def layer_table(rows: list[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        stages = [f"{row['seconds'][s]:.2f}" if s in row["seconds"] else "–" for s in STAGES]
        faster = (row["times_faster"], row["times_faster_than_lean"])
        body.append(
            [
                row["procedure"],
                *stages,
                f"{row['seconds']['all']:.2f}",
                *(f"{times:.1f} ×" for times in faster),
                f"{row['peak_mib']:.0f}",
                f"{row['noise']:.1f}",
                f"{row['worst_head']:.1f}",
            ]
        )
    columns = ["procedure", *(f"{stage} s" for stage in STAGES), "layer s", "faster than paper"]
    columns += ["than lean", "peak MiB", "noise", "worst head"]
    return record.markdown_table(columns, body)


def growth_table(found: dict[str, Any]) -> str:
    columns = ["procedure", *(f"time ∝ {LETTERS[d]}^" for d in found)]
    columns += [f"peak ∝ {LETTERS[d]}^" for d in found]
    body = [
        [name]
        + [f"{found[d][name]['time_exponent']:.2f}" for d in found]
        + [f"{found[d][name]['peak_exponent']:.2f}" for d in found]
        for name in GROWING
    ]
    return record.markdown_table(columns, body)


def draw(found: dict[str, Any]) -> Callable[[Any], None]:
    def onto(figure: Any) -> None:
        figure.set_size_inches(10, 5.5)
        axes = figure.subplots(2, len(found), squeeze=False)
        keys = (("seconds", "s"), ("peak_mib", "peak MiB"))
        for line, (key, label) in zip(axes, keys, strict=True):
            for ax, dimension in zip(line, found, strict=True):
                sizes = found[dimension]["sizes"]
                for name in GROWING:
                    ax.loglog(sizes, found[dimension][name][key], marker="o", label=name)
                record.label_loglog(ax, sizes, LETTERS[dimension], label)
        axes[0][0].legend()

    return onto


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, once; writes nothing")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.peak:
        name, shapes = chosen.peak
        print(measure_peak(name, [Projection(**shape) for shape in json.loads(shapes)]))
        return
    quick = chosen.quick
    models = {"small": (SMALL, SMALL)} if quick else MODELS
    names = tuple(PROCEDURES)
    times_of((SMALL,), names, 1)  # starts the thread pool
    layers = {}
    for model, projections in models.items():
        times = times_of(projections, names, 3 if model == "DeepSeek-V2-Lite" else 1)
        rows = []
        for name in names:
            noise, worst = noise_of(projections[0], name)
            rows.append(
                {
                    "procedure": name,
                    "seconds": times[name],
                    "times_faster": times["paper"]["all"] / times[name]["all"],
                    "times_faster_than_lean": times["paper, lean"]["all"] / times[name]["all"],
                    "peak_mib": gain_of_peak(projections, name),
                    "noise": noise,
                    "worst_head": worst,
                }
            )
        layers[model] = rows
        print(layer_table(rows), file=sys.stderr, flush=True)
    sizes = {"heads": (2, 4)} if quick else GROWTH
    grown = growth(SMALL if quick else V2_LITE, sizes, 1 if quick else 3)
    depth = 2 if quick else LAYERS
    model_seconds = {
        name: whole_model(SMALL if quick else V2_LITE, depth, name, 2)
        for name in ("first, D", "pivot, D", "pivot, 7/8 D")
    }
    steps, rewritten = rewrite_steps(depth, quick)
    origin = record.provenance(SEED, ("transformers",))
    parts = [record.heading("prepare.py", origin)]
    for model, (k, v) in models.items():
        parts += [
            f"### {model}'s layer: K and V, {k.heads} heads × {k.head_dim} of {k.in_features}, "
            f"partners {k.partner} and {v.partner} wide",
            layer_table(layers[model]),
        ]
    parts += ["### Growth around DeepSeek-V2-Lite's K", growth_table(grown)]
    parts += [
        f"### The whole model: {depth} layers of DeepSeek-V2-Lite",
        "Seconds, two projections at a time on one thread each: "
        + "; ".join(f"{n}: {s['all']:.1f} (CPU {s['CPU']:.1f})" for n, s in model_seconds.items())
        + ".",
        f"`bda_fx.rewrite` with default options, after export ({rewritten} of {2 * depth} sites "
        "rewritten), seconds: "
        + "; ".join(f"{name}: {value:.1f}" for name, value in steps.items())
        + ".",
    ]
    found = {
        "unit": "CPU seconds per layer (K and V), median; MiB",
        "layers": layers,
        "growth": grown,
        "whole_model_s": model_seconds,
        "rewrite_s": steps,
        "rewritten": rewritten,
    }
    text = "\n\n".join(parts) + "\n"
    record.write("prepare", text, {**origin, **found}, draw(grown), quick=quick)


if __name__ == "__main__":
    main()
