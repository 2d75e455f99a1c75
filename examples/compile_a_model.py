"""torch.compile with BD attention: one word, no import of bda_fx."""

from __future__ import annotations

import time

import torch
from models import embed, minilm, sentences


def main() -> None:
    model, tokenizer = minilm()
    batch = dict(tokenizer(sentences(8), return_tensors="pt", padding=True))
    reference = embed(model, batch)

    compiled = torch.compile(model, backend="bda")
    start = time.perf_counter()
    first = embed(compiled, batch)
    print(f"compiled in {time.perf_counter() - start:.1f} s")
    print(f"smallest cosine to the original: {(reference * first).sum(-1).min():.7f}")

    # Weights may change: the compiled model sees it at the next call.
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    changed, expected = embed(compiled, batch), embed(model, batch)
    print(f"after all weights changed:       {(changed * expected).sum(-1).min():.7f}")


if __name__ == "__main__":
    main()
