"""An opaque cache: by induction over steps, it holds K S⁻¹ and V S⁻¹ and outputs stay the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs import randn
from tests.symbolic.cases import D, E, H, Small
from tests.symbolic.prove import Prover


class Cached(Small):
    """Attention that returns its keys and values and takes those of earlier tokens."""

    def forward(
        self, x: Tensor, past_k: Tensor | None = None, past_v: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x)
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return self.out(F.scaled_dot_product_attention(q, k, v)), k, v


OPAQUE = {"basis_size": "full", "kv_cache": "opaque"}
PAST = tuple(randn(1, H, 1, D, seed=i) for i in range(2))


def turned(proving: Prover, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What the cache is to hold for these keys and values."""
    qk, vo = proving.changes
    with proving.mode:
        return keys @ qk.s_inv, values @ vo.s_inv


def test_the_first_step_caches_turned_keys_and_values() -> None:
    proving = Prover(Cached(), (randn(1, 2, E),), OPAQUE)
    out, keys, values = proving.run_original()
    derived = proving.derive()
    got, *cache = proving.run_rewritten(derived, proving.inputs)
    assert torch.equal(got, out)
    for cached, expected in zip(cache, turned(proving, keys, values), strict=True):
        assert torch.equal(cached, expected)
    assert not torch.equal(cache[0], keys)


def test_each_step_keeps_the_cache_turned() -> None:
    proving = Prover(Cached(), (randn(1, 1, E), *PAST), OPAQUE)
    out, keys, values = proving.run_original()
    derived = proving.derive()
    past = turned(proving, proving.inputs["past_k"], proving.inputs["past_v"])
    given = {**proving.inputs, "past_k": past[0], "past_v": past[1]}
    got, *cache = proving.run_rewritten(derived, given)
    assert torch.equal(got, out)
    for cached, expected in zip(cache, turned(proving, keys, values), strict=True):
        assert torch.equal(cached, expected)


def test_a_cache_that_is_not_turned_gives_other_outputs() -> None:
    proving = Prover(Cached(), (randn(1, 1, E), *PAST), OPAQUE)
    (out, *_) = proving.run_original()
    (got, *_) = proving.run_rewritten(proving.derive(), proving.inputs)
    assert not torch.equal(got, out)
