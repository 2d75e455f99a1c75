"""Why was something rewritten, or not? ``analyze`` says it for every attention."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import bda_fx


class Attention(nn.Module):
    def __init__(self, *, normalise: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.normalise = normalise

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.normalise:
            q, k = (nn.functional.rms_norm(t, (16,)) for t in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(-2)), k


class Model(nn.Module):
    """One attention whose keys are handed out, as a KV cache is, and one with normalised keys."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention(normalise=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, k = self.first(x)
        return self.second(y)[0], k


def explain(report: bda_fx.Report) -> None:
    """What ``print(report)`` says, field by field."""
    for site in report.skipped:
        print(f"{site.product} of {site.module}: {site.reason}")
        print(f"  source: {site.source}")
        print(f"  remedy: {site.remedy or 'none: it is as it must be'}")


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=100,
    )  # fmt: skip
    llama = LlamaModel(config).eval()
    tokens = {"input_ids": torch.randint(0, 100, (1, 8)), "use_cache": False}
    print("Llama:", bda_fx.analyze(llama, (), tokens))

    report = bda_fx.analyze(Model().eval(), (torch.randn(2, 8, 64),))
    print("\nTwo attentions:", report)
    print("\nThe same, one field at a time:")
    explain(report)

    with torch.device("meta"):
        meta, x = Model().eval(), torch.randn(2, 8, 64)
    print("\nWithout weights, the sizes are known:")
    for site in bda_fx.analyze(meta, (x,)).skipped:
        if site.reason_code == "NO_VALUES":
            print(
                f"{site.product} {site.name}: {site.heads} heads × {site.decomposed} "
                f"of {site.in_features}; {site.remedy}"
            )


if __name__ == "__main__":
    main()
