"""Why was something rewritten, or not? ``analyze`` says it for every attention."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import bda_fx


class Returned(nn.Module):
    """An attention that hands its keys out, as a KV cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(-2)), k


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=100,
    )  # fmt: skip
    llama = LlamaModel(config).eval()
    tokens = {"input_ids": torch.randint(0, 100, (1, 8)), "use_cache": False}
    print("Llama:", bda_fx.analyze(llama, (), tokens))
    print("\nKeys returned:", bda_fx.analyze(Returned(), (torch.randn(2, 8, 64),)))


if __name__ == "__main__":
    main()
