"""Modules made to mislead the finder: each is rewritten rightly, or skipped for the right reason.

Every module is rewritten in float64, at its example's sizes and with a dynamic number of tokens,
and must give what the original gives. The table beside each says what is rewritten: (heads, D).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.misleading import Cases
from tests.programs import B, D, E, H, Projections, example, randn, rewrite_in_float64

case = Cases()


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


@case([("qk", 4, 6), ("vo", 4, 6)], [])
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


@case([("qk", 4, 2), ("qk", 4, 4), ("vo", 4, 6)], [])
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


@case([("vo", 4, 6)], [("qk", "SHARED_WEIGHT")])
def k_eq_q_weight(m: Projections, x: Tensor) -> Any:
    (q, _, v), k = m.qkv(x), m.qkv(x)[0]
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk+vo", 4, 6)], [])
def k_eq_v(m: Projections, x: Tensor) -> Any:
    q, k, _ = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, k))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
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


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def linear_attention(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(q @ (k.transpose(-1, -2) @ v))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
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


@case([("qk", 4, 6), ("vo", 4, 6)], [])
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


@case([("qk", 2, 6), ("vo", 4, 6)], [])
def gqa_group_perm(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = k[:, :2].repeat_interleave(2, 1)
    k = torch.cat([k[:, :1], k[:, 1:2].flip(-1), k[:, 2:]], 1)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 2, 6), ("vo", 4, 6)], [])
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


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def per_head_o(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    o = F.scaled_dot_product_attention(q, k, v)
    return F.linear(o, m.o.weight[:, :D])


# -- outputs that alias -----------------------------------------------------------------------


@case([("vo", 4, 6)], [("qk", "RETURNED")])
def k_and_a_view_of_it_returned(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, v)), k.transpose(1, 2), k


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def output_returned_twice(m: Projections, x: Tensor) -> Any:
    out = m.out(F.scaled_dot_product_attention(*m.qkv(x)))
    return out, out, out.view(-1)


@case([("qk", 4, 6), ("vo", 4, 5)], [])
def one_feature_of_v_returned(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, v)), v[..., 2]


@case([("qk", 4, 6), ("vo", 3, 6)], [])
def one_head_of_v_returned(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, v)), v[:, 1].flatten(1)


@case([("qk", 4, 6)], [("vo", "RETURNED")])
def attention_output_returned(m: Projections, x: Tensor) -> Any:
    out = F.scaled_dot_product_attention(*m.qkv(x))
    return out.transpose(1, 2), m.out(out)


@case([("vo", 4, 6)], [("qk", "RETURNED")])
def q_returned_detached(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, v)), q.detach()


@case([("qk", 1, 4), ("vo", 4, 6)], [])
def k_written_into_the_input(m: Projections, x: Tensor) -> Any:
    """All but the last four features of the last head are."""
    q, k, v = m.qkv(x)
    out = m.out(F.scaled_dot_product_attention(q, k, v))
    x.copy_(k.transpose(1, 2).flatten(-2)[..., :E])
    return out


# -- writes into views ------------------------------------------------------------------------


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def one_token_of_k_scaled_in_place(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[:, :, 0].mul_(0.5)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def one_token_of_k_zeroed_in_place(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[:, :, 0] = 0
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 5), ("vo", 4, 6)], [])
def one_feature_of_k_zeroed_in_place(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[..., 1] = 0
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("vo", 4, 6)], [("qk", "NO_PROJECTION")])
def one_token_of_k_overwritten(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[:, :, 0] = x[:, 0, None, :D]
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("vo", 4, 6)], [("qk", "MISMATCHED")])
def features_of_k_copied_onto_others(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[..., :3] = k[..., 3:]
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def features_of_k_swapped_in_place(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    first = k[..., :3].clone()
    k[..., :3] = k[..., 3:]
    k[..., 3:] = first
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 3, 6), ("vo", 4, 6)], [])
def one_head_of_k_overwritten_by_another(m: Projections, x: Tensor) -> Any:
    """Head 0 meets no query any more, head 1 meets two."""
    q, k, v = m.qkv(x)
    k[:, 0] = k[:, 1]
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 6), ("vo", 4, 5)], [])
def one_feature_of_the_output_scaled_in_place(m: Projections, x: Tensor) -> Any:
    out = F.scaled_dot_product_attention(*m.qkv(x))
    out[..., 0].mul_(2.0)
    return m.out(out)


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def one_token_of_the_output_scaled_in_place(m: Projections, x: Tensor) -> Any:
    out = F.scaled_dot_product_attention(*m.qkv(x))
    out[:, :, 0].mul_(2.0)
    return m.out(out)


@case([("qk", 4, 6), ("vo", 3, 6)], [])
def one_head_of_the_output_zeroed_in_place(m: Projections, x: Tensor) -> Any:
    out = F.scaled_dot_product_attention(*m.qkv(x))
    out[:, 2].zero_()
    return m.out(out)


@case([("qk", 4, 6)], [("vo", "ADDED")])
def the_output_added_to_in_place(m: Projections, x: Tensor) -> Any:
    out = F.scaled_dot_product_attention(*m.qkv(x))
    out += x[:, None, :, :D]
    return m.out(out)


# -- orders of features -----------------------------------------------------------------------


@case([("qk", 4, 6), ("vo", 2, 6)], [])
def values_of_a_group_in_two_orders(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    v = v[:, :2].repeat_interleave(2, 1)
    v = torch.cat([v[:, :1], v[:, 1:2].flip(-1), v[:, 2:]], 1)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("vo", 4, 6)], [("qk", "MISMATCHED"), ("qk", "MISMATCHED")])
def one_query_meets_a_key_in_two_orders(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    scores = q @ k.mT + q @ k.roll(1, -1).mT
    return m.out(scores.softmax(-1) @ v)


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def every_head_in_an_order_of_its_own(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    q = torch.stack([q[:, h].roll(h, -1) for h in range(H)], 1)
    k = torch.stack([k[:, h].roll(h, -1).flip(-1) for h in range(H)], 1)
    v = torch.stack([v[:, h].roll(2 * h, -1) for h in range(H)], 1)
    out = F.scaled_dot_product_attention(q, k, v)
    return m.out(torch.stack([out[:, h].roll(-h, -1) for h in range(H)], 1))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def order_from_a_buffer(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k[..., m.order], v.index_select(-1, m.order)))


@case([("vo", 4, 6)], [("qk", "DATA_DEPENDENT")])
def order_from_a_buffer_and_the_input(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    order = m.order.roll(1) if x.shape[0] == 0 else (m.order + (x[0, 0, 0] > 0).long()) % D
    return m.out(F.scaled_dot_product_attention(q[..., order], k[..., order], v))


@case([("vo", 4, 6)], [("qk", "DATA_DEPENDENT")])
def order_sorted_by_the_input(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    order = x[0, 0, :D].argsort()
    return m.out(F.scaled_dot_product_attention(q, k[..., order], v))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def features_shuffled_between_heads(m: Projections, x: Tensor) -> Any:
    """The same way for queries and keys, and for values and outputs."""
    order = torch.arange(H * D).view(H, D).t().flatten().roll(5)
    q, k, v = (f(x)[..., order].unflatten(-1, (H, D)).transpose(1, 2) for f in (m.q, m.k, m.v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    return m.o(out[..., order.argsort()])


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def heads_cut_in_two_ways(m: Projections, x: Tensor) -> Any:
    """Heads are rows of one view and columns of the other: features still meet one to one."""
    q, _, v = m.qkv(x)
    k = m.k(x).unflatten(-1, (D, H)).permute(0, 3, 1, 2)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("vo", 4, 6)], [("qk", "NOTHING_SAVED")])
def tokens_and_features_scrambled(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(
        F.scaled_dot_product_attention(
            q, k.mT.clone(memory_format=torch.contiguous_format).view(k.shape), v
        )
    )


# The features of q are weights, with which keys are mixed over tokens before they meet the values.
@case([("qk+vo", 4, 6)], [])
def features_of_q_meet_tokens_of_k(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    window = k[:, :, :2]
    return m.out(((q[..., :2] @ window) @ v.mT).softmax(-1) @ v)


# -- factors and sums -------------------------------------------------------------------------


@case([("vo", 4, 6)], [("qk", "NOTHING_SAVED")])
def factor_for_each_feature(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k * m.q.weight.new_tensor(range(1, 7)), v))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def factor_for_each_head(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    factor = x.new_tensor([1.0, 2, 3, 4])[:, None, None]
    return m.out(F.scaled_dot_product_attention(q, k * factor, v / factor))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def factor_for_each_token(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    factor = x[:, None, :, :1].tanh()
    return m.out(F.scaled_dot_product_attention(q * factor, k * factor.exp(), v * factor))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def factor_from_a_buffer(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k * m.factor, v / m.factor))


@case([("qk", 8, 3), ("vo", 8, 3)], [])
def quarter_turn(m: Projections, x: Tensor) -> Any:
    """cat(-b, a): a move and a sign."""
    q, k, v = m.qkv(x)
    k, v = (torch.cat([-t[..., 3:], t[..., :3]], -1) for t in (k, v))
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("vo", 4, 6)], [("qk", "ADDED")])
def input_added_to_k(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k + x[:, None, :, :D], v))


@case([("vo", 4, 6)], [("qk", "ADDED")])
def input_added_to_q(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q - x.mean(1)[:, None, None, :D], k, v))


@case([("qk", 4, 6)], [("vo", "ADDED")])
def input_added_before_the_output_linear(m: Projections, x: Tensor) -> Any:
    out = F.scaled_dot_product_attention(*m.qkv(x)).transpose(1, 2).flatten(-2)
    return m.o(out + F.pad(x, (0, H * D - E)))


@case([], [("qk", "ROTATED"), ("vo", "ROTATED")])
def rotation_by_halves(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    angle = torch.arange(x.shape[1])[:, None] * 0.3 ** torch.arange(3).to(x)
    cos, sin = angle.cos(), angle.sin()

    def turn(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return m.out(F.scaled_dot_product_attention(turn(q), turn(k), turn(v)))


@case([("vo", 4, 6)], [("qk", "ROTATED")])
def rotation_of_complex_numbers(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    angle = torch.arange(x.shape[1])[:, None] * 0.3 ** torch.arange(3).to(x)
    unit = torch.polar(torch.ones_like(angle), angle)

    def turn(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.unflatten(-1, (3, 2)).contiguous())
        return torch.view_as_real(pairs * unit).flatten(-2)

    return m.out(F.scaled_dot_product_attention(turn(q), turn(k), v))


@case([("qk", 4, 4), ("vo", 4, 6)], [])
def rotation_of_two_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    angle = torch.arange(x.shape[1])[:, None].to(x)

    def turn(t: Tensor) -> Tensor:
        a, b, rest = t.split([1, 1, 4], -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos(), rest], -1)

    return m.out(F.scaled_dot_product_attention(turn(q), turn(k), v))


@case([("vo", 4, 6)], [("qk", "NORMALISED")])
def rms_norm_of_each_head(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    q, k = F.rms_norm(q, (D,)), F.rms_norm(k, (D,), x.new_ones(D))
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("vo", 4, 6)], [("qk", "NORMALISED")])
def rms_norm_of_all_heads_of_q(m: Projections, x: Tensor) -> Any:
    _, k, v = m.qkv(x)
    q = F.rms_norm(m.q(x), (H * D,)).unflatten(-1, (H, D)).transpose(1, 2)
    return m.out(F.scaled_dot_product_attention(q, k, v))


@case([("qk", 4, 6)], [("vo", "NORMALISED")])
def output_divided_by_its_norm(m: Projections, x: Tensor) -> Any:
    out = F.scaled_dot_product_attention(*m.qkv(x))
    return m.out(out / (1 + out.norm(dim=-1, keepdim=True)))


# -- other readers and spellings --------------------------------------------------------------


@case([("qk", 4, 6)], [("vo", "NO_PROJECTION")])
def output_linear_reads_the_input_too(m: Projections, x: Tensor) -> Any:
    out = m.out(F.scaled_dot_product_attention(*m.qkv(x)))
    return out + m.o(F.pad(x, (0, H * D - E)))


@case([], 2 * [("qk", "COMPUTED")] + 2 * [("vo", "COMPUTED")])
def output_linear_reads_a_spoilt_attention_too(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    attend = F.scaled_dot_product_attention
    return m.out(attend(q, k, v)) + m.out(attend(q.relu(), k, q.relu()))


@case([("qk", 4, 6)], [("vo", "NO_PROJECTION")])
def output_linear_reads_scores_too(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    weights = (q @ k.mT).softmax(-1)
    some = weights[..., :1].flatten(1)[:, :H].repeat_interleave(D, 1)
    return m.out(weights @ v) + m.o(some)[:, None]


@case([("qk", 4, 6)], [("vo", "SHARED_WEIGHT")])
def output_weight_is_read_as_a_table(m: Projections, x: Tensor) -> Any:
    out = m.out(F.scaled_dot_product_attention(*m.qkv(x)))
    return out + m.o.weight[0].sum()


@case([], [("qk", "SHARED_WEIGHT"), ("vo", "SHARED_WEIGHT")])
def output_weight_is_that_of_the_keys(m: Projections, x: Tensor) -> Any:
    """Each could get values of its own, but one weight would then be two."""
    out = F.scaled_dot_product_attention(*m.qkv(x)).transpose(1, 2).flatten(-2)
    return F.linear(out, m.k.weight.t())


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def key_weight_is_computed_from_constants(m: Projections, x: Tensor) -> Any:
    q, _, v = m.qkv(x)
    k = F.linear(x, m.k.weight * m.factor / m.k.weight.norm()).unflatten(-1, (H, D))
    return m.out(F.scaled_dot_product_attention(q, k.transpose(1, 2), v))


@case([("vo", 4, 6)], [("qk", "NO_PROJECTION")])
def key_weight_depends_on_the_input(m: Projections, x: Tensor) -> Any:
    q, _, v = m.qkv(x)
    k = F.linear(x, m.k.weight * x.mean()).unflatten(-1, (H, D))
    return m.out(F.scaled_dot_product_attention(q, k.transpose(1, 2), v))


@case([("qk", 4, 6)], [("vo", "COMPUTED")])
def mask_made_of_values(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    mask = (v.sum(-1) > 0)[:, :, None]
    return m.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@case([("vo", 4, 6)], [("qk", "SHARED_WEIGHT")])
def keys_meet_keys(m: Projections, x: Tensor) -> Any:
    _, k, v = m.qkv(x)
    return m.out((k @ k.mT).softmax(-1) @ v)


@case([("qk+vo", 4, 6)], [])
def weights_mix_the_keys(m: Projections, x: Tensor) -> Any:
    q, k, _ = m.qkv(x)
    return m.out((q @ k.mT).softmax(-1) @ k)


@case([("qk", 8, 3), ("vo", 4, 6)], [])
def halves_scored_apart(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    scores = (q[..., :3] @ k[..., :3].mT).tanh() * (q[..., 3:] @ k[..., 3:].mT).sigmoid()
    return m.out(scores.softmax(-1) @ v)


@case([("qk", 8, 3), ("vo", 4, 6)], [])
def products_of_a_whole_and_of_a_half(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    scores = (q @ k.mT).tanh() + (q[..., :3] @ k[..., :3].mT)
    return m.out(scores.softmax(-1) @ v)


@case([("vo", 4, 6)], [("qk", "COMPUTED")])
def features_summed_apart(m: Projections, x: Tensor) -> Any:
    """Σᵢ qᵢ Σⱼ kⱼ is no product of q and k."""
    q, k, v = m.qkv(x)
    scores = torch.einsum("bhid,bhje->bhij", q, k)
    return m.out(scores.softmax(-1) @ v)


@case([("vo", 4, 6)], [("qk", "COMPUTED")])
def scores_without_a_contraction(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
    return m.out(scores.softmax(-1) @ v)


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def sliding_windows(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k, v = (F.pad(t, (0, 0, 2, 0)).unfold(2, 3, 1).mT for t in (k, v))
    scores = (q[..., None, :] @ k.mT).softmax(-1)
    return m.out((scores @ v).squeeze(-2))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def values_summed_over_tokens(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, v.cumsum(2)))


@case([("vo", 4, 6)], [("qk", "COMPUTED")])
def softmax_of_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(q.softmax(-1) @ (k.softmax(-2).mT @ v))


# -- sums of projections and constants --------------------------------------------------------


@case([("qk+vo", 4, 6)], [])
def queries_added_to_the_output(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, v) + q)


@case([("vo", 4, 6)], [("qk", "SHARED_WEIGHT")])
def queries_added_to_keys(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k + q, v))


@case([("qk+vo", 4, 6)], [])
def keys_added_to_values(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k, v - k))


@case([], [("qk", "MISMATCHED"), ("vo", "MISMATCHED")])
def one_table_added_to_queries_and_keys(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    u = m.o.bias[:D]
    return m.out(F.scaled_dot_product_attention(q + u, k + u, v + u))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def constant_added_before_the_output_linear(m: Projections, x: Tensor) -> Any:
    out = F.scaled_dot_product_attention(*m.qkv(x)).transpose(1, 2).flatten(-2)
    return m.o(out + m.q.bias) + m.q.bias[:E]


@case([], [("qk", "NOTHING_SAVED"), ("vo", "NOTHING_SAVED")])
def sum_with_a_factor_for_each_feature(m: Projections, x: Tensor) -> Any:
    """The linear of v makes a second key; the factor is on that term alone."""
    q, k, v = m.qkv(x)
    more = v.flip(2) * x.new_tensor(range(D))
    return m.out(F.scaled_dot_product_attention(q, k + more, q))


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def sum_with_a_factor_for_each_token(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    more = m.k(x.flip(1)).unflatten(-1, (H, D)).transpose(1, 2)
    return m.out(
        F.scaled_dot_product_attention(q, torch.sub(k, more * x[:, None, :, 2:3], alpha=3), v)
    )


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def difference_to_the_mean_token(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q, k - k.mean(2, keepdim=True), v))


@case([("vo", 4, 6)], [("qk", "ROTATED")])
def difference_of_heads(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q - q.roll(1, 1), k, v))


@case([("qk+vo", 4, 6)], [])
def outputs_are_queries(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    again = F.scaled_dot_product_attention(q, k, v)
    return m.out(F.scaled_dot_product_attention(again, k, v))


@case([("qk+vo", 4, 6)], [])
def outputs_are_keys(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    again = F.scaled_dot_product_attention(q, k, v)
    return m.out(F.scaled_dot_product_attention(q, again, v.flip(2)))


@case([("qk", 4, 6), ("vo", 2, 6), ("vo", 2, 6)], [])
def output_linear_in_two_parts(m: Projections, x: Tensor) -> Any:
    out = F.scaled_dot_product_attention(*m.qkv(x)).transpose(1, 2).flatten(-2)
    left, right = m.o.weight[:, : 2 * D], m.o.weight[:, 2 * D :]
    return F.linear(out[..., : 2 * D], left) + F.linear(out[..., 2 * D :], right)


@case([("qk", 4, 6)], [("vo", "SHARED_WEIGHT")])
def output_weight_by_heads_reads_the_input_too(m: Projections, x: Tensor) -> Any:
    weight = m.o.weight.t().unflatten(0, (H, D))
    out = torch.einsum("bhsd,hde->bse", F.scaled_dot_product_attention(*m.qkv(x)), weight)
    return out + torch.einsum("bsd,de->bse", x[..., :D], weight[0])


@case([("qk", 4, 6), ("vo", 4, 6)], [])
def biases_of_two_uses(m: Projections, x: Tensor) -> Any:
    """One weight, a bias for each attention, one of them also returned."""
    q, k, v = m.qkv(x)
    other = F.linear(x.flip(1), m.k.weight, m.v.bias).unflatten(-1, (H, D)).transpose(1, 2)
    attend = F.scaled_dot_product_attention
    return m.out(attend(q, k, v) + attend(q, other, v)), m.k.bias * 2


@case([("vo", 4, 6)], [("qk", "NO_PROJECTION"), ("qk", "SHARED_WEIGHT")])
def bias_that_depends_on_the_input(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    bias = F.pad(x.mean((0, 1)), (0, H * D - E))
    other = F.linear(x, m.k.weight, bias).unflatten(-1, (H, D)).transpose(1, 2)
    attend = F.scaled_dot_product_attention
    return m.out(attend(q, k, v) + attend(q, other, v))


@case([("vo", 4, 6)], [("qk", "MISMATCHED")])
def features_repeated_on_both_sides(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(F.scaled_dot_product_attention(q.repeat(1, 1, 1, 2), k.repeat(1, 1, 1, 2), v))


@case([("vo", 4, 6)], [("qk", "MISMATCHED")])
def features_met_in_two_orders_at_once(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    both = torch.cat([k, k.flip(-1)], -1)
    return m.out(F.scaled_dot_product_attention(q.repeat(1, 1, 1, 2), both, v))


@case([], [("qk", "DATA_DEPENDENT"), ("vo", "DATA_DEPENDENT")])
def tokens_chosen_by_the_input(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    first = x[0, :, 0].argsort()[:3]
    return m.out(F.scaled_dot_product_attention(q, k[:, :, first], v[:, :, first]))


@case([("vo", 4, 6)], [("qk", "DATA_DEPENDENT")])
def heads_chosen_by_the_input(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    order = x[0, 0, :H].argsort()
    return m.out(F.scaled_dot_product_attention(q, k[:, order], v))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", case)
def test_never_wrong(name: str, dynamic: bool) -> None:
    assert case.outcome(name, dynamic=dynamic) == case[name]


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
