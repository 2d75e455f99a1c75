"""Say which model an artefact is of, and how it was made: hash, versions, options, command."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

import bda_fx
from bda_fx.options import Options
from bda_fx.tensor_bytes import tensor_bytes


def hash_weights(program: ExportedProgram) -> str:
    """SHA-256 of all parameters, buffers and constants: names, dtypes, shapes and bytes, by name.

    The same for one checkpoint however it was loaded; changes with any single bit of it.
    """
    digest = hashlib.sha256()
    tensors = {**program.state_dict, **program.constants}
    for name, value in sorted(tensors.items()):
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        if value.device.type != "meta":
            digest.update(tensor_bytes(value))
    return digest.hexdigest()


def identify_model(
    program: ExportedProgram, options: Options, command: str, packages: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The record that goes into every artefact's evidence. Cost: one pass over the weights."""
    return {
        "weights_sha256": hash_weights(program),
        "versions": {
            "bda_fx": bda_fx.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: installed(package) for package in packages},
        },
        "options": asdict(options),
        "command": command,
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def call_of(function: str, path: Any, options: Options, **arguments: Any) -> str:
    """The call that makes an artefact again, with what differs from the defaults."""
    changed = {
        f.name: getattr(options, f.name)
        for f in fields(Options)
        if getattr(options, f.name) != getattr(Options(), f.name)
    }
    given: Mapping[str, Any] = {"options": changed, **arguments} if changed else arguments
    text = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
    return f"bda_fx.{function}(model, {str(path)!r}, args, kwargs{text})"
