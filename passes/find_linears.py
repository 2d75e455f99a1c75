"""Find the linears of a program, and which of them are made of the same weights.

A weight may reach its linears in several spellings: as it is, transposed, as a 1×1 kernel, as a
slice of a fused one. Two spellings of the same elements are one weight; two that overlap are tied.

Requires: ``normalize_linears``. Changes nothing.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.canonicalize import Program, roots_of
from bda_fx.passes.choose_sizes import example_size
from bda_fx.passes.op_rules import LINEAR
from bda_fx.passes.run_moves import run_move
from bda_fx.passes.sites import Linear


def constant_linears(program: Program, constants: dict[str, fx.Node]) -> dict[str, Linear]:
    """Every linear with a constant 2-d weight, keyed by the weight's node name."""
    nodes: dict[str, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.target not in LINEAR or not node.users:
            continue
        weight, bias = (*node.args, None)[1:3]
        known = weight.name in constants and (bias is None or bias.name in constants)
        if known and weight.meta["val"].dim() == 2:
            nodes[weight.name].append(node)
    for weight, same in _respelled(nodes, constants).items():
        nodes[same] += nodes.pop(weight)
    found = {}
    for weight, users in nodes.items():
        rows, columns = (int(s) for s in constants[weight].meta["val"].shape)
        name = weight_name(constants[weight], program)
        given = [(*n.args, None)[2] for n in users]
        biases = tuple(bias.name if isinstance(bias, fx.Node) else None for bias in given)
        shapes = [n.args[0].meta["val"].shape[:-1] for n in users]
        tokens = sum(math.prod([example_size(s) for s in shape]) for shape in shapes)
        names = tuple(n.name for n in users)
        found[weight] = Linear(name, weight, names, biases, columns, rows, tokens)
    return found


def weight_name(node: fx.Node, program: Program) -> str:
    """The parameter's name; expressions of it (slices, transposes of a slice) get a suffix."""
    roots = roots_of(node)
    name = program.names[roots[0].name]
    path, whole = node, True
    while path.op != "placeholder":
        values = [n.meta["val"] for n in (path, path.all_input_nodes[0])]
        whole &= all(isinstance(v, Tensor) for v in values)
        whole = whole and values[0].numel() == values[1].numel()
        path = path.all_input_nodes[0]
    if whole and len(roots) == 1:
        return name
    return f"{name}_part{_dependents(roots[0]).index(node)}"


def _dependents(root: fx.Node) -> list[fx.Node]:
    """Every node that depends on ``root``, in the order of the graph."""
    found: dict[fx.Node, None] = {}
    for node in root.graph.nodes:
        if node.op == "call_function" and any(
            n is root or n in found for n in node.all_input_nodes
        ):
            found[node] = None
    return list(found)


def overlapping_weights(
    constants: Mapping[str, fx.Node], linears: Mapping[str, Linear]
) -> dict[str, str]:
    """Weights that share some but not all elements with another one, and that other one.

    Each would get derived weights of its own: right, but nothing would be saved.
    """
    found = {}
    for spellings in _same_root(linears, constants).values():
        elements = {
            w: ids.unique() for w in spellings if (ids := _elements(constants[w])) is not None
        }
        if not elements:
            continue
        every = torch.cat(list(elements.values()))
        if len(every.unique()) == len(every):
            continue
        for a, b in itertools.combinations(elements, 2):
            if bool(torch.isin(elements[a], elements[b]).any()):
                found[a], found[b] = b, a
    return found


def _respelled(weights: Iterable[str], constants: Mapping[str, fx.Node]) -> dict[str, str]:
    """Weights that are another one's elements in the same places, and that other one."""
    found = {}
    for spellings in _same_root(weights, constants).values():
        known: list[tuple[str, Tensor]] = []
        for weight in spellings:
            ids = _elements(constants[weight])
            if ids is None:
                continue
            same = next((name for name, other in known if torch.equal(ids, other)), None)
            if same is None:
                known.append((weight, ids))
            else:
                found[weight] = same
    return found


def _same_root(weights: Iterable[str], constants: Mapping[str, fx.Node]) -> dict[str, list[str]]:
    """Weights by the parameter that they are made of, where there are several of one."""
    by_root: dict[str, list[str]] = defaultdict(list)
    for weight in weights:
        roots = roots_of(constants[weight])
        if len(roots) == 1:
            by_root[roots[0].name].append(weight)
    return {root: found for root, found in by_root.items() if len(found) > 1}


def _elements(node: fx.Node) -> Tensor | None:
    """Which element of its parameter is where in a weight, or None if it is not just moved."""
    if node.op == "placeholder":
        shape = tuple(node.meta["val"].shape)
        return torch.arange(math.prod(shape)).view(shape)
    if node.target is operator.getitem:
        whole, at = node.args
        parts = _elements(whole)  # type: ignore[arg-type]
        return None if parts is None else parts[at]  # type: ignore[index]
    inputs = node.all_input_nodes
    if len(inputs) != 1 or not (node.target in rules.MOVES or node.target in rules.KEEPS):
        return None
    ids = _elements(inputs[0])
    if ids is None or node.target in rules.KEEPS:
        return ids
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _: ids)
    try:
        return run_move(node.target, args, kwargs, -1)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
