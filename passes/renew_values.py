"""Bring fake values up to date behind the nodes that a pass made, strides above all.

    view(conv1d(x, w))     →     reshape(transpose(linear(xᵀ, C)) …)

What replaces a node has its shape and type but not always its strides (a convolution comes out
contiguous, a transposed linear does not), and a view that was legal for the old strides may not be
for the new ones. So values are computed anew from the new nodes on, as far as strides differ, and a
view that no longer holds becomes a reshape, which copies where it has to. So does a view behind a
``roll``, whose fake strides are not those of the real op.

Requires: a rewritten graph whose new nodes have values. Leaves: values in agreement with the ops.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from bda_fx.passes import op_rules as rules
from bda_fx.passes.canonicalize import Program
from bda_fx.passes.emit_node import EMITTED, fake_mode_of, fake_value

_ROLLS = rules.overloads("roll")
_PART = operator.getitem


def renew_values(program: Program) -> None:
    """Recompute fake values downstream of new nodes, in place."""
    mode = fake_mode_of(program.graph)
    if mode is None:
        return
    moved: set[fx.Node] = set()
    rolled: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.target in _ROLLS or (_keeps_strides(node) and rolled & set(node.all_input_nodes)):
            rolled.add(node)
            if node.target in rules.VIEWS:
                node.target = torch.ops.aten.reshape.default
        made = EMITTED in node.meta
        read = [arg for arg in node.all_input_nodes if EMITTED in arg.meta or arg in moved]
        if made and not any(arg in moved for arg in read):
            continue
        old = node.meta.get("val")
        computed = isinstance(node.target, torch._ops.OpOverload) or node.target is _PART
        if not read or not computed or not _strides(old) or node.is_impure():
            continue
        try:
            new = fake_value(node, mode)
        except (RuntimeError, ValueError):
            if node.target not in rules.VIEWS:
                raise
            node.target = torch.ops.aten.reshape.default
            new = fake_value(node, mode)
        if _strides(new) != _strides(old):
            node.meta["val"] = new
            moved.add(node)
    program.module.recompile()


def _strides(value: Any) -> list[tuple[Any, ...]]:
    """Of a tensor, or of each that an op gives (``split``)."""
    return [leaf.stride() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _keeps_strides(node: fx.Node) -> bool:
    """Whether the strides of a result follow from those of what is read."""
    if node.target is _PART:
        return True
    tables = (rules.MOVES, rules.KEEPS, rules.SCALES, rules.SUMS, rules.MIXES)
    return any(node.target in ops for ops in tables)
