"""An attention kernel of one's own: say how to read it, and it is rewritten like any other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bda_fx


@torch.library.custom_op("example::capped_attention", mutates_args=())
def capped_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Stands for a kernel; tensors are [batch, tokens, heads, features]."""
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
    weights = (30 * (scores / 30).tanh()).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, value)


@capped_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(256, 256) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 64)) for f in (self.q, self.k, self.v))
        return self.o(capped_attention(q, k, v).flatten(-2))


def main() -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 50, 256)
    print("Before:", bda_fx.analyze(model, (x,)))

    # What it takes: queries and keys are seen through their products alone, values are added up.
    bda_fx.register_attention(capped_attention, layout="bthd")
    rewritten = bda_fx.rewrite(model, (x,))
    print("\nAfter:", rewritten.report)
    print(bda_fx.verify(model, rewritten.program, (x,)))


if __name__ == "__main__":
    main()
