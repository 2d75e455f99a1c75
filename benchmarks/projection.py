"""One decomposed projection by itself, beside the limit that its FLOPs set: 1 / (1 - r / E).

    python benchmarks/projection.py [--quick] [--threads 1 2] [--dtypes float32] [--only NAME …]

Every cell is a shape of public models × tokens × type × threads. In it all candidates take turns
within one process, for the same weights and inputs:

* the original: eager (MKL or oneDNN), oneDNN with a prepacked weight, Inductor with freezing; what
  counts is the fastest of the three, which is named;
* our kernel without a basis (r = 0), which tells what the basis costs it;
* our kernel with a window and with scattered rows, r = D and 7/8 D;
* the plain ATen spelling under Inductor with freezing, scattered rows.

The C library keeps what is freed, as the allocators of servers do. Left to itself it maps results
of 32 MiB and more anew at each call, and faults at first touch take a fifth of every way's time.

A ratio of medians over the limit is 1 where all that is saved on paper is saved in time. Figures
aimed at, for D ≥ 64, E / D ≤ 6 and 128 tokens and more: 0.95 against our own kernel; against the
fastest original 0.90 in each cell and 0.95 in the geometric mean.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from record import heading, markdown_table, of_this_cpu, provenance, write
from torch import Tensor
from torch.nn import functional as F

from bda_fx.freed_memory import M_MMAP_MAX, M_TRIM_THRESHOLD, set_malloc_parameter
from bda_fx.kernels.basis_projection import project_in_aten
from bda_fx.kernels.packed_projection import pack, packed_projection, serves
from bda_fx.measure_projection import prepacked_linear


@dataclass(frozen=True)
class Shape:
    """A projection of a public model: E inputs, heads × D outputs."""

    name: str
    in_features: int
    heads: int
    head_dim: int

    @property
    def judged(self) -> bool:
        """Whether the figures aimed at are meant for it."""
        return self.head_dim >= 64 and self.in_features <= 6 * self.head_dim


SHAPES = [
    Shape("DeepSeek-V2-Lite", 512, 16, 128),
    Shape("DeepSeek-V3", 512, 128, 128),
    Shape("GLM-4.7-Flash K", 512, 20, 192),
    Shape("GLM-4.7-Flash V", 512, 20, 256),
    Shape("MiniCPM3-4B", 256, 40, 64),
    Shape("DeiT-Tiny", 192, 3, 64),
    Shape("Swin-T", 96, 3, 32),
    Shape("Whisper-tiny", 384, 6, 64),
    Shape("T5-small", 512, 8, 64),
    Shape("DETR", 256, 8, 32),
    Shape("MiniLM-L6", 384, 12, 32),
    Shape("rxnfp", 256, 4, 64),
    Shape("BERT-base", 768, 12, 64),
    Shape("SD-1.5 cross-attention", 768, 8, 160),
]
TOKENS = (1, 4, 16, 128, 1024, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ORIGINALS = ("eager", "oneDNN, prepacked", "Inductor, frozen")
SIZES = {"D": 1.0, "7/8 D": 7 / 8}
SEED = 0


def keep_freed_memory() -> None:
    """Have glibc take large blocks from its heap and give none back to the system."""
    set_malloc_parameter(M_MMAP_MAX, 0)
    set_malloc_parameter(M_TRIM_THRESHOLD, 2**31 - 1)


def compiled(function: Callable[..., Tensor], x: Tensor, **buffers: Tensor) -> Callable[[], Tensor]:
    """``function(x, **buffers)`` under Inductor, with the buffers as constants that it may pack."""

    class Frozen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in buffers.items():
                self.register_buffer(name, value)

        def forward(self, x: Tensor) -> Tensor:
            return function(x, **{name: getattr(self, name) for name in buffers})

    torch._dynamo.reset()
    run = torch.compile(Frozen().eval(), options={"freezing": True})
    run(x)
    return lambda: run(x)


def operands(
    shape: Shape, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias of the projection."""
    e, f = shape.in_features, shape.heads * shape.head_dim
    x = torch.randn(tokens, e, generator=generator).to(dtype)
    weight = (torch.randn(f, e, generator=generator) / e**0.5).to(dtype)
    return x, weight, torch.randn(f, generator=generator).to(dtype)


def basis_first(permutation: Tensor, r: int) -> Tensor:
    """Scattered rows: the first r of a permutation and the others, each in ascending order."""
    parts = permutation.split([r, len(permutation) - r])
    return torch.cat([part.sort().values for part in parts])


def kernel(
    shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, r: int, order: Tensor | None
) -> Callable[[], Tensor]:
    """Our kernel with a basis of r rows: in ``order``, or the first ones."""
    panels, slots = pack(weight[:, r:]), [*range(r), *[-1] * (shape.head_dim - r)]
    return lambda: packed_projection(x, panels, order, bias, 0, r, slots, len(weight))


def candidates(shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute the projection, by name."""
    generator = torch.Generator().manual_seed(SEED)
    e, d = shape.in_features, shape.head_dim
    x, weight, bias = operands(shape, tokens, dtype, generator)
    prepacked = prepacked_linear(x, weight, bias)
    plain = pack(weight)
    ways: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: F.linear(x, weight, bias),
        "Inductor, frozen": compiled(F.linear, x, weight=weight, bias=bias),
        "r = 0": lambda: packed_projection(x, plain, None, bias, 0, 0, [-1], len(weight)),
    }
    if prepacked is not None:
        ways["oneDNN, prepacked"] = prepacked

    permutation = torch.randperm(e, generator=generator)
    for label, fraction in SIZES.items():
        r = round(fraction * d)
        order = basis_first(permutation, r)
        ways[f"window, {label}"] = kernel(shape, x, weight, bias, r, None)
        ways[f"scattered, {label}"] = kernel(shape, x, weight, bias, r, order)
        if label == "D":

            def aten(x: Tensor, weight: Tensor, order: Tensor, bias: Tensor, r: int = r) -> Tensor:
                return project_in_aten(x, weight, order, bias, 0, r, [*range(r)])

            rest = weight[:, r:].contiguous()
            ways["ATen"] = compiled(aten, x, weight=rest, order=order, bias=bias)
    return ways


def medians(ways: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, list[float]]:
    """Quartiles of the seconds a call takes; the ways take turns, each long enough to be timed."""
    repeats = {}
    for name, way in ways.items():
        way()
        start = time.perf_counter()
        way()
        repeats[name] = max(1, min(100, int(1e-4 / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                way()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.quantiles(each, n=4) for name, each in times.items()}


def measure(shape: Shape, tokens: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """One cell: seconds of every way, and ratios over their limits."""
    with torch.no_grad():
        quartiles = medians(candidates(shape, tokens, dtype), seconds)
    median = {name: q[1] for name, q in quartiles.items()}
    best = min((name for name in ORIGINALS if name in median), key=median.__getitem__)
    cell: dict[str, Any] = {
        **asdict(shape),
        "judged": shape.judged and tokens >= 128,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": median,
        "quartiles": {name: [q[0], q[2]] for name, q in quartiles.items()},
        "best_original": best,
        "limits": {},
        "against_own": {},
        "against_best": {"r = 0": median[best] / median["r = 0"]},
    }
    for label, fraction in SIZES.items():
        limit = 1 / (1 - round(fraction * shape.head_dim) / shape.in_features)
        cell["limits"][label] = limit
        for kind in ("window", "scattered"):
            name = f"{kind}, {label}"
            cell["against_own"][name] = median["r = 0"] / median[name] / limit
            cell["against_best"][name] = median[best] / median[name] / limit
    cell["against_best"]["ATen"] = median[best] / median["ATen"] / cell["limits"]["D"]
    return cell


OURS = [f"{kind}, {label}" for label in SIZES for kind in ("window", "scattered")]


def row(cell: dict[str, Any]) -> list[str]:
    best = cell["seconds"][cell["best_original"]]
    return [
        f"{cell['name']} ({cell['in_features']} → {cell['heads']} × {cell['head_dim']})",
        str(cell["tokens"]),
        f"{1e6 * best:.0f} µs, {cell['best_original']}",
        f"{cell['limits']['D']:.3f}",
        *[f"{cell['against_own'][name]:.2f}" for name in OURS],
        *[f"{cell['against_best'][name]:.2f}" for name in [*OURS, "ATen"]],
    ]


def report(cells: list[dict[str, Any]], origin: dict[str, Any]) -> str:
    """Tables by type and threads, what the figures aimed at came to, and the worst ten cells."""
    parts = [
        "# A decomposed projection by itself",
        heading("projection.py", origin),
        "Ratios of medians over the limit 1 / (1 - r / E): 1 is all that the FLOPs promise. *own*: "
        "against our kernel with r = 0; *best*: against the fastest original, which is named.",
    ]
    columns = ["projection", "tokens", "original", "limit, D"]
    columns += [f"own: {name}" for name in OURS] + [f"best: {name}" for name in [*OURS, "ATen"]]
    key = lambda cell: (cell["dtype"], cell["threads"])  # noqa: E731
    for (dtype, threads), group in itertools.groupby(sorted(cells, key=key), key):
        of = list(group)
        parts.append(f"## {dtype}, {threads} thread{'s' * (threads > 1)}")
        parts.append(markdown_table(columns, [row(cell) for cell in of]))
        judged = [cell for cell in of if cell["judged"]]
        for name in OURS if judged else []:
            own = [cell["against_own"][name] for cell in judged]
            best = [cell["against_best"][name] for cell in judged]
            parts.append(
                f"{name}, {len(judged)} cells with D ≥ 64, E / D ≤ 6, 128 tokens and more: own "
                f"{min(own):.2f} at least, {geometric(own):.3f} in the mean; best {min(best):.2f} "
                f"at least, {geometric(best):.3f} in the mean; {sum(b < 0.9 for b in best)} below "
                "0.90."
            )
    worst = sorted(
        ((cell["against_best"][name], name, cell) for cell in cells for name in OURS),
        key=lambda item: item[0],
    )[:10]
    parts.append("## The worst ten against the fastest original")
    parts.append(
        markdown_table(
            ["projection", "tokens", "type", "threads", "form", "over the limit", "r = 0"],
            [
                [c["name"], str(c["tokens"]), c["dtype"], str(c["threads"]), name, f"{ratio:.2f}",
                 f"{c['against_best']['r = 0']:.2f}"]
                for ratio, name, c in worst
            ],
        )
    )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def geometric(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small cells: shows that it runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(DTYPES),
        default=list(DTYPES),
        help="without a 16-bit dot product in the CPU, originals in bfloat16 take 9 s a call",
    )
    parser.add_argument("--only", nargs="+", help="names of shapes; leaves the results as they are")
    chosen = parser.parse_args()
    keep_freed_memory()
    if not serves(torch.device("cpu"), torch.float32):
        raise SystemExit("projection.py: there is no kernel to measure (see the warning)")
    shapes = [s for s in SHAPES if not chosen.only or s.name in chosen.only]
    dtypes = [DTYPES[name] for name in chosen.dtypes]
    plan = list(itertools.product(sorted(set(chosen.threads)), dtypes, shapes, TOKENS))
    if chosen.quick:
        plan = [(1, torch.float32, SHAPES[5], 16), (1, torch.bfloat16, SHAPES[5], 16)]
    cells = []
    for threads, dtype, shape, tokens in plan:
        torch.set_num_threads(threads)
        cells.append(measure(shape, tokens, dtype, 0.05 if chosen.quick else 1.5))
        last = cells[-1]
        print(
            f"{last['dtype']} {threads} {shape.name} {tokens}: "
            + ", ".join(f"{name} {last['against_best'][name]:.2f}" for name in [*OURS, "ATen"]),
            flush=True,
        )
    origin = provenance(SEED)
    record = {**origin, "cells": cells}
    partial = chosen.quick or bool(chosen.only)
    write(of_this_cpu("projection"), report(cells, origin), record, quick=partial)


if __name__ == "__main__":
    main()
