"""Modules made to mislead the finder: each is rewritten rightly, or skipped for the right reason.

Every module is rewritten in float64, at its example's sizes and with a dynamic number of tokens,
and must give what the original gives. The table beside each says what is rewritten: (heads, D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.programs import B, D, E, H, example, randn, rewrite_in_float64, seeded

Body = Callable[["Projections", Tensor], Any]
CASES: dict[str, tuple[Body, list[tuple[str, int, int]], list[tuple[str, str]]]] = {}


class Projections(nn.Module):
    """q, k, v, o linears; ``body`` is the attention between them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, H * D) for _ in range(3))
        self.o = nn.Linear(H * D, E)
        self.body = body
        seeded(self)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, S, D] each."""
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def out(self, heads: Tensor) -> Tensor:
        return self.o(heads.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def case(
    rewritten: list[tuple[str, int, int]], skipped: list[tuple[str, str]]
) -> Callable[[Body], Body]:
    def note(body: Body) -> Body:
        CASES[body.__name__] = (body, rewritten, skipped)
        return body

    return note


@case([("vo", 4, 6)], [("qk", "DATA_DEPENDENT")])
def gather_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    idx = (x.abs().sum() * 100).long() % D
    idx = (torch.arange(D) + idx) % D
    return m.out(F.scaled_dot_product_attention(q[..., idx], k[..., idx], v))


@case([("vo", 4, 6)], [("qk", "MISMATCHED")])
def perm_per_batch(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = torch.cat([k[:1], k[1:].flip(-1)], 0)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("vo", 4, 6)], [("qk", "MISMATCHED")])
def perm_both_per_batch(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = torch.cat([k[:1], k[1:].flip(-1)], 0)
    q = torch.cat([q[:1], q[1:].flip(-1)], 0)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 5), ("vo", 4, 6)], [])
def inplace_view(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[..., 0].mul_(2.0)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def inplace_view_all(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k.mul_(2.0)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 8, 3), ("vo", 4, 6)], [])
def token_shift(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = torch.cat([k[..., :3], k[..., 3:].roll(1, 2)], -1)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 6), ("vo", 8, 3)], [])
def v_token_shift(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    v = torch.cat([v[..., :3], v[..., 3:].roll(1, 2)], -1)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 6), ("vo", 8, 3)], [])
def out_token_shift(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v)
    o = torch.cat([o[..., :3], o[..., 3:].roll(1, 2)], -1)
    return m.out(o)


@case([("qk", 8, 3), ("vo", 4, 6)], [])
def half_scale(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = torch.cat([k[..., :3] * 2, k[..., 3:] * x[:, None, :, :1]], -1)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("vo", 4, 6)], [("qk", "NOTHING_SAVED")])
def q_half_scale(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    w = torch.tensor([1.0, 1, 1, 3, 3, 3], dtype=x.dtype)
    return m.out(F.scaled_dot_product_attention(q * w, k, v))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def per_head_gate(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v) * x[:, None, :, :1].sigmoid()
    return m.out(o)


@case([("qk", 4, 6)], [("vo", "NOTHING_SAVED")])
def feat_gate(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v) * x[:, None, :, :D].sigmoid()
    return m.out(o)


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def mix_heads_out(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v)
    o = o.roll(1, 1)
    return m.out(o)


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def add_zero_attn(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    z = k.new_zeros(k.shape[0], H, 1, D)
    return m.out(F.scaled_dot_product_attention(q, torch.cat([k, z], 2), torch.cat([v, z], 2)))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def pad_feature(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(
        F.scaled_dot_product_attention(F.pad(q, (0, 2)), F.pad(k, (0, 2)), F.pad(v, (0, 2)))[
            ..., :D
        ]
    )


@case([("vo", 4, 6)], [("qk", "MISMATCHED")])
def partial_zero(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    z = torch.zeros_like(k[:, :, :1, :2])
    k0 = torch.cat([z, k[:, :, :1, 2:]], -1)
    k = torch.cat([k0, k[:, :, 1:]], 2)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 6), ("vo", 4, 2), ("vo", 4, 4)], [])
def partial_zero_v(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    z = torch.zeros_like(k[:, :, :1, :2])
    k0 = torch.cat([z, v[:, :, :1, 2:]], -1)
    v = torch.cat([k0, v[:, :, 1:]], 2)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("vo", 4, 6)], [("qk", "MISMATCHED")])
def k_eq_q_weight(m: Projections, x: Tensor) -> Any:
    (q, _, v), k = m.qkv(x), m.qkv(x)[0]
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([], [("qk", "MISMATCHED"), ("vo", "MISMATCHED")])
def k_eq_v(m: Projections, x: Tensor) -> Any:
    q, k, _ = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, k))


@case([("qk", 4, 6)], [("vo", "ROTATED"), ("vo", "ROTATED")])
def two_attn_one_k(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(
        F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q.flip(2), k, v)
    )


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def head_perm(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k.flip(1), v))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def feature_perm_same(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k.flip(-1), v))


@case([("vo", 4, 6)], [("qk", "MISMATCHED"), ("qk", "MISMATCHED")])
def cross_head_scores(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    sc = q @ k.transpose(-1, -2)
    sc = sc + q @ k.flip(1).transpose(-1, -2)
    return m.out(sc.softmax(-1) @ v)


@case([("vo", 4, 6)], [("qk", "ROTATED")])
def k_plus_self(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k + k.flip(-1), v))


@case([("vo", 4, 6)], [("qk", "COMPUTED")])
def k_relu(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k.relu(), v))


@case([("qk", 4, 5), ("vo", 4, 6)], [])
def attn_mask_from_k(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=k[..., :1].transpose(-1, -2).expand(-1, -1, x.shape[1], -1)
        )
    )


@case([], [("qk", "MISMATCHED")])
def linear_attention(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(q @ (k.transpose(-1, -2) @ v))


@case([("qk", 4, 6)], [("vo", "ROTATED")])
def v_residual(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, v) + v)


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def two_outs(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v)
    return m.out(o), m.out(o * 2)


@case([("qk", 4, 6)], [("vo", "COMPUTED")])
def out_and_gelu(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v)
    return m.out(o) + F.gelu(o).sum()


@case([("qk", 4, 6)], [("vo", "NORMALISED")])
def mean_pool_v(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v)
    return m.out(o) + v.mean()


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def second_mix(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    p = (q @ k.transpose(-1, -2)).softmax(-1)
    return m.out(p @ (p @ v))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def rollout(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    p = (q @ k.transpose(-1, -2)).softmax(-1)
    return m.out(p @ v), p @ p


@case([], [("qk", "COMPUTED"), ("vo", "COMPUTED")])
def masked_fill(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    hidden = (x[..., :1] > 0)[:, None]
    return m.out(
        F.scaled_dot_product_attention(q, k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0))
    )


@case([("vo", 4, 6)], [("qk", "NOTHING_SAVED")])
def div_feature(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k / (1 + x[:, None, :, :D].abs()), v))


@case([("qk", 1, 6), ("vo", 4, 6)], [])
def gqa_group_perm(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = k[:, :2].repeat_interleave(2, 1)
    k = torch.cat([k[:, :1], k[:, 1:2].flip(-1), k[:, 2:]], 1)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 1, 6), ("vo", 4, 6)], [])
def gqa_group_perm_q(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = k[:, :2].repeat_interleave(2, 1)
    k = torch.cat([k[:, :1], k[:, 1:2].flip(-1), k[:, 2:]], 1)
    q = torch.cat([q[:, :1], q[:, 1:2].flip(-1), q[:, 2:]], 1)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([], [("qk", "NESTED"), ("vo", "NESTED")])
def cond(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = torch.cond(
        x.sum() > 0,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q * 2, k, v),
        (q, k, v),
    )
    return m.out(o)


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def x_rev_o(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v)
    o = o.transpose(1, 2).reshape(*x.shape[:2], H * D)
    return m.o(o.flip(-1))


@case([("qk", 4, 6)], [("vo", "NO_PROJECTION")])
def o_on_tokens_cat(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v)
    o = o.transpose(1, 2).reshape(*x.shape[:2], H * D)
    return m.o(torch.cat([o, F.pad(x, (0, 4))], 1))


@case([("qk", 4, 6)], [("vo", "MISMATCHED")])
def per_head_o(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v)
    return F.linear(o, m.o.weight[:, :D])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_never_wrong(name: str, dynamic: bool) -> None:
    body, rewritten, skipped = CASES[name]
    others = ((randn(B, 9, E, seed=5),),) if dynamic else ()
    shapes = {"x": {1: torch.export.Dim.DYNAMIC}} if dynamic else None
    report = rewrite_in_float64(
        Projections(body), (example(),), others=others, dynamic_shapes=shapes
    )
    assert sorted((s.product, s.kv_heads, s.decomposed) for s in report.rewritten) == rewritten
    assert sorted((s.product, s.reason_code) for s in report.skipped) == skipped


def roll_by_length(m: Projections, x: Tensor) -> Tensor:
    """Which features meet depends on the number of tokens: true at one size, wrong at the next."""
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k.roll(x.shape[1], -1), v))


def test_a_meeting_that_holds_at_one_size_only_is_refused() -> None:
    static = rewrite_in_float64(Projections(roll_by_length), (example(),))
    assert [s.product for s in static.rewritten] == ["qk", "vo"]
    dynamic = rewrite_in_float64(
        Projections(roll_by_length),
        (example(),),
        others=((randn(B, 9, E),),),
        dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}},
    )
    assert [s.product for s in dynamic.rewritten] == ["vo"]
    assert [s.reason_code for s in dynamic.skipped] == ["MISMATCHED"]
