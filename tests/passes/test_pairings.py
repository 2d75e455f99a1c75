"""Attention in which heads do not pair up one to one, and factors that are no linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bda_fx
from tests import tolerances
from tests.programs import (
    FULL,
    B,
    D,
    E,
    H,
    Projected,
    S,
    assert_close,
    example,
    randn,
    rewrite_in_float64,
    seeded,
)

Case = tuple[list[tuple[str, str, int, int]], list[tuple[str, str]]]
CASES: dict[type[nn.Module], Case] = {}


def case(
    rewritten: list[tuple[str, str, int, int]], skipped: list[tuple[str, str]] | None = None
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """(product, weight, key/value heads, D) of every site; (product, reason) of every skip."""

    def register(module: type[nn.Module]) -> type[nn.Module]:
        CASES[module] = (rewritten, skipped or [])
        return module

    return register


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


attend = F.scaled_dot_product_attention
BOTH = [("qk", "k.weight", H, D), ("vo", "v.weight", H, D)]


@case(BOTH)
class RelativePositions(Projected):
    """Transformer-XL: q + u meets the keys, q + w a table of positions."""

    def __init__(self) -> None:
        super().__init__(
            u=parameter(H, D),
            w=parameter(H, D),
            r=nn.Linear(E, H * D, bias=False),
            positions=parameter(1, S, E),
        )

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(x.shape[0], -1, H, D)
        _, k, v = self.qkv(x)
        r = self.split(self.r(self.positions))
        content = (q + self.u).transpose(1, 2) @ k.mT
        position = (q + self.w).transpose(1, 2) @ r.mT
        return self.out(((content + position) / D**0.5).softmax(-1) @ v)


@case(BOTH)
class ContentAndPosition(Projected):
    """DeBERTa: content and position keys and queries, three products on one change of basis."""

    def __init__(self) -> None:
        super().__init__(
            pk=nn.Linear(E, H * D), pq=nn.Linear(E, H * D), positions=parameter(1, S, E)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        pk, pq = self.split(self.pk(self.positions)), self.split(self.pq(self.positions))
        scores = q @ k.mT + q @ pk.mT + (k @ pq.mT).mT
        return self.out((scores / D**0.5).softmax(-1) @ v)


@case(BOTH)
class SharedContentAndPosition(Projected):
    """The same with one linear for both, as DeBERTa's ``share_att_key``."""

    def __init__(self) -> None:
        super().__init__(positions=parameter(1, S, E))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        pk, pq = self.split(self.k(self.positions)), self.split(self.q(self.positions))
        scores = q @ k.mT + q @ pk.mT + (k @ pq.mT).mT
        return self.out((scores / D**0.5).softmax(-1) @ v)


@case(BOTH)
class Prefix(Projected):
    """Learned keys and values in front of the others (prefix tuning, ``add_bias_kv``)."""

    def __init__(self) -> None:
        super().__init__(pk=parameter(1, H, 3, D), pv=parameter(1, H, 3, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        k = torch.cat([self.pk.expand(x.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([self.pv.expand(x.shape[0], -1, -1, -1), v], 2)
        return self.out(attend(q, k, v))


@case(BOTH)
class LowRankAdapter(Projected):
    """LoRA that is not merged: K is the sum of two linears."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(E, 3, bias=False), b=nn.Linear(3, H * D, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, _, v = self.qkv(x)
        return self.out(attend(q, self.split(self.k(x) + 0.5 * self.b(self.a(x))), v))


@case(BOTH)
class LearnedQueries(Projected):
    """Perceiver: queries that are parameters."""

    def __init__(self) -> None:
        super().__init__(latents=parameter(H, 3, D))

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.qkv(x)
        return self.out(attend(self.latents[None].expand(x.shape[0], -1, -1, -1), k, v))


@case(BOTH)
class ProjectedQueries(Projected):
    """Queries that are computed from parameters alone."""

    def __init__(self) -> None:
        super().__init__(latents=parameter(1, 3, E))

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.qkv(x)
        q = self.split(self.q(self.latents)).expand(x.shape[0], -1, -1, -1)
        return self.out(attend(q, k, v))


@case(BOTH)
class TwoOutputs(Projected):
    def __init__(self) -> None:
        super().__init__(o2=nn.Linear(H * D, 7))

    def forward(self, x: Tensor) -> Any:
        z = attend(*self.qkv(x))
        return self.out(z), self.o2(z.transpose(1, 2).flatten(-2))


@case([("qk", "k.weight", H, D), ("vo", "v.weight", H, 4), ("vo", "v.weight", H, 2)])
class OutputOfPartOfAHead(Projected):
    """A second output linear sees some features of every head: two blocks a head."""

    def __init__(self) -> None:
        super().__init__(o2=nn.Linear(H * 4, 7))

    def forward(self, x: Tensor) -> Any:
        z = attend(*self.qkv(x))
        return self.out(z), self.o2(z[..., :4].transpose(1, 2).flatten(-2))


@case([("qk", "k.weight", H, D), ("vo", "v.weight", 2, D), ("vo", "v.weight", 2, D)])
class OutputOfSomeHeads(Projected):
    def __init__(self) -> None:
        super().__init__(o2=nn.Linear(2 * D, 7))

    def forward(self, x: Tensor) -> Any:
        z = attend(*self.qkv(x))
        return self.out(z), self.o2(z[:, :2].transpose(1, 2).flatten(-2))


@case(BOTH)
class TwoAttentionsOneOutput(Projected):
    """Two attentions with values of their own, added up before one output linear."""

    def __init__(self) -> None:
        super().__init__(v2=nn.Linear(E, H * D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(attend(q, k, v) + attend(q.flip(2), k, self.split(self.v2(x))))


@case(BOTH)
class JointAttention(Projected):
    """Keys and values of two streams side by side along the tokens (SD3)."""

    def __init__(self) -> None:
        super().__init__(k2=nn.Linear(7, H * D), v2=nn.Linear(7, H * D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        k = torch.cat([k, self.split(self.k2(x[..., :7]))], 2)
        v = torch.cat([v, self.split(self.v2(x[..., :7]))], 2)
        return self.out(attend(q, k, v))


@case(BOTH)
class MixedTokens(Projected):
    """Keys are averaged with their neighbours: the same feature of other tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(attend(q, k + k.roll(1, 2), v))


@case(BOTH)
class LinearAttention(Projected):
    """No softmax, so keys and values are multiplied first."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(q @ (k.mT @ v) / S)


@case(BOTH)
class LinearAttentionByEinsum(Projected):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        state = torch.einsum("bhnd,bhne->bhde", k, v)
        return self.out(torch.einsum("bhnd,bhde->bhne", q, state) / S)


@case([("qk", "k", H, D), ("vo", "v.weight", H, D)])
class WeightsByHead(Projected):
    """Projections with a weight of three axes, spelled as einsum."""

    def __init__(self) -> None:
        super().__init__()
        del self.k, self.o
        self.k, self.o = parameter(H, E, D), parameter(H, D, E)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.split(self.q(x)), self.split(self.v(x))
        z = attend(q, torch.einsum("bse,hed->bhsd", x, self.k), v)
        return torch.einsum("bhsd,hde->bse", z, self.o)


@case(BOTH)
class TalkingHeads(Projected):
    """Heads are mixed before and after the softmax, and the weights are returned."""

    def __init__(self) -> None:
        super().__init__(before=parameter(H, H), after=parameter(H, H))

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x)
        weights = torch.einsum("bhij,hg->bgij", q @ k.mT, self.before).softmax(-1)
        weights = torch.einsum("bhij,hg->bgij", weights, self.after)
        return self.out(weights @ v), weights


@case(BOTH)
class SigmoidOfCappedScores(Projected):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(torch.sigmoid(5 * torch.tanh(q @ k.mT / 5)) @ v)


@case(BOTH)
class FlexAttention(Projected):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + 0.1 * (i - j)

        return self.out(flex_attention(*self.qkv(x), score_mod=score))


@case([("qk", "k.weight", 2, D), ("vo", "v.weight", 2, D)])
class BroadcastGroups(Projected):
    """Grouped queries by broadcasting in the matmul."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(x.shape[0], -1, 2, 2, D).permute(0, 2, 3, 1, 4)
        k, v = (
            f(x)[..., : 2 * D].view(x.shape[0], -1, 2, 1, D).permute(0, 2, 3, 1, 4)
            for f in (self.k, self.v)
        )
        z = (q @ k.mT / D**0.5).softmax(-1) @ v
        return self.o(z.permute(0, 3, 1, 2, 4).flatten(2))


@case([("qk", "k.weight", 2, D), ("vo", "v.weight", 4, D)])
class DifferentGroups(Projected):
    """Keys are shared by query heads, values are not."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(attend(q, k[:, :2].repeat(1, 2, 1, 1), v))


@case([("vo", "v.weight", H, D)], [("qk", "SHARED_WEIGHT")])
class KeysAreQueries(Projected):
    """S⁻¹ and Sᵀ at once: only an orthogonal S could do that."""

    def forward(self, x: Tensor) -> Tensor:
        q, _, v = self.qkv(x)
        return self.out(attend(q, q.roll(1, 2), v))


@case([("qk+vo", "k.weight", H, D)])
class ValuesAreKeys(Projected):
    """One projection for both: one change of basis serves both products."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, _ = self.qkv(x)
        return self.out(attend(q, k, k))


@case([("vo", "v.weight", H, D)], [("qk", "MISMATCHED"), ("qk", "MISMATCHED")])
class TableForAllHeads(Projected):
    """A table that every head meets (SAM): one S for all heads would save nothing."""

    def __init__(self) -> None:
        super().__init__(table=parameter(S, S, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        position = torch.einsum("bhid,ijd->bhij", q, self.table)
        return self.out(((q @ k.mT + position) / D**0.5).softmax(-1) @ v)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("module", CASES, ids=lambda m: m.__name__)
def test_pairing(module: type[nn.Module], dynamic: bool) -> None:
    rewritten, skipped = CASES[module]
    others = ((randn(B + 1, S, E, seed=5),),) if dynamic else ()
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}} if dynamic else None
    report = rewrite_in_float64(module(), (example(),), others=others, dynamic_shapes=shapes)
    found = sorted((s.product, s.name, s.kv_heads, s.decomposed) for s in report.rewritten)
    assert found == sorted(rewritten)
    assert sorted((s.product, s.reason_code) for s in report.skipped) == skipped


@pytest.mark.parametrize("module", CASES, ids=lambda m: m.__name__)
def test_a_second_rewrite_finds_the_same_or_nothing_left_to_save(module: type[nn.Module]) -> None:
    """The rewritten program is a program like any other: whatever is done to it keeps it right."""
    model, x = module().double(), (example().double(),)
    once = bda_fx.rewrite(model, x, options=FULL)
    twice = bda_fx.rewrite(once.program, options=FULL)
    conditions = [s.condition or 0.0 for r in (once, twice) for s in r.report.rewritten]
    with torch.no_grad():
        expected = model(*x)
        for rewritten in (once, twice):
            got = rewritten.program.module()(*x)
            assert_close(got, expected, tolerances.program(conditions))
