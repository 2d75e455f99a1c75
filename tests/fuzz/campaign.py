"""Fuzz many modules: ``python -m tests.fuzz [--graphs 10000] [--seed 0] [--workers 2]``.

Writes benchmarks/results/fuzz.md and fuzz.json, prints every wrong rewrite as a minimal module.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.grammar import Spec, specs
from tests.fuzz.oracles import Verdict, smaller
from tests.fuzz.render import render
from tests.fuzz.test_fuzz import verdict

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def draw(count: int, start: int) -> list[Spec]:
    """Different specs, the same for the same seed."""
    found: dict[Spec, None] = {}
    while len(found) < count:
        collect = settings(
            max_examples=2000, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        before = len(found)
        seed(start)(collect(given(specs())(lambda spec: found.setdefault(spec))))()
        start += 1
        if len(found) == before:
            break
    return list(found)[:count]


def run(spec: Spec) -> Verdict:
    try:
        return verdict(spec)
    except Exception:
        nothing = {"qk": 0, "vo": 0}
        return Verdict(spec, nothing, nothing, traceback.format_exc(limit=4))


def fails(spec: Spec) -> bool:
    found = run(spec)
    return bool(found.wrong) or found.beyond


def shared_traits(verdicts: list[Verdict]) -> list[tuple[str, int, int]]:
    """(choice, misses with it, modules with it), the most frequent among the misses first."""
    missing = Counter(
        f"{name}={value}"
        for v in verdicts
        if any(v.missed.values())
        for name, value in v.spec.unusual.items()
    )
    every = Counter(f"{name}={value}" for v in verdicts for name, value in v.spec.unusual.items())
    return [(trait, n, every[trait]) for trait, n in missing.most_common(12)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    start = time.perf_counter()
    drawn = draw(chosen.graphs, chosen.seed)
    print(
        f"{len(drawn)} different modules drawn in {time.perf_counter() - start:.0f} s", flush=True
    )
    verdicts: list[Verdict] = []
    with multiprocessing.get_context("spawn").Pool(chosen.workers, maxtasksperchild=400) as pool:
        for found in pool.imap_unordered(run, drawn, chunksize=20):
            verdicts.append(found)
            if found.wrong:
                print("WRONG", found.wrong, found.spec.unusual, flush=True)
            elif found.beyond:
                print("MORE", found.found, "than", found.legal, found.spec.unusual, flush=True)
            if len(verdicts) % 500 == 0:
                rate = len(verdicts) / (time.perf_counter() - start)
                print(f"{len(verdicts)} modules, {rate:.1f} a second", flush=True)
    report = summary(verdicts, time.perf_counter() - start)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fuzz.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "fuzz.md").write_text(markdown(report))
    print(markdown(report))
    for v in [v for v in verdicts if v.wrong or v.beyond][:5]:
        minimal = smaller(v.spec, fails)
        print(f"\nMINIMAL {minimal.unusual}\n\n{render(minimal)}")
    return int(report["wrong"] > 0 or report["beyond"] > 0)


def summary(verdicts: list[Verdict], seconds: float) -> dict[str, Any]:
    legal = {p: sum(v.legal[p] for v in verdicts) for p in ("qk", "vo")}
    missed = {p: sum(v.missed[p] for v in verdicts) for p in ("qk", "vo")}
    return {
        "modules": len(verdicts),
        "wrong": sum(bool(v.wrong) for v in verdicts),
        "beyond": sum(v.beyond for v in verdicts),
        "modules_with_something_legal": sum(any(v.legal.values()) for v in verdicts),
        "legal_features": legal,
        "missed_features": missed,
        "recall": 1 - sum(missed.values()) / max(1, sum(legal.values())),
        "traits_of_the_missing": shared_traits(verdicts),
        "seconds": round(seconds),
    }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Fuzzed attention modules",
        "",
        "`make fuzz`: random modules of `tests/fuzz/grammar.py`, rewritten in float64 and held",
        "against two oracles that know nothing of the finder (`tests/fuzz/oracles.py`).",
        "",
        "| modules | wrong rewrites | more than is legal | legal features (QK, VO) | recall |",
        "|---|---|---|---|---|",
        f"| {report['modules']:,} | {report['wrong']} | {report['beyond']} "
        f"| {report['legal_features']['qk']:,}, {report['legal_features']['vo']:,} "
        f"| {report['recall']:.4f} |",
        "",
    ]
    if report["traits_of_the_missing"]:
        lines += ["What the modules with something missing have in common:", ""]
        lines += ["| choice | modules that miss | modules that have it |", "|---|---|---|"]
        lines += [f"| {t} | {n} | {m} |" for t, n, m in report["traits_of_the_missing"]]
        lines += [""]
    return "\n".join(lines)
