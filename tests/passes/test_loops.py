"""Attention in and beside ``while_loop`` and ``scan``: reported, or rewritten outside of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from tests.programs import Body, Projections, example, rewrite_in_float64


def attention_in_a_while_loop(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)

    def again(i: Tensor, heads: Tensor, k: Tensor, v: Tensor) -> Any:
        heads = F.scaled_dot_product_attention(heads, k, v)
        return i + 1, heads, k.clone(), v.clone()

    start = (torch.zeros((), dtype=torch.int64), q, k, v)
    _, heads, _, _ = while_loop(lambda i, *_: i < 3, again, start)
    return m.out(heads)


def while_loop_beside_attention(m: Projections, x: Tensor) -> Any:
    start = (torch.zeros((), dtype=torch.int64), x)
    _, y = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), start)
    return m.out(F.scaled_dot_product_attention(*m.qkv(y))) + y


def while_loop_on_keys(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    start = (torch.zeros((), dtype=torch.int64), k)
    _, k = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), start)
    return m.out(F.scaled_dot_product_attention(q, k, v))


def attention_in_a_scan(m: Projections, x: Tensor) -> Any:
    """One token at a time."""
    q, k, v = m.qkv(x)

    def step(carry: Tensor, token: Tensor) -> Any:
        out = F.scaled_dot_product_attention(token[:, :, None], k, v)[:, :, 0]
        return carry + 1, out

    _, heads = scan(step, torch.zeros(1), q, dim=2)
    return m.out(heads)


def scan_beside_attention(m: Projections, x: Tensor) -> Any:
    """A running mean of the inputs, which is what the attention reads."""

    def step(carry: Tensor, token: Tensor) -> Any:
        carry = 0.5 * carry + token
        return carry, carry.clone()

    _, y = scan(step, torch.zeros_like(x[:, 0]), x, dim=1)
    return m.out(F.scaled_dot_product_attention(*m.qkv(y)))


def scan_over_values(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)

    def step(carry: Tensor, token: Tensor) -> Any:
        carry = 0.5 * carry + token
        return carry, carry.clone()

    _, v = scan(step, torch.zeros_like(v[:, :, 0]), v, dim=2)
    return m.out(F.scaled_dot_product_attention(q, k, v))


NESTED = ([], [("qk", "NESTED"), ("vo", "NESTED")])


@pytest.mark.parametrize(
    ("body", "rewritten", "skipped"),
    [
        (attention_in_a_while_loop, *NESTED),
        (while_loop_beside_attention, ["qk", "vo"], []),
        (while_loop_on_keys, ["vo"], [("qk", "COMPUTED")]),
        (attention_in_a_scan, *NESTED),
        (scan_beside_attention, ["qk", "vo"], []),
        (scan_over_values, ["qk"], [("vo", "COMPUTED")]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_loops(body: Body, rewritten: list[str], skipped: list[tuple[str, str]]) -> None:
    report = rewrite_in_float64(Projections(body), (example(),))
    assert sorted(s.product for s in report.rewritten) == rewritten
    assert sorted((s.product, s.reason_code) for s in report.skipped) == skipped
