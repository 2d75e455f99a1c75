"""Gathers that cost nothing, and the readers that forbid it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bda_fx
from bda_fx.passes.find_folds import find_folds
from bda_fx.passes.find_sites import find_sites
from tests.programs import (
    FULL,
    B,
    D,
    E,
    H,
    S,
    canonical,
    randn,
    rewrite_in_float64,
    seeded,
    spelled_attention,
)

LATENT = 14


class Norm(nn.Module):
    """RMS norm spelled out, with casts, as transformers does it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(LATENT))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float64)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Latent(nn.Module):
    """Keys and values from a narrow latent, which one linear makes together with something else."""

    def __init__(
        self, norm: nn.Module | None = None, leak: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.down = nn.Linear(E, LATENT + 3)
        self.norm = Norm() if norm is None else norm
        self.kv = nn.Linear(LATENT, 2 * H * D, bias=False)
        self.q = nn.Linear(E, H * D)
        self.o = nn.Linear(H * D, E)
        self.leak = leak
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        latent, other = self.down(x).split([LATENT, 3], -1)
        latent = self.norm(latent)
        k, v = self.kv(latent).view(*x.shape[:2], H, 2 * D).transpose(1, 2).split(D, -1)
        q = self.q(x).view(*x.shape[:2], H, D).transpose(1, 2)
        y = self.o(spelled_attention(q, k, v).transpose(1, 2).flatten(-2)) + other.sum(-1, True)
        return y if self.leak is None else y + self.leak(latent)


def folds(model: nn.Module) -> list[str]:
    program = canonical(model, randn(B, S, E))
    return list(find_folds(program, find_sites(program)))


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(LATENT), nn.RMSNorm(LATENT), nn.Identity()])
def test_fold_through_a_norm(norm: nn.Module | None) -> None:
    assert folds(Latent(norm)) == ["p_kv_weight"]
    report = rewrite_in_float64(Latent(norm), (randn(B, S, E),))
    assert sorted(s.product for s in report.rewritten) == ["qk", "vo"]


def test_no_index_tensors_and_no_gather() -> None:
    rewrite = bda_fx.rewrite(Latent(), (randn(B, S, E),), options=FULL)
    targets = {str(node.target) for node in rewrite.program.graph.nodes}
    assert "aten.index_select.default" not in targets
    assert all(value.is_floating_point() for value in rewrite.program.state_dict.values())
    site = rewrite.report.rewritten[0]
    assert site.params_before is not None
    assert site.params_after == site.params_before - H * D * D


def test_another_linear_that_reads_the_latent_has_its_columns_permuted() -> None:
    model = Latent()
    reader = seeded(nn.Linear(LATENT, E), 3)
    model.leak = reader
    assert folds(model) == ["p_kv_weight"]
    rewrite_in_float64(model, (randn(B, S, E),))


@pytest.mark.parametrize(
    "leak",
    [
        lambda latent: latent[..., :1],  # sees which feature is first
        lambda latent: latent.cumsum(-1)[..., -1:],
        lambda latent: latent.softmax(-1)[..., 2:3],
    ],
)
def test_a_reader_that_sees_the_order_forbids_it(leak: Callable[[Tensor], Tensor]) -> None:
    assert folds(Latent(leak=leak)) == []
    rewrite_in_float64(Latent(leak=leak), (randn(B, S, E),))


def test_a_reader_that_does_not_see_the_order_is_left_alone() -> None:
    """A mean over all features is the same in any order, but only behind a proof: refused here."""
    model = Latent(leak=lambda latent: latent.mean(-1, keepdim=True))
    rewrite_in_float64(model, (randn(B, S, E),))


def test_a_slice_into_the_latent_forbids_it() -> None:
    class Overlap(Latent):
        def forward(self, x: Tensor) -> Tensor:
            down = self.down(x)
            return self.attend(x, self.norm(down[..., :LATENT])) + down[..., 5:6]

        def attend(self, x: Tensor, latent: Tensor) -> Tensor:
            k, v = self.kv(latent).view(*x.shape[:2], H, 2 * D).transpose(1, 2).split(D, -1)
            q = self.q(x).view(*x.shape[:2], H, D).transpose(1, 2)
            return self.o(spelled_attention(q, k, v).transpose(1, 2).flatten(-2))

    assert folds(Overlap()) == []
    rewrite_in_float64(Overlap(), (randn(B, S, E),))


def test_a_shared_norm_weight_forbids_it() -> None:
    class Shared(Latent):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.norm.weight.sum() * self.norm.weight[0]

    assert folds(Shared()) == []
