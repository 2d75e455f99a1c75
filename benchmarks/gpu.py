"""The basis projection on a GPU: our kernel against cuBLAS and Inductor, beside the limits.

    python benchmarks/gpu.py [--quick] [--dtype DTYPE ...] [--shape NAME ...]

For each shape of SHAPES, token count and dtype: the original projection by cuBLAS (``F.linear``),
by Inductor with max-autotune and by our kernel without a basis; the basis projection by our kernel,
window and scattered, by its ATen form under Inductor, and by what Inductor chooses of the two. Each
candidate is captured into a CUDA graph of ``CALLS`` calls, so that what is timed is the device
alone, and candidates take turns: a round times each once, by CUDA events, L2 flushed before. Ratios
are medians over rounds of original over candidate in the same round; the original is the faster of
the first two.

Writes results/gpu.json, gpu.md and gpu.svg; ``--quick`` (one small shape) only prints. What the
roofline model predicts stands beside each figure; ``--model`` writes that alone, for the devices
with a data sheet, and needs no GPU (results/gpu_model.md).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from record import heading, markdown_table, provenance, write
from torch import Tensor
from torch.nn import functional as F

from bda_fx.kernels.roofline import (
    DATA_SHEETS,
    LAUNCH_SECONDS,
    Device,
    Projection,
    cuda_device,
    predict,
    predict_speedup,
)


@dataclass(frozen=True)
class Shape:
    """``heads`` heads of ``head_dim`` features, as many basis features as a head has."""

    name: str
    in_features: int
    heads: int
    head_dim: int

    def projection(self, tokens: int, dtype: torch.dtype, *, scattered: bool = False) -> Projection:
        features = self.heads * self.head_dim
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return Projection(
            tokens, self.in_features, features, self.head_dim, dtype, 1.0, scattered, tf32
        )


SHAPES = (
    Shape("DeepSeek-V2-Lite, K and V", 512, 32, 128),
    Shape("DeepSeek-V3, K and V", 512, 256, 128),
    Shape("Kimi-K2, K and V", 512, 128, 128),
    Shape("GLM-4.7-Flash, K", 512, 20, 192),
    Shape("GLM-4.7-Flash, V", 512, 20, 256),
    Shape("MiniCPM3-4B, K and V", 256, 80, 64),
    Shape("DeiT-Tiny", 192, 3, 64),
    Shape("Swin-T, stage 1", 96, 3, 32),
    Shape("Whisper-tiny, DeiT-S", 384, 6, 64),
    Shape("T5-small", 512, 8, 64),
    Shape("DETR", 256, 8, 32),
    Shape("BERT-base", 768, 12, 64),
    Shape("SD-1.5, 160", 768, 8, 160),
)
TOKENS = (1, 16, 128, 512, 1024, 4096, 16384)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CALLS, ROUNDS = 5, 31
LONG = 10 * LAUNCH_SECONDS
FLUSHED = 256 * 2**20  # bytes, more than any L2
Call = Callable[[], Tensor]


def captured(call: Call) -> Callable[[], None]:
    """``call`` as a CUDA graph of ``CALLS`` of it, after what it tunes and compiles."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each candidate in each round."""
    replays = {name: captured(call) for name, call in calls.items()}
    flush = torch.empty(FLUSHED // 4, dtype=torch.int32, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, replay in replays.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            if number >= 3:
                seconds[name].append(start.elapsed_time(end) / 1e3 / CALLS)
    return seconds


def candidates(shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, Call]:
    """Originals by "original, …", basis projections by any other name."""
    from bda_fx.kernels.basis_projection import basis_projection, project_in_aten

    size, features = shape.head_dim, shape.heads * shape.head_dim

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", dtype=dtype)

    x, weight = randn(tokens, shape.in_features), randn(features, shape.in_features)
    coefficients = randn(features, shape.in_features - size)
    order = torch.randperm(shape.in_features, device="cuda")
    slots = list(range(size))
    options = {"max_autotune": True, "triton.cudagraphs": False}

    def compiled(function: Callable[..., Tensor], *arguments: Any) -> Call:
        inductor = torch.compile(lambda x: function(x, *arguments), options=options)
        return lambda: inductor(x)

    window = (coefficients, None, None, 0, size, slots)
    scattered = (coefficients, order, None, 0, size, slots)
    return {
        "original, cuBLAS": lambda: F.linear(x, weight),
        "original, Inductor": compiled(F.linear, weight),
        "original, our kernel": lambda: basis_projection(x, weight, None, None, 0, 0, [-1]),
        "window": lambda: basis_projection(x, *window),
        "scattered": lambda: basis_projection(x, *scattered),
        "window, ATen": compiled(project_in_aten, *window),
        "scattered, ATen": compiled(project_in_aten, *scattered),
        "window, Inductor's choice": compiled(basis_projection, *window),
        "scattered, Inductor's choice": compiled(basis_projection, *scattered),
    }


def measure(shape: Shape, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    seconds = interleaved(candidates(shape, tokens, dtype), rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    originals = [name for name in seconds if name.startswith("original")]
    fastest = min(originals[:2], key=lambda name: medians[name])

    def ratio(original: str, name: str) -> dict[str, float]:
        ratios = [a / b for a, b in zip(seconds[original], seconds[name], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        return {"median": median, "quartiles": [low, high]}  # type: ignore[dict-item]

    projection = shape.projection(tokens, dtype)
    device = cuda_device(torch.cuda.current_device())
    return {
        "shape": asdict(shape),
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "limit": projection.limit,
        "fastest_original": fastest,
        "median_s": medians,
        "over_fastest_original": {
            name: ratio(fastest, name) for name in seconds if name not in originals
        },
        "over_our_original": {
            name: ratio("original, our kernel", name) for name in ("window", "scattered")
        },
        "predicted": {
            name: predict_speedup(shape.projection(tokens, dtype, scattered=scattered), device)
            for name, scattered in (("window", False), ("scattered", True))
        },
        "predicted_s": predict(projection, device).seconds,
        "bound": predict(projection, device).bound,
    }


def table(cells: list[dict[str, Any]]) -> str:
    columns = [
        "shape", "dtype", "tokens", "fastest original", "µs", "limit", "window", "scattered",
        "window, Inductor's choice", "scattered, Inductor's choice", "window, of our original",
        "predicted", "bound",
    ]  # fmt: skip
    rows = []
    for cell in cells:
        over = cell["over_fastest_original"]
        rows.append(
            [
                cell["shape"]["name"], cell["dtype"], str(cell["tokens"]),
                cell["fastest_original"].removeprefix("original, "),
                f"{1e6 * cell['median_s'][cell['fastest_original']]:.1f}", f"{cell['limit']:.3f}",
                *(f"{over[name]['median']:.3f}" for name in columns[6:10]),
                f"{cell['over_our_original']['window']['median']:.3f}",
                f"{cell['predicted']['window']:.3f}", cell["bound"],
            ]
        )  # fmt: skip
    return markdown_table(columns, rows)


def draw(cells: list[dict[str, Any]]) -> Callable[[Any], None]:
    def on(figure: Any) -> None:
        axes = figure.subplots()
        for name in dict.fromkeys(cell["shape"]["name"] for cell in cells):
            mine = [c for c in cells if c["shape"]["name"] == name and c["dtype"] == "bfloat16"]
            axes.plot(
                [c["tokens"] for c in mine],
                [c["over_fastest_original"]["window"]["median"] / c["limit"] for c in mine],
                marker="o", label=name,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="tokens", ylabel="speed-up of the window form / limit")
        axes.axhline(1.0, color="black", linewidth=0.5)
        axes.legend(fontsize="small")

    return on


def model(devices: tuple[Device, ...]) -> tuple[str, list[dict[str, Any]]]:
    """What the roofline predicts for every shape, as a table and as records; no GPU is needed."""
    records, rows = [], []
    for device, shape in itertools.product(devices, SHAPES):
        row = [device.name, shape.name, f"{shape.projection(1, torch.bfloat16).limit:.3f}"]
        for tokens in TOKENS:
            projection = shape.projection(tokens, torch.bfloat16)
            shares = [
                predict_speedup(form, device) / projection.limit
                for form in (projection, replace(projection, scattered=True))
            ]
            original, ours = predict(projection.original, device), predict(projection, device)
            bound = original.bound
            records.append(
                {
                    "device": device.name, "shape": shape.name, "tokens": tokens, "bound": bound,
                    "bound_of_window": ours.bound, "window_s": ours.seconds,
                    "limit": projection.limit, "window": shares[0], "scattered": shares[1],
                }
            )  # fmt: skip
            row.append(f"{shares[0]:.2f} / {shares[1]:.2f} {bound[0]}")
        rows.append(row)
    columns = ["device", "shape", "limit", *(f"{tokens} tokens" for tokens in TOKENS)]
    return markdown_table(columns, rows), records


def write_model(quick: bool) -> None:
    text, records = model(DATA_SHEETS)
    bound = [
        r
        for r in records
        if r["bound"] == r["bound_of_window"] == "arithmetic" and r["window_s"] > LONG
    ]
    reached = sum(r["window"] >= 0.95 for r in bound)
    misses = "; ".join(
        f"{r['device']}, {r['shape']}, {r['tokens']} tokens: {r['window']:.2f}"
        for r in bound
        if r["window"] < 0.95
    )
    write(
        "gpu_model",
        "Written by `benchmarks/gpu.py --model`: predicted, not measured. bfloat16; the speed-up "
        "over the original projection as a share of the limit 1 / (1 - r/E), window / scattered, "
        "and what bounds the original beside the launch: **a**rithmetic, **L**2, **m**emory.\n\n"
        f"Where arithmetic bounds both sides and the launch is under a tenth, {reached} of "
        f"{len(bound)} cells of the window form are at 0.95 of the limit or above. The others: "
        f"{misses or 'none'}.\n\n{text}\n",
        {"cells": records},
        quick=quick,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small shape, no results written")
    parser.add_argument("--model", action="store_true", help="predictions alone; needs no GPU")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shape", nargs="+", choices=[shape.name for shape in SHAPES])
    chosen = parser.parse_args()
    if chosen.model:
        write_model(chosen.quick)
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: no CUDA device is available (--model needs none)")

    from bda_fx.kernels.basis_projection_cuda import offer_to_inductor

    offer_to_inductor()
    torch.manual_seed(0)
    shapes = [shape for shape in SHAPES if not chosen.shape or shape.name in chosen.shape]
    tokens: tuple[int, ...] = TOKENS
    rounds = ROUNDS
    if chosen.quick:
        shapes, tokens, rounds = [SHAPES[6]], (16, 512), 5
    cells = []
    for shape, dtype, count in itertools.product(shapes, chosen.dtype, tokens):
        cells.append(measure(shape, count, DTYPES[dtype], rounds))
        over = {k: round(v["median"], 3) for k, v in cells[-1]["over_fastest_original"].items()}
        print(shape.name, dtype, count, over, flush=True)
    origin = provenance(0, packages=("triton",))
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    origin |= {"device": properties.name, "cuda": torch.version.cuda}
    worst = sorted(
        cells, key=lambda c: c["over_fastest_original"]["window"]["median"] / c["limit"]
    )[:10]
    text = (
        f"{heading('gpu.py', origin)}\n\nThe fastest original (named) over each candidate, medians "
        f"of {rounds} interleaved rounds.\n\n{table(cells)}\n\nThe ten cells furthest from the "
        f"limit:\n\n{table(worst)}\n"
    )
    write("gpu", text, {**origin, "cells": cells}, draw(cells), quick=chosen.quick)


if __name__ == "__main__":
    main()
