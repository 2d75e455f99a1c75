"""Run data-movement ops on labels, which need not have the strides of the real tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules

_INDEXED = rules.overloads("index_select", "index.Tensor")
_PADS = rules.overloads("constant_pad_nd", "pad")
_COPIES = rules.overloads("copy", "fill.Tensor")
_LIKE = rules.overloads("expand_as", "view_as", "type_as", "to.other")


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """Tensors whose elements ``node`` reads."""
    given = node.args[:1] if node.target in _LIKE else node.all_input_nodes
    return [
        arg for arg in given if isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), Tensor)
    ]


def index_arguments(node: fx.Node) -> list[fx.Node]:
    """Tensor arguments that say *where* to read rather than what."""
    found: list[fx.Node] = []
    if node.target in _INDEXED:
        fx.map_arg(node.args[1:], found.append)
    elif node.target in rules.INDEX_PUTS:
        fx.map_arg(node.args[1], found.append)
    return found


def pads_with_values(node: fx.Node) -> bool:
    if node.target not in _PADS:
        return False
    if node.target in rules.overloads("pad") and (*node.args, "constant")[2] != "constant":
        return True
    value = node.args[-1] if len(node.args) > 2 else node.kwargs.get("value", 0)
    return not isinstance(value, str) and value not in (0, 0.0, None, "constant")


def is_zero_fill(node: fx.Node) -> bool:
    return node.target in rules.FULLS and node.args[-1] in (0, 0.0)


def run_move(target: Any, args: Any, kwargs: dict[str, Any], fill: int) -> Any:
    """Run a movement op on labels, which need not have the strides of the real tensors."""
    if target in rules.VIEWS:
        return args[0].reshape(args[1])
    if target in _PADS:
        return torch.ops.aten.constant_pad_nd.default(args[0], args[1], fill)
    if target in _COPIES:
        return args[1].expand_as(args[0])
    return target(*args, **{k: v for k, v in kwargs.items() if k != "dtype"})
