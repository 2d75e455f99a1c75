"""Bugs that a second, independent fuzzer found, each as the smallest module that shows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.programs import randn, rewrite_in_float64, seeded

E, H = 11, 2


def heads(x: Tensor, width: int) -> Tensor:
    """[B, S, H·D] to [B, H, S, D]"""
    return x.view(*x.shape[:2], -1, width).transpose(1, 2)


def merged(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


def check(model: nn.Module, rewritten: list[tuple[str, int]]) -> None:
    """Outputs stay; ``rewritten`` are product and features of a head."""
    seeded(model)
    inputs = [(randn(2, 5, E, seed=seed),) for seed in (1, 2)]
    report = rewrite_in_float64(model, inputs[0], others=(inputs[1],))
    found = sorted((s.product, s.decomposed) for s in report.rewritten)
    assert found == sorted(rewritten)


class TwoFusedLayers(nn.Module):
    """K and V of equal width in one fused weight, twice: the layers' bases were mixed up."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(E, 18), nn.Linear(6, E)
        self.qkv1, self.o1 = nn.Linear(E, 18), nn.Linear(6, E)

    def forward(self, x: Tensor) -> Tensor:
        for qkv, o in ((self.qkv, self.o), (self.qkv1, self.o1)):
            q, k, v = (heads(t, 3) for t in qkv(x).chunk(3, -1))
            x = o(merged(F.scaled_dot_product_attention(q, k, v)))
            x = F.layer_norm(x, (E,))
        return x


def test_two_fused_layers() -> None:
    check(TwoFusedLayers(), [("qk", 3), ("vo", 3), ("qk", 3), ("vo", 3)])


class ValueResidual(nn.Module):
    """The second layer adds the first one's values to its own, all from fused weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(E, 26), nn.Linear(10, E)
        self.qkv1, self.o1 = nn.Linear(E, 26), nn.Linear(10, E)

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor | None = None
        for qkv, o in ((self.qkv, self.o), (self.qkv1, self.o1)):
            q, k, v = qkv(x).split([8, 8, 10], -1)
            v = heads(v, 5)
            v = v if first is None else v + 0.5 * first
            first = v
            x = o(merged(F.scaled_dot_product_attention(heads(q, 4), heads(k, 4), v)))
            x = F.layer_norm(x, (E,))
        return x


def test_value_residual() -> None:
    check(ValueResidual(), [("qk", 4), ("qk", 4), ("vo", 5)])


class EinsumOutput(nn.Module):
    """An output weight [H·D, 1, E] in an einsum, where one axis has length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(E, 4), nn.Linear(E, 4), nn.Linear(E, 5)
        self.w = nn.Parameter(torch.empty(5, E))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(f(x), f.out_features) for f in (self.q, self.k, self.v))
        o = merged(F.scaled_dot_product_attention(q, k, v))
        return torch.einsum("bte,ehd->bthd", o, self.w.view(5, 1, E)).flatten(2)


def test_einsum_output() -> None:
    check(EinsumOutput(), [("qk", 4), ("vo", 5)])


class Latent(nn.Module):
    """MLA whose queries get a bias after they are split, and whose keys' other part has none."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.u = nn.Linear(E, 12, bias=False), nn.Parameter(torch.empty(12))
        self.kv_a, self.norm = nn.Linear(E, 10, bias=False), nn.RMSNorm(7)
        self.kv_b, self.o = nn.Linear(7, 16), nn.Linear(10, E)

    def forward(self, x: Tensor) -> Tensor:
        q = heads(self.q(x), 6) + self.u.view(H, 1, 6)
        latent, shared = self.kv_a(x).split([7, 3], -1)
        k, v = heads(self.kv_b(self.norm(latent)), 8).split([3, 5], -1)
        k = torch.cat([k, shared[:, None].expand(-1, H, -1, -1)], -1)
        return self.o(merged(F.scaled_dot_product_attention(q, k, v)))


def test_latent() -> None:
    check(Latent(), [("qk", 3), ("vo", 5), ("qk", 3)])


class RolledHeads(nn.Module):
    """The strides of v decide whether bmm may flatten it with a view."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(E, 8), nn.Linear(E, 8), nn.Linear(E, 10)
        self.o = nn.Linear(10, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k = heads(self.q(x), 4).flatten(0, 1), heads(self.k(x), 4).flatten(0, 1)
        v = self.v(x).unflatten(-1, (5, H)).permute(0, 3, 1, 2).roll(1, 1)
        p = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return self.o(merged(torch.bmm(p, v.flatten(0, 1)).unflatten(0, (-1, H))))


def test_rolled_heads() -> None:
    check(RolledHeads(), [("qk", 4), ("vo", 5)])


class ConvolvedLatent(nn.Module):
    """MLA whose up-projection is a 1×1 convolution, with other strides than a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv_a, self.norm = nn.Linear(E, 12), nn.Linear(E, 10), nn.RMSNorm(7)
        self.kv_b, self.o = nn.Conv1d(7, 16, 1), nn.Linear(10, E)

    def forward(self, x: Tensor) -> Tensor:
        latent, shared = self.kv_a(x).split([7, 3], -1)
        y = self.kv_b(self.norm(latent).transpose(1, 2)).transpose(1, 2)
        k, v = y.view(*y.shape[:2], H, 8).transpose(1, 2).split([3, 5], -1)
        k = torch.cat([k, shared[:, None].expand(-1, H, -1, -1)], -1)
        p = (heads(self.q(x), 6) @ k.transpose(-1, -2)).softmax(-1)
        o = torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, H))
        return self.o(merged(o))


def test_convolved_latent() -> None:
    check(ConvolvedLatent(), [("qk", 3), ("vo", 5), ("qk", 3)])


class SharedOutput(nn.Module):
    """Two layers share an output weight; what the second one multiplies it with has x added to it,
    so that a change of basis of its columns shows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(E, 8), nn.Linear(E, 8), nn.Linear(E, 10)
        self.q1, self.k1, self.v1 = nn.Linear(E, 8), nn.Linear(E, 8), nn.Linear(E, 10)
        self.o = nn.Linear(10, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.q(x), 4), heads(self.k(x), 4), heads(self.v(x), 5)
        x = self.o(merged(F.scaled_dot_product_attention(q, k, v)))
        x = F.layer_norm(x, (E,))
        q, k, v = heads(self.q1(x), 4), heads(self.k1(x), 4), self.v1(x) + x[..., :10]
        return self.o(merged(F.scaled_dot_product_attention(q, k, heads(v, 5))))


def test_shared_output() -> None:
    check(SharedOutput(), [("qk", 4), ("qk", 4)])


class ShiftedHalf(nn.Module):
    """Values with the heads innermost: a cat of slices has strides that einsum's view can take,
    those of the new values have not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(E, 8), nn.Linear(E, 8), nn.Linear(E, 10)
        self.o = nn.Linear(10, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k = heads(self.q(x), 4), heads(self.k(x), 4)
        v = self.v(x).unflatten(-1, (5, H)).permute(0, 3, 1, 2)
        v = torch.cat([v[..., :2], v[..., 2:].roll(1, -2)], -1)
        p = torch.einsum("bhsd,bhtd->bhst", q, k).softmax(-1)
        return self.o(merged(torch.einsum("bhst,bhtd->bhsd", p, v)))


def test_shifted_half() -> None:
    check(ShiftedHalf(), [("qk", 4), ("vo", 2), ("vo", 3)])
