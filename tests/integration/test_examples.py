"""Every example runs as it stands and says what it promises (``make demo`` runs the demo)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "compile_a_model.py": "after all weights changed",
    "rewrite_and_save.py": "24 of 24 attention products rewritten",
    "verify_your_model.py": "NOT EQUIVALENT",
    "explain.py": "skipped, returned by the program",
    "register_attention.py": "2 of 2 attention products rewritten",
    "prove_it.py": "All proven.",
}


def test_every_example_is_listed() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {*SAYS, "demo.py", "models.py"}


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert SAYS[name] in result.stdout
