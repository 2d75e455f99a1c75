"""Run an ONNX graph with PyTorch's ops, node by node, as a module that can be exported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bda_fx.importers import (  # noqa: F401 - each enters its ops in the table
    arithmetic_ops,
    attention_ops,
    index_ops,
    linear_ops,
    microsoft_ops,
    move_ops,
    norm_ops,
    reduce_ops,
    shape_ops,
)
from bda_fx.importers.known_values import Known, Value, fits, tensor
from bda_fx.importers.name_weights import name_weights, valid_names
from bda_fx.importers.op_table import Node, OnnxImportError, find_op
from bda_fx.importers.read_onnx import Graph, all_nodes

CONTROL = ("If",)
"""Ops with graphs in them that are run: the branch that shapes alone choose."""


class OnnxModule(nn.Module):
    """A graph as a module: keyword inputs by name, outputs as a dict by name.

    Weights are parameters, other constants buffers, under their ONNX names as far as a module may
    have such names (``name_weights``). Numbers and shapes are none of them.
    """

    def __init__(self, graph: Graph) -> None:
        """
        Raises:
            OnnxImportError: an op is not supported.
        """
        super().__init__()
        for node in all_nodes(graph):
            if node.op not in CONTROL:
                find_op(node)
        self.graph = graph
        self.names = valid_names([value.name for value in graph.inputs])
        """For each input of the graph the name of the argument."""
        self.weights: dict[str, str] = {}
        """For each constant that is held as a tensor where it lies in the module."""
        self.known: dict[str, Known] = {}
        held = {}
        for name, value in _constants(graph).items():
            if fits(value.dtype, value.shape):
                self.known[name] = Known(value.numpy(), value.dtype)
            else:
                held[name] = value
        self.weights = name_weights(graph, held)
        for name, value in held.items():
            _hold(self, self.weights[name], value)

        def forward(*args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
            return self.run(dict(zip(self.names, args, strict=False)) | kwargs)

        # ``torch.export`` reads the names of the inputs off the signature.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in self.names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name for inputs by the names of the arguments."""
        self._same_sizes(inputs)
        values: dict[str, Value] = dict(self.known)
        values |= {name: self._held(path) for name, path in self.weights.items()}
        for value, name in zip(self.graph.inputs, self.names, strict=True):
            values[value.name] = inputs[name]
        made = _run(self.graph, values)
        return {name: tensor(value) for name, value in made.items()}

    def _same_sizes(self, inputs: Mapping[str, Tensor]) -> None:
        """Axes of one name have one size: said, so that they stay one when they are left open."""
        first: dict[str, Any] = {}
        for value, name in zip(self.graph.inputs, self.names, strict=True):
            for at, axis in enumerate(value.axes or ()):
                if axis.name is not None:
                    size = inputs[name].shape[at]
                    if first.setdefault(axis.name, size) is not size:
                        torch._check(first[axis.name] == size)

    def _held(self, path: str) -> Tensor:
        *modules, name = path.split(".")
        owner: nn.Module = self
        for part in modules:
            owner = getattr(owner, part)
        found: Tensor = getattr(owner, name)
        return found


def _constants(graph: Graph) -> dict[str, Tensor]:
    """Constants of a graph and of the graphs in it."""
    found = dict(graph.constants)
    for node in all_nodes(graph):
        for value in node.attributes.values():
            if isinstance(value, Graph):
                found |= value.constants
    return found


def _run(graph: Graph, values: dict[str, Value]) -> dict[str, Value]:
    """Outputs of a graph; ``values`` are what it may read, by name, and take what it makes."""
    for node in graph.nodes:
        try:
            inputs = [None if name is None else values[name] for name in node.inputs]
        except KeyError as error:
            raise OnnxImportError(
                f"{node} reads {error}, which nothing makes; export the model anew"
            ) from error
        if node.op in CONTROL:
            made: Any = _run_branch(node, inputs, values)
        else:
            made = find_op(node)(node, *inputs)
        made = made if isinstance(made, tuple | list) else (made,)
        for name, value in zip(node.outputs, made, strict=False):
            if name is not None:
                values[name] = value
    return {name: values[name] for name in graph.outputs}


def _run_branch(node: Node, inputs: list[Value | None], values: dict[str, Value]) -> Any:
    (condition,) = inputs
    if not isinstance(condition, Known):
        raise node.refused("which branch it takes depends on values, not on shapes alone")
    branch = node.get("then_branch" if condition.item else "else_branch")
    return tuple(_run(branch, dict(values)).values())


def _hold(module: nn.Module, path: str, value: Tensor) -> None:
    """Put a tensor where ``path`` says, in modules that are made on the way."""
    *modules, name = path.split(".")
    for part in modules:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if value.is_floating_point():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(name, value)
