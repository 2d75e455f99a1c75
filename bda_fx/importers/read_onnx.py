"""Read an ONNX file: its nodes as the table of ops takes them, its weights as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bda_fx.exporters.exported import root_cause
from bda_fx.importers.op_table import Node, OnnxFileError, OnnxImportError
from bda_fx.importers.shape_ops import DTYPES

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST = 7
"""Operator set that broadcasts as NumPy does; before it ops say themselves how."""


@dataclass(frozen=True)
class Axis:
    """An axis of an input: its size, or the name that the file has for an open one."""

    size: int | None
    name: str | None


@dataclass(frozen=True)
class Input:
    """An input of a graph. ``axes`` is None where the file does not tell its rank."""

    name: str
    dtype: torch.dtype | None
    axes: tuple[Axis, ...] | None


@dataclass(frozen=True)
class Graph:
    """A graph, in topological order. ``constants`` are initializers and Constant nodes."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Tensor]


@dataclass(frozen=True)
class Signature:
    """What a caller sees of a file. ``opset`` is that of the standard's ops."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    opset: int


def read_signature(path: str | os.PathLike[str]) -> Signature:
    """
    Raises:
        OnnxFileError: the file is damaged.
    """
    import onnx
    import onnx_ir as ir

    try:
        proto = onnx.load(str(path), load_external_data=False)
        model = ir.serde.deserialize_model(proto)
    except Exception as error:
        raise _damaged(Path(path), error) from error
    outputs = tuple(value.name or "" for value in model.graph.outputs)
    return Signature(_inputs(model.graph), outputs, _opset(model.opset_imports))


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a file with its external data.

    Raises:
        OnnxFileError: it is damaged, or external data is missing.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, _get_all_tensors, uses_external_data

    model = Path(path)
    if not model.is_file():
        raise OnnxFileError(f"there is no file {model}; check the path")
    try:
        loaded = onnx.load(str(model), load_external_data=False)
    except Exception as error:  # protobuf's own kinds of errors
        raise _damaged(model, error) from error
    beside = {
        ExternalDataInfo(held).location
        for held in _get_all_tensors(loaded)
        if uses_external_data(held)
    }
    for name in sorted(beside):
        if not (model.parent / name).is_file():
            raise OnnxFileError(
                f"{model} has weights in {name}, which is not there; put that file beside it"
            )
    return model.stat().st_size + sum((model.parent / name).stat().st_size for name in beside)


def read_onnx(path: str | os.PathLike[str]) -> Graph:
    """The main graph of a file, with model-local functions inlined.

    Raises:
        OnnxFileError: it is no ONNX model, is damaged, or lacks external data.
        OnnxImportError: it uses what cannot be read.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass, TopologicalSortPass

    file = Path(path)
    file_bytes(file)
    try:
        onnx.checker.check_model(str(file))
    except Exception as error:
        # ONNX Runtime writes ops of its own into the standard's domain; the table may know them.
        if "No Op registered" not in str(error):
            raise _damaged(file, error) from error
    try:
        model = ir.load(file)
        if model.functions:
            model = InlinePass()(model).model
        model = TopologicalSortPass()(model).model
        opsets = dict(model.opset_imports)
        if (opset := _opset(opsets)) < OLDEST:
            raise OnnxImportError(
                f"{file} is of operator set {opset}, and {OLDEST} is the oldest that is read; "
                "convert it with onnx.version_converter, or export it anew"
            )
        return _graph(model.graph, opsets)
    except OnnxImportError:
        raise
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise _damaged(file, error) from error


def _damaged(path: Path, error: Exception) -> OnnxFileError:
    text = root_cause(error).replace(";", ",").rstrip(".")
    return OnnxFileError(f"{path} is no ONNX model, or damaged ({text}); export it once more")


def _graph(graph: ir.Graph, opsets: Mapping[str, int]) -> Graph:
    constants = {
        name: tensor_of(value.const_value, name)
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    nodes = []
    for node in graph:
        if node.op_type == "Constant" and node.domain == "":
            name = node.outputs[0].name
            assert name is not None
            constants[name] = _constant(node, name)
        else:
            nodes.append(_node(node, opsets))
    outputs = tuple(value.name or "" for value in graph.outputs)
    return Graph(_inputs(graph), outputs, tuple(nodes), constants)


def _opset(opsets: Mapping[str, int]) -> int:
    return opsets.get("", opsets.get("ai.onnx", OLDEST))


def _inputs(graph: ir.Graph) -> tuple[Input, ...]:
    """What a caller passes; older files list the weights among the inputs."""
    return tuple(_input(v) for v in graph.inputs if v.name not in graph.initializers)


def _node(node: ir.Node, opsets: Mapping[str, int]) -> Node:
    read = {value.name for value in node.outputs if value.uses() or value.is_graph_output()}
    return Node(
        op=node.op_type,
        domain=node.domain,
        opset=opsets.get(node.domain, 1),
        name=node.name or "",
        inputs=tuple(None if v is None or not v.name else v.name for v in node.inputs),
        outputs=tuple(v.name if v.name in read and v.name else None for v in node.outputs),
        attributes={
            name: _attribute(value, node, opsets)
            for name, value in node.attributes.items()
            if isinstance(value.value, object) and value.value is not None
        },
    )


def _attribute(attribute: ir.Attr, node: ir.Node, opsets: Mapping[str, int]) -> Any:
    import onnx_ir as ir

    kinds = ir.AttributeType
    if attribute.type == kinds.TENSOR:
        return tensor_of(attribute.value, f"{node.name}.{attribute.name}")
    if attribute.type == kinds.GRAPH:
        return _graph(attribute.value, opsets)
    if attribute.type in (kinds.INT, kinds.FLOAT, kinds.STRING):
        return attribute.value
    if attribute.type in (kinds.INTS, kinds.FLOATS, kinds.STRINGS):
        return list(attribute.value)
    return attribute.value


def _constant(node: ir.Node, name: str) -> Tensor:
    ((kind, attribute),) = node.attributes.items()
    if kind == "value":
        return tensor_of(attribute.value, name)
    if kind in ("value_int", "value_ints"):
        return torch.tensor(attribute.value, dtype=torch.int64)
    if kind in ("value_float", "value_floats"):
        return torch.tensor(attribute.value, dtype=torch.float32)
    raise OnnxImportError(
        f"constant {name!r} is given as {kind}, which has no counterpart in PyTorch; "
        "start from the PyTorch model"
    )


def tensor_of(value: Any, name: str) -> Tensor:
    """A tensor of the file as one of PyTorch, with memory of its own.

    Raises:
        OnnxImportError: it is of a type that PyTorch has no counterpart for.
    """
    dtype = DTYPES.get(int(value.dtype))
    if dtype is None:
        raise OnnxImportError(
            f"tensor {name!r} is of type {value.dtype}, which has no counterpart in PyTorch; "
            "quantised models and strings are not supported"
        )
    array = value.numpy()
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _input(value: ir.Value) -> Input:
    import onnx_ir as ir

    dtype = None if value.dtype is None else DTYPES.get(int(value.dtype))
    if value.shape is None:
        return Input(value.name or "", dtype, None)
    axes = []
    for size in value.shape:
        if isinstance(size, ir.SymbolicDim):
            axes.append(Axis(None, size.value))
        else:
            axes.append(Axis(int(size), None))
    return Input(value.name or "", dtype, tuple(axes))


def all_nodes(graph: Graph) -> Iterator[Node]:
    """Nodes of a graph and of the graphs in it."""
    for node in graph.nodes:
        yield node
        for value in node.attributes.values():
            if isinstance(value, Graph):
                yield from all_nodes(value)
