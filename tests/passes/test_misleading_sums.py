"""Masks, choices, blends, means and running sums: legal while they treat a head's features alike.

Beside each legal spelling stands a near miss that must be skipped, or cut into blocks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bda_fx
from tests.passes.misleading import Cases
from tests.programs import FULL, B, D, E, H, Projected, Projections, randn, rewrite_in_float64

case = Cases()
attend = F.scaled_dot_product_attention
EVERY = [("qk", 4, 6), ("vo", 4, 6)]
HALVES = [("qk", 8, 3), ("vo", 4, 6)]
"""The halves of each key head change basis apart."""
VALUES = [("vo", 4, 6)]


def hidden(x: Tensor) -> Tensor:
    """A padding mask [B, 1, T, 1]."""
    return (x[..., :1] > 0.3)[:, None]


def later(m: Projections, x: Tensor) -> Tensor:
    """A second key of the same linear, made from other tokens."""
    return m.split(m.k(x.flip(1)))


# -- masks ------------------------------------------------------------------------------------


@case(EVERY, [])
def padding_masked_everywhere(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    zero = x.new_zeros(())
    k = torch.where(hidden(x), zero, k)
    v = torch.where(hidden(x), torch.zeros_like(v), v).masked_fill(hidden(x.flip(0)), zero)
    return m.out(attend(q, k, v).masked_fill(hidden(x), 0.0))


@case(EVERY, [])
def mask_by_a_constant_zero(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = torch.where(hidden(x), k, torch.tensor(0.0))
    return m.out(attend(q, k, torch.where(hidden(x), 0.0, v)))


@case(EVERY, [])
def mask_expanded_along_the_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    mask = hidden(x).expand_as(k)
    return m.out(attend(q, k.masked_fill(~mask, 0.0), v * (mask | (v.new_ones(D) > 2)).to(v)))


@case(EVERY, [])
def mask_written_in_place(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[hidden(x)[..., 0].expand(-1, H, -1)] = 0
    v = v.contiguous().masked_fill_(hidden(x), 0)
    return m.out(attend(q, k, v))


@case(EVERY, [])
def mask_made_of_scores(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    weights = (q @ k.mT).softmax(-1)
    likely = weights.amax(-1, keepdim=True)
    return m.out((weights @ v).masked_fill(likely < 0.5, 0.0) * likely)


@case(VALUES, [("qk", "NOTHING_SAVED")])
def mask_of_single_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k.masked_fill(x[:, None, :, :D] > 0, 0.0), v))


@case([("qk", 4, 6)], [("vo", "NOTHING_SAVED")])
def mask_of_single_features_in_place(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    v[(x[:, None, :, :D] > 0).expand_as(v)] = 0
    return m.out(attend(q, k, v))


@case([("qk", 4, 6)], [("vo", "NOTHING_SAVED")])
def mask_of_the_output_expanded_and_changed(m: Projections, x: Tensor) -> Any:
    """The mask is the same for all features until it meets one that is not."""
    out = attend(*m.qkv(x))
    mask = hidden(x).expand_as(out) & (torch.arange(D) > x[:, None, :, :1])
    return m.out(out.masked_fill(mask, 0.0))


@case(VALUES, [("qk", "NOTHING_SAVED")])
def mask_padded_by_reflection(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    gate = F.pad(x[..., :4], (1, 1), mode="reflect")[:, None]
    return m.out(attend(q, k * gate, v))


@case(VALUES, [("qk", "COMPUTED")])
def mask_made_of_the_keys(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k.masked_fill(k[..., :1] > 0, 0.0).masked_fill(k > 0, 0.0), v))


@case([("qk", 4, 6)], [("vo", "COMPUTED")])
def mask_made_of_the_values(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k.masked_fill((v.sum(-1, keepdim=True) > 0), 0.0), v))


@case(VALUES, [("qk", "COMPUTED")])
def fill_that_is_not_zero(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k.masked_fill(hidden(x), 0.5), v))


@case(VALUES, [("qk", "COMPUTED")])
def choice_of_minus_infinity(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.where(x[:, None, :, :1] < 99, k, float("-inf")), v))


@case(VALUES, [("qk", "COMPUTED")])
def choice_of_the_input(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.where(hidden(x), k, x[:, None, :, :D]), v))


@case(EVERY, [])
def choice_of_a_learned_token(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.where(hidden(x), k, m.q.bias.view(H, 1, D)), v))


@case(EVERY, [])
def choice_of_two_keys(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.where(hidden(x), k, later(m, x)), v))


@case(VALUES, [("qk", "ROTATED")])
def choice_of_two_orders(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.where(hidden(x), k, k.flip(-1)), v))


# -- writes -----------------------------------------------------------------------------------


@case(EVERY, [])
def tokens_zeroed(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[:, :, 1:3] = 0
    k[:, :, [0, 4]] = 0.0
    v[:, :, 0].fill_(0)
    v[:, :, -1].zero_()
    return m.out(attend(q, k, v))


@case([("qk", 4, 2), ("qk", 4, 4), ("vo", 4, 6)], [])
def some_features_of_a_token_zeroed(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[:, :, 0, :2] = 0
    return m.out(attend(q, k, v))


@case([("qk", 4, 2), ("qk", 4, 4), ("vo", 4, 6)], [])
def some_features_zeroed_where_a_mask_says(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = torch.cat([k[..., :2].masked_fill(hidden(x), 0.0), k[..., 2:]], -1)
    return m.out(attend(q, k, v))


@case([("qk", 4, 4), ("vo", 4, 6)], [])
def features_zeroed_by_a_constant_index(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[..., [0, 2]] = 0
    return m.out(attend(q, k, v))


@case(VALUES, [("qk", "DATA_DEPENDENT")])
def tokens_zeroed_by_an_index_of_the_input(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[:, :, x[0, :, 0].argsort()[:2]] = 0
    return m.out(attend(q, k, v))


@case(VALUES, [("qk", "NO_PROJECTION")])
def token_filled_with_ones(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[:, :, 0] = 1
    return m.out(attend(q, k, v))


@case(VALUES, [("qk", "NO_PROJECTION")])
def token_filled_with_a_buffer(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[:, :, 0] = m.factor
    return m.out(attend(q, k, v))


@case(VALUES, [("qk", "MISMATCHED")])
def token_filled_with_one_of_its_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k[:, :, 0] = k[:1, :1, :1, 0]
    return m.out(attend(q, k, v))


@case(VALUES, [("qk", "COMPUTED")])
def zeros_added_at_an_index(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    places = (torch.tensor([0, 1]),)
    return m.out(attend(q, k.index_put(places, k.new_zeros(()), accumulate=True), v))


# -- blends -----------------------------------------------------------------------------------


@case(EVERY, [])
def token_shift(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = torch.lerp(k, F.pad(k, (0, 0, 1, -1)), 0.3)
    v = torch.lerp(v.roll(1, 2), v, x[:, None, :, :1].sigmoid())
    return m.out(attend(torch.lerp(q, q.roll(1, 2), m.factor), k, v))


@case(VALUES, [("qk", "NOTHING_SAVED")])
def token_shift_with_a_weight_for_each_feature(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.lerp(k, k.roll(1, 2), m.q.bias[:D].sigmoid()), v))


@case(HALVES, [])
def token_shift_of_one_half(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    half = torch.lerp(k[..., :3], k[..., :3].roll(1, 2), 0.3)
    return m.out(attend(q, torch.cat([half, k[..., 3:]], -1), v))


@case(HALVES, [])
def blends_with_two_weights(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    halves = (torch.lerp(k, k.roll(1, 2), w) for w in (0.3, 0.6))
    return m.out(
        attend(q, torch.cat([h[..., 3 * i : 3 * i + 3] for i, h in enumerate(halves)], -1), v)
    )


@case(VALUES, [("qk", "ROTATED")])
def blend_of_two_orders(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.lerp(k, k.roll(1, -1), 0.3), v))


@case(VALUES, [("qk", "COMPUTED")])
def blend_with_the_input(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.lerp(k, x[:, None, :, :D], 0.3), v))


@case([], [("qk", "COMPUTED"), ("vo", "COMPUTED")])
def blend_by_the_values(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.lerp(k, k.roll(1, 2), v), v))


# -- sums of a part and of another ------------------------------------------------------------


@case(HALVES, [])
def half_negated(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.cat([k[..., :3], 0 - k[..., 3:]], -1), v))


@case(HALVES, [])
def half_subtracted_from_zeros(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(
        attend(q, torch.cat([k[..., :3], torch.zeros_like(k[..., 3:]) - k[..., 3:]], -1), v)
    )


@case(HALVES, [])
def half_a_sum_and_half_a_difference(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    more = later(m, x)
    return m.out(attend(q, torch.cat([(k + more)[..., :3], (k - more)[..., 3:]], -1), v))


@case(HALVES, [])
def sums_with_two_factors(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    sums = [torch.add(k, later(m, x), alpha=alpha) for alpha in (1, 2)]
    return m.out(attend(q, torch.cat([sums[0][..., :3], sums[1][..., 3:]], -1), v))


@case([("qk", 4, 6), ("vo", 8, 3)], [])
def values_and_their_negative(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    out = attend(q, k, v)
    return m.out(torch.cat([(out + v)[..., :3], (out - v)[..., 3:]], -1))


# -- mixtures along an axis -------------------------------------------------------------------


@case(EVERY, [])
def running_sums(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q.cumsum(2), k.cumsum(-2), v.cumsum(2)).cumsum(2))


@case([("qk", 4, 6)], [("vo", "COMPUTED")])
def running_sum_of_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k, v.cumsum(-1)))


@case(VALUES, [("qk", "COMPUTED")])
def running_sum_of_heads(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k.cumsum(1), v))


@case(HALVES, [])
def running_sum_of_one_half(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, torch.cat([k[..., :3].cumsum(2), k[..., 3:]], -1), v))


@case(HALVES, [])
def half_a_sum_and_half_a_mean(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = torch.cat([k[..., :3].sum(2, keepdim=True), k[..., 3:].mean(2, keepdim=True)], -1)
    return m.out(attend(q, k.expand_as(q), v))


@case(HALVES, [])
def sums_of_masked_halves(m: Projections, x: Tensor) -> Any:
    """The halves carry different masks before they are summed over tokens."""
    q, k, v = m.qkv(x)
    halves = (k[..., :3].masked_fill(hidden(x), 0.0), k[..., 3:])
    return m.out(attend(q, k + torch.cat(halves, -1).sum(2, keepdim=True), v))


@case(EVERY, [])
def centred_keys_and_pooled_outputs(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = k - k.sum((0, 2), keepdim=True) / 7
    return m.out(attend(q, k, v - v.mean(dim=-2, keepdim=True)).mean(2, keepdim=True))


@case(EVERY, [])
def mean_of_the_flat_output(m: Projections, x: Tensor) -> Any:
    out = attend(*m.qkv(x)).transpose(1, 2).flatten(-2)
    return m.o(out.mean(1))


@case([("qk", 4, 6)], [("vo", "NORMALISED")])
def mean_of_the_features(m: Projections, x: Tensor) -> Any:
    out = attend(*m.qkv(x))
    return m.out(out - out.mean(-1, keepdim=True))


@case(VALUES, [("qk", "NORMALISED")])
def mean_of_heads_and_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k - k.mean((1, 3), keepdim=True), v))


@case(VALUES, [("qk", "NORMALISED")])
def mean_of_tokens_and_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q - q.mean((2, 3), keepdim=True), k, v))


@case([("qk", 4, 6)], [("vo", "NORMALISED")])
def mean_of_everything(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k, v - v.mean(None, keepdim=True)))


@case(EVERY, [])
def average_pooling_of_tokens(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k, v = (t.mT.flatten(1, 2) for t in (k, v))
    k, v = F.avg_pool1d(k, 3, 1, 1), F.avg_pool2d(v[..., None], (2, 1), (1, 1))[..., 0]
    k, v = (t.unflatten(1, (H, D)).mT for t in (k[..., 1:], v))
    return m.out(attend(q, k, v))


@case(VALUES, [("qk", "COMPUTED")])
def average_pooling_of_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, F.avg_pool1d(k.flatten(0, 1), 3, 1, 1).unflatten(0, (-1, H)), v))


@case([("qk", 4, 6)], [("vo", "COMPUTED")])
def adaptive_pooling_of_tokens_and_features(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k, F.adaptive_avg_pool2d(v, (3, D))[:, :, :1].expand_as(v)))


@case(EVERY, [])
def keys_summed_before_they_are_met(m: Projections, x: Tensor) -> Any:
    """The normaliser of a linear attention: q · Σ k is a product like any other."""
    q, k, v = m.qkv(x)
    total = q @ k.sum(2)[..., None]
    return m.out(q @ (k.mT @ v) / (1 + total.square()))


@case([("qk", 4, 6)], [])
def values_weighted_without_a_contraction(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    weights = (q @ k.mT).softmax(-1)
    return m.out((weights[..., None] * v[:, :, None]).sum(3))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", case)
def test_misleading_sums(name: str, dynamic: bool) -> None:
    assert case.outcome(name, dynamic=dynamic) == case[name]


# -- as many tokens as features ---------------------------------------------------------------


def square_mask(m: Projections, x: Tensor) -> Any:
    """[T, T] on keys [T, D]: a mask of features, as far as there are as many tokens."""
    q, k, v = m.qkv(x)
    return m.out(attend(q, k.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu() > 0, 0.0), v))


def row_mask(m: Projections, x: Tensor) -> Any:
    """[B, 1, 1, T], which keys [B, H, T, D] take for a mask of features."""
    q, k, v = m.qkv(x)
    return m.out(attend(q, k * x[:, None, None, :, 0].sigmoid(), v))


def wrong_axis(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    return m.out(attend(q, k - k.mT.mean(2, keepdim=True), v))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (square_mask, "NOTHING_SAVED"),
        (row_mask, "NOTHING_SAVED"),
        (wrong_axis, "NORMALISED"),
    ],
)
def test_tokens_are_not_features(body: Any, reason: str) -> None:
    report = rewrite_in_float64(Projections(body), (randn(B, D, E),))
    assert [s.product for s in report.rewritten] == ["vo"]
    assert [s.reason_code for s in report.skipped] == [reason]


def column_mask(m: Projections, x: Tensor) -> Any:
    q, k, v = m.qkv(x)
    k = torch.lerp(k, k.cumsum(2), x[:, None, :, :1])
    return m.out(attend(q, k - k.mean(2, keepdim=True), v.masked_fill(hidden(x), 0.0)))


def test_tokens_may_be_as_many_as_features() -> None:
    report = rewrite_in_float64(
        Projections(column_mask),
        (randn(B, D, E),),
        others=((randn(B, 9, E),),),
        dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}},
    )
    assert [(s.product, s.decomposed) for s in report.rewritten] == [("qk", D), ("vo", D)]


# -- values that are zero for the time being, and chance ---------------------------------------


class Filled(Projected):
    """The first key is a learned number, or one in a buffer; both are zero when it is rewritten."""

    def __init__(self, *, learned: bool) -> None:
        super().__init__()
        value = torch.zeros(())
        if learned:
            self.fill = nn.Parameter(value)
        else:
            self.register_buffer("fill", value)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(attend(q, k.masked_fill(hidden(x), self.fill), v))


@pytest.mark.parametrize("learned", [True, False])
def test_a_parameter_that_is_zero_now_is_no_zero(learned: bool) -> None:
    model = Filled(learned=learned)
    model.fill.data.zero_()
    report = rewrite_in_float64(model)
    assert [s.product for s in report.rewritten] == ["vo"]


@pytest.mark.parametrize("gate", ["dropout", "rand_like", "bernoulli"])
def test_chance_treats_no_two_features_alike(gate: str) -> None:
    def body(m: Projections, x: Tensor) -> Any:
        q, k, v = m.qkv(x)
        ones = x.new_ones(()).expand(k.shape[2], D)
        gates = {
            "dropout": lambda: F.dropout(ones, 0.5, training=True),
            "rand_like": lambda: torch.rand_like(ones),
            "bernoulli": lambda: torch.bernoulli(ones / 2),
        }
        return m.out(attend(q, k * gates[gate](), v))

    report = bda_fx.analyze(Projections(body), (randn(B, 5, E),), options=FULL)
    assert [s.product for s in report.rewritten] == ["vo"]
    assert [s.reason_code for s in report.skipped] == ["NOTHING_SAVED"]


def test_a_mask_on_the_meta_device() -> None:
    """Constants without values are not taken for zeros."""
    model = Filled(learned=False).to("meta")
    report = bda_fx.analyze(model, (randn(B, 5, E).to("meta"),), options=FULL)
    assert {s.product: s.reason_code for s in report.skipped} == {
        "qk": "COMPUTED",
        "vo": "NO_VALUES",
    }
