"""What benchmarks write: strict JSON, with the versions that made it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_numbers_that_json_lacks_become_strings(results: Path) -> None:
    found = {"rows": [{"change": math.inf, "noise": 1.5}], "ends": (math.nan, -1.0), "n": 3}
    record.write("table", "| a |\n", found)
    assert (results / "table.md").read_text() == "| a |\n"
    text = (results / "table.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "rows": [{"change": "inf", "noise": 1.5}],
        "ends": ["nan", -1.0],
        "n": 3,
    }


def test_the_same_drawing_is_the_same_file(results: Path) -> None:
    def draw(figure: Any) -> None:
        figure.add_subplot().plot([1, 2])

    record.write("plot", "text\n", {}, draw)
    first = (results / "plot.svg").read_text()
    record.write("plot", "text\n", {}, draw)
    assert (results / "plot.svg").read_text() == first
    assert "plot.svg" in (results / "plot.md").read_text()


def test_a_quick_run_leaves_nothing(results: Path) -> None:
    record.write("table", "| a |\n", {"n": 1}, quick=True)
    assert not results.exists()


def test_versions_name_what_is_missing() -> None:
    origin = record.provenance(3, ("a-package-that-is-not",))
    assert origin["versions"]["torch"] == torch.__version__
    assert origin["versions"]["a-package-that-is-not"] == "not installed"
    assert "seed 3" in record.heading("table.py", origin)
