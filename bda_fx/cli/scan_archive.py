"""Look into a ``.pt2`` archive before it is loaded, so that loading it runs no code of its own.

``torch.export.load`` unpickles what an archive asks it to, resolves the targets of its nodes by
name below ``torch``, evaluates its size expressions with ``sympify`` and executes its guards. So:

    payloads    plain tensors alone; example inputs that load with ``weights_only=True``
    targets     operators (``torch.ops.namespace.name``), and functions of ``operator`` and ``math``
    expressions arithmetic and calls of functions on sizes; strings are names, nothing is hidden
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bda_fx.cli.errors import CliError, ExitCode, first_line

_TARGET = re.compile(
    r"torch\.ops\.(?!load_library)\w+\.\w+(\.\w+)?|(_operator|math)\.[a-z]\w*"
    r"|torch\.(sym_\w+|_sym_\w+|_C\._set_grad_enabled)|torch\._higher_order_ops\.[\w.]+"
    r"|#[\w.:]+"
)
_FUNCTIONS = {"abs", "bool", "ceiling", "floor", "int", "isinstance", "len", "max", "min", "sqrt"}
_METHODS = {"dim", "is_contiguous", "numel", "size", "storage_offset", "stride"}
_SYNTAX = (
    ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Constant,
    ast.Attribute, ast.Subscript, ast.Name, ast.Tuple, ast.List, ast.IfExp, ast.keyword,
    ast.operator, ast.boolop, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip


_OUTPUT_CLASS = re.compile(rb'\\"type\\": \\"(transformers(?:\.\w+)*)\.\w+\\"')
"""A class of transformers in the structure of inputs or outputs (JSON within JSON)."""


@dataclass(frozen=True)
class Scanned:
    """What an archive that may be loaded holds. ``modules`` of transformers define the classes that
    its program takes or returns: they must be imported first."""

    weight_bytes: int
    modules: tuple[str, ...]


def scan_archive(path: Path, *, unsafe: bool = False) -> Scanned:
    """Look into an archive.

    Raises:
        CliError: the file is no archive of an ``ExportedProgram``, is damaged, or (without
            ``unsafe``) would run code while it is loaded.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            _check_kind(path, names)
            if not unsafe:
                _check_payloads(path, archive, names)
                _check_graphs(path, archive, names)
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            graphs = [archive.read(names[name]) for name in names if name.startswith("models/")]
    except (zipfile.BadZipFile, EOFError, KeyError, UnicodeDecodeError, ValueError) as error:
        raise CliError(
            f"{path} is damaged or no .pt2 archive: {first_line(error)}",
            "save it once more with torch.export.save",
            ExitCode.CANNOT_OPEN,
        ) from error
    payloads = ("data/weights/", "data/constants/")
    weight_bytes = sum(sizes[full] for name, full in names.items() if name.startswith(payloads))
    found = {match.decode() for graph in graphs for match in _OUTPUT_CLASS.findall(graph)}
    return Scanned(weight_bytes, tuple(sorted(found)))


def _check_kind(path: Path, names: dict[str, str]) -> None:
    if any(name.startswith("models/") for name in names):
        return
    if any(name.startswith("data/aotinductor/") for name in names):
        raise CliError(
            f"{path} is a compiled AOTInductor package, not an ExportedProgram",
            "pass the program or the model that it was compiled from",
            ExitCode.CANNOT_OPEN,
        )
    if "data.pkl" in names:
        raise CliError(
            f"{path} is a pickle checkpoint, not an ExportedProgram",
            "rename it to .pt and pass --unsafe if you trust it, or save the model with "
            "torch.export.save",
            ExitCode.CANNOT_OPEN,
        )
    raise CliError(
        f"{path} holds no ExportedProgram",
        "save one with torch.export.save(program, 'model.pt2')",
        ExitCode.CANNOT_OPEN,
    )


def _check_payloads(path: Path, archive: zipfile.ZipFile, names: dict[str, str]) -> None:
    import torch

    for name, full in names.items():
        if name.endswith("_config.json"):
            for key, payload in json.loads(archive.read(full)).get("config", {}).items():
                if payload.get("use_pickle"):
                    raise _refusal(path, f"{key} is stored as a pickle")
        elif name.startswith("data/sample_inputs/") or _is_legacy(name):
            _load_weights_only(torch, path, name, archive.read(full))


def _is_legacy(name: str) -> bool:
    """Weights or constants in one file, as PyTorch before 2.9 wrote them."""
    return name.startswith(("data/weights/", "data/constants/")) and name.endswith(".pt")


def _load_weights_only(torch: Any, path: Path, name: str, data: bytes) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refusal(path, f"{name} needs a pickle: {first_line(error)}") from error


def _check_graphs(path: Path, archive: zipfile.ZipFile, names: dict[str, str]) -> None:
    for name, full in names.items():
        if not name.startswith("models/"):
            continue
        program = json.loads(archive.read(full))
        for guard in program.get("guards_code") or ():
            _check_expression(path, guard)
        for key, value in _fields(program):
            if key == "target" and "." in value and not _TARGET.fullmatch(value):
                raise _refusal(path, f"a node calls {value!r}, which is no operator")
            if key == "expr_str":
                _check_expression(path, value)


def _fields(value: Any) -> Iterator[tuple[str, str]]:
    """Targets of nodes and expressions, wherever they are. Other things have targets too (what a
    placeholder stands for), so a target is one beside ``inputs`` and ``outputs``."""
    stack = [value]
    while stack:
        current = stack.pop()
        if isinstance(current, dict):
            is_node = "inputs" in current and "outputs" in current
            for key, item in current.items():
                if isinstance(item, str) and (key == "expr_str" or (key == "target" and is_node)):
                    yield key, item
            stack += current.values()
        elif isinstance(current, list):
            stack += current


def _check_expression(path: Path, text: str) -> None:
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise _refusal(path, f"{text!r} is no expression of sizes") from error
    for node in ast.walk(tree):
        allowed = isinstance(node, _SYNTAX)
        if isinstance(node, ast.Name | ast.Attribute):
            allowed = not (node.id if isinstance(node, ast.Name) else node.attr).startswith("__")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            allowed = node.value.isidentifier() and not node.value.startswith("__")
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            simple = isinstance(node.func, ast.Name)
            allowed = (simple and (name in _FUNCTIONS or name[:1].isupper())) or name in _METHODS
        if not allowed:
            raise _refusal(path, f"{text!r} is no expression of sizes")


def _refusal(path: Path, reason: str) -> CliError:
    return CliError(
        f"{path} would run code when it is loaded: {reason}",
        "pass --unsafe if you trust whoever made it",
        ExitCode.CANNOT_OPEN,
    )
