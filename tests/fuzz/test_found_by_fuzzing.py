"""Bugs that fuzzing found, each as the smallest module that shows it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bda_fx
from bda_fx.report import Report
from tests import tolerances
from tests.programs import (
    FULL,
    D,
    E,
    H,
    Projected,
    assert_close,
    example,
    rewrite_in_float64,
    seeded,
)


def sites(report: Report) -> list[tuple[str, int | None]]:
    return sorted((s.product, s.decomposed) for s in report.rewritten)


def test_a_fold_puts_the_dense_piece_of_its_own_linear_in_order_too() -> None:
    """Keys are values too, and one feature is read by something else: it stays as it was."""

    class Folded(Projected):
        def __init__(self) -> None:
            super().__init__(down=nn.Linear(E, 9), up=nn.Linear(9, H * D))

        def forward(self, x: Tensor) -> Tensor:
            kv = self.split(self.up(F.layer_norm(self.down(x), (9,))))
            q = self.split(self.q(x)).clone()
            q[..., 0].mul_(2.0)
            return self.out(F.scaled_dot_product_attention(q, kv, kv))

    report = rewrite_in_float64(Folded())
    assert sites(report) == [("qk+vo", D - 1)]


@pytest.mark.parametrize("spelling", ["conv", "left", "einsum"])
def test_views_behind_a_respelled_projection_hold(spelling: str) -> None:
    """A convolution comes out contiguous, the linear in its place does not."""

    class Respelled(Projected):
        def project(self, x: Tensor, linear: nn.Linear) -> Tensor:
            if spelling == "conv":
                return F.conv1d(x.transpose(1, 2), linear.weight[:, :, None]).transpose(1, 2)
            if spelling == "left":
                return (linear.weight @ x.transpose(1, 2)).transpose(1, 2)
            return torch.einsum("bte,hde->bthd", x, linear.weight.view(H, D, E)).flatten(2)

        def forward(self, x: Tensor) -> Tensor:
            k, v = (self.project(x, f).reshape(-1, x.shape[1], H, D) for f in (self.k, self.v))
            k, v = (t.movedim(1, 2).repeat(1, 1, 1, 1) for t in (k, v))
            scores = torch.einsum("bhid,bhjd->bhij", self.split(self.q(x)), k)
            return self.out(scores.softmax(-1) @ v + v)

    assert sites(rewrite_in_float64(Respelled())) == [("qk", D), ("vo", D)]


def test_a_rewritten_projection_is_not_spelled_back() -> None:
    """The old node was put back where its replacement was more than a linear: nothing was saved,
    and with one projection spelled so the other half of the rewrite was wrong."""

    class Mixed(Projected):
        def forward(self, x: Tensor) -> Tensor:
            k = F.conv1d(x.transpose(1, 2), self.k.weight[:, :, None]).transpose(1, 2)
            q, v = self.split(self.q(x)), self.split(self.v(x))
            return self.out(F.scaled_dot_product_attention(q, self.split(k), v))

    model, x = Mixed().double(), example().double()
    rewritten = bda_fx.rewrite(model, (x,), options=FULL)
    assert_close(rewritten.program.module()(x), model(x), tolerances.FLOAT64_PIVOT)
    assert (rewritten.report.bytes_after or 0) < (rewritten.report.bytes_before or 0)
    assert "conv1d" not in rewritten.program.graph_module.code


def test_a_sum_that_is_lost_loses_all_of_its_terms() -> None:
    """q + u meets keys that cannot change, q + w a table that could: q must not change either."""

    class Biased(Projected):
        def __init__(self) -> None:
            empty = {n: nn.Parameter(torch.zeros(H, 1, D)) for n in ("u", "w")}
            super().__init__(**empty, table=nn.Parameter(torch.zeros(H, 7, D)))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
            content = (q + self.u) @ torch.relu(k).mT
            position = ((q + self.w) @ self.table.mT).mean(-1, keepdim=True)
            return self.out((content + position).softmax(-1) @ v)

    assert sites(rewrite_in_float64(Biased())) == [("vo", D)]


@pytest.mark.parametrize("spelling", ["transposed", "kernel"])
def test_one_weight_in_two_spellings_is_one_weight(spelling: str) -> None:
    """Keys and queries of one parameter would each have got a copy of it."""

    class Shared(Projected):
        def forward(self, x: Tensor) -> Tensor:
            if spelling == "transposed":
                k = x @ self.q.weight.t()
            else:
                k = F.conv1d(x.transpose(1, 2), self.q.weight[:, :, None]).transpose(1, 2)
            q, v = self.split(F.linear(x, self.q.weight)), self.split(self.v(x))
            return self.out(F.scaled_dot_product_attention(q, self.split(k), v))

    report = rewrite_in_float64(Shared())
    assert sites(report) == [("vo", D)]
    assert [s.reason_code for s in report.skipped] == ["SHARED_WEIGHT"]


def test_overlapping_slices_of_one_weight_are_tied() -> None:
    class Sliced(Projected):
        def forward(self, x: Tensor) -> Tensor:
            w = self.k.weight
            q = F.linear(x, w)
            k = F.linear(x, torch.cat([w[D:], w[:D]]))
            v = F.linear(x, w[1:])
            v = torch.cat([v, v[..., :1]], -1)
            heads = (self.split(t) for t in (q, k, v))
            return self.out(F.scaled_dot_product_attention(*heads))

    assert sites(rewrite_in_float64(Sliced())) == []


def test_attention_outputs_that_are_lost_altogether() -> None:
    """An activation reads what has no label left: values that came out of a cache."""

    class Lost(Projected):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
            z = (q @ k.mT).softmax(-1) @ torch.relu(v)
            return self.out(F.gelu(z))

    assert sites(rewrite_in_float64(Lost())) == [("qk", D)]


def test_values_pass_where_keys_do_not() -> None:
    """Linear attention with a feature map on the keys: values are only mixed over tokens."""

    class FeatureMap(Projected):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
            return self.out(q @ (torch.relu(k).mT @ v) / 5)

    report = rewrite_in_float64(FeatureMap())
    assert sites(report) == [("vo", D)]
    assert [s.reason_code for s in report.skipped if s.product == "qk"] == ["COMPUTED"]


def test_two_shared_bases_of_one_weight() -> None:
    """Two kinds of features in one weight, each with parts that share a basis."""

    class Shared(Projected):
        def __init__(self) -> None:
            super().__init__(first=nn.Linear(D, E))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = F.scaled_dot_product_attention(*self.qkv(x))
            mean = z[..., :2].mean(2, keepdim=True).expand_as(z[..., :2])
            z = torch.cat([mean, z[..., 2:]], -1)
            return self.out(z), self.first(z[:, 0])

    report = rewrite_in_float64(Shared())
    bases = {(s.basis_size, s.decomposed) for s in report.rewritten if s.product == "vo"}
    assert bases == {(2, 2), (D - 2, D - 2)}


def test_strides_of_every_part_of_a_split() -> None:
    """A fused projection with the weight on the left comes out transposed, its rewrite does not;
    views behind the split, a clone and a write that keeps strides had been made for the former."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.empty(3 * H * D, E))
            self.o = nn.Linear(H * D, E)
            seeded(self)

        def forward(self, x: Tensor) -> Tensor:
            parts = (self.qkv @ x.transpose(1, 2)).transpose(1, 2).split(H * D, -1)
            q, k, v = (part.unflatten(-1, (H, D)).transpose(1, 2) for part in parts)
            q = q.clone()
            q[(x[..., 0] > 0)[:, None].expand(-1, H, -1)] = 0
            scores = torch.einsum("bhid,bhjd->bhij", q, k)
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    assert sites(rewrite_in_float64(Fused()))


def test_one_weight_for_keys_and_queries_whose_halves_meet_crosswise() -> None:
    """Key features of either half meet query features of the other: turning one half by S and the
    other by S⁻ᵀ suits both roles of the weight, so that half of it is decomposed. The legality
    oracle had taken every such weight for illegal."""

    class Crossed(Projected):
        def forward(self, x: Tensor) -> Tensor:
            q, v = self.split(self.q(x)), self.split(self.v(x))
            halves = q.chunk(2, -1)
            k = torch.cat([halves[1], halves[0].mean(2, keepdim=True).expand_as(halves[0])], -1)
            return self.out(F.scaled_dot_product_attention(q, k, v))

    report = rewrite_in_float64(Crossed())
    assert sites(report) == [("qk", D // 2), ("vo", D)]
