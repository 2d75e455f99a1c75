"""A small program for every form that the passes can emit.

Sizes are the least at which the form exists: a symbol is a symbol, and what holds for two heads of
two features by algebra does not hold by accident. Odd ones are chosen apart where that is free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.programs import Attention, FusedAttention, randn, seeded

B, S, E, H, D = 1, 2, 3, 2, 2
attend = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Case:
    """``sites`` are (product, side, r) of what must be rewritten; ``emits`` are keys of derived
    tensors that the form is known by, and ``lacks`` those that it must do without."""

    name: str
    make: Callable[[], nn.Module]
    sites: tuple[tuple[str, str, int], ...]
    args: tuple[Tensor, ...] = (randn(B, S, E),)
    options: Mapping[str, Any] = field(default_factory=lambda: {"basis_size": "full"})
    fixed_rows: bool = True
    emits: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


class Small(nn.Module):
    """q, k, v, o linears for ``heads`` heads of ``width`` features, and what ``extra`` names."""

    def __init__(self, heads: int = H, width: int = D, **extra: Any) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.q, self.k, self.v = (nn.Linear(E, heads * width) for _ in range(3))
        self.o = nn.Linear(heads * width, E)
        for name, value in extra.items():
            setattr(self, name, value)
        seeded(self)

    def split(self, x: Tensor) -> Tensor:
        """[B, S, heads · D] to [B, heads, S, D]"""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def out(self, heads: Tensor) -> Tensor:
        return self.o(heads.transpose(1, 2).flatten(-2))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on two features."""
    turned = torch.cat([-x[..., 1:], x[..., :1]], -1)
    return x * cos + turned * sin


class DecoupledRotary(Small):
    """DeepSeek's: some features of a query and a key are rotated and made by other linears."""

    def __init__(self) -> None:
        super().__init__(
            heads=1,
            qr=nn.Linear(E, 2),
            kr=nn.Linear(E, 2),
            cos=parameter(S, 2),
            sin=parameter(S, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        qr, kr = (rotate(f(x), self.cos, self.sin).unsqueeze(1) for f in (self.qr, self.kr))
        return self.out(attend(torch.cat([q, qr], -1), torch.cat([k, kr], -1), v))


class PartialRotary(Small):
    """The first two of a head's four features are rotated: one linear, two kinds of pieces."""

    def __init__(self) -> None:
        super().__init__(heads=1, width=4, cos=parameter(S, 2), sin=parameter(S, 2))
        self.v, self.o = seeded(nn.Linear(E, 2), 1), seeded(nn.Linear(2, E), 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (self.rotate_two(f(x)) for f in (self.q, self.k))
        return self.o((q @ k.mT).softmax(-1) @ self.v(x))

    def rotate_two(self, x: Tensor) -> Tensor:
        return torch.cat([rotate(x[..., :2], self.cos, self.sin), x[..., 2:]], -1)


class TwoBlocks(Small):
    """A second output projection sees a part of a head: two blocks, each with its own basis."""

    def __init__(self) -> None:
        super().__init__(heads=1, width=5, o2=nn.Linear(2, 2))
        self.q, self.k = seeded(nn.Linear(E, 2), 1), seeded(nn.Linear(E, 2), 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
        return self.o(z), self.o2(z[..., :2])


class ReversedKeys(Small):
    """Features meet in another order than the linear makes them in."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(attend(q, k.flip(-1), v.flip(-1)))


class StridedOutput(Small):
    """Features of a head lie apart in the output projection, last to first."""

    def forward(self, x: Tensor) -> Tensor:
        z = attend(*self.qkv(x))
        return self.o(z.permute(0, 2, 3, 1).flatten(-2).flip(-1))


class ValuesAreKeys(Small):
    def forward(self, x: Tensor) -> Tensor:
        q, k, _ = self.qkv(x)
        return self.out(attend(q, k, k))


class ContentAndPosition(Small):
    """DeBERTa: two keys and two queries, three products, one change of basis."""

    def __init__(self) -> None:
        super().__init__(
            pk=nn.Linear(E, H * D), pq=nn.Linear(E, H * D), positions=parameter(1, S, E)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        pk, pq = self.split(self.pk(self.positions)), self.split(self.pq(self.positions))
        scores = q @ k.mT + q @ pk.mT + (k @ pq.mT).mT
        return self.out(scores.softmax(-1) @ v)


class RelativePositions(Small):
    """Transformer-XL: learned biases u and w are added to the queries."""

    def __init__(self) -> None:
        super().__init__(
            u=parameter(H, D),
            w=parameter(H, D),
            r=nn.Linear(E, H * D),
            positions=parameter(1, S, E),
        )

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (H, D))
        _, k, v = self.qkv(x)
        r = self.split(self.r(self.positions))
        scores = (q + self.u).transpose(1, 2) @ k.mT + (q + self.w).transpose(1, 2) @ r.mT
        return self.out(scores.softmax(-1) @ v)


class Prefix(Small):
    """Learned keys and values in front of the others: constants that turn along."""

    def __init__(self) -> None:
        super().__init__(pk=parameter(1, H, 1, D), pv=parameter(1, H, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(attend(q, torch.cat([self.pk, k], 2), torch.cat([self.pv, v], 2)))


class LearnedQueries(Small):
    def __init__(self) -> None:
        super().__init__(latents=parameter(1, H, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = self.qkv(x)
        return self.out(attend(self.latents, k, v))


class JointAttention(Small):
    """Keys and values of two streams, side by side along the tokens."""

    def __init__(self) -> None:
        super().__init__(k2=nn.Linear(E, H * D), v2=nn.Linear(E, H * D))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        k = torch.cat([k, self.split(self.k2(y))], 2)
        v = torch.cat([v, self.split(self.v2(y))], 2)
        return self.out(attend(q, k, v))


class TwoOutputs(Small):
    def __init__(self) -> None:
        super().__init__(o2=nn.Linear(H * D, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = attend(*self.qkv(x))
        return self.out(z), self.o2(z.transpose(1, 2).flatten(-2))


class LinearAttention(Small):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(q @ (k.mT @ v))


class Masked(Small):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(((q @ k.mT) / D**0.5 + mask).softmax(-1) @ v)


class UsedTwice(nn.Module):
    """One attention, two calls: its weights are decomposed once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attention(heads=1, head_dim=D, embed=E)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x) + self.layer(y)


class Latent(nn.Module):
    """Latent attention: an RMS norm with a constant per feature before the one K/V linear.

    ``again``: another linear reads the latent too.
    """

    LATENT = 3

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(2, self.LATENT + 1)
        self.scale = nn.Parameter(torch.ones(self.LATENT))
        self.kv = nn.Linear(self.LATENT, 2 * D, bias=False)
        self.q, self.o = nn.Linear(2, D), nn.Linear(D, 2)
        self.again = nn.Linear(self.LATENT, 2) if again else None
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        latent, other = self.down(x).split([self.LATENT, 1], -1)
        latent = self.scale * (latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1))
        k, v = self.kv(latent).unsqueeze(1).split(D, -1)
        y = self.o(attend(self.q(x).unsqueeze(1), k, v).squeeze(1)) + other
        return y if self.again is None else y + self.again(latent)


def scattered() -> nn.Module:
    """The feature in the middle is a poor choice for a basis, on either side."""
    model = Attention(heads=H, head_dim=D, embed=E)
    with torch.no_grad():
        for linear in (model.q, model.k, model.v):
            linear.weight[:, 1] *= 0.01
        model.o.weight[1] *= 0.01
    return model


def attention(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: Attention(**{"heads": H, "head_dim": D, "embed": E, **kwargs})


KV_SIDE = (("qk", "kv", D), ("vo", "kv", D))
QO_SIDE = (("qk", "qo", D), ("vo", "qo", D))
QUERIES = {"basis_size": "full", "side": "qo"}
WINDOW = {"basis_size": "full", "basis": "window"}
PART = {"basis_size": 0.7}
TWO = (randn(B, S, E), randn(B, 1, E, seed=1))

CASES = (
    Case("scattered rows", scattered, KV_SIDE,
         emits=("k.weight_qk0_rows", "k.weight_qk0_rest", "k.weight_coefficients_bias")),
    Case("no biases", attention(bias=False), KV_SIDE, lacks=("k.weight_coefficients_bias",)),
    Case("rows that are inputs", attention(), KV_SIDE, options=WINDOW, fixed_rows=False,
         emits=("k.weight_qk0_rows", "v.weight_vo0_rest")),
    Case("first rows", attention(), KV_SIDE, options={"basis_size": "full", "basis": "first"},
         lacks=("k.weight_qk0_rows",)),
    Case("window of rows", attention(heads=1, embed=4), KV_SIDE, (randn(B, S, 4),), WINDOW,
         lacks=("k.weight_qk0_rows",)),
    Case("grouped queries", attention(kv_heads=1), KV_SIDE),
    Case("grouped queries, broadcast", attention(kv_heads=1, gqa="expand"), KV_SIDE),
    Case("fewer basis rows than features", attention(heads=1, head_dim=3, embed=4),
         (("qk", "kv", 2), ("vo", "kv", 2)), (randn(B, S, 4),), PART),
    Case("fewer basis rows, two heads", attention(), (("qk", "kv", 1), ("vo", "kv", 1)),
         options=PART),
    Case("query side", scattered, QO_SIDE, options=QUERIES,
         emits=("q.weight_qk0_rows", "o.weight_vo0_order", "o.weight_coefficients_bias_rest")),
    Case("query side, window of outputs", attention(heads=1, embed=4), QO_SIDE, (randn(B, S, 4),),
         {**QUERIES, "basis": "window"}, lacks=("o.weight_vo0_order",)),
    Case("query side, fewer basis rows", attention(), (("qk", "qo", 1), ("vo", "qo", 1)),
         options={"side": "qo", **PART}),
    Case("query side, scattered heads", StridedOutput, QO_SIDE, options=QUERIES,
         emits=("o.weight_heads",)),
    Case("all inputs are the basis", attention(heads=1, embed=2), KV_SIDE, (randn(B, S, 2),),
         lacks=("k.weight_coefficients",)),
    Case("heads wider than the model", attention(heads=1, head_dim=3, embed=2), KV_SIDE,
         (randn(B, S, 2),), lacks=("k.weight_coefficients",)),
    Case("query side, all outputs", attention(heads=1, embed=2), QO_SIDE, (randn(B, S, 2),),
         QUERIES, lacks=("o.weight",)),
    Case("fused, one after the other", lambda: FusedAttention("chunk", H, D, E), KV_SIDE,
         emits=("qkv.weight_dense", "qkv.weight_kv4_rows")),
    Case("fused, head by head", lambda: FusedAttention("interleaved", H, D, E), KV_SIDE,
         emits=("qkv.weight_dense",)),
    Case("fused, heads innermost", lambda: FusedAttention("strided", H, D, E), KV_SIDE,
         emits=("qkv.weight_dense", "qkv.weight_kv2_slots")),
    Case("features in reverse", lambda: ReversedKeys(1, 3), (("qk", "kv", 2), ("vo", "kv", 2)),
         options=PART),
    Case("decoupled rotary", DecoupledRotary, KV_SIDE),
    Case("partial rotary", PartialRotary, KV_SIDE, emits=("k.weight_dense",)),
    Case("two blocks in a head", TwoBlocks, (*KV_SIDE, ("vo", "kv", 3)),
         emits=("v.weight_coefficients1_bias",)),
    Case("values are keys", ValuesAreKeys, (("qk+vo", "kv", D),)),
    Case("content and position", ContentAndPosition, KV_SIDE, emits=("pk.weight", "pq.weight")),
    Case("biases of queries", RelativePositions, KV_SIDE),
    Case("learned keys", Prefix, KV_SIDE),
    Case("learned queries", LearnedQueries, KV_SIDE),
    Case("two streams", JointAttention, KV_SIDE, TWO, emits=("k2.weight", "v2.weight")),
    Case("two output projections", TwoOutputs, KV_SIDE, emits=("o.weight", "o2.weight")),
    Case("two output projections, query side", TwoOutputs, QO_SIDE, options=QUERIES,
         emits=("v.weight",)),
    Case("cross-attention", attention(), KV_SIDE, (TWO[1], TWO[0])),
    Case("no softmax", LinearAttention, KV_SIDE, (TWO[1],)),
    Case("added mask", Masked, KV_SIDE, (randn(B, S, E), randn(S, S, seed=1))),
    Case("used twice", UsedTwice, KV_SIDE, TWO),
    Case("folded into the producer", Latent, KV_SIDE, (randn(B, S, 2),),
         emits=("down.weight", "scale"), lacks=("kv.weight_kv0_rows",)),
    Case("folded, with another reader", lambda: Latent(again=True), KV_SIDE, (randn(B, S, 2),),
         emits=("down.weight", "again.weight"), lacks=("kv.weight_kv0_rows",)),
)  # fmt: skip
"""Lines are a table."""


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
