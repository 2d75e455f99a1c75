"""Peak memory of ``bda-fx rewrite``, as a multiple of the model's weights.

A random BERT of the given size is saved as a Hugging Face directory, and the command runs on it in
a process of its own, whose largest resident set (pages of mapped files included) the system tells.

    python benchmarks/cli_memory.py [--quick] [--gigabytes 1]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bda_fx.cli.foresee_memory import PEAK

WIDTH, LAYERS_A_GIGABYTE = 1024, 20
"""A layer of BERT-large is 12 · 1024² weights of four bytes: 50 MB."""


def make_model(directory: Path, gigabytes: float) -> int:
    """Save a random BERT; bytes of its weights. In a process of its own, as it takes memory."""
    code = (
        "import sys, transformers\n"
        f"config = transformers.BertConfig(vocab_size=1000, hidden_size={WIDTH},\n"
        f"    num_hidden_layers=max(1, round({gigabytes} * {LAYERS_A_GIGABYTE})),\n"
        f"    num_attention_heads=16, intermediate_size={4 * WIDTH})\n"
        "transformers.BertModel(config).save_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def peak_of(*command: str) -> tuple[int, float, str]:
    """Largest resident set in bytes, seconds and stderr of a command."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(done.returncode)\n"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    return int(done.stdout) * unit, time.monotonic() - start, done.stderr


def measure(gigabytes: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as home:
        weights = make_model(Path(home, "model"), gigabytes)
        bda_fx = (sys.executable, "-m", "bda_fx.cli")
        nothing, _, _ = peak_of(sys.executable, "-c", "import torch, transformers.modeling_utils")
        peak, seconds, stderr = peak_of(
            *bda_fx, "rewrite", str(Path(home, "model")), "-o", str(Path(home, "out.pt2"))
        )
    return {
        "weight_bytes": weights,
        "peak_bytes": peak,
        "of_which_imports": nothing,
        "ratio": peak / weights,
        "seconds": seconds,
        "progress_lines": sum("…" in line for line in stderr.splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true", help="a small model: measures nothing")
    chosen = parser.parse_args()
    found = measure(0.05 if chosen.quick else chosen.gigabytes)
    print(json.dumps(found, indent=2))
    if not chosen.quick and float(str(found["ratio"])) > PEAK:
        raise SystemExit(f"peak memory is {found['ratio']:.2f} × the weights, above {PEAK}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
