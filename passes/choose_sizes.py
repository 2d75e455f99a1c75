"""Choose the sizes at which a graph is run on labels, and evaluate its constant indices there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from bda_fx.passes.canonicalize import Program

MAX_INDEX = 1 << 20  # constant indices up to this many elements are looked at


UNKNOWN_SIZE = 3  # stands for a size that depends on data and has no example


def choices_of_sizes(graph: fx.Graph) -> list[Callable[[Any], int]]:
    """The example's sizes, and a second set for dynamic dimensions: a finding must hold at both."""
    first: dict[Any, int] = {}
    second: dict[Any, int] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        for dim in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(dim, torch.SymInt):
                known = dim.node.shape_env
                for symbol in dim.node.expr.free_symbols - set(first):
                    size = int(known.backed_var_to_val.get(symbol, UNKNOWN_SIZE))
                    first[symbol] = size
                    second[symbol] = _another_size(size, known.var_to_range.get(symbol))

    def at(assignment: dict[Any, int]) -> Callable[[Any], int]:
        def size(value: Any) -> int:
            if not isinstance(value, torch.SymInt):
                return value
            return int(value.node.expr.subs(assignment))

        return size

    return [at(first)] if first == second else [at(first), at(second)]


def example_size(value: Any) -> int:
    """A size at the example's sizes."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    known = value.node.shape_env.backed_var_to_val
    symbols = value.node.expr.free_symbols
    return int(value.node.expr.subs({s: int(known.get(s, UNKNOWN_SIZE)) for s in symbols}))


def _another_size(size: int, allowed: Any) -> int:
    """Twice the size, which keeps most divisibilities, or another one in the allowed range."""
    if allowed is None or 2 * size <= allowed.upper:
        return 2 * size
    smaller = size - 1
    return smaller if smaller >= max(2, allowed.lower) else size


def index_value(program: Program, size: Callable[[Any], int]) -> Callable[[fx.Node], Tensor | None]:
    """Evaluate small index tensors, and scalars, that depend on sizes and constants alone."""
    memo: dict[fx.Node, Tensor | None] = {}

    def evaluate(node: fx.Node) -> Tensor | None:
        if node not in memo:
            memo[node] = compute(node)
        return memo[node]

    def compute(node: fx.Node) -> Tensor | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or (value.is_floating_point() and value.dim() > 0):
            return None
        if node.op == "placeholder" and program.exported is not None:
            known = program.tensors.get(node.name)  # a buffer of a compiled module may change
            learned = program.names.get(node.name) in program.exported.state_dict
            return None if value.is_floating_point() and learned else _with_values(known)
        if node.op == "get_attr":
            return _with_values(getattr(program.module, str(node.target), None))
        if node.op != "call_function":
            return None
        if torch.Size([size(s) for s in value.shape]).numel() > MAX_INDEX:
            return None
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        failed = False

        def argument(n: fx.Node) -> Any:
            nonlocal failed
            inner = n.meta.get("val")
            if not isinstance(inner, Tensor):
                return size(inner)
            result = evaluate(n)
            failed |= result is None
            return result

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
        if failed:
            return None
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError):
            return None

    return evaluate


def _with_values(value: Tensor | None) -> Tensor | None:
    return None if value is None or value.is_meta or isinstance(value, FakeTensor) else value
