"""Bytes of weights in an ONNX file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

SHAPE = 16
"""Elements of the largest vector that is taken for a shape or for paddings of one."""


def weight_bytes(path: Path) -> int:
    """Bytes of all weights of an ONNX file; external data is not loaded.

    Integer vectors of a few elements and scalars are no weights but the shapes, axes and factors of
    the graph: translators write them as constants and a program does not count them.
    """
    total = 0
    for tensor in _constants(onnx.load(str(path), load_external_data=False).graph):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        elements = math.prod(tensor.dims)
        integer = np.issubdtype(dtype, np.integer)
        if tensor.dims and not (integer and len(tensor.dims) == 1 and elements <= SHAPE):
            total += elements * dtype.itemsize
    return total


def _constants(graph: Any) -> Iterator[Any]:
    """Initializers, and constants that are written as nodes."""
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))
