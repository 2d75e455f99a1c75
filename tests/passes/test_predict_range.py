"""float16 does not overflow where the original does not, and underflow is predicted as noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bda_fx
from bda_fx.evaluate_float64 import evaluate_float64
from bda_fx.fidelity import relative_error
from bda_fx.passes.canonicalize import canonicalize_module
from bda_fx.passes.change_basis import change_basis
from bda_fx.passes.predict_noise import PartnerHeads
from bda_fx.passes.predict_range import PEAK, keeps_range
from bda_fx.passes.read_weights import SiteWeights, moments_of
from tests.programs import randn, seeded
from tests.tolerances import NOISE_RATIO

E, H, D, S = 96, 3, 16, 24
LARGEST = torch.finfo(torch.float16).max


class SelfAttention(nn.Module):
    """``gains``: what the weights and biases of q, k, v and o are multiplied by."""

    def __init__(self, gains: tuple[float, float, float, float], seed: int = 0) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, H * D) for _ in range(3))
        self.o = nn.Linear(H * D, E)
        seeded(self, seed)
        with torch.no_grad():
            for linear, gain in zip((self.q, self.k, self.v, self.o), gains, strict=True):
                for parameter in linear.parameters():
                    parameter.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        heads = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(*heads)
        return self.o(out.transpose(1, 2).flatten(-2))


def outliers(seed: int, scale: float = 1.0) -> Tensor:
    """Normal inputs [2, S, E] in float16, three channels of which have 100 times the size."""
    x = scale * randn(2, S, E, seed=seed)
    channels = torch.randperm(E, generator=torch.Generator().manual_seed(seed))[:3]
    x[..., channels] *= 100
    return x.half()


def rewritten(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, bda_fx.Report]:
    """Outputs of the original and of the rewritten model in float16, and the report."""
    rewrite = bda_fx.rewrite(model, (x,), options=options)
    with torch.no_grad():
        return model(x), rewrite.program.module()(x), rewrite.report


GAINS = {
    "ordinary": ((1.0, 1.0, 1.0, 1.0), 1.0),
    "keys": ((1e-3, 1e5, 1.0, 1.0), 1e-3),
    "queries": ((1e5, 1e-3, 1.0, 1.0), 1e-3),
    "values": ((1.0, 1.0, 1e5, 1e-5), 1e-3),
    "outputs": ((1.0, 1.0, 1e-5, 1e5), 1e-3),
}
"""Gains of q, k, v, o and the scale of x. 1e5 puts the largest weight between 3.5e4 and 5.7e4."""


@pytest.mark.parametrize("side", ["kv", "qo"])
@pytest.mark.parametrize("size", ["auto", "full", 3 / 4])
@pytest.mark.parametrize(("gains", "scale"), GAINS.values(), ids=GAINS)
def test_outliers_and_weights_at_the_end_of_the_range(gains, scale, size, side):
    model, x = SelfAttention(gains).half(), outliers(0, scale)
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    assert max(gains) == 1 or largest > LARGEST / 2
    own, got, report = rewritten(model, x, basis_size=size, side=side)
    assert own.isfinite().all()
    assert got.isfinite().all()
    assert {s.reason_code for s in report.skipped} <= {"OUT_OF_RANGE", "TOO_NOISY"}
    exact = canonicalize_module(model, (x,), {}).exported
    assert exact is not None
    (truth,) = evaluate_float64(exact, (x,), {})
    ratio = relative_error(got, truth) / relative_error(own, truth)
    assert ratio <= NOISE_RATIO["full"][torch.float16]


@pytest.mark.parametrize("gain", [1e3, 1e4, 5e4])
def test_what_overflows_is_left_alone(gain):
    """Large queries meet large keys: K' is of the size of x, so Q' would be that of the scores."""
    model = SelfAttention((gain, gain, 1.0, 1.0)).half()
    x = outliers(0, 1 / gain)
    own, got, report = rewritten(model, x, products=("qk",), basis_size="full", side="kv")
    assert not (own.isfinite() & ~got.isfinite()).any()
    (site,) = [s for s in report.sites if s.product == "qk"]
    assert site.reason_code == "OUT_OF_RANGE"


def site(gain_k: float, gain_q: float, bias: float = 0.0) -> SiteWeights:
    partner = PartnerHeads(gain_q * randn(2, 8, 20, seed=1).double(), None, torch.arange(2), 20)
    heads = gain_k * randn(2, 20, 8, seed=0).double()
    return SiteWeights(heads, torch.full((2, 8), bias, dtype=torch.float64), [partner])


def in_range(weights: SiteWeights, size: int, dtype: torch.dtype) -> bool:
    moments = moments_of(weights)
    both = (moments.key, moments.query)
    change = change_basis(weights.heads, torch.arange(size), weights.bias, both)
    return keeps_range(weights, moments, change.s, change.s_inv, dtype)


def test_the_limit_is_that_of_the_dtype():
    """Q' = U Sᵀ has rows of norm ‖U W_B‖: the gains' product decides, whatever their ratio."""
    for ratio in (1.0, 1e2):
        small, large = math.sqrt(LARGEST / PEAK / 1e3), math.sqrt(LARGEST)
        assert in_range(site(small * ratio, small / ratio), 8, torch.float16)
        assert not in_range(site(large * ratio, large / ratio), 8, torch.float16)
        assert in_range(site(large * ratio, large / ratio), 8, torch.bfloat16)


def test_nan_is_out_of_range():
    weights = site(1.0, 1.0)
    s = torch.full((2, 8, 8), float("nan"), dtype=torch.float64)
    assert not keeps_range(weights, moments_of(weights), s, s, torch.float32)


def test_the_free_scale_keeps_a_large_bias_in_range(monkeypatch):
    """At the scale of ‖W_B‖ free features of K' would carry the bias over it."""
    weights = site(1e-2, 1.0, bias=5e3)
    assert in_range(weights, 6, torch.float16)
    assert not in_range(weights, 8, torch.float16)
    monkeypatch.setattr("bda_fx.passes.change_basis.FARTHEST", 1.0)
    assert not in_range(weights, 6, torch.float16)


def test_underflow_counts_as_noise():
    """Products of weights of 1e-4 are far below float16's smallest normal number, 6e-5."""
    model, x = SelfAttention((1e-3,) * 4).half(), outliers(0)
    own, got, report = rewritten(model, x, noise_budget=2.0)
    assert own.isfinite().all()
    assert {s.product for s in report.skipped if s.reason_code == "TOO_NOISY"} >= {"vo"}
    exact = canonicalize_module(model, (x,), {}).exported
    assert exact is not None
    (truth,) = evaluate_float64(exact, (x,), {})
    assert relative_error(got, truth) <= 2 * relative_error(own, truth)
    (vo,) = [
        s
        for s in bda_fx.analyze(model, (x,), options={"basis_size": "full"}).rewritten
        if s.product == "vo"
    ]
    assert vo.noise is not None
    assert vo.noise > 100  # 65 measured: what is flushed to zero errs by no more than itself


def test_weights_that_come_later_and_leave_the_range_run_as_they_are():
    """One compiled graph; the second weights are those of ``test_what_overflows_is_left_alone``."""
    torch._dynamo.reset()
    model, x = SelfAttention((1.0,) * 4).half(), outliers(0)
    options = {"products": ("qk",), "basis_size": "full", "side": "kv", "inner": "eager"}
    compiled = torch.compile(model, backend="bda", options=options)
    with torch.no_grad():
        assert not torch.equal(compiled(x), model(x))
        model.load_state_dict(SelfAttention((1e3, 1e3, 1.0, 1.0)).half().state_dict())
        assert torch.equal(compiled(x / 1e3), model(x / 1e3))
