"""Make inputs for an exported program from its signature.

    float    →  standard normal                     bool            →  True
    complex  →  standard normal                     int, elsewhere  →  1 (a mask, a small number)
    int that is moved to a table as its index       →  uniform below the size of the table

Sizes that the program leaves open are drawn from their range, once per input. Those that were equal
in the example stay equal: a mask has as many tokens as the text, whether or not the program says
so. Random tokens and features are not what a model was trained on: its activations are
then often smaller and its attention flatter than in use, so figures on them are weaker evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from bda_fx.passes import op_rules

COUNT = 4
"""Inputs that are made."""
SPAN = 32
"""An open size is drawn from the first so many of its range: position tables end somewhere."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_EMBEDDING = op_rules.overloads("embedding")
_PICKS = op_rules.overloads("index_select", "gather")
_INDEX = op_rules.overloads("index.Tensor")
_CARRIES = op_rules.MOVES | op_rules.KEEPS


def generate_inputs(program: ExportedProgram, count: int = COUNT) -> list[Inputs]:
    """``count`` inputs (args, kwargs) for ``program``, always the same ones; one if it takes none.

    Raises:
        ValueError: the program has an input of a kind that cannot be made up.
    """
    if not program.graph_signature.user_inputs:
        return [((), {})]
    return [_generate(program, torch.Generator().manual_seed(seed)) for seed in range(count)]


def _generate(program: ExportedProgram, random: torch.Generator) -> Inputs:
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    sizes = _draw_sizes(program, random)
    values: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            values.append(spec.arg.value)
            continue
        node = nodes[spec.arg.name]
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            values.append(make_tensor(node, [_size(n, sizes) for n in value.shape], random))
        elif isinstance(value, torch.SymInt | int):
            values.append(_size(value, sizes))
        else:
            raise ValueError(
                f"no {type(value).__name__} can be made up for input {node.name!r}: "
                "pass args and kwargs, or inputs="
            )
    spec_of_inputs = program.call_spec.in_spec
    assert spec_of_inputs is not None
    args, kwargs = pytree.tree_unflatten(values, spec_of_inputs)
    return args, kwargs


def _draw_sizes(program: ExportedProgram, random: torch.Generator) -> dict[Any, int]:
    """A size for each symbol, within its range."""
    examples = _example_sizes(program)
    drawn: dict[Any, int] = {}
    sizes = {}
    for symbol, bounds in program.range_constraints.items():
        if not symbol.is_symbol:
            continue  # a size that follows from others, such as 2 s
        low = max(int(bounds.lower), 2)  # sizes of 0 and 1 may have kernels of their own
        # Compared, not converted: an open range ends in one of several infinities.
        high = low + SPAN if bounds.upper > low + SPAN else int(bounds.upper)
        low = min(low, high)
        alike = (examples.get(symbol, symbol), low, high)
        if alike not in drawn:
            drawn[alike] = int(torch.randint(low, high + 1, (), generator=random))
        sizes[symbol] = drawn[alike]
    return sizes


def _example_sizes(program: ExportedProgram) -> dict[Any, int]:
    """The size of each symbol in the example that the program was exported with."""
    found: dict[Any, int] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.has_hint():
                found[size.node.expr] = int(size.node.hint)
    return found


def _size(size: Any, sizes: Mapping[Any, int]) -> int:
    return int(size.node.expr.subs(sizes)) if isinstance(size, torch.SymInt) else int(size)


def make_tensor(
    node: fx.Node, shape: list[int], random: torch.Generator, *, by_rank: bool = False
) -> Tensor:
    """A value of ``shape`` for the placeholder ``node``, as the module docstring says.

    ``by_rank``: indices of a table are log-uniform (k about as often as 1 / k says), as words are
    in text where a vocabulary lists them by frequency.
    """
    like = node.meta["val"]
    if like.is_floating_point() or like.is_complex():
        wide = torch.complex64 if like.is_complex() else torch.float32
        made = torch.randn(shape, generator=random, dtype=wide)
    else:
        rows = None if like.dtype == torch.bool else _rows_indexed(node)
        made = _draw_indices(rows, shape, random, by_rank) if rows else torch.ones(shape)
    return made.to(dtype=like.dtype, device=like.device)


def _draw_indices(rows: int, shape: list[int], random: torch.Generator, by_rank: bool) -> Tensor:
    if not by_rank:
        return torch.randint(rows, shape, generator=random)
    exponents = torch.rand(shape, generator=random, dtype=torch.float64)
    return ((rows + 1.0) ** exponents).long().clamp(1, rows) - 1


def _rows_indexed(node: fx.Node) -> int | None:
    """Rows of the smallest table that the values of ``node`` are an index of, moved at most."""
    found: list[int] = []
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        for user in current.users:
            rows = _rows_looked_up(user, current)
            if rows is not None:
                found.append(rows)
            elif user.target in _CARRIES and user not in seen:
                seen.add(user)
                stack.append(user)
    return min(found, default=None)


def _rows_looked_up(lookup: fx.Node, index: fx.Node) -> int | None:
    """Rows of the table that ``lookup`` reads at ``index``; None where it does no such thing."""
    args: tuple[Any, ...] = lookup.args
    if lookup.target in _EMBEDDING and args[1] is index:
        axis = 0
    elif lookup.target in _PICKS and args[2] is index:
        axis = args[1]
    elif lookup.target in _INDEX and index in args[1]:
        axis = args[1].index(index)
    else:
        return None
    size = args[0].meta["val"].shape[axis]
    return size if isinstance(size, int) else None
