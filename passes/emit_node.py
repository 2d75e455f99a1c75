"""Insert ATen nodes with their ``meta`` filled in: fake value, stack trace, module stack."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode that the graph's values belong to."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    return None


def emit(graph: fx.Graph, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """``target(*args)`` as a new node at the insertion point, traced back to where ``like`` is.

    The fake value is computed by running the op on the fake values of its arguments, so symbolic
    sizes stay symbolic and a shape error surfaces here, with the op that made it.
    """
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: like.meta[key] for key in COPIED_META if key in like.meta}
    values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = fake_mode_of(graph)
    with mode or contextlib.nullcontext(), torch.no_grad():
        node.meta["val"] = target(*values, **named)
    return node
