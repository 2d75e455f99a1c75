"""Latents made to mislead the search for free gathers: who else sees their order?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.programs import B, D, E, H, S, randn, rewrite_in_float64, seeded

LATENT = 14
Body = Callable[["Whole", Tensor], Tensor]


class Whole(nn.Module):
    """A linear that makes nothing but the latent of keys and values, and a norm."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.down, self.other = nn.Linear(E, LATENT), nn.Linear(E, LATENT)
        self.norm = nn.RMSNorm(LATENT)
        self.kv = nn.Linear(LATENT, 2 * H * D)
        self.reader = nn.Linear(LATENT, E)
        self.q, self.o = nn.Linear(E, H * D), nn.Linear(H * D, E)
        self.body = body
        seeded(self)

    def attend(self, x: Tensor, latent: Tensor) -> Tensor:
        k, v = self.kv(latent).unflatten(-1, (H, 2 * D)).transpose(1, 2).split(D, -1)
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def first_feature_before_the_norm(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return m.attend(x, m.norm(raw)) + raw[..., :1]


def returned_before_the_norm(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return torch.cat([m.attend(x, m.norm(raw)), raw], -1)


def linear_before_the_norm(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return m.attend(x, m.norm(raw)) + m.reader(raw)


def linear_before_and_after_the_norm(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return m.attend(x, m.norm(raw)) + m.reader(raw) + m.reader(m.norm(raw))


def linear_reads_something_else_too(m: Whole, x: Tensor) -> Tensor:
    latent = m.norm(m.down(x))
    return m.attend(x, latent) + m.reader(latent) + m.reader(x[..., :LATENT])


def producer_reads_something_else_too(m: Whole, x: Tensor) -> Tensor:
    return m.attend(x, m.norm(m.down(x))) + m.down(x.flip(-1)).sum(-1, True) + m.down(x)[..., 2:3]


def producer_weight_is_a_table(m: Whole, x: Tensor) -> Tensor:
    return m.attend(x, m.norm(m.down(x))) + m.down.weight[3].sum() + m.down.bias[2]


def reader_weight_is_a_table(m: Whole, x: Tensor) -> Tensor:
    latent = m.norm(m.down(x))
    return m.attend(x, latent) + m.reader(latent) + m.reader.weight[:, 2]


def norm_of_something_else_too(m: Whole, x: Tensor) -> Tensor:
    return m.attend(x, m.norm(m.down(x))) + m.reader(m.norm(m.other(x)))


def gate_from_another_linear(m: Whole, x: Tensor) -> Tensor:
    return m.attend(x, m.norm(m.down(x)) * m.other(x).sigmoid())


def gate_from_the_input(m: Whole, x: Tensor) -> Tensor:
    return m.attend(x, m.norm(m.down(x)) * x[..., :LATENT].sigmoid())


def gate_from_itself(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return m.attend(x, m.norm(raw) * raw.sigmoid())


def gate_from_one_feature(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return m.attend(x, m.norm(raw) * raw[..., 4:5])


def gate_for_each_token(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return m.attend(x, raw * x.mean(-1, True) + raw.mean(-1, True))


def one_number_of_the_latent(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return m.attend(x, raw * raw[0, 0, 3])


def turned_latent(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return m.attend(x, raw + raw.flip(-1))


def norm_of_groups(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x).unflatten(-1, (2, LATENT // 2))
    return m.attend(x, F.rms_norm(raw, (LATENT // 2,)).flatten(-2))


def sorted_latent(m: Whole, x: Tensor) -> Tensor:
    return m.attend(x, m.down(x).sort(-1).values)


def two_latents(m: Whole, x: Tensor) -> Tensor:
    return m.attend(x, m.norm(m.down(x)) + m.other(x))


def tokens_of_two_latents(m: Whole, x: Tensor) -> Tensor:
    return m.attend(x, torch.cat([m.down(x), m.other(x)], 1))


def one_latent_after_another(m: Whole, x: Tensor) -> Tensor:
    """The reader of the latent makes the input of the query linear."""
    latent = m.norm(m.down(x))
    return m.attend(m.reader(latent), latent)


def latent_mixed_over_tokens(m: Whole, x: Tensor) -> Tensor:
    raw = m.down(x)
    return m.attend(x, (raw @ raw.mT).softmax(-1) @ raw)


def square_latent(m: Whole, x: Tensor) -> Tensor:
    """As many tokens as features, transposed: rows of it are tokens."""
    raw = m.down(x.repeat(1, 3, 1)[:, :LATENT])
    return m.attend(x, raw.transpose(1, 2))


BODIES = [
    first_feature_before_the_norm,
    returned_before_the_norm,
    linear_before_the_norm,
    linear_before_and_after_the_norm,
    linear_reads_something_else_too,
    producer_reads_something_else_too,
    producer_weight_is_a_table,
    reader_weight_is_a_table,
    norm_of_something_else_too,
    gate_from_another_linear,
    gate_from_the_input,
    gate_from_itself,
    gate_from_one_feature,
    gate_for_each_token,
    one_number_of_the_latent,
    turned_latent,
    norm_of_groups,
    sorted_latent,
    two_latents,
    tokens_of_two_latents,
    one_latent_after_another,
    latent_mixed_over_tokens,
    square_latent,
]


@pytest.mark.parametrize("side", ["kv", "qo"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_misleading_fold(body: Body, side: str) -> None:
    """Whatever is folded, both products are rewritten and the outputs are right."""
    options = {"basis_size": "full", "side": side}
    report = rewrite_in_float64(Whole(body), (randn(B, S, E),), options=options)
    assert sorted(s.product for s in report.rewritten) == ["qk", "vo"]
