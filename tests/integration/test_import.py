"""`import bda_fx` is cheap and touches nothing: the compiler is loaded at first use."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = 3
MAX_SECONDS = 0.3

# Loaded only by what needs them. torch is imported first, so what it loads itself does not count.
LAZY = {
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sympy",
    "triton",
}

# What a process whose caches hold everything does without: near half a second of imports.
PLANNER = {"pipeline", "rewrite_dynamo", "report", "passes.plan_sites", "passes.transform_weights"}

MEASURE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import bda_fx
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "loaded": sorted(set(sys.modules) - before),
    "file": bda_fx.__file__,
    "device": torch.cuda.is_initialized(),
}))
"""


def test_the_backend_imports_no_planner() -> None:
    code = "import sys, bda_fx.backend; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "bda_fx.rewrite_cache" in loaded  # negative control: names are like these
    assert not {f"bda_fx.{name}" for name in PLANNER} & loaded


def test_import_is_cheap_and_initialises_no_device() -> None:
    runs = []
    for _ in range(RUNS):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))

    for run in runs:
        assert Path(run["file"]) == ROOT / "bda_fx" / "__init__.py"
        assert not run["device"]
        loaded = {
            name for name in run["loaded"] for lazy in LAZY if f"{name}.".startswith(f"{lazy}.")
        }
        assert not loaded
    assert statistics.median(run["seconds"] for run in runs) <= MAX_SECONDS
