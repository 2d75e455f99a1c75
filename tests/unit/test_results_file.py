"""What benchmarks write: strict JSON, with the versions that made it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import results_file


def test_numbers_that_json_lacks_become_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path / "results")
    record = {"rows": [{"change": math.inf, "noise": 1.5}], "ends": (math.nan, -1.0), "n": 3}
    results_file.write("table", "| a |\n", record)
    assert (tmp_path / "results/table.md").read_text() == "| a |\n"
    text = (tmp_path / "results/table.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "rows": [{"change": None, "noise": 1.5}],
        "ends": [None, -1.0],
        "n": 3,
    }


def test_versions_name_what_is_missing() -> None:
    found = results_file.versions("torch", "a-package-that-is-not")
    assert set(found) == {"python", "torch", "a-package-that-is-not"}
    assert found["torch"] == torch.__version__
    assert found["a-package-that-is-not"] == "not installed"
