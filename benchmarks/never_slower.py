"""Whether a projection that profitability="measure" chose is ever slower than the original.

    python benchmarks/never_slower.py [--quick] [--threads 1 2] [--only NAME …]

Every cell is a shape of public models × tokens × type × threads × basis size, as in projection.py.
The backend's own measurement decides between the original and the kernel on scattered rows; then
what it chose is timed anew against the fastest original: eager, oneDNN with a prepacked weight,
Inductor with freezing. Aimed at: 0.98 of that in every cell. Where the original was chosen the
graph holds it as it was, so the cell is 1 by definition; the table says how many these are. A cell
below the goal is timed once more, five times as long, as other load on the machine disturbs short
runs; the second figure counts, and the table says of how many cells.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import torch
from projection import (
    DTYPES,
    SHAPES,
    SIZES,
    TOKENS,
    Shape,
    compiled,
    geometric,
    keep_freed_memory,
    medians,
)
from record import heading, markdown_table, of_this_cpu, provenance, write
from torch.nn import functional as F

from bda_fx.kernels.packed_projection import serves
from bda_fx.measure_projection import ORIGINAL, Candidate, Case, Measure, calls_of
from bda_fx.passes.forms import forms_of
from bda_fx.passes.sites import Linear, Plan, Site, SitePlan
from bda_fx.profitability import GAIN, speedup

GOAL = 0.98
CPU = torch.device("cpu")


def case_of(shape: Shape, dtype: torch.dtype, fraction: float) -> Case:
    """The keys of an attention with this shape, decomposed on scattered rows."""
    e, d, size = shape.in_features, shape.head_dim, round(fraction * shape.head_dim)
    linear = Linear("k", "k", ("linear",), ("bias",), e, shape.heads * d)
    heads = tuple(tuple(range(h * d, (h + 1) * d)) for h in range(shape.heads))
    site = Site("qk", linear, heads, (), ())
    plan = Plan((SitePlan(site, "k", "pivot", size, tuple(range(size)), 1.0, 1.0, 1.0),), ())
    (form,) = forms_of(plan)
    candidate = Candidate("packed", "packed", form, plan)
    return Case(linear, dtype, CPU, True, False, (candidate,))


def measure(
    shape: Shape, tokens: int, dtype: torch.dtype, fraction: float, seconds: float
) -> dict[str, Any]:
    """One cell: what was chosen, how fast it was found to be, and how fast it is."""
    case = case_of(shape, dtype, fraction)
    begin = time.perf_counter()
    decided = Measure(CPU)(case, tokens)
    took = time.perf_counter() - begin
    found = speedup(decided[ORIGINAL], decided["packed"])
    cell = {
        "name": shape.name,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "size": round(fraction * shape.head_dim),
        "found": found,
        "decomposed": found >= GAIN,
        "ratio": 1.0,
        "best_original": "",
        "deciding": took,
    }
    if found < GAIN:
        return cell
    with torch.no_grad():
        calls = calls_of(case, tokens)
        names = {ORIGINAL: "eager", f"{ORIGINAL}, prepacked": "oneDNN, prepacked"}
        ways = {names.get(name, name): call for name, call in calls.items()}
        x, weight = (
            torch.randn(tokens, shape.in_features),
            torch.randn(shape.heads * shape.head_dim, shape.in_features),
        )
        bias = torch.randn(len(weight)).to(dtype)
        ways["Inductor, frozen"] = compiled(
            F.linear, x.to(dtype), weight=weight.to(dtype), bias=bias
        )
        for longer in (1, 5):
            median = {name: q[1] for name, q in medians(ways, longer * seconds).items()}
            chosen = median.pop("0")
            best = min(median, key=median.__getitem__)
            cell |= {"ratio": median[best] / chosen, "best_original": best, "longer": longer}
            if median[best] / chosen >= GOAL:
                break
    return cell


def report(cells: list[dict[str, Any]], origin: dict[str, Any]) -> str:
    """How many cells are as fast as the goal, and the worst ten."""
    decomposed = [cell for cell in cells if cell["decomposed"]]
    below = [cell for cell in cells if cell["ratio"] < GOAL]
    text = (
        f"{len(cells)} cells, {len(decomposed)} decomposed: {len(below)} below {GOAL} of the "
        f"fastest original, {min(cell['ratio'] for cell in cells):.3f} at least"
    )
    if decomposed:
        text += f", {geometric([cell['ratio'] for cell in decomposed]):.3f} in the mean of these"
    again = sum(cell.get("longer", 1) > 1 for cell in cells)
    text += f". {again} were timed twice"
    slowest = max(cell["deciding"] for cell in cells)
    text += f". Deciding took {slowest:.2f} s at most, once for each cell."
    worst = sorted(decomposed, key=lambda cell: cell["ratio"])[:10]
    columns = ["projection", "r", "tokens", "type", "threads", "found", "now", "fastest original"]
    rows = [
        [
            cell["name"],
            str(cell["size"]),
            str(cell["tokens"]),
            cell["dtype"],
            str(cell["threads"]),
            f"{cell['found']:.2f}",
            f"{cell['ratio']:.3f}",
            cell["best_original"],
        ]
        for cell in worst
    ]
    return "\n\n".join(
        [
            "# Never slower than the original",
            heading("never_slower.py", origin),
            'Forms that `profitability="measure"` chose, timed anew. ' + text,
            "The worst ten of those decomposed; *found* is what the choice was made on.",
            markdown_table(columns, rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few small cells: shows that it runs"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--only", nargs="+", help="names of shapes; leaves the results as they are")
    chosen = parser.parse_args()
    keep_freed_memory()
    if not serves(CPU, torch.float32):
        raise SystemExit("never_slower.py: there is no kernel to measure (see the warning)")
    shapes = [s for s in SHAPES if not chosen.only or s.name in chosen.only]
    plan = list(
        itertools.product(
            sorted(set(chosen.threads)), DTYPES.values(), shapes, SIZES.values(), TOKENS
        )
    )
    if chosen.quick:
        plan = list(itertools.product([1], DTYPES.values(), SHAPES[5:6], [1.0], [1, 128]))
    cells = []
    for threads, dtype, shape, fraction, tokens in plan:
        torch.set_num_threads(threads)
        cells.append(measure(shape, tokens, dtype, fraction, 0.1 if chosen.quick else 0.3))
        last = cells[-1]
        print(
            f"{last['dtype']} {threads} {shape.name} r = {last['size']}, {tokens}: "
            f"found {last['found']:.2f}, now {last['ratio']:.2f} {last['best_original']}",
            flush=True,
        )
    origin = provenance()
    partial = chosen.quick or bool(chosen.only)
    write(
        of_this_cpu("never_slower"),
        report(cells, origin),
        {**origin, "cells": cells},
        quick=partial,
    )


if __name__ == "__main__":
    main()
