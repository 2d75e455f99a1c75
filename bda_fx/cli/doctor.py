"""``doctor``: versions, compilers and accelerators, which exporters work, what others need."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

import bda_fx
from bda_fx import choose_truth
from bda_fx.cli.run_command import Result
from bda_fx.cli.write_output import size

PACKAGES = (
    "torch", "transformers", "safetensors", "timm", "onnx", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu12-bindings", "torch-tensorrt", "triton",
)  # fmt: skip
TOOLS = ("c++", "g++", "clang++", "cmake", "nvcc", "trtexec")


@dataclass(frozen=True)
class Ability:
    """Something bda-fx can do, if what it ``needs`` is there; ``install`` says how to get that."""

    name: str
    works: bool
    missing: str = ""
    install: str = ""


def examine() -> Result:
    """Look around; a :class:`Result` for ``run_command``."""
    found = {
        "bda_fx": bda_fx.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_available": choose_truth.available_bytes(torch.device("cpu")),
        "packages": {name: _version(name) for name in PACKAGES},
        "tools": {name: _tool(name) for name in TOOLS},
        "accelerators": _accelerators(),
        "abilities": [asdict(ability) for ability in _abilities()],
    }
    return Result(found, _tables(found))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tool(name: str) -> str | None:
    """The first line that a tool says of its version; None where there is no such tool."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return path
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1 if name == "nvcc" else 0] if lines else path


def _accelerators() -> list[str]:
    """Devices that PyTorch can use, by name; asking for them starts none."""
    found = []
    if torch.cuda.is_available():
        kind = "ROCm" if torch.version.hip else "CUDA"
        for at in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(at).total_memory
            found.append(f"{torch.cuda.get_device_name(at)} ({kind}, {size(memory)})")
    if torch.backends.mps.is_available():
        found.append("Apple MPS")
    if torch.xpu.is_available():
        found += [torch.xpu.get_device_name(at) for at in range(torch.xpu.device_count())]
    return found


def _abilities() -> list[Ability]:
    return [
        _ability("Hugging Face directories", "hf", "transformers", "safetensors"),
        _ability("timm models", "", "timm"),
        _ability("export --to onnx", "onnx", "onnx", "onnxscript", "onnxruntime"),
        _ability("export --to tensorrt", "onnx,tensorrt", "onnxscript", "tensorrt_rtx_bindings"),
        _compiled("export --to aoti"),
        _compiled('torch.compile(backend="bda")'),
        _ability("verify an ONNX file", "onnx", "onnx", "onnxruntime"),
    ]


def _ability(name: str, extra: str, *modules: str) -> Ability:
    missing = [m for m in modules if not _imports(m)]
    install = f"pip install 'bda-fx[{extra}]'" if extra else f"pip install {' '.join(missing)}"
    return Ability(name, not missing, ", ".join(missing), install if missing else "")


def _imports(module: str) -> bool:
    """Whether a module is there; it is not imported, for that may take seconds or a device."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _compiled(name: str) -> Ability:
    """What Inductor compiles needs a C++ compiler."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        return Ability(name, False, "a C++ compiler", "your system's g++ or clang++")
    return Ability(name, True)


def _tables(found: dict[str, Any]) -> Any:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    here = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    here.add_column("here")
    here.add_column("")
    here.add_row("bda-fx", found["bda_fx"])
    here.add_row("python", f"{found['python']}, {found['system']}, {found['cores']} cores")
    free = found["memory_available"]
    here.add_row("memory available", "unknown" if free is None else size(free))
    here.add_row("accelerators", ", ".join(found["accelerators"]) or "none")
    for name, number in found["packages"].items():
        here.add_row(name, number or "[dim]not installed[/]")
    for name, text in found["tools"].items():
        here.add_row(name, text or "[dim]not found[/]")
    able = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("what", "works", "missing", "to get it"):
        able.add_column(column)
    for ability in found["abilities"]:
        works = "[green]yes[/]" if ability["works"] else "[red]no[/]"
        # Square brackets of extras are not markup.
        install = ability["install"].replace("[", r"\[")
        able.add_row(ability["name"].replace("[", r"\["), works, ability["missing"], install)
    return Group(here, able)
