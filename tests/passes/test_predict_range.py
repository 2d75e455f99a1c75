"""float16 does not overflow where the original does not: outlier channels, weights at its end."""

from __future__ import annotations

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

E, H, D, S = 96, 3, 16, 24
LARGEST = torch.finfo(torch.float16).max


class SelfAttention(nn.Module):
    """``gains``: what the weights (and biases) of q, k, v and o are multiplied by."""

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


def outliers(seed: int, size: float = 100.0, count: int = 3) -> Tensor:
    """Normal inputs [2, S, E] with ``count`` channels of ``size`` times the others' size."""
    x = randn(2, S, E, seed=seed)
    channels = torch.randperm(E, generator=torch.Generator().manual_seed(seed))[:count]
    x[..., channels] *= size
    return x.half()


ORDINARY = (1.0, 1.0, 1.0, 1.0)
GAINS = {
    "ordinary": ORDINARY,
    "large keys, small queries": (2e-4, 5e3, 1.0, 1.0),
    "small keys, large queries": (5e3, 2e-4, 1.0, 1.0),
    "large values, small outputs": (1.0, 1.0, 5e3, 2e-4),
    "small values, large outputs": (1.0, 1.0, 2e-4, 5e3),
}
"""With nn.Linear's weights of up to 0.1 to 0.5 for these sizes, 5e3 puts them near 10³."""


@pytest.mark.parametrize("side", ["kv", "qo"])
@pytest.mark.parametrize("size", ["auto", "full", 3 / 4])
@pytest.mark.parametrize("gains", GAINS.values(), ids=GAINS)
@pytest.mark.parametrize("seed", [0, 1])
def test_outlier_channels_do_not_overflow(gains, size, side, seed):
    model = SelfAttention(gains, seed).half()
    x = outliers(seed)
    with torch.no_grad():
        own = model(x)
        rewrite = bda_fx.rewrite(model, (x,), options={"basis_size": size, "side": side})
        got = rewrite.program.module()(x)
    assert not (own.isfinite() & ~got.isfinite()).any()
    for skip in rewrite.report.skipped:
        assert skip.reason_code in {"OUT_OF_RANGE", "TOO_NOISY"}
