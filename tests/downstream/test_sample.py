"""A project of its own uses the pytest plugin: what passes, what fails, and how that reads.

It runs in a pytest of its own, with this plugin alone, as after ``pip install bda-fx``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = Path(__file__).parent / "sample"


def run_pytest(*arguments: str, cwd: Path = SAMPLE) -> tuple[int, str]:
    """Exit code and output of pytest in a project."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = (sys.executable, "-m", "pytest", "-p", "bda_fx.testing.plugin", "--tb=short")
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sample() -> str:
    """The output of all tests of the project."""
    code, output = run_pytest("-v")
    assert code == 1, output
    return output


def test_good_models_pass_in_every_dtype_and_way(sample: str) -> None:
    for dtype in ("float32", "bfloat16"):
        for way in ("eager", "program"):
            assert f"test_every_dtype_and_way[{dtype}-{way}] PASSED" in sample
    assert "test_my_own_candidate PASSED" in sample


def test_a_wrong_weight_fails_with_a_table(sample: str) -> None:
    assert "test_a_candidate_with_a_wrong_weight FAILED" in sample
    assert "the models are not equivalent" in sample
    assert re.search(r"candidate +NOT EQUIVALENT, [\d.]+ × the original's own error", sample)
    assert "| output | dtype | error | reference's own | ratio |" in sample
    assert re.search(r"\| output 0 \| float32 \| .* \| \*\*no\*\* \|", sample)


def test_a_noisy_rewrite_fails_and_shows_the_sites(sample: str) -> None:
    assert "test_a_basis_that_is_too_noisy[float32-program] FAILED" in sample
    assert re.search(r"program +NOT EQUIVALENT, [\d.]+ × .*budget 2\)", sample)
    assert "+ qk q.weight: 3 heads × 8, basis 8 of 24" in sample


def test_nothing_heavy_is_loaded_when_pytest_starts(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text(
        "import sys\n"
        "def test_light():\n"
        "    assert 'bda_fx.testing.plugin' in sys.modules\n"
        "    heavy = {'torch', 'numpy', 'onnx', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy\n"
    )
    code, output = run_pytest("-q", cwd=tmp_path)
    assert code == 0, output


def test_a_way_that_there_is_not(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nbda_fx_ways = warp\n")
    (tmp_path / "test_warp.py").write_text("def test_warp(bda_equivalence): pass\n")
    code, output = run_pytest("-q", cwd=tmp_path)
    assert code != 0
    assert "there is no warp; the ways are eager, compiled, program, onnx, aoti" in output


def test_what_is_not_installed_is_skipped_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nbda_fx_ways = onnx\n")
    (tmp_path / "conftest.py").write_text(
        "import bda_fx.testing.run_ways as ways\nways.NEEDS['onnx'] = ('no_such_package',)\n"
    )
    (tmp_path / "test_onnx.py").write_text("def test_it(bda_equivalence): assert False\n")
    code, output = run_pytest("-q", "-rs", cwd=tmp_path)
    assert code == 0, output
    assert "no_such_package is not installed: pip install 'bda-fx[onnx]'" in output
