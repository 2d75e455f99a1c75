"""``export_aoti``: one package, run by Python without bda_fx and by C++ without Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bda_fx
from bda_fx.exporters.export_aoti import compile_package
from tests.exporters.deployed import BATCH, LENGTH
from tests.programs import Attention, example, randn

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_in_cpp"
SHAPES = {"x": {0: BATCH, 1: LENGTH}}

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: c++")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bda_fx.Exported:
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    return bda_fx.export_aoti(
        Attention(), path, (), {"x": example()}, dynamic_shapes=SHAPES,
        options={"basis_size": "full"}, measure=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(exported: bda_fx.Exported, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Input of another size than any before, and what the loaded package gives for it in Python."""
    directory = tmp_path_factory.mktemp("runs")
    x = randn(3, 11, 20, seed=7)
    torch.save([x], directory / "inputs.pt")
    return directory, torch._inductor.aoti_load_package(str(exported.path))(x=x)


def test_evidence(exported: bda_fx.Exported) -> None:
    names = ["model.pt2", "model.pt2.bda.json", "model.pt2.bda.md"]
    assert [file.name for file in exported.files] == names
    assert sorted(f.name for f in exported.path.parent.iterdir()) == names
    assert exported.bytes_saved == 2 * 24 * 6 * 4  # K and V, without the basis' columns
    assert exported.fidelity is not None
    assert exported.fidelity.passed
    assert exported.details["yardstick"] == "the original in eager"


LOADER = """
import sys
sys.modules["bda_fx"] = None  # importing it raises
import torch
(x,) = torch.load(sys.argv[2])
torch.save(torch._inductor.aoti_load_package(sys.argv[1])(x=x), sys.argv[3])
assert not any(name.startswith("bda_fx.") for name in sys.modules)
"""


def test_runs_where_bda_fx_is_not_installed(exported: bda_fx.Exported, runs: Any) -> None:
    directory, expected = runs
    (directory / "load.py").write_text(LOADER)
    command = [sys.executable, "load.py", str(exported.path), "inputs.pt", "python.pt"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(directory / "python.pt"), expected)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_runs_in_cpp(exported: bda_fx.Exported, runs: Any, tmp_path: Path) -> None:
    directory, expected = runs
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", str(EXAMPLE), "-B", str(tmp_path), prefix],
        ["cmake", "--build", str(tmp_path)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    program = str(tmp_path / "run_package")
    files = [str(exported.path), "inputs.pt", "cpp.pt"]
    done = subprocess.run([program, *files], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "CPUFloatType [3, 11, 20]\n"
    (found,) = torch.load(directory / "cpp.pt")
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)
    failed = subprocess.run([program, "absent.pt2", "inputs.pt", "x.pt"], cwd=directory,
                            capture_output=True, text=True)  # fmt: skip
    assert failed.returncode == 1
    assert "absent.pt2" in failed.stderr
    assert subprocess.run([program], capture_output=True).returncode == 2


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(bda_fx.ExportError, match=r"model\.so: the name of a package ends with"):
        bda_fx.export_aoti(Attention(), tmp_path / "model.so", (example(),))

    def no_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("wrapped") from FileNotFoundError("c++ not found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", no_compiler)
    with pytest.raises(bda_fx.ExportError, match=r"does not compile the program: c\+\+ not found"):
        bda_fx.export_aoti(Attention(), tmp_path / "model.pt2", (example(),))
    assert list(tmp_path.iterdir()) == []


def test_the_program_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor works on a copy: what the caller exports twice is the same twice."""
    from bda_fx.api import export_module

    program = export_module(Attention(), (example(),))
    before = str(program.graph)
    given: list[Any] = []

    def compiler(own: Any, **_: Any) -> None:
        given.append(own)
        for node in own.graph.find_nodes(op="output"):
            own.graph.erase_node(node)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    compile_package(program, tmp_path / "model.pt2", {})
    assert given[0] is not program
    assert str(program.graph) == before
