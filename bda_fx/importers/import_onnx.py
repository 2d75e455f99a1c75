"""``import_onnx``: an ONNX file as an exported program, with its names and open axes.

The nodes are run with PyTorch's ops under ``torch.export``: what the finder of sites and every
exporter then see is an ATen graph like any other.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from bda_fx.exporters.rewrite_pair import require
from bda_fx.generate_inputs import generate_inputs
from bda_fx.importers.op_table import OnnxImportError
from bda_fx.importers.read_onnx import Graph, read_onnx
from bda_fx.importers.run_graph import OnnxModule

_SIZES = ((2, 3, 5, 7), (32, 33, 35, 37, 39, 41))
"""Sizes in the example that is traced, of first axes and of others: different ones for names that
differ. What is planned and timed by tokens counts these."""

_FEW = ((2, 3, 5, 7), (5, 7, 11, 13, 17, 19))
"""The same for models that take no 32 tokens."""


def import_onnx(
    path: str | os.PathLike[str], *, dynamic: bool = True, sizes: Mapping[str, int] | None = None
) -> ExportedProgram:
    """The model in an ONNX file as a program: what ``analyze``, ``rewrite`` and exporters take.

    Inputs are keyword inputs and outputs the entries of a dict, by their names in the file;
    characters that Python has not in names become "_". Weights keep their names likewise. Axes that
    the file leaves open stay open, with the limits that the graph sets them, such as the length
    of a table of positions; those of one name have one size.

    Args:
        path: the file; external data lies beside it. Operator sets from 7 on, and the ops that
            ONNX Runtime's optimisers fuse (com.microsoft) as far as ``OPS`` lists them.
        dynamic: whether open axes stay open; else they get the sizes of the example.
        sizes: sizes of open axes in the example, by name ("batch") or by input and axis
            ("input_ids 0"). Others are chosen.

    Raises:
        OnnxFileError: the file is no ONNX model, is damaged, or lacks external data.
        OnnxImportError: an op is not supported, or a shape depends on the values of inputs; the
            error names the node.
        ExportError: onnx is not installed.

    Cost: a copy of the weights, and a run on fake tensors.
    """
    require("onnx", "'bda-fx[onnx]'", "import_onnx")
    require("onnx_ir", "'bda-fx[onnx]'", "import_onnx")
    graph = read_onnx(path)
    module = OnnxModule(graph).eval()
    failure: Exception | None = None
    for example in _examples(graph, module.names, dict(sizes or {})):
        try:
            with torch.no_grad():
                program = _export(module, example, dynamic)
        except OnnxImportError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # sizes that do not go together fail in any op
            failure = failure or error
        else:
            program.example_inputs = _typical(program)
            return program
    raise OnnxImportError(
        f"{os.fspath(path)} cannot be traced ({_first_line(failure)}); "
        "pass sizes that go together with --inputs, or start from the PyTorch model"
    ) from failure


@dataclass(frozen=True)
class _Example:
    """Inputs to trace with, and which of their axes are open."""

    kwargs: dict[str, Tensor]
    axes: dict[str, list[int]]


def _examples(graph: Graph, names: list[str], sizes: Mapping[str, int]) -> Iterator[_Example]:
    """First with a size for each name; then, where names differ that mean the same, with one for
    all first axes and one for all others."""
    for value in graph.inputs:
        if value.axes is None or value.dtype is None:
            what = "rank" if value.axes is None else "type"
            raise OnnxImportError(
                f"the {what} of input {value.name!r} is not in the file or not supported; "
                "export the model anew with shapes of its inputs"
            )
    for of_axes, alike in itertools.product((_SIZES, _FEW), (False, True)):
        yield _example(graph, names, sizes, of_axes, alike)


def _example(
    graph: Graph,
    names: list[str],
    sizes: Mapping[str, int],
    of_axes: tuple[tuple[int, ...], ...],
    alike: bool,
) -> _Example:
    known = dict(sizes)
    fresh = [itertools.cycle(some[:1] if alike else some) for some in of_axes]
    kwargs: dict[str, Tensor] = {}
    axes: dict[str, list[int]] = {}
    for value, name in zip(graph.inputs, names, strict=True):
        assert value.axes is not None
        assert value.dtype is not None
        shape: list[int] = []
        axes[name] = [at for at, axis in enumerate(value.axes) if axis.size is None]
        for at, axis in enumerate(value.axes):
            label = axis.name or f"{value.name} {at}"
            size = axis.size
            if size is None:
                size = sizes.get(f"{value.name} {at}")
            if size is None and not (alike and axis.name is None):
                size = _evaluated(label, known)
            if size is None:
                size = next(fresh[min(at, 1)])
            if axis.size is None:
                known.setdefault(label, size)
            shape.append(size)
        kwargs[name] = torch.zeros(shape, dtype=value.dtype)
    return _Example(kwargs, axes)


def _typical(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Inputs to show in place of the zeros that were traced."""
    try:
        return generate_inputs(program, 1)[0]
    except ValueError:
        return None


def _evaluated(label: str, known: Mapping[str, int]) -> int | None:
    """The size of an axis whose name is a sum of others: "past_length + 1"."""
    parts = [part.strip() for part in label.split("+")]
    if len(parts) < 2 or not all(part.isdigit() or part in known for part in parts):
        return known.get(label)
    return sum(int(part) if part.isdigit() else known[part] for part in parts)


def _export(module: OnnxModule, example: _Example, dynamic: bool) -> ExportedProgram:
    from bda_fx.passes.canonicalize import composite_attention

    shapes = {name: dict.fromkeys(axes, Dim.AUTO) for name, axes in example.axes.items()}
    with composite_attention():
        return torch.export.export(
            module, (), example.kwargs, dynamic_shapes=shapes if dynamic else None, strict=False
        )


def _first_line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).replace(";", ",").rstrip(".")
