"""How the time of a decomposed projection, and of a whole attention, grows: slopes in log-log.

    python benchmarks/growth.py [--quick]

Tokens, heads and width E vary one by one around 1,024 tokens and 8 heads × 64 of E = 512, float32,
one thread. The projection by itself: the fastest original (eager, or oneDNN with a prepacked
weight) and our kernel on scattered rows, r = D. The attention (Q, K, V, SDPA, O, without biases):
under Inductor with freezing, and under ``backend="bda"`` with freezing, ``basis_size="full"``; the
limit is that of its multiplications. All ways of a size take turns in one process; medians. The
slope is that of a least-squares line through log time over log size: 1 is linear growth.

Writes results/growth.md, .json and .svg beside this script.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from projection import Shape, basis_first, kernel, medians, operands
from record import heading, label_loglog, markdown_table, provenance, write
from torch import Tensor, nn
from torch.nn import functional as F

from bda_fx.kernels.packed_projection import serves
from bda_fx.measure_projection import prepacked_linear

SEED = 0
BASE, BASE_TOKENS = Shape("", 512, 8, 64), 1024
SIZES = {
    "tokens": (16, 64, 256, 1024, 4096),
    "heads": (2, 4, 8, 16, 32),
    "width": (128, 256, 512, 1024, 2048),
}
PAIRS = (("projection", "original", "ours"), ("attention", "Inductor", "bda"))


class Attention(nn.Module):
    """Multi-head self-attention of E features, without biases."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, inner = shape.heads, shape.heads * shape.head_dim
        self.q, self.k, self.v = (nn.Linear(shape.in_features, inner, False) for _ in range(3))
        self.o = nn.Linear(inner, shape.in_features, False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def varied(what: str, size: int) -> tuple[Shape, int]:
    """The base with another number of tokens, heads or inputs."""
    if what == "tokens":
        return BASE, size
    return replace(BASE, **{"heads" if what == "heads" else "in_features": size}), BASE_TOKENS


def projections(shape: Shape, tokens: int) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    x, weight, bias = operands(shape, tokens, torch.float32, generator)
    rows = basis_first(torch.randperm(shape.in_features, generator=generator), shape.head_dim)
    ways: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: F.linear(x, weight, bias),
        "ours": kernel(shape, x, weight, bias, shape.head_dim, rows),
    }
    prepacked = prepacked_linear(x, weight, bias)
    return ways if prepacked is None else {**ways, "prepacked": prepacked}


def attentions(shape: Shape, tokens: int, inner: str) -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(SEED)
    model, x = Attention(shape).eval(), torch.randn(1, tokens, shape.in_features)
    freezing = {"freezing": True} if inner == "inductor" else {}
    ours = {"inner": inner, "inner_options": freezing, "basis_size": "full"}
    torch._dynamo.reset()
    plain = torch.compile(model, backend=inner, **({"options": freezing} if freezing else {}))
    bda = torch.compile(model, backend="bda", options=ours)
    return {"Inductor": lambda: plain(x), "bda": lambda: bda(x)}


def attention_limit(shape: Shape, tokens: int) -> float:
    """Multiplications of the original attention over those of the rewritten one."""
    e, d, inner = shape.in_features, shape.head_dim, shape.heads * shape.head_dim
    work = tokens * inner * (4 * e + 2 * tokens)
    return work / (work - 2 * tokens * inner * d)


def measure(what: str, size: int, seconds: float, inner: str) -> dict[str, Any]:
    shape, tokens = varied(what, size)
    with torch.no_grad():
        alone = {n: q[1] for n, q in medians(projections(shape, tokens), seconds).items()}
        ways = attentions(shape, tokens, inner)
        whole = {n: q[1] for n, q in medians(ways, seconds).items()}
    ours = alone.pop("ours")
    best = min(alone, key=alone.__getitem__)
    return {
        "size": size,
        "seconds": {"original": alone[best], "ours": ours, **whole},
        "best_original": best,
        "limits": {
            "projection": 1 / (1 - shape.head_dim / shape.in_features),
            "attention": attention_limit(shape, tokens),
        },
    }


def slope(cells: list[dict[str, Any]], way: str) -> float:
    """Of the least-squares line through log seconds over log size."""
    points = [(math.log(cell["size"]), math.log(cell["seconds"][way])) for cell in cells]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def report(cells: dict[str, list[dict[str, Any]]], origin: dict[str, Any]) -> str:
    rows, slopes = [], []
    for what, of in cells.items():
        for cell in of:
            row = [what, str(cell["size"])]
            for name, original, ours in PAIRS:
                before, after = cell["seconds"][original], cell["seconds"][ours]
                limit = cell["limits"][name]
                texts = f"{1e6 * before:.0f}", f"{1e6 * after:.0f}", f"{before / after:.3f}"
                row += [*texts, f"{limit:.3f}", f"{before / after / limit:.2f}"]
            rows.append(row)
        ways = [way for _, *pair in PAIRS for way in pair]
        slopes.append([what, *(f"{slope(of, way):.2f}" for way in ways)])
    columns = ["varied", "size"]
    for name, *pair in PAIRS:
        columns += [f"{name}: {way}, µs" for way in pair] + ["ratio", "limit", "ratio / limit"]
    return "\n\n".join(
        [
            "# How time grows",
            heading("growth.py", origin),
            "Around 1,024 tokens and 8 heads × 64 of E = 512, float32, one thread; medians.",
            markdown_table(columns, rows),
            "Slopes of log time over log size:",
            markdown_table(["varied", *(w for _, *pair in PAIRS for w in pair)], slopes),
            "",
        ]
    )


def draw(cells: dict[str, list[dict[str, Any]]]) -> Callable[[Any], None]:
    def onto(figure: Any) -> None:
        figure.set_size_inches(10, 5.5)
        axes = figure.subplots(len(PAIRS), len(cells), squeeze=False)
        for line, (name, *pair) in zip(axes, PAIRS, strict=True):
            for ax, (what, of) in zip(line, cells.items(), strict=True):
                sizes = [cell["size"] for cell in of]
                for way in pair:
                    times = [cell["seconds"][way] for cell in of]
                    ax.loglog(sizes, times, marker="o", label=f"{way}, slope {slope(of, way):.2f}")
                label_loglog(ax, sizes, what, f"{name}, s")
                ax.legend()

    return onto


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="two sizes each, nothing is compiled")
    quick = parser.parse_args().quick
    if not serves(torch.device("cpu"), torch.float32):
        raise SystemExit("growth.py: there is no kernel to measure (see the warning)")
    torch.set_num_threads(1)
    cells = {
        what: [
            measure(what, size, 0.05 if quick else 2.0, "aot_eager" if quick else "inductor")
            for size in (sizes[:2] if quick else sizes)
        ]
        for what, sizes in SIZES.items()
    }
    origin = provenance(SEED)
    write("growth", report(cells, origin), {**origin, "cells": cells}, draw(cells), quick=quick)


if __name__ == "__main__":
    main()
