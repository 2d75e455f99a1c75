"""Tell the finder about attention ops of one's own."""

from __future__ import annotations

from typing import Any

import torch

from bda_fx.passes.op_rules import ATTENTION, AttentionRule, argument_names


def register_attention(
    op: Any, *, q: str = "query", k: str = "key", v: str = "value", layout: str = "bhtd"
) -> None:
    """Let ``op`` take part in BD attention wherever it stands in a graph.

    The op must see queries and keys through their scores ``q kᵀ`` alone, head by head, and return
    weighted sums of the values over tokens, with any weights: then a change of basis of keys and
    queries, and of values and outputs, cannot show. Scales, masks, biases, softcaps and sinks of
    the scores are fine; rotating q or k inside of the op is not.

    Args:
        op: what ``torch.library.custom_op`` returned, an op (``torch.ops.my.attention``) or one of
            its overloads, or a higher-order op whose ``__call__`` names its arguments.
        q, k, v: names of its arguments.
        layout: axes of these arguments and of the first result, one letter each: h heads, t
            tokens, d features, b any other that is batched over. "bhtd" is that of
            ``scaled_dot_product_attention``, "bthd" that of flash-attn, "thd" a packed batch. Keys
            and values may have fewer heads than queries, each serving a group of neighbours.

    Raises:
        TypeError: ``op`` is no op.
        ValueError: it has no such argument, or the layout is not one.
    """
    if "".join(sorted(layout.replace("b", ""))) not in ("dt", "dht"):
        raise ValueError(
            f"layout {layout!r}: expected one t and one d, at most one h, and any number of b, "
            'as in "bhtd"'
        )
    for overload in _overloads(op):
        names = argument_names(overload)
        missing = [name for name in (q, k, v) if name not in names]
        if missing:
            raise ValueError(f"{overload} has no argument {missing[0]!r}; it has {names}")
        ATTENTION[overload] = AttentionRule(q, k, v, layout)


def _overloads(op: Any) -> list[Any]:
    if isinstance(op, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return [op]
    if isinstance(op, torch._ops.OpOverloadPacket):
        return [getattr(op, name) for name in op.overloads()]
    if isinstance(op, torch._library.custom_ops.CustomOpDef):
        return [op._opoverload]
    raise TypeError(
        f"op is an op of torch.ops or what torch.library.custom_op returned, got {op!r}"
    )
