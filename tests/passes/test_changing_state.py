"""Programs that change their own weights and buffers: right at the next call too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.programs import Projections, example, rewrite_in_float64

Stateful = tuple[Callable[[], nn.Module], list[str], list[tuple[str, str]]]
STATEFUL: dict[str, Stateful] = {}


def stateful(rewritten: list[str], skipped: list[tuple[str, str]]) -> Any:
    def note(module: type[nn.Module]) -> type[nn.Module]:
        STATEFUL[module.__name__] = (module, rewritten, skipped)
        return module

    return note


class State(Projections):
    """``body`` is a method here; the key weight may be a buffer, which a program can change."""

    def __init__(self, buffers: tuple[str, ...] = ()) -> None:
        super().__init__(lambda m, x: m.run(x))
        for name in buffers:
            linear = getattr(self, name)
            weight = linear.weight.detach().clone()
            del linear.weight
            linear.register_buffer("weight", weight)

    def attend(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(*self.qkv(x)))


@stateful(["vo"], [("qk", "NO_PROJECTION")])
class KeyWeightDoubledBeforeUse(State):
    def __init__(self) -> None:
        super().__init__(("k",))

    def run(self, x: Tensor) -> Tensor:
        self.k.weight.mul_(2)
        return self.attend(x)


@stateful(["vo"], [("qk", "NO_PROJECTION")])
class KeyWeightDoubledAfterUse(State):
    def __init__(self) -> None:
        super().__init__(("k",))

    def run(self, x: Tensor) -> Tensor:
        out = self.attend(x)
        self.k.weight.mul_(2)
        return out


@stateful(["vo"], [("qk", "NO_PROJECTION")])
class QueryWeightMovesTowardsTheInput(State):
    def __init__(self) -> None:
        super().__init__(("q",))

    def run(self, x: Tensor) -> Tensor:
        out = self.attend(x)
        self.q.weight.add_(x.mean())
        return out


@stateful(["vo"], [("qk", "NO_PROJECTION")])
class WeightsChangePlaces(State):
    """Buffers that change places: each call attends with the other's weight."""

    def __init__(self) -> None:
        super().__init__(("k", "q"))

    def run(self, x: Tensor) -> Tensor:
        out = self.attend(x)
        old = self.k.weight.clone()
        self.k.weight.copy_(self.q.weight)
        self.q.weight.copy_(old)
        return out


@stateful(["qk"], [("vo", "COMPUTED")])
class OutputWeightDecays(State):
    def __init__(self) -> None:
        super().__init__(("o",))

    def run(self, x: Tensor) -> Tensor:
        self.o.weight[0].mul_(0.5)
        return self.attend(x)


@stateful(["vo"], [("qk", "NO_PROJECTION")])
class KeyBiasMoves(State):
    def __init__(self) -> None:
        super().__init__()
        bias = self.k.bias.detach().clone()
        del self.k.bias
        self.k.register_buffer("bias", bias)

    def run(self, x: Tensor) -> Tensor:
        out = self.attend(x)
        self.k.bias.add_(1)
        return out


@stateful(["vo"], [("qk", "DATA_DEPENDENT")])
class OrderOfKeysTurns(State):
    """A buffer holds the order; what meets at the first call does not at the second."""

    def run(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        out = self.out(F.scaled_dot_product_attention(q, k[..., self.order], v))
        self.order.copy_(self.order.roll(1))
        return out


@stateful(["qk", "vo"], [])
class FactorGrows(State):
    """A factor for all features may be anything, even one that changes."""

    def run(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        self.factor.mul_(1.5)
        return self.out(F.scaled_dot_product_attention(q, k * self.factor, v))


@pytest.mark.parametrize("name", STATEFUL)
def test_never_wrong_at_the_next_call(name: str) -> None:
    module, rewritten, skipped = STATEFUL[name]
    calls = tuple((example(seed=i),) for i in range(1, 4))
    report = rewrite_in_float64(module(), (example(),), others=calls)
    assert sorted(s.product for s in report.rewritten) == rewritten
    assert sorted((s.product, s.reason_code) for s in report.skipped) == skipped
