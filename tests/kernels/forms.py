"""Forms of the operator for the tests, and its definition written out feature by feature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def head(size: int, width: int) -> tuple[int, ...]:
    """The slots of one head of ``width`` features."""
    return (*range(size), *[-1] * (width - size))


@dataclass(frozen=True)
class Form:
    """One call of the operator: sizes, where the basis lies and how it enters the outputs."""

    name: str
    in_features: int
    size: int
    slots: tuple[int, ...]
    groups: int
    start: int | None = 0
    """First row of a window; None for scattered rows."""
    ascending: bool = True
    """Whether scattered rows, and the others, come in ascending order."""
    bias: bool = True
    lead: tuple[int, ...] = (5,)
    """Sizes of x but for the last."""

    @property
    def out_features(self) -> int:
        return self.groups * len(self.slots)

    def arguments(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Any]:
        """x, coefficients, order, bias, start, size, slots."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        x = randn(*self.lead, self.in_features)
        coefficients = randn(self.out_features, self.in_features - self.size)
        order = None
        if self.start is None:
            order = torch.randperm(self.in_features, generator=generator)
            if self.ascending:
                parts = order.split([self.size, self.in_features - self.size])
                order = torch.cat([part.sort().values for part in parts])
        bias = randn(self.out_features) if self.bias else None
        return [x, coefficients, order, bias, self.start or 0, self.size, list(self.slots)]


FORMS = [
    Form("window at the start", 24, 8, head(8, 8), 3),
    Form("window in the middle", 24, 8, head(8, 8), 3, start=5),
    Form("window at the end", 24, 8, head(8, 8), 3, start=16),
    Form("scattered", 24, 8, head(8, 8), 3, start=None),
    Form("scattered in any order", 24, 8, head(8, 8), 3, start=None, ascending=False),
    Form("smaller than the head", 24, 7, head(7, 8), 3, start=None),
    Form("key and value on one basis", 24, 7, head(7, 8) + head(7, 12), 3, start=None),
    Form("slots in any order", 24, 4, (-1, 2, 3, -1, 0, 0), 2, start=9),
    Form("no slots", 24, 4, (-1, -1, -1), 4),
    Form("r = E", 8, 8, head(8, 8), 3),
    Form("r = E, any order", 8, 8, head(8, 12), 3, start=None, ascending=False),
    Form("r = 0", 24, 0, (-1,), 10),
    Form("r = 0, any order", 24, 0, (-1,), 10, start=None),
    Form("one feature", 1, 1, (0,), 1),
    Form("odd sizes", 37, 11, head(11, 13), 7, start=None, lead=(17,)),
    Form("odd window", 37, 11, head(11, 13), 7, start=3, lead=(17,)),
    Form("one token", 40, 16, head(16, 16), 5, start=None, lead=(1,)),
    Form("no leading size", 24, 8, head(8, 8), 3, start=2, lead=()),
    Form("three dimensions", 24, 8, head(8, 8), 3, start=None, lead=(2, 3)),
    Form("four dimensions", 24, 8, head(8, 8), 3, start=None, lead=(2, 3, 5)),
    Form("no tokens", 24, 8, head(8, 8), 3, start=None, lead=(0,)),
    Form("no tokens in a batch", 24, 8, head(8, 8), 3, start=1, lead=(3, 0)),
]
FORMS += [replace(form, name=f"{form.name}, no bias", bias=False) for form in FORMS[::2]]


def by_definition(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: list[int],
) -> Tensor:
    """The operator's formula in float64, one output feature after the other."""
    if order is None:
        rows = list(range(start, start + size))
        rest = [*range(start), *range(start + size, x.shape[-1])]
    else:
        rows, rest = order[:size].tolist(), order[size:].tolist()
    wide = x.double()
    y = wide[..., rest] @ coefficients.double().T
    for feature in range(coefficients.shape[0]):
        slot = slots[feature % len(slots)]
        if slot >= 0:
            y[..., feature] += wide[..., rows[slot]]
        if bias is not None:
            y[..., feature] += bias[feature].double()
    return y
