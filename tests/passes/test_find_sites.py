"""Which features meet which, over the spellings of one attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bda_fx.passes.sites import Reason
from tests.programs import (
    Attention,
    B,
    D,
    E,
    FusedAttention,
    H,
    SharedLayers,
    T,
    find,
    products,
    randn,
    reasons,
    seeded,
)


@pytest.mark.parametrize("core", ["sdpa", "spelled"])
def test_one_attention_is_two_sites(core: str) -> None:
    found = find(Attention(core=core))
    assert products(found) == ["qk", "vo"]
    for site in found.sites:
        assert site.linear.name == {"qk": "k.weight", "vo": "v.weight"}[site.product]
        assert site.features == tuple(tuple(range(h * D, h * D + D)) for h in range(H))
        (partner,) = site.partners
        assert partner.axis == {"qk": "out", "vo": "in"}[site.product]
        assert partner.features == site.features
        assert partner.groups == tuple(range(H))


@pytest.mark.parametrize("gqa", ["repeat_interleave", "expand", "enable_gqa"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_query_heads_know_their_group(gqa: str, kv_heads: int) -> None:
    for site in find(Attention(kv_heads=kv_heads, gqa=gqa)).sites:
        assert site.num_kv_heads == kv_heads
        order = sorted(zip(site.partners[0].features, site.partners[0].groups, strict=True))
        assert [g for _, g in order] == [i * kv_heads // H for i in range(H)]


def test_cross_attention() -> None:
    found = find(Attention(), randn(B, 5, E), randn(B, T, E))
    assert products(found) == ["qk", "vo"]


@pytest.mark.parametrize("order", ["chunk", "interleaved", "permuted", "strided"])
def test_fused_projections(order: str) -> None:
    found = find(FusedAttention(order))
    assert products(found) == ["qk", "vo"]
    assert {site.linear.name for site in found.sites} == {"qkv.weight"}
    seen = [f for site in found.sites for head in site.features for f in head]
    assert len(seen) == len(set(seen)) == 2 * H * D


def test_partial_rotary_leaves_the_other_features() -> None:
    def change(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Any:
        def turn(t: Tensor) -> Tensor:
            a, b, rest = t[..., :1], t[..., 1:2], t[..., 2:]
            return torch.cat([a * 0.6 - b * 0.8, a * 0.8 + b * 0.6, rest], -1)

        return turn(q), turn(k), v

    found = find(Attention(change=change))
    site = next(s for s in found.sites if s.product == "qk")
    assert site.features == tuple(tuple(range(h * D + 2, h * D + D)) for h in range(H))


def test_keys_built_by_slice_copies() -> None:
    """new_empty and two slice copies, as MLA does it: slice_scatter after functionalisation."""

    def change(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Any:
        whole = k.new_empty(k.shape)
        whole[..., :4] = k[..., :4]
        whole[..., 4:] = k[..., 4:]
        return q, whole, v

    assert products(find(Attention(change=change))) == ["qk", "vo"]


def test_shared_layers_are_one_site_used_twice() -> None:
    found = find(SharedLayers(2))
    assert products(found) == ["qk", "vo"]
    assert all(len(site.contractions) == 2 for site in found.sites)
    assert all(len(site.linear.nodes) == 2 for site in found.sites)


def test_scores_may_be_anything() -> None:
    model = Attention(core="spelled", scores=lambda s: 30 * (s / 30).tanh())
    assert products(find(model)) == ["qk", "vo"]


def test_readers_of_the_shape_are_no_readers() -> None:
    def change(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Any:
        return q, k + torch.zeros_like(k) if False else k.new_zeros(k.shape).copy_(k), v

    assert products(find(Attention(change=change))) == ["qk", "vo"]


def test_two_output_linears_are_two_partners() -> None:
    class Two(Attention):
        def __init__(self) -> None:
            super().__init__(finish=lambda m, out: m.o(out) + m.other(out))
            self.other = nn.Linear(H * D, E)
            seeded(self)

    site = next(s for s in find(Two()).sites if s.product == "vo")
    assert sorted(p.linear.name for p in site.partners) == ["o.weight", "other.weight"]


def test_an_output_linear_that_sees_some_heads() -> None:
    """The features that no linear reads are free; those that one reads are rewritten."""
    model = Attention(finish=lambda m, out: F.linear(out[..., : 2 * D], m.o.weight[:, : 2 * D]))
    site = next(s for s in find(model).sites if s.product == "vo")
    assert site.num_kv_heads == 2


def test_multihead_attention_and_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(E, 4, 24, batch_first=True).eval()
    assert products(find(layer)) == ["qk", "vo"]


def test_no_attention() -> None:
    found = find(nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.Linear(E, E)))
    assert found.sites == found.skips == found.products == ()


def test_tied_to_an_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(embed=E)
            self.table = nn.Embedding(H * D, E)
            self.table.weight = self.attention.k.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x + self.table(x[..., 0].long().clamp(0, 3)))

    found = find(Tied())
    assert products(found) == ["vo"]
    assert reasons(found) == {"qk": Reason.SHARED_WEIGHT}
