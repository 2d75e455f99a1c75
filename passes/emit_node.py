"""Insert ATen nodes with their ``meta`` filled in: fake value, stack trace, module stack."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

EMITTED = "bda_fx_emitted"
"""Key in ``meta`` of nodes that a pass made; ``check_graph`` recomputes their fake values."""
_GENERATED = re.compile(r'/torch/|"<')  # frames that are not the user's
COPIED_META = ("nn_module_stack", "source_fn_stack", "torch_fn")


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
    if like.meta.get("stack_trace"):
        node.meta["stack_trace"] = innermost_frame(like.meta["stack_trace"])
    node.meta[EMITTED] = True
    node.meta["val"] = fake_value(node, fake_mode_of(graph))
    return node


def emit_view(graph: fx.Graph, x: fx.Node, shape: Any, *, like: fx.Node) -> fx.Node:
    """``x`` in another shape: a view, or a reshape where its strides allow none."""
    node = emit(graph, torch.ops.aten.reshape.default, x, shape, like=like)
    node.target = torch.ops.aten.view.default
    try:
        node.meta["val"] = fake_value(node, fake_mode_of(graph))
    except (RuntimeError, ValueError):
        node.target = torch.ops.aten.reshape.default
    return node


def innermost_frame(trace: str) -> str:
    """The user's innermost frame of a stack trace: saved programs store a trace for each node."""
    lines = trace.rstrip().splitlines()
    starts = [i for i, line in enumerate(lines) if line.lstrip().startswith("File ")]
    if not starts:
        return trace
    ends = [*starts[1:], len(lines)]
    frames = ["\n".join(lines[a:b]) for a, b in zip(starts, ends, strict=True)]
    own = [
        f for f in frames if "/torch/" not in f.splitlines()[0] and '"<' not in f.splitlines()[0]
    ]
    return (own or frames)[-1]


def fake_value(node: fx.Node, mode: FakeTensorMode | None) -> Any:
    """What ``node`` gives on the fake values of its arguments; symbolic sizes stay symbolic."""
    values: Any
    values, named = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    if node.target is torch.ops.aten.sym_size.int:  # the op itself would fix the size
        return values[0].shape[values[1]]
    with mode or contextlib.nullcontext(), enable_python_dispatcher(), torch.no_grad():
        return node.target(*values, **named)  # type: ignore[operator]
