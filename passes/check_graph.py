"""Check a graph between passes: well formed, in order, typed, and with nothing dangling.

Requires nothing and changes nothing. A violation is a bug in a pass, so it raises with the node and
the rule that it breaks.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes.canonicalize import Program
from bda_fx.passes.emit_node import EMITTED, fake_mode_of, fake_value


class GraphError(AssertionError):
    """A pass left a graph that breaks a rule of ``check_graph``."""


def check_graph(program: Program) -> None:
    """Raise :class:`GraphError` at the first broken rule."""
    graph = program.graph
    try:
        graph.lint()
    except RuntimeError as error:
        raise GraphError(f"graph.lint: {error}") from error
    mode = fake_mode_of(graph)
    body_began = False
    for node in graph.nodes:
        if node.op == "placeholder":
            _require(not body_began, node, "placeholders come first")
            continue
        body_began = True
        if node.op == "output":
            continue
        _require(
            node.op in ("call_function", "get_attr"), node, f"no {node.op} nodes in functional ATen"
        )
        if node.op != "call_function":
            continue
        known = isinstance(node.target, torch._ops.OperatorBase) or (
            getattr(node.target, "__module__", None)
            in ("_operator", "math", "torch", "torch._sym_ops")
        )
        _require(known or node.target is operator.getitem, node, f"unknown target {node.target}")
        _require(bool(node.users) or node.is_impure(), node, "a node that nobody reads")
        _require("val" in node.meta or not node.users, node, "no fake value in meta")
        if EMITTED in node.meta and mode is not None:
            _check_value(node, mode)


def _check_value(node: fx.Node, mode: Any) -> None:
    try:
        expected = fake_value(node, mode)
    except Exception as error:
        raise GraphError(f"{node.format_node()}: does not run on fake values: {error}") from error
    actual = node.meta["val"]
    if not isinstance(expected, Tensor):
        _require(
            type(expected) is type(actual), node, f"meta says {actual}, the op gives {expected}"
        )
        return
    for what in ("shape", "dtype", "device"):
        want, have = getattr(expected, what), getattr(actual, what)
        same = have == want if what != "shape" else _same_shape(have, want)
        _require(same, node, f"meta says {what} {have}, the op gives {want}")


def _same_shape(a: torch.Size, b: torch.Size) -> bool:
    return len(a) == len(b) and all(
        x.node.expr == y.node.expr
        if isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt)
        else isinstance(x, torch.SymInt) == isinstance(y, torch.SymInt) and x == y
        for x, y in zip(a, b, strict=True)
    )


def _require(condition: bool, node: fx.Node, rule: str) -> None:
    if not condition:
        raise GraphError(f"{node.format_node() or node.name}: {rule}")
