"""Time what preparing one layer costs: basis choice, change of basis and noise prediction.

    python benchmarks/prepare.py [--quick]

Random weights in the shapes of MLA layers (K and V projections, each with its own basis). Prints a
Markdown table and writes results/prepare.json beside this script: medians in seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bda_fx.passes.change_basis import change_basis
from bda_fx.passes.choose_basis import choose_basis
from bda_fx.passes.predict_noise import PartnerHeads, predict_noise

RESULTS = Path(__file__).parent / "results" / "prepare.json"
SEED = 0


@dataclass(frozen=True)
class Case:
    """One projection: G heads, E input features, D features per head, r basis rows."""

    model: str
    heads: int
    in_features: int
    head_dim: int
    size: int
    projections: int


@dataclass(frozen=True)
class Row:
    """Seconds for all projections of a layer (medians), and the site's predicted noise."""

    case: Case
    strategy: str
    choose_s: float
    change_s: float
    predict_s: float
    noise: float
    worst_head: float


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


def measure(case: Case, strategy: str, repeats: int) -> Row:
    generator = torch.Generator().manual_seed(SEED)
    shape = (case.heads, case.in_features, case.head_dim)
    weights = torch.randn(shape, generator=generator)
    groups = torch.arange(case.heads)
    partner = PartnerHeads(torch.randn(shape, generator=generator).mT, None, groups)
    rows, choose_s = timed(lambda: choose_basis(weights, case.size, strategy), repeats)
    change, change_s = timed(lambda: change_basis(weights, rows), repeats)
    (noise, worst), predict_s = timed(
        lambda: predict_noise(weights, None, change, [partner]), repeats
    )
    layer = [t * case.projections for t in (choose_s, change_s, predict_s)]
    return Row(case, strategy, *layer, noise, worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="pivot on the small layer, once")
    quick = parser.parse_args().quick
    models = [("DeepSeek-V2-Lite", 16)] if quick else [("DeepSeek-V2-Lite", 16), ("V3", 128)]
    strategies = ["pivot"] if quick else ["pivot", "window", "residual-min", "first"]
    cases = [Case(name, g, 512, 128, size, 2) for name, g in models for size in (128, 112)]
    choose_basis(torch.randn(2, 64, 16), 16, "pivot")  # starts the thread pool
    print("| layer (K and V) | r | basis | choose s | change s | predict s | noise | worst head |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for case in cases:
        for strategy in strategies:
            row = measure(case, strategy, 1 if quick else 3)
            rows.append(row)
            print(
                f"| {case.model}, {case.heads} × {case.head_dim} of {case.in_features} "
                f"| {case.size} | {strategy} | {row.choose_s:.2f} | {row.change_s:.2f} "
                f"| {row.predict_s:.2f} | {row.noise:.2f} | {row.worst_head:.1f} |",
                flush=True,
            )
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "device": f"cpu ({platform.machine()}), {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seed": SEED,
        "quick": quick,
        "unit": "seconds per layer (all its projections), median",
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
