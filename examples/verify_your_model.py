"""How equal is it? Errors are measured against float64, in units of the original's own error."""

from __future__ import annotations

import copy

import torch
from models import minilm, sentences

import bda_fx


def main() -> None:
    model, tokenizer = minilm()
    batch = dict(tokenizer(sentences(4), return_tensors="pt", padding=True))
    for dtype in (torch.float32, torch.bfloat16):
        original = copy.deepcopy(model).to(dtype)
        rewritten = bda_fx.rewrite(original, (), batch).program
        print(bda_fx.verify(original, rewritten, (), batch))

    # A model that is not the same must fail: one coefficient changed by 10 %.
    broken = bda_fx.rewrite(model, (), batch).program
    name = next(n for n in broken.state_dict if n.endswith("_coefficients"))
    with torch.no_grad():
        broken.state_dict[name][0, 0] *= 1.1
    print(f"with one number of {name} changed:")
    print(bda_fx.verify(model, broken, (), batch))


if __name__ == "__main__":
    main()
