"""Keys and values that leave into a cache: left alone, or changed in every graph alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bda_fx
from bda_fx.report import Report
from tests import tolerances
from tests.programs import FULL, Attention, B, D, E, H, S, assert_close, example, randn

OPAQUE = {**FULL, "kv_cache": "opaque"}


class Cached(Attention):
    """Attention over past and present keys and values, which are returned."""

    def forward(self, x: Tensor, past_k: Tensor | None = None, past_v: Tensor | None = None) -> Any:
        q, k, v = self.project(x, x)
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).flatten(-2)), k, v


class Static(Attention):
    """Keys and values are written into buffers of a fixed length, at a position that is given."""

    def __init__(self, length: int = 12, write: str = "index_copy") -> None:
        super().__init__()
        self.write = write
        for name in ("cache_k", "cache_v"):
            self.register_buffer(name, torch.zeros(B, H, length, D))

    def store(self, cache: Tensor, value: Tensor, at: Tensor) -> Tensor:
        if self.write == "index_copy":
            return cache.index_copy_(2, at, value)
        cache[:, :, at] = value
        return cache

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = self.project(x, x)
        k, v = self.store(self.cache_k, k, at), self.store(self.cache_v, v, at)
        mask = torch.arange(k.shape[2]) <= at[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(out.transpose(1, 2).flatten(-2))


class Cross(Attention):
    """Cross-attention that hands out its keys and values, for decoders that do not make them."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Any:
        assert memory is not None
        q, k, v = self.project(x, memory)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).flatten(-2)), k, v


def past(tokens: int = 3) -> tuple[Tensor, Tensor]:
    return tuple(randn(B, H, tokens, D, seed=7 + i, dtype=torch.float64) for i in range(2))  # type: ignore[return-value]


def reasons(report: Report) -> dict[str, str | None]:
    return {s.product: s.reason_code for s in report.skipped}


def x64(tokens: int = S, seed: int = 0) -> Tensor:
    return randn(B, tokens, E, seed=100 + seed, dtype=torch.float64)


def test_a_returned_cache_is_left_alone_and_the_remedy_is_named() -> None:
    report = bda_fx.analyze(Cached(), (example(),), options=FULL)
    assert reasons(report) == {"qk": "RETURNED", "vo": "RETURNED"}
    assert all("kv_cache='opaque'" in (s.remedy or "") for s in report.skipped)


def test_a_growing_cache_is_left_alone_and_the_remedy_is_named() -> None:
    report = bda_fx.analyze(Cached().double(), (x64(1), *past()), options=FULL)
    assert reasons(report) == {"qk": "CACHED", "vo": "CACHED"}
    assert all("kv_cache='opaque'" in (s.remedy or "") for s in report.skipped)


@pytest.mark.parametrize("write", ["index_copy", "index_put"])
def test_a_static_cache_is_left_alone_and_the_remedy_is_named(write: str) -> None:
    report = bda_fx.analyze(Static(write=write), (example(), torch.arange(S)), options=FULL)
    assert reasons(report) == {"qk": "CACHED", "vo": "CACHED"}


def test_prefill_and_decode_programs_share_a_cache() -> None:
    model = Cached().double()
    prefill = bda_fx.rewrite(model, (x64(),), options=OPAQUE)
    token = torch.export.Dim.DYNAMIC
    shapes = {"x": {}, "past_k": {2: token}, "past_v": {2: token}}
    decode = bda_fx.rewrite(model, (x64(1), *past()), dynamic_shapes=shapes, options=OPAQUE)
    for step in (prefill, decode):
        assert [s.product for s in step.report.rewritten] == ["qk", "vo"]
    bound = tolerances.program([s.condition or 0 for s in prefill.report.rewritten])
    first, then = prefill.program.module(), decode.program.module()
    with torch.no_grad():
        out, *cache = first(x64())
        expected, *original = model(x64())
        assert_close(out, expected, bound)
        assert not torch.allclose(cache[0], original[0])
        for i in range(3):
            x = x64(1, seed=i)
            out, *cache = then(x, *cache)
            expected, *original = model(x, *original)
            assert_close(out, expected, 10 * bound)


@pytest.mark.parametrize("write", ["index_copy", "index_put"])
def test_a_static_cache_holds_what_every_step_reads(write: str) -> None:
    model = Static(write=write).double()
    shapes = {"x": {1: torch.export.Dim.DYNAMIC}, "at": {0: torch.export.Dim.DYNAMIC}}
    rewritten = bda_fx.rewrite(
        copy.deepcopy(model), (x64(), torch.arange(S)), dynamic_shapes=shapes, options=OPAQUE
    )
    assert [s.product for s in rewritten.report.rewritten] == ["qk", "vo"]
    bound = tolerances.program([s.condition or 0 for s in rewritten.report.rewritten])
    module, at = rewritten.program.module(), 0
    with torch.no_grad():
        for tokens in (5, 3, 4):
            x, positions = x64(tokens, seed=at), torch.arange(at, at + tokens)
            assert_close(module(x, positions), model(x, positions), 10 * bound)
            at += tokens


def test_the_basis_does_not_depend_on_the_graph() -> None:
    """Other token counts, another side that would save more, one linear for K and V."""
    model = Cached().double()
    reports = [
        bda_fx.rewrite(model, args, options=OPAQUE).report
        for args in ((x64(),), (x64(9),), (x64(1), *past()))
    ]
    for report in reports[1:]:
        for a, b in zip(reports[0].rewritten, report.rewritten, strict=True):
            assert (a.name, a.side, a.basis_size, a.condition, a.noise) == (
                b.name, b.side, b.basis_size, b.condition, b.noise,
            )  # fmt: skip


def test_the_cache_of_a_cross_attention_is_left_alone() -> None:
    """Who reads it has no weights that could tell of the change."""
    report = bda_fx.analyze(Cross(), (example(), example(seed=1)), options=OPAQUE)
    assert reasons(report) == {"qk": "RETURNED", "vo": "RETURNED"}


def test_keys_given_by_the_caller_are_no_cache() -> None:
    class Given(Attention):
        def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
            q, k, v = self.project(x, x)
            k, v = (torch.cat([extra, t], 2) for t in (k, v))
            out = F.scaled_dot_product_attention(q, k, v)
            return self.o(out.transpose(1, 2).flatten(-2))

    report = bda_fx.analyze(Given().double(), (x64(), past()[0]), options=OPAQUE)
    assert reasons(report) == {"qk": "CACHED", "vo": "CACHED"}


def test_a_probe_of_something_else_is_no_cache() -> None:
    class Probe(Attention):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> Any:
            q, k, v = self.project(x, x)
            out = F.scaled_dot_product_attention(q, k, v)
            return self.o(out.transpose(1, 2).flatten(-2)), q, v.mean(2)

    report = bda_fx.analyze(Probe(), (example(),), options=OPAQUE)
    assert reasons(report) == {"qk": "RETURNED", "vo": "RETURNED"}
