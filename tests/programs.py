"""Small attention modules, parametrised by spelling, and what tests do with them.

Shape letters as in ``bda_fx.passes.sites``. Sizes are odd on purpose: no two dimensions of an
example are equal by accident, so a transposed or misplaced feature cannot go unnoticed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bda_fx
from bda_fx.passes.canonicalize import Program, canonicalize_module
from bda_fx.passes.find_sites import find_sites
from bda_fx.passes.normalize_linears import normalize_linears
from bda_fx.passes.sites import Found, Reason
from bda_fx.report import Report
from tests import tolerances

B, S, T, E, H, D = 2, 5, 7, 20, 4, 6
FULL = {"basis_size": "full"}
"""Options under which the noise budget plays no part: what is legal is rewritten."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every floating-point parameter reproducible values of the size of its fan-in."""
    for i, parameter in enumerate(module.parameters()):
        if parameter.is_floating_point() and parameter.device.type != "meta":
            fan_in = parameter.shape[-1]
            value = randn(*parameter.shape, seed=1000 * seed + i) / fan_in**0.5
            parameter.data.copy_(value)
    return module.eval()


def spelled_attention(q: Tensor, k: Tensor, v: Tensor, scores: Any = None) -> Tensor:
    """softmax(q kᵀ / √D) v with matmul and softmax; ``scores`` may change the scores."""
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    s = s if scores is None else scores(s)
    return s.softmax(-1) @ v


class Attention(nn.Module):
    """q, k, v, o linears around an attention core.

    ``core``: "sdpa" or "spelled". ``gqa``: how key heads are repeated: "repeat_interleave",
    "expand" or "enable_gqa". ``change(q, k, v, x)`` may alter the heads [B, heads, tokens, D]
    before they are repeated, ``scores(s)`` the scores, ``finish(module, out)`` replaces the
    output linear.
    """

    def __init__(
        self,
        heads: int = H,
        kv_heads: int | None = None,
        head_dim: int = D,
        embed: int = E,
        *,
        bias: bool = True,
        core: str = "sdpa",
        gqa: str = "repeat_interleave",
        change: Callable[..., Any] | None = None,
        scores: Callable[[Tensor], Tensor] | None = None,
        finish: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.core, self.gqa = core, gqa
        self.change, self.scores, self.finish = change, scores, finish
        self.q = nn.Linear(embed, heads * head_dim, bias=bias)
        self.k = nn.Linear(embed, self.kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(embed, self.kv_heads * head_dim, bias=bias)
        self.o = nn.Linear(heads * head_dim, embed, bias=bias)
        seeded(self, seed)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.head_dim).transpose(1, 2)

    def repeat(self, x: Tensor) -> Tensor:
        times = self.heads // self.kv_heads
        if times == 1 or self.gqa == "enable_gqa":
            return x
        if self.gqa == "repeat_interleave":
            return x.repeat_interleave(times, 1)
        b, g, t, d = x.shape
        return x[:, :, None].expand(b, g, times, t, d).reshape(b, g * times, t, d)

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.split(self.q(x), self.heads)
        return (
            q,
            self.split(self.k(memory), self.kv_heads),
            self.split(self.v(memory), self.kv_heads),
        )

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Any:
        q, k, v = self.project(x, x if memory is None else memory)
        extra: tuple[Tensor, ...] = ()
        if self.change is not None:
            q, k, v, *extra = self.change(q, k, v, x)
        k, v = self.repeat(k), self.repeat(v)
        if self.core == "sdpa":
            grouped = self.gqa == "enable_gqa" and self.heads != self.kv_heads
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        else:
            out = spelled_attention(q, k, v, self.scores)
        out = out.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.head_dim)
        out = self.o(out) if self.finish is None else self.finish(self, out)
        return (out, *extra) if extra else out


class Projected(nn.Module):
    """q, k, v, o linears and whatever ``extra`` names; what lies between is up to a subclass."""

    def __init__(self, **extra: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, H * D) for _ in range(3))
        self.o = nn.Linear(H * D, E)
        for name, value in extra.items():
            setattr(self, name, value)
        seeded(self)

    def split(self, x: Tensor) -> Tensor:
        """[B, S, heads · D] to [B, heads, S, D]"""
        return x.unflatten(-1, (-1, D)).transpose(1, 2)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, S, D] each."""
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def out(self, heads: Tensor) -> Tensor:
        return self.o(heads.transpose(1, 2).flatten(-2))


class Projections(Projected):
    """``body(module, x)`` is what lies between; it finds a constant order and a factor too."""

    def __init__(self, body: Body) -> None:
        super().__init__(body=body)
        self.register_buffer("order", torch.tensor([4, 0, 5, 2, 1, 3]))
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


Body = Callable[[Projections, Tensor], Any]


class FusedAttention(nn.Module):
    """One linear for q, k and v, in ``order``:

    "chunk" [q | k | v]; "interleaved" [q k v] head by head; "permuted" as timm's
    ``reshape(…, 3, H, D).permute``; "strided": heads innermost, so a head's features lie apart.
    """

    def __init__(self, order: str = "chunk", heads: int = H, head_dim: int = D, embed: int = E):
        super().__init__()
        self.order, self.heads, self.head_dim = order, heads, head_dim
        self.qkv = nn.Linear(embed, 3 * heads * head_dim)
        self.o = nn.Linear(heads * head_dim, embed)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        y, h, d = self.qkv(x), self.heads, self.head_dim
        if self.order == "chunk":
            q, k, v = (t.view(b, s, h, d).transpose(1, 2) for t in y.chunk(3, -1))
        elif self.order == "interleaved":
            q, k, v = (t.transpose(1, 2) for t in y.view(b, s, h, 3, d).unbind(3))
        elif self.order == "permuted":
            q, k, v = y.reshape(b, s, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = y.view(b, s, d, 3, h).permute(3, 0, 4, 1, 2).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, h * d)
        return self.o(out)


class SharedLayers(nn.Module):
    """One attention applied ``times`` times, as ALBERT does."""

    def __init__(self, times: int = 2, **kwargs: Any) -> None:
        super().__init__()
        self.layer, self.times = Attention(**kwargs), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.layer(x)
        return x


# -- what tests do with them -------------------------------------------------------------------


def example(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, S, E]"""
    return randn(B, S, E, seed=100 + seed, dtype=dtype)


def canonical(model: nn.Module, *args: Any, dynamic_shapes: Any = None) -> Program:
    """The canonical program with every linear spelled as one: what ``find_sites`` reads."""
    program = canonicalize_module(model, args or (example(),), None, dynamic_shapes)
    normalize_linears(program)
    return program


def find(model: nn.Module, *args: Any, dynamic_shapes: Any = None) -> Found:
    """Sites and skips of a module, after checking that they account for every product."""
    found = find_sites(canonical(model, *args, dynamic_shapes=dynamic_shapes))
    assert_accounted(found)
    return found


def assert_accounted(found: Found) -> None:
    """Each attention product is in a site or a skip, and no skip is about something else."""
    sites = {(c, site.product) for site in found.sites for c in site.contractions}
    skips = {(skip.contraction, skip.product) for skip in found.skips}
    assert set(found.products) == sites | skips


def products(found: Found) -> list[str]:
    return sorted(site.product for site in found.sites)


def reasons(found: Found) -> dict[str, Reason]:
    """Product → the reason it is skipped for (one attention in the program)."""
    return {skip.product: skip.reason for skip in found.skips}


def rewrite_in_float64(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    *,
    others: tuple[tuple[Any, ...], ...] = (),
    dynamic_shapes: Any = None,
    options: Any = FULL,
) -> Report:
    """Rewrite ``model`` in float64 and compare with the original on ``args`` and on ``others``.

    Outputs, and the buffers that the program leaves behind, must agree to ``tolerances.program``.
    """
    model = copy.deepcopy(model).double()
    args = _double(args or (example(),))
    rewritten = bda_fx.rewrite(
        copy.deepcopy(model), args, dynamic_shapes=dynamic_shapes, options=options
    )
    module = rewritten.program.module()
    bound = tolerances.program([site.condition or 0.0 for site in rewritten.report.rewritten])
    bound = max(bound, tolerances.FLOAT64_IDENTITY)
    buffers = dict(module.named_buffers())
    with torch.no_grad():
        for inputs in (args, *map(_double, others)):
            expected, got = model(*copy.deepcopy(inputs)), module(*copy.deepcopy(inputs))
            assert_close(got, expected, bound)
            for name, buffer in model.named_buffers():
                if name in buffers:
                    assert_close(buffers[name], buffer, bound)
    return rewritten.report


def assert_close(got: Any, expected: Any, bound: float) -> None:
    """Every tensor of ``got`` is within ``bound`` of ``expected``, relative to its norm."""
    pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
    for a, b in pairs:
        if isinstance(b, Tensor):
            assert a.shape == b.shape
            assert float((a - b).double().norm()) <= bound * float(b.double().norm())
        else:
            assert a == b


def _double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
