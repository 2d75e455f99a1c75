"""Pieces of one linear are joined where a reader needs them all; else they are read as they are."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import bda_fx
from bda_fx.passes.emit_node import EMITTED, emit
from bda_fx.passes.forms import Form, Piece
from bda_fx.passes.read_parts import read_parts
from bda_fx.passes.sites import Linear
from tests.programs import FULL, B, D, E, FusedAttention, H, S, example, rewrite_in_float64, seeded

aten = torch.ops.aten
OWN_BASES = {**FULL, "noise_budget": 2.0}
"""Room for K and V on a basis each, but not on one."""


class Latent(nn.Module):
    """Keys and values by one linear, head by head, as MLA's ``kv_b_proj`` makes them.

    ``read(kv)`` takes them apart: [B, S, H · (D + V)] to [B, H, S, D] and [B, H, S, V].
    """

    V = D + 2

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.read = read
        self.q, self.kv = nn.Linear(E, H * D), nn.Linear(E, H * (D + self.V))
        self.o = nn.Linear(H * self.V, E)
        seeded(self)

    def forward(self, x: Tensor) -> Any:
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k, v, *extra = self.read(self.kv(x))
        out = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (out, *extra) if extra else out


def by_views(kv: Tensor) -> Any:
    return kv.view(B, -1, H, D + Latent.V).transpose(1, 2).split([D, Latent.V], dim=-1)


def by_slices(kv: Tensor) -> Any:
    heads = kv.unflatten(-1, (H, -1)).transpose(1, 2)
    return heads[..., :D], heads[..., D:]


def into_a_buffer(kv: Tensor) -> Any:
    """As transformers fills the keys of MLA: what is allocated takes its type alone from kv."""
    heads = kv.view(B, -1, H, D + Latent.V).transpose(1, 2)
    keys = heads.new_empty((*heads.shape[:-1], D))
    keys[..., :] = heads[..., :D]
    return keys, heads[..., D:]


def in_another_type(kv: Tensor) -> Any:
    return (part.contiguous().to(kv.dtype) for part in by_views(kv.double()))


def joins(model: nn.Module, dynamic: bool = False, options: Any = OWN_BASES) -> list[fx.Node]:
    """Concatenations that the rewritten program has along the features of a linear."""
    shapes = {"x": {1: torch.export.Dim.DYNAMIC}} if dynamic else None
    result = bda_fx.rewrite(model, (example(),), dynamic_shapes=shapes, options=options)
    assert sorted(site.product for site in result.report.rewritten) == ["qk", "vo"]
    return [
        node
        for node in result.program.graph.nodes
        if node.target is aten.cat.default and EMITTED in node.meta
    ]


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("read", [by_views, by_slices, into_a_buffer, in_another_type])
def test_keys_and_values_of_one_linear_are_not_joined(read: Any, dynamic: bool) -> None:
    assert not joins(Latent(read), dynamic)
    shapes = {"x": {1: torch.export.Dim.DYNAMIC}} if dynamic else None
    others = ((example(seed=1)[:, :3],),) if dynamic else ()
    rewrite_in_float64(Latent(read), others=others, dynamic_shapes=shapes, options=OWN_BASES)


@pytest.mark.parametrize("order", ["chunk", "interleaved", "permuted"])
def test_a_fused_projection_is_not_joined(order: str) -> None:
    assert not joins(FusedAttention(order))


def test_multihead_attention_of_torch_is_not_joined() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, H, batch_first=True)
            seeded(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    assert not joins(Own())
    rewrite_in_float64(Own(), options=OWN_BASES)


def test_a_reader_of_all_pieces_gets_them_joined() -> None:
    def read(kv: Tensor) -> Any:
        return *by_views(kv), kv.shape[-1] + kv.new_zeros(2)

    assert not joins(Latent(read))

    def look(kv: Tensor) -> Any:
        heads = kv.view(B, -1, H, D + Latent.V).transpose(1, 2).repeat_interleave(1, 1)
        return heads[..., :D], heads[..., D:]

    assert len(joins(Latent(look))) == 1
    rewrite_in_float64(Latent(look), options=OWN_BASES)


def test_an_axis_that_is_longer_than_one_is_kept_where_a_part_has_one_of_it() -> None:
    def read(kv: Tensor) -> Any:
        parts = kv.view(B, -1, 2, H, D).transpose(1, 2).squeeze(1)
        return (part[:, 0].transpose(1, 2) for part in parts.split(1, dim=1))

    model = Latent(read)
    model.kv, model.o = nn.Linear(E, 2 * H * D), nn.Linear(H * D, E)
    rewrite_in_float64(seeded(model), options={**FULL, "noise_budget": 1.1})


def test_an_order_that_is_mixed_is_put_together_by_index() -> None:
    result = bda_fx.rewrite(FusedAttention("strided"), (example(),), options=OWN_BASES)
    assert len(result.report.rewritten) == 2
    rewrite_in_float64(FusedAttention("strided"), options=OWN_BASES)


# -- random readers --------------------------------------------------------------------------------


class Drawn:
    """A graph of a linear with pieces and random readers, and what runs it."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.graph = fx.Graph()
        widths = [self.draw.choice((2, 4, 6)) for _ in range(self.draw.choice((2, 3)))]
        groups = self.draw.choice((1, 1, 3))
        owner = [at for at, width in enumerate(widths) for _ in range(width)] * groups
        pieces = [
            Piece(tuple(f for f, at in enumerate(owner) if at == piece))
            for piece in range(len(widths))
        ]
        linear = Linear("w", "w", ("linear",), (None,), E, len(owner))
        self.form = Form(linear, tuple(pieces))
        generator = torch.Generator().manual_seed(seed)
        x, weight = (
            torch.randint(-4, 5, shape, generator=generator).double()
            for shape in ((B, S, E), (len(owner), E))
        )
        self.inputs = [x, weight, *(weight[list(piece.features)] for piece in pieces)]
        mode = FakeTensorMode()
        self.x, *self.weights = (self.graph.placeholder(f"x{at}") for at in range(len(self.inputs)))
        for node, value in zip((self.x, *self.weights), self.inputs, strict=True):
            node.meta["val"] = mode.from_tensor(value)
        self.node = self.emit(aten.linear.default, self.x, self.weights[0], like=self.x)
        whole = self.node
        if groups > 1 and self.draw.random() < 0.8:
            whole = self.emit(aten.view.default, whole, [B, -1, groups, sum(widths)])
        self.leaves: list[fx.Node] = []
        self.read(whole, widths, 5)
        self.graph.output(tuple(self.leaves))

    def emit(self, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
        node = emit(self.graph, target, *args, like=like or self.node)
        del node.meta[EMITTED]  # as the program has it
        return node

    def read(self, node: fx.Node, widths: list[int], depth: int) -> None:
        """Some random moves behind ``node``."""
        draw, shape = self.draw, list(node.meta["val"].shape)
        if depth == 0 or 0 in shape or not shape or draw.random() < 0.1:
            self.leaves.append(self.emit(aten.neg.default, node))
            return
        dim = draw.randrange(len(shape))
        likely = [at for at, size in enumerate(shape) if size == sum(widths)]
        if likely and draw.random() < 0.6:
            dim = likely[-1]
        kind = draw.choice(["transpose", "split", "split", "slice", "select", "view", "unsqueeze",
                            "squeeze", "clone", "unbind", "unflatten"])  # fmt: skip
        if kind == "transpose":
            self.read(self.emit(aten.transpose.int, node, dim, -1), widths, depth - 1)
        elif kind == "unsqueeze":
            self.read(self.emit(aten.unsqueeze.default, node, dim), widths, depth - 1)
        elif kind == "squeeze":
            self.read(self.emit(aten.squeeze.dim, node, dim), widths, depth - 1)
        elif kind == "clone":
            self.read(self.emit(aten.clone.default, node), widths, depth - 1)
        elif kind == "slice":
            first = draw.choice([0, 1, -2, None])
            cut = self.emit(aten.slice.Tensor, node, dim, first, draw.choice([shape[dim], None]))
            self.read(cut, widths, depth - 1)
        elif kind == "select" and len(shape) > 1:
            at = draw.randrange(-shape[dim], shape[dim])
            self.read(self.emit(aten.select.int, node, dim, at), widths, depth - 1)
        elif kind in ("view", "unflatten") and shape[dim] % 2 == 0 and shape[dim] > 2:
            outer = draw.choice([2, shape[dim] // 2])
            sizes = [outer, shape[dim] // outer]
            if kind == "view":
                flat = self.emit(aten.clone.default, node)
                node = self.emit(aten.view.default, flat, [*shape[:dim], *sizes, *shape[dim + 1 :]])
            else:
                node = self.emit(aten.unflatten.int, node, dim, sizes)
            self.read(node, widths, depth - 1)
        elif kind in ("split", "unbind"):
            exact = shape[dim] == sum(widths)
            if kind == "unbind":
                parts = self.emit(aten.unbind.int, node, dim)
            elif exact and draw.random() < 0.7:
                parts = self.emit(aten.split_with_sizes.default, node, widths, dim)
            else:
                parts = self.emit(aten.split.Tensor, node, draw.choice([1, 2, 4]), dim)
            for at in range(min(len(parts.meta["val"]), 3)):
                self.read(
                    self.emit(operator.getitem, parts, at), widths, depth - 2 if depth > 1 else 0
                )
        else:
            self.read(node, widths, depth - 1)

    def run(self) -> list[Tensor]:
        self.graph.lint()
        return list(fx.Interpreter(fx.GraphModule({}, self.graph)).run(*self.inputs))


def test_random_readers_hold_what_they_held() -> None:
    apart = 0
    for seed in range(400):
        drawn = Drawn(seed)
        expected = drawn.run()
        reads = read_parts(drawn.node, drawn.form)
        if reads is None:
            continue
        apart += 1
        with drawn.graph.inserting_before(drawn.node):
            pieces = [
                drawn.emit(aten.linear.default, drawn.x, weight) for weight in drawn.weights[1:]
            ]
        reads.redirect(drawn.graph, pieces)
        drawn.graph.erase_node(drawn.node)
        for got, want in zip(drawn.run(), expected, strict=True):
            assert torch.equal(got, want), seed
    assert apart > 100
