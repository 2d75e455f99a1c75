"""The ways a rewritten model is run, each as a callable that takes what the model takes.

A way that needs what is not installed says so (:func:`unavailable`) instead of failing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import bda_fx

Run = Callable[..., Any]

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


def unavailable(way: str) -> str | None:
    """What keeps ``way`` from running here, and what to install; None where nothing does."""
    missing = [name for name in NEEDS.get(way, ()) if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed: pip install 'bda-fx[{way}]'"
    if way in ("compiled", "aoti") and not _cpp_compiler():
        return "there is no C++ compiler, which Inductor needs"
    return None


def _cpp_compiler() -> bool:
    return bool(os.environ.get("CXX")) or any(map(shutil.which, ("g++", "clang++", "c++")))


def run_way(
    way: str,
    model: nn.Module,
    program: ExportedProgram,
    options: Mapping[str, Any],
    folder: Path,
) -> Run:
    """``model`` rewritten and made ready to run in this way.

    ``program`` is the model's own, as exported; what is written on the way goes into ``folder``.
    """
    return _RUNNERS[way](model, program, options, folder)


def _eager(model: nn.Module, program: Any, options: Mapping[str, Any], folder: Path) -> Run:
    return _compiled_with("eager", model, options)


def _compiled(model: nn.Module, program: Any, options: Mapping[str, Any], folder: Path) -> Run:
    return _compiled_with("inductor", model, options)


def _compiled_with(inner: str, model: nn.Module, options: Mapping[str, Any]) -> Run:
    settings = {**options, "inner": inner, "strict": True}
    compiled: Run = torch.compile(model, backend=bda_fx.bda_backend, options=settings)
    return compiled


def _program(
    model: nn.Module, program: ExportedProgram, options: Mapping[str, Any], folder: Path
) -> Run:
    rewritten = bda_fx.rewrite(program, options=options).program
    torch.export.save(rewritten, folder / "program.pt2")
    run: Run = torch.export.load(folder / "program.pt2").module()
    return run


def _onnx(
    model: nn.Module, program: ExportedProgram, options: Mapping[str, Any], folder: Path
) -> Run:
    from bda_fx.cli.run_onnx import OnnxModel

    path = folder / "model.onnx"
    bda_fx.export_onnx(program, path, options=options, check=False)
    return OnnxModel(path)


def _aoti(
    model: nn.Module, program: ExportedProgram, options: Mapping[str, Any], folder: Path
) -> Run:
    path = folder / "model.pt2"
    bda_fx.export_aoti(program, path, options=options, check=False)
    run: Run = torch._inductor.aoti_load_package(str(path))
    return run


_RUNNERS: dict[str, Callable[..., Run]] = {
    "eager": _eager,
    "compiled": _compiled,
    "program": _program,
    "onnx": _onnx,
    "aoti": _aoti,
}
