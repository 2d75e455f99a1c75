"""Measure the rounding errors of a linear in some features that stand for all.

Float64 would take most of the time of an estimate: products in it take twice those in float32, and
all weights are widened. So a linear is computed for one in six of its features. Half of these are
the ones with most energy, which may have most of the noise; of the others it is every k-th in order
of energy, which counts for k. That moves shares by up to four per cent, where other inputs made up
alike move them by twenty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

MANY = 512
"""Features below which all are looked at: there is little to be saved."""
PART = 6
"""One in so many features is in a sample."""
FEW_TOKENS = 16
"""Vectors below which all features are: they would not tell a loud feature from a quiet one."""


@dataclass(frozen=True)
class Sample:
    """Features [n] of F; ``weights`` [n] multiply their errors, so that squares stand for all."""

    features: Tensor
    weights: Tensor

    def of(self, value: Tensor) -> Tensor:
        """The features in ``value`` [*, F]."""
        return value[..., self.features]

    def arguments(self, args: Any) -> Any:
        """Input, weight and bias of a linear with these features alone."""
        x, *weights = args
        return (x, *(w if w is None else w.detach()[self.features] for w in weights))


def sample_of(n: fx.Node, args: Any, value: Tensor) -> Sample | None:
    """A sample of the features of the ``value`` [*, F] that node ``n`` makes of ``args``.

    None where all are to be looked at: there are few, or it is no linear.
    """
    if n.target is not torch.ops.aten.linear.default or n.kwargs or args[1].dim() != 2:
        return None
    if value.shape[-1] < MANY or value.shape[:-1].numel() < FEW_TOKENS:
        return None
    order = value.flatten(0, -2).square().sum(0).argsort(descending=True, stable=True)
    count = len(order) // (2 * PART)
    loud, others = order[:count], order[count:]
    picked = (torch.arange(count) + 0.5) * (len(others) / count)
    quiet = others[picked.long().to(others.device)]
    weights = torch.ones(2 * count, device=value.device)
    weights[count:] = (len(others) / count) ** 0.5
    return Sample(torch.cat([loud, quiet]), weights)
