"""The table of ONNX ops: what each computes, in PyTorch.

An op is a function of its node and its input values (None where an optional input is left out). It
returns a value, or a tuple of them for several outputs. What a function does not know how to do it
refuses: there is no guessing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from bda_fx.exporters.exported import ExportError
from bda_fx.importers.known_values import Known, Value


class OnnxImportError(ExportError):
    """An ONNX file that cannot become a program: an op is unknown, or used in an unknown way."""


class OnnxFileError(OnnxImportError):
    """A file that is no ONNX model, is damaged, or lacks its external data."""


@dataclass(frozen=True)
class Node:
    """One node of an ONNX graph.

    ``opset`` is the version of the operator set of ``domain`` that the model imports. Attributes
    are Python values and tensors; one that is a graph is a ``read_onnx.Graph``.
    """

    op: str
    domain: str
    opset: int
    name: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def get(self, attribute: str, default: Any = None) -> Any:
        return self.attributes.get(attribute, default)

    def wants(self, output: int) -> bool:
        """Whether this output is read."""
        return output < len(self.outputs) and self.outputs[output] is not None

    def refused(self, why: str) -> OnnxImportError:
        """The error for what this node asks."""
        return OnnxImportError(
            f"{self}: {why}; export the model anew without it, or start from the PyTorch model"
        )

    def __str__(self) -> str:
        op = f"{self.domain}.{self.op}" if self.domain else self.op
        at = self.name or next((name for name in self.outputs if name), "")
        return f"node {at!r} ({op}, opset {self.opset})"


Op = Callable[..., Any]
Function = TypeVar("Function", bound=Op)

OPS: dict[tuple[str, str], Op] = {}
"""Domain ("" is the standard's) and name of an op, and the function for it."""

_STANDARD = ("", "ai.onnx")


def onnx_op(*names: str, domain: str = "") -> Callable[[Function], Function]:
    """Enter a function in the table."""

    def enter(function: Function) -> Function:
        for name in names:
            OPS[domain, name] = function
        return function

    return enter


def find_op(node: Node) -> Op:
    """The function for ``node``.

    Raises:
        OnnxImportError: the op is not in the table.
    """
    domain = "" if node.domain in _STANDARD else node.domain
    if (domain, node.op) not in OPS:
        op = f"{node.domain}.{node.op}" if node.domain else node.op
        raise OnnxImportError(
            f"the ONNX op {op} (opset {node.opset}) of node {node.name!r} is not supported; "
            "export the model anew without it, or start from the PyTorch model"
        )
    return OPS[domain, node.op]


def ints(node: Node, value: Value | None, what: str) -> list[Any]:
    """A vector of sizes, axes or the like, as Python ints and open sizes.

    Raises:
        OnnxImportError: it is computed from the values of inputs.
    """
    if not isinstance(value, Known):
        raise node.refused(f"its {what} depend on values, not on shapes alone")
    return value.items


def number(node: Node, value: Value | None, what: str) -> Any:
    """The same for one number."""
    if not isinstance(value, Known) or value.array.size != 1:
        raise node.refused(f"its {what} is no number that shapes alone tell")
    return value.item


def axes_of(node: Node, given: Value | None, rank: int) -> list[int] | None:
    """Axes, an attribute in older operator sets and an input in newer ones, from 0 on; None where
    they are left out."""
    axes = node.get("axes")
    if given is not None:
        axes = ints(node, given, "axes")
    return None if axes is None else [int(axis) % rank if rank else 0 for axis in axes]


def is_static(*sizes: Any) -> bool:
    """Whether no size is open."""
    return not any(isinstance(size, torch.SymInt) for size in sizes)
