"""The main job on a real model: all-MiniLM-L6-v2, rewritten, compiled, saved, reloaded, compared.

make demo            or            python examples/demo.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from models import embed, minilm, sentences

import bda_fx


def main() -> None:
    model, tokenizer = minilm()
    texts = sentences()
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True))
    print(
        f"all-MiniLM-L6-v2 on {len(texts)} sentences, {batch['input_ids'].shape[1]} tokens each\n"
    )

    names = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    rewrite = bda_fx.rewrite(model, (), batch, dynamic_shapes=dict.fromkeys(batch, names))
    print(rewrite.report.to_markdown(), "\n")

    with tempfile.TemporaryDirectory() as directory:
        sizes = {}
        for name, program in (
            (
                "original",
                torch.export.export(
                    model, (), batch, dynamic_shapes=dict.fromkeys(batch, names), strict=False
                ),
            ),
            ("rewritten", rewrite.program),
        ):
            path = Path(directory) / f"{name}.pt2"
            torch.export.save(program, path)
            sizes[name] = path.stat().st_size
        reloaded = torch.export.load(Path(directory) / "rewritten.pt2").module()
    saved = sizes["original"] - sizes["rewritten"]
    print(f"files: {sizes['original']:,} → {sizes['rewritten']:,} bytes ({saved:,} fewer)\n")

    reference = embed(model, batch)
    candidates = {
        "rewritten, eager": rewrite.program.module(),
        "rewritten, saved and reloaded": reloaded,
        'torch.compile(backend="bda")': torch.compile(model, backend="bda"),
    }
    print("sentence embeddings against the original's:")
    for name, candidate in candidates.items():
        compare(name, reference, embed(candidate, batch))

    print("\nnoise, relative to the original's own float32 rounding (float64 is the truth):")
    print(bda_fx.verify(model, rewrite.program, (), batch))
    paper = bda_fx.rewrite(
        model, (), batch, options={"basis": "residual-min", "basis_size": "full"}
    )
    print("the same for the paper's basis choice (Residual-min, r = D), for comparison:")
    print(bda_fx.verify(model, paper.program, (), batch))


def compare(name: str, reference: torch.Tensor, candidate: torch.Tensor) -> None:
    """Cosine between embeddings, and whether each sentence ranks the others in the same order."""
    cosine = (reference * candidate).sum(-1)
    orders = [(e @ e.T).argsort(-1, descending=True) for e in (reference, candidate)]
    same = (orders[0] == orders[1]).all(-1).sum()
    print(
        f"  {name:32} cosine ≥ {cosine.min():.7f}, "
        f"neighbour ranking equal for {int(same)} of {len(reference)} sentences"
    )


if __name__ == "__main__":
    main()
