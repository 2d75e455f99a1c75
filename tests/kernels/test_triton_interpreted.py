"""The Triton kernel is right in every form, under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tolerances import float32_sum

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpret_triton"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_at_least_as_near_to_float64_as_the_aten_form(measured: list[dict[str, Any]]) -> None:
    assert {run["dtype"] for run in measured} == {
        "torch.float16", "torch.bfloat16", "torch.float32"
    }  # fmt: skip
    for run in measured:
        assert run["shape"], run
        # In float32 two orders of one sum are as good as each other.
        chance = float32_sum(run["terms"]) if run["dtype"] == "torch.float32" else 0.0
        assert run["kernel"] <= max(run["aten"], chance), run


def test_one_rounding_beats_two(measured: list[dict[str, Any]]) -> None:
    """Where a basis feature is added, the ATen form has rounded the product before."""
    halves = [run for run in measured if run["dtype"] != "torch.float32"]
    added = [run for run in halves if run["form"].startswith(("scattered", "many", "odd"))]
    assert added
    for run in added:
        assert run["kernel"] < run["aten"], run


def test_split_sums_are_the_same_each_time(measured: list[dict[str, Any]]) -> None:
    split = [run for run in measured if run["splits"] > 1]
    assert {run["splits"] for run in split} == {2, 5}
    assert all(run["again"] for run in split)
