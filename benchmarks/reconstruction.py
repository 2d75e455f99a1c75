"""Error of the products K Qᵀ and V O when what is stored of them is rounded, by basis and dtype.

    python benchmarks/reconstruction.py [--quick]

Per head the product is P = W U (W [E, D] of the projection that is decomposed, with its bias as one
more row; U [D, n] its partner: query weights, or output weights for V). After the change of basis
it is P = W' U', with W' = I on the basis rows and C on the others, and U' = S U. Both forms are
worked out in float64, rounded to the dtype, and multiplied in float64 again: what is measured is
what storing costs, without the noise of the matrix products of a run.

* fp32, bf16, fp16: relative Frobenius error of all heads together, as a multiple of the original's,
  whose factors W and U are rounded to the same dtype. "Worst head" is the largest multiple of any
  head in fp16. Over several layers: geometric mean, and the worst head of all.
* fp64: the relative error itself, as the original has none to compare with.

Weights: normal, and heavy-tailed (Student's t with 3 degrees of freedom), in shapes of public
models; and real ones. Every weight is divided by 3, which changes no relative error, so that no
dtype holds it exactly: real weights come in float32, whose own rounding could not be seen in it.
V3's partner is the 1536 wide query projection, the others' are 2048 wide or the model's own width;
all heads share one basis, as they do in the pass.

Writes results/reconstruction.{md,json,svg} beside this script.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record

from bda_fx.passes.change_basis import change_basis, turn_vectors
from bda_fx.passes.choose_basis import BasisSearch
from tests.unit.real_weights import MODELS, projections

SEED = 0
BASES = (
    ("first", 1.0),
    ("residual-min", 1.0),
    ("window", 1.0),
    ("pivot", 1.0),
    ("pivot", 15 / 16),
    ("pivot", 7 / 8),
    ("pivot", 3 / 4),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUNDED = DTYPES[1:]


@dataclass(frozen=True)
class Shape:
    """H heads of D features of E inputs, and n features of the partner."""

    name: str
    heads: int
    in_features: int
    head_dim: int
    partner: int


SHAPES = (
    Shape("DeepSeek-V2-Lite K, V", 16, 512, 128, 2048),
    Shape("DeepSeek-V3 K", 128, 512, 128, 1536),
    Shape("GLM-4.7-Flash K", 20, 512, 192, 2048),
    Shape("GLM-4.7-Flash V", 20, 512, 256, 2048),
    Shape("BERT-base K, V", 12, 768, 64, 768),
)
QUICK = (Shape("small", 3, 96, 16, 40),)


@dataclass(frozen=True)
class Product:
    """One bilinear product, float64: ``near`` [H, E, D], ``bias`` [H, D], ``far`` [H, D, n]."""

    near: Tensor
    bias: Tensor | None
    far: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        return _with_bias(self.near, self.bias), self.far


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) / 3


def heavy_tailed(*shape: int, generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom: infinite fourth moment, outliers of 10 σ and more."""
    chi_squared = torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        chi_squared += torch.randn(*shape, generator=generator, dtype=torch.float64).square()
    return normal(*shape, generator=generator) / (chi_squared / 3).sqrt()


def random_product(shape: Shape, draw: Callable[..., Tensor]) -> Product:
    generator = torch.Generator().manual_seed(SEED)
    near = draw(shape.heads, shape.in_features, shape.head_dim, generator=generator)
    return Product(
        near, None, draw(shape.heads, shape.head_dim, shape.partner, generator=generator)
    )


def real_products(model: str, product: str, layers: int | None) -> list[Product]:
    """One for each layer, with biases: U [D, n] has the query's as one more column."""
    found = []
    for p in [p for p in projections(model) if p.product == product][:layers]:
        far = p.partner.double()
        if p.partner_bias is not None:
            far = torch.cat([far, p.partner_bias.double().unsqueeze(2)], 2)
        found.append(Product(p.heads.double() / 3, p.bias.double() / 3, far / 3))
    return found


def rewritten(product: Product, rows: Tensor) -> tuple[Tensor, Tensor]:
    """W' [H, E (+ 1), D] and U' [H, D, n] on basis ``rows``."""
    change = change_basis(product.near, rows, product.bias)
    near = torch.zeros_like(product.near)
    near[:, change.rest] = change.coefficients
    near[:, rows, torch.arange(len(rows))] = 1
    every = torch.arange(len(near))
    far = turn_vectors(product.far.mT, change, every, against=True).mT
    return _with_bias(near, change.bias), far


def errors(exact: Tensor, near: Tensor, far: Tensor, dtype: torch.dtype) -> Tensor:
    """Frobenius error of each head's product with both factors rounded to ``dtype``, [H]."""
    near, far = near.to(dtype).double(), far.to(dtype).double()
    heads = zip(exact, near, far, strict=True)
    return torch.stack([torch.addmm(p, w, u, beta=-1).norm() for p, w, u in heads])


@dataclass(frozen=True)
class Cell:
    """One basis in one dtype: ``error`` relative, ``ratio`` and ``worst_head`` over the original's
    (None in float64)."""

    error: float
    ratio: float | None
    worst_head: float | None


def measure(product: Product) -> Iterator[tuple[int, dict[str, Cell]]]:
    """For each of BASES: its rows' number, and a cell for each dtype."""
    near, far = product.factors()
    exact = near @ far
    size = float(exact.norm())
    own = {dtype: errors(exact, near, far, dtype) for dtype in ROUNDED}
    searches = {name: BasisSearch(product.near, name) for name, _ in BASES}
    _, e, d = product.near.shape
    for strategy, share in BASES:
        rows = searches[strategy].rows(min(e, int(d * share)))
        moved = rewritten(product, rows)
        cells = {}
        for dtype in DTYPES:
            error = errors(exact, *moved, dtype)
            ratio = worst = None
            if dtype in own:
                ratio = float(error.norm() / own[dtype].norm())
                worst = float((error / own[dtype]).max())
            cells[_short(dtype)] = Cell(float(error.norm()) / size, ratio, worst)
        yield len(rows), cells


def summarise(products: list[Product]) -> list[dict[str, Any]]:
    """One row per basis, over all ``products``."""
    measured = [list(measure(product)) for product in products]
    e = products[0].near.shape[1]
    rows = []
    for at, (strategy, share) in enumerate(BASES):
        cells = [layer[at][1] for layer in measured]
        size = measured[0][at][0]
        row: dict[str, Any] = {"basis": strategy, "share": share, "size": size, "saved": size / e}
        row["fp64_error"] = _mean([c["fp64"].error for c in cells])
        for name in map(_short, ROUNDED):
            row[f"{name}_error"] = _mean([c[name].error for c in cells])
            row[f"{name}_ratio"] = _mean([c[name].ratio for c in cells])
            row[f"{name}_worst_head"] = max(c[name].worst_head for c in cells)
        rows.append(row)
    return rows


def table(name: str, rows: list[dict[str, Any]]) -> str:
    columns = ["basis", "r", "saved", "fp64 error", *(f"{_short(d)} ×" for d in ROUNDED)]
    body = []
    for row in rows:
        share = "D" if row["share"] == 1 else f"{row['share']:.4g} D"
        ratios = [f"{row[f'{_short(d)}_ratio']:.2f}" for d in ROUNDED]
        saved, fp64 = f"{100 * row['saved']:.1f} %", f"{row['fp64_error']:.1e}"
        body.append([row["basis"], share, saved, fp64, *ratios, f"{row['fp16_worst_head']:.1f}"])
    return f"### {name}\n\n" + record.markdown_table([*columns, "worst head ×"], body)


def draw(results: dict[str, list[dict[str, Any]]]) -> Callable[[Any], None]:
    """fp16 multiples, and those of the worst head, of every basis over all cases."""

    def onto(figure: Any) -> None:
        figure.set_size_inches(10, 6)
        axes = figure.subplots(1, 2, sharey=True)
        names = list(results)
        for ax, key, title in zip(
            axes, ("ratio", "worst_head"), ("all heads", "worst head"), strict=True
        ):
            for at, (strategy, share) in enumerate(BASES):
                values = [results[name][at][f"fp16_{key}"] for name in names]
                label = strategy if share == 1 else f"{strategy}, {share:.4g} D"
                ax.plot(values, range(len(names)), marker="o", linestyle="none", label=label)
            ax.set_xscale("log")
            ax.axvline(1, color="grey", linewidth=0.8)
            ax.set_xlabel("error in fp16, × the original's")
            ax.set_title(title)
            ax.grid(axis="x", alpha=0.3)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        axes[0].legend(loc="lower right", fontsize=7)

    return onto


def cases(quick: bool) -> Iterator[tuple[str, list[Product]]]:
    for shape in QUICK if quick else SHAPES:
        dimensions = f"{shape.in_features} → {shape.heads} × {shape.head_dim}"
        for kind, draw_weights in (("normal", normal), ("heavy-tailed", heavy_tailed)):
            yield f"{shape.name}, {dimensions}, {kind}", [random_product(shape, draw_weights)]
    for model in MODELS[1:] if quick else MODELS:
        for product, letter in (("qk", "K"), ("vo", "V")):
            found = real_products(model, product, 1 if quick else None)
            h, e, d = found[0].near.shape
            title = f"{NAMES[model]} {letter}, {e} → {h} × {d}, real, {len(found)} layers"
            yield title, found


NAMES = {"minilm": "MiniLM-L6", "rxnfp": "rxnfp"}


def _with_bias(near: Tensor, bias: Tensor | None) -> Tensor:
    return near if bias is None else torch.cat([near, bias.unsqueeze(1)], 1)


def _short(dtype: torch.dtype) -> str:
    return {"bfloat16": "bf16"}.get(
        name := str(dtype).removeprefix("torch."), name.replace("float", "fp")
    )


def _mean(values: list[float]) -> float:
    """Geometric; inf and nan stay what they are."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small cases; writes nothing")
    quick = parser.parse_args().quick
    results = {}
    for name, products in cases(quick):
        start = time.perf_counter()
        results[name] = summarise(products)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    origin = record.provenance(SEED)
    text = "\n\n".join(table(name, rows) for name, rows in results.items())
    text = f"{record.heading('reconstruction.py', origin)}\n\n{text}\n"
    record.write("reconstruction", text, {**origin, "results": results}, draw(results), quick=quick)


if __name__ == "__main__":
    main()
