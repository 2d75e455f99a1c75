"""Prove that the rewrite changes nothing, and work out what it saves. All of it with symbols.

    python examples/prove_it.py [--all]

1. The formulas, for matrices of any size: the difference of both sides cancels.
2. What the passes emit: a small program and its rewrite run on polynomials in all of their inputs
   and weights, and come out as the same rational functions. The S of each head is completed by free
   symbols, so any completion will do. ``--all`` proves every form that there is (half a minute).
3. The same with a mistake in it: no proof.
4. What is stored and multiplied, and where one choice starts to pay more than another, as Markdown
   and as LaTeX. ``bda_fx.Report`` takes its numbers from these formulas.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sympy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bda_fx.passes.count_costs import (
    LAYOUTS,
    break_even_points,
    cost_formulas,
    heads_and_tokens,
    symbols,
    whole_attention,
)
from tests.symbolic.cases import CASES, Case, named
from tests.symbolic.identities import claims
from tests.symbolic.prove import Proof, Prover

SHOWN = (
    "scattered rows",
    "grouped queries",
    "fewer basis rows than features",
    "query side",
    "all inputs are the basis",
    "fused, one after the other",
    "decoupled rotary",
    "values are keys",
    "learned keys",
    "folded into the producer",
)
Cell = str | sympy.Expr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every form that the passes emit")
    cases = CASES if parser.parse_args().all else tuple(named(name) for name in SHOWN)

    print("Formulas, for E inputs, D features of a head, r rows of basis, any number of tokens\n")
    formulas = claims()
    for claim in formulas:
        print(f"  {verdict(claim.holds)}  {claim.name:38} {claim.says}")

    print("\nForms that the passes emit: all outputs as rational functions of all symbols\n")
    proofs = [show(case) for case in cases]

    print("\nThe same with a mistake in it\n")
    mistakes = [claims(sign=-1)[1].holds, claims(turn=lambda s: s)[1].holds]
    mistakes.append(with_wrong_sign("scattered rows").holds)
    names = ("formula, -C for C", "formula, S for Sᵀ", "program, -C for C")
    for name, holds in zip(names, mistakes, strict=True):
        print(f"  {verdict(holds)}  {name}")

    print("\nCosts of the projection that is decomposed (its partners keep their size)\n")
    print_table(*costs())
    print("Break-even points\n")
    print_table(*break_evens())
    print(
        "Saved of all multiplications of an attention layer, both products on the key/value side\n"
    )
    print_table(("share saved", "at S = T = n"), [share_saved()])

    proven = all(claim.holds for claim in formulas) and all(proof.holds for proof in proofs)
    print("All proven." if proven and not any(mistakes) else "NOT PROVEN.")
    return 0 if proven and not any(mistakes) else 1


def verdict(holds: bool) -> str:
    return "proven  " if holds else "no proof"


def show(case: Case) -> Proof:
    prover = Prover(case.make(), case.args, case.options, fixed_rows=case.fixed_rows)
    proof = prover.prove()
    sites = ", ".join(f"{product} r = {size}" for product, _, size in case.sites)
    print(
        f"  {verdict(proof.holds)}  {case.name:38} {sites:28} "
        f"{proof.numbers:2} identities in {proof.symbols:3} symbols",
        flush=True,
    )
    return proof


def with_wrong_sign(name: str) -> Proof:
    """The proof of a form whose coefficients have the wrong sign."""
    case = named(name)
    prover = Prover(case.make(), case.args, case.options)

    def change(*args: Any) -> Any:
        right = prover.complete_freely(*args)
        return dataclasses.replace(right, coefficients=-right.coefficients)

    return prover.prove(change=change)


# -- tables -----------------------------------------------------------------------------------


def costs() -> tuple[Sequence[str], list[list[Cell]]]:
    """The original of each kind of projection, its forms, and the form at r = E."""
    r, e = symbols()["r"], symbols()["E"]
    rows: list[list[Cell]] = []
    last = ""
    for name, layout in LAYOUTS.items():
        kind, form = name.split(", ")
        formulas, (_, tokens) = cost_formulas(layout), heads_and_tokens(layout.side)
        if kind != last:
            before = formulas.macs_per_token_before
            rows.append([kind, "original", formulas.params_before, tokens * before])
            everything = formulas.params_after.subs(r, e)
            rows.append([kind, "r = E", everything, sympy.Integer(0)])
        rows.append([kind, form, formulas.params_after, tokens * formulas.macs_per_token_after])
        last = kind
    return ("projection", "form", "numbers stored", "multiplications"), rows


def break_evens() -> tuple[Sequence[str], list[list[Cell]]]:
    points = break_even_points()
    rows: list[list[Cell]] = [
        [p.question, sympy.Eq(p.variable, p.value, evaluate=False), p.above] for p in points
    ]
    return ("question", "break-even", "above it"), rows


def share_saved() -> list[Cell]:
    s = symbols()
    n = sympy.Symbol("n", integer=True, positive=True)
    formulas = cost_formulas(LAYOUTS["keys or values, window or folded"])
    saved = 2 * s["T"] * (formulas.macs_per_token_before - formulas.macs_per_token_after)
    share = sympy.factor(saved / whole_attention())
    return [share, sympy.factor(share.subs({s["S"]: n, s["T"]: n}))]


def print_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """As Markdown, then as LaTeX."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(as_text(cell) for cell in row)} |")
    print(f"\n\\begin{{tabular}}{{{'l' * len(header)}}}\n{' & '.join(header)} \\\\ \\hline")
    for row in rows:
        print(f"{' & '.join(as_latex(cell) for cell in row)} \\\\")
    print("\\end{tabular}\n")


def as_text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, sympy.Eq):
        return f"{as_text(cell.lhs)} = {as_text(cell.rhs)}"
    return sympy.sstr(cell).replace("*", "·").replace("beta", "β")


def as_latex(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"${sympy.latex(cell)}$"


if __name__ == "__main__":
    raise SystemExit(main())
