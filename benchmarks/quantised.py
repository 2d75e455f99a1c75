"""Weight-only quantisation after the rewrite, against quantising the original.

    python benchmarks/quantised.py [--quick]

torchao's int8 and fp8 (e4m3) weights with one scale per output channel replace every weight that a
linear of the program reads, in the original and in the rewritten program; products are in float32,
so that what is measured is the quantisation. Error: relative RMS of the last hidden state at real
tokens against a float64 run of the unquantised original. The ratio is that of the rewritten program
over the original's, both quantised alike, with its 95 % interval over the rows of the batch.

Writes ``results/quantised.json`` and ``results/quantised.md`` beside this file.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from models import minilm, rxnfp  # noqa: E402
from noise import reaction_batch, text_batch  # noqa: E402
from record import heading, provenance, write  # noqa: E402
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow  # noqa: E402

import bda_fx  # noqa: E402
from bda_fx.evaluate_float64 import evaluate_float64  # noqa: E402
from bda_fx.noise_interval import noise_interval  # noqa: E402
from bda_fx.passes.canonicalize import canonicalize_module  # noqa: E402

LIMIT = 1.25
"""How much worse than the quantised original the recommended options may be."""

ABOUT = f"""Error of the last hidden state against the unquantised original in float64, over that of
the original quantised alike, with its 95 % interval over the rows of the batch. What is recommended
for a scheme is `optimize_for` it: at most {LIMIT} is asked."""

SCHEMES: dict[str, Callable[[Tensor], Any]] = {
    "int8": lambda weight: Int8Tensor.from_hp(weight, granularity=PerRow()),
    "fp8": lambda weight: Float8Tensor.from_hp(weight, granularity=PerRow()),
}

OPTIONS: tuple[dict[str, Any], ...] = (
    {"basis_size": "full"},
    {"basis_size": 7 / 8},
    {"basis_size": 3 / 4},
    {"basis_size": 1 / 2},
    {"basis_size": 1 / 2, "side": "qo"},
    {"basis_size": 1 / 2, "products": ("qk",)},
    {},
    {"noise_budget": 1.05},
    {"optimize_for": "int8"},
    {"optimize_for": "fp8"},
)


def quantise(program: ExportedProgram, scheme: str) -> torch.nn.Module:
    """The program's module with each linear's weight rounded to ``scheme``, in its own dtype."""
    names = {
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_buffers,
        **program.graph_signature.inputs_to_lifted_tensor_constants,
    }
    module = copy.deepcopy(program.module())  # a program shares its weights with the model
    weights = {
        names[node.args[1].name]
        for node in program.graph.find_nodes(
            op="call_function", target=torch.ops.aten.linear.default
        )
        if node.args[1].name in names
    }
    for name in sorted(weights):
        path, _, leaf = name.rpartition(".")
        weight = getattr(module.get_submodule(path), leaf)
        with torch.no_grad():
            weight.copy_(SCHEMES[scheme](weight.detach().clone()).dequantize())
    return module


def row_energies(hidden: Tensor, truth: Tensor, real: Tensor) -> Tensor:
    """Squared error of every row of the batch [B], at real tokens."""
    error = (hidden.double() - truth).square().sum(-1)
    return torch.where(real, error, 0.0).sum(-1)


def measure(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One row per scheme and choice of options."""
    original = canonicalize_module(model, (), batch).exported
    assert original is not None
    real = batch["attention_mask"].bool()
    truth = evaluate_float64(original, (), batch)[0]
    size = float(truth[real].square().sum())

    def errors(program: ExportedProgram, scheme: str) -> Tensor:
        with torch.no_grad():
            return row_energies(quantise(program, scheme)(**batch)[0], truth, real)

    with torch.no_grad():
        plain = {
            scheme: errors(torch.export.export(model, (), batch, strict=False), scheme)
            for scheme in SCHEMES
        }
    rows = []
    for options in OPTIONS:
        rewrite = bda_fx.rewrite(model, (), batch, options=options)
        for scheme in SCHEMES:
            ours = errors(rewrite.program, scheme)
            rows.append(
                {
                    "options": options,
                    "scheme": scheme,
                    "saved": saved(rewrite.report),
                    "rewritten": len(rewrite.report.rewritten),
                    "error_original": float(plain[scheme].sum() / size) ** 0.5,
                    "error": float(ours.sum() / size) ** 0.5,
                    "ratio": float(ours.sum() / plain[scheme].sum()) ** 0.5,
                    "interval": noise_interval(ours, plain[scheme]),
                }
            )
            print(rows[-1], flush=True)
    return rows


def saved(report: bda_fx.Report) -> int:
    """Parameters of the decomposed projections that are spared."""
    return sum((s.params_before or 0) - (s.params_after or 0) for s in report.rewritten)


def label(options: dict[str, Any]) -> str:
    """Options as a user writes them."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "default"


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """One line per choice of options."""
    own = {r["scheme"]: r["error_original"] for r in rows}
    lines = [
        f"### {name}",
        "",
        "Quantised original: " + ", ".join(f"{s} {100 * own[s]:.2f} %" for s in SCHEMES),
        "",
        "| options | sites | parameters saved | " + " | ".join(SCHEMES) + " |",
        "|---" * (3 + len(SCHEMES)) + "|",
    ]
    for options in OPTIONS:
        mine = {r["scheme"]: r for r in rows if r["options"] == options}
        cells = [f"{r['ratio']:.2f} {interval(r['interval'])}" for r in mine.values()]
        first = next(iter(mine.values()))
        lines.append(
            f"| {label(options)} | {first['rewritten']} | {first['saved']:,} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"({bounds[0]:.2f} … {bounds[1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small batch of one model: shows that it runs"
    )
    quick = parser.parse_args().quick
    model, tokenizer = minilm()
    results = {"MiniLM-L6": measure(model, text_batch(tokenizer, 2 if quick else 16))}
    if not quick:
        results["rxnfp"] = measure(rxnfp(), reaction_batch(8))
    origin = provenance(packages=("torchao", "transformers"))
    tables = [table(name, rows) for name, rows in results.items()]
    text = "\n\n".join([heading("quantised.py", origin), ABOUT, *tables]) + "\n"
    record = {"provenance": origin, "limit": LIMIT, "results": results}
    write("quantised", text, record, quick=quick)


if __name__ == "__main__":
    main()
