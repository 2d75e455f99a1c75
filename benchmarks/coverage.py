"""Which attention products of which architecture are found: the zoo, in every spelling it has.

    python benchmarks/coverage.py [--quick]

One row for each architecture and attention implementation: sites found against those that the
architecture's mathematics has (``tests/zoo``), the D features decomposed of E inputs, what a basis
of D rows saves of them in K and in V, seconds for ``bda_fx.analyze`` (export included), and what is
skipped for which reason. The models are tiny and random: shares are those of their own shapes.

Writes ``results/coverage.json`` and ``results/coverage.md`` beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bda_fx
from benchmarks import record
from tests import zoo
from tests.zoo.find_differences import count, found_sites, wanted_sites

FULL = {"basis_size": "full"}
QUICK = ("bert", "gpt2", "t5", "llama", "deepseek_v3")
PACKAGES = ("transformers", "timm", "diffusers")


@dataclass(frozen=True)
class Row:
    """One architecture in one spelling; shares are of the features decomposed, in percent."""

    architecture: str
    attention: str
    sites: int = 0
    sites_expected: int = 0
    as_expected: bool = False
    decomposed: tuple[str, ...] = ()
    saved_k_percent: float | None = None
    saved_v_percent: float | None = None
    analyze_s: float | None = None
    skipped: tuple[str, ...] = ()
    error: str = ""


def measure(case: zoo.Case) -> Row:
    expected = zoo.expected(case)
    fixed: dict[str, Any] = {
        "architecture": case.architecture,
        "attention": case.attention,
        "sites_expected": count(expected),
    }
    needs = zoo.ENTRIES[case.architecture].needs
    if importlib.util.find_spec(needs) is None:
        return Row(**fixed, error=f"{needs} is not installed")
    example = zoo.make(case)
    start = time.perf_counter()
    try:
        report = bda_fx.analyze(example.model, (), example.kwargs, options=FULL)
    except Exception as error:
        return Row(**fixed, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    seconds = time.perf_counter() - start
    sizes = Counter((s.product, s.decomposed, s.in_features) for s in report.rewritten)
    skips = Counter((s.product, s.reason_code) for s in report.skipped)
    return Row(
        **fixed,
        sites=len(report.rewritten),
        as_expected=found_sites(report) == wanted_sites(expected),
        decomposed=tuple(f"{n} {p} {d} of {e}" for (p, d, e), n in sorted(sizes.items())),
        saved_k_percent=saved(report, "qk"),
        saved_v_percent=saved(report, "vo"),
        analyze_s=round(seconds, 3),
        skipped=tuple(f"{n} {product} {reason}" for (product, reason), n in sorted(skips.items())),
    )


def saved(report: bda_fx.Report, product: str) -> float | None:
    """Multiply-accumulates saved per token, of those that make the features decomposed."""
    sites = [s for s in report.rewritten if s.product == product]
    before = sum(s.macs_per_token_before or 0 for s in sites)
    after = sum(s.macs_per_token_after or 0 for s in sites)
    return round(100 * (1 - after / before), 1) if before else None


def summary(rows: list[Row]) -> str:
    names = {row.architecture for row in rows}
    right = sum(row.as_expected for row in rows)
    found, legal = sum(row.sites for row in rows), sum(row.sites_expected for row in rows)
    return (
        f"{len(names)} architectures in {len(rows)} spellings; {found} sites found of {legal}; "
        f"{right} of {len(rows)} rows with exactly the sites and skips expected."
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| architecture | attention | sites | D of E | saves K | saves V | analyze s | skipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = "" if row.as_expected else " *"
        skipped = "; ".join(row.skipped).lower().replace("_", " ")
        lines.append(
            f"| {row.architecture} | {row.attention.removesuffix('_attention')} "
            f"| {row.sites} / {row.sites_expected}{mark} | {', '.join(row.decomposed) or '–'} "
            f"| {percent(row.saved_k_percent)} | {percent(row.saved_v_percent)} "
            f"| {'–' if row.analyze_s is None else f'{row.analyze_s:.2f}'} "
            f"| {row.error or skipped or '–'} |"
        )
    if not all(row.as_expected for row in rows):
        lines += ["", "\\* Sites or reasons differ from those expected (`tests/zoo`)."]
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="five architectures; writes nothing")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cases = [c for c in zoo.CASES if not quick or c.architecture in QUICK]
    measure(zoo.Case("mha", "sdpa"))  # the first export also imports
    rows = []
    for case in cases:
        rows.append(measure(case))
        print(table(rows[-1:]).splitlines()[2], flush=True)
    origin = record.provenance(packages=PACKAGES)
    text = "\n\n".join([record.heading("coverage.py", origin), summary(rows), table(rows)])
    found = {**origin, "summary": summary(rows), "rows": [asdict(row) for row in rows]}
    record.write("coverage", text + "\n", found, quick=quick)


if __name__ == "__main__":
    main()
