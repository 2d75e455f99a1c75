"""How equal is it? Errors are measured against float64, in units of the original's own error."""

from __future__ import annotations

import copy

import torch
from models import minilm, sentences
from torch.export import Dim

import bda_fx


def main() -> None:
    model, tokenizer = minilm()
    batch = dict(tokenizer(sentences(4), return_tensors="pt", padding=True))
    sizes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in batch}
    # Several inputs, here of different lengths, give the ratio a confidence interval.
    inputs = [((), dict(tokenizer([s], return_tensors="pt"))) for s in sentences(4)]
    for dtype in (torch.float32, torch.bfloat16):
        original = copy.deepcopy(model).to(dtype)
        rewritten = bda_fx.rewrite(original, (), batch, dynamic_shapes=sizes).program
        print(bda_fx.verify(original, rewritten, inputs=inputs, task="embedding"))

    # In a batch, what is computed at padding is read by nobody and must not count.
    fidelity = bda_fx.verify(original, rewritten, (), batch, mask="attention_mask")
    print(fidelity.to_markdown())

    # Without inputs some are made from the program's signature. They tell less.
    print(bda_fx.verify(original, rewritten))

    # A model that is not the same must fail, and the report says where: one coefficient is changed
    # by 10 %.
    broken = bda_fx.rewrite(model, (), batch).program
    name = next(n for n in broken.state_dict if n.endswith("_coefficients"))
    with torch.no_grad():
        broken.state_dict[name][0, 0] *= 1.1
    print(f"with one number of {name} changed:")
    print(bda_fx.verify(model, broken, (), batch, mask="attention_mask"))


if __name__ == "__main__":
    main()
