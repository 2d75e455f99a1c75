"""What is left of the saving in deployed artefacts, how noisy they are, and how fast.

    python benchmarks/deployment.py [--quick] [--only NAME …] [--dtypes NAME …]

Two models with trained weights, and four of true dimensions with random weights and few layers, in
float32 and float16, with open batch and length:

- ONNX: bytes of weights against the report's, noise ratio in ONNX Runtime (both models there,
  against float64), latency there of original over rewritten, at two sizes. Every site is rewritten,
  so that the figures are of the form and not of what the exporter would leave out. The limit is
  that of the multiplications: all that the original does over all that the rewritten model does.
- The two whose latency counts most are exported once more as by default: sites that are slower
  alone keep their original form.
- TensorRT-RTX: the engine's own weight memory, as its builder states it, against the report's, and
  the layers that add basis features. Nothing is proved: engines run on GPUs.

With ``--only`` or ``--dtypes`` these cells are measured again, and the others stay as they were in
the results. Ends with exit code 1 if a figure misses its goal (``misses``).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from deployed_models import CASES, Case
from record import RESULTS, heading, markdown_table, provenance, write
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bda_fx
from bda_fx.exporters.rewrite_pair import rewrite_pair
from bda_fx.exporters.time_sites import leading_sizes, slower, time_sites

DTYPES = {"float32": torch.float32, "float16": torch.float16}
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "tensorrt-rtx-cu12-bindings", "transformers")


def measure(case: Case, directory: Path, dtype: torch.dtype, *, quick: bool) -> dict[str, Any]:
    """Figures of one model in one dtype. A quick run plans nothing and times nothing."""
    model = case.model.to(dtype)
    kwargs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in case.kwargs.items()
    }
    options = {"basis_size": 3 / 4} if quick else {}
    pair = rewrite_pair(model, (), kwargs, case.dynamic_shapes, options)
    threads = torch.get_num_threads()
    common: dict[str, Any] = {"dynamic_shapes": case.dynamic_shapes}
    onnx = bda_fx.export_onnx(
        pair, directory / "model.onnx", threads=threads, keep_slower=True, measure=not quick,
        **common,
    )  # fmt: skip
    assert onnx.fidelity is not None
    record: dict[str, Any] = {
        "sites": len(onnx.report.rewritten),
        "of_sites": len(onnx.report.sites),
        "first_plan_saves": promised(pair.report),
        "report_saves": promised(onnx.report),
        "onnx_saves": onnx.bytes_saved,
        "onnx_bytes": [onnx.bytes_before, onnx.bytes_after],
        "file_bytes": onnx.file_bytes,
        "optimized_weight_bytes": onnx.details["optimized_weight_bytes"],
        "predicted_noise": onnx.report.noise_ratio,
        "proof": onnx.details["proof"],
        "noise": [asdict(output) for output in onnx.fidelity.outputs],
        "noise_ratio": onnx.fidelity.noise_ratio,
        "latency": [asdict(timing) for timing in onnx.timings],
    }
    if not quick:
        record |= speeds(pair.original, onnx.report, threads)
    if case.choose and not quick:
        proof = onnx.details["proof"]
        passed = proof["planned_for"][proof["measured"].index(onnx.fidelity.noise_ratio)]
        delivered = pair if len(proof["measured"]) == 1 else pair.replanned(passed, None)
        chosen = bda_fx.export_onnx(
            delivered, directory / "chosen.onnx", threads=threads, budget=proof["limit"], **common
        )
        record["chosen"] = {
            "sites": len(chosen.report.rewritten),
            "saves": chosen.bytes_saved,
            "noise_ratio": chosen.fidelity and chosen.fidelity.noise_ratio,
            "latency": [asdict(timing) for timing in chosen.timings],
        }
    if find_spec("tensorrt_rtx_bindings") is not None:
        engine = bda_fx.export_tensorrt(pair, directory / "model.engine", check=False, **common)
        record["engine_weights"] = [engine.bytes_before, engine.bytes_after]
        record["engine_saves"] = engine.bytes_saved
        record["engine_report_saves"] = promised(engine.report)
        record["engine"] = dict(engine.details)
    return record


def promised(report: bda_fx.Report) -> int:
    assert report.bytes_before is not None
    assert report.bytes_after is not None
    return report.bytes_before - report.bytes_after


def speeds(program: ExportedProgram, report: bda_fx.Report, threads: int) -> dict[str, Any]:
    """Limits, and the single sites: each beside its limit, and which are slower than they were."""
    sites = time_sites(program, report, threads)
    known = {f"{site.name} ({site.product})": site for site in report.rewritten}
    spared = 0
    records = []
    for timing in sites:
        site = known[timing.name]
        sizes = leading_sizes(program, site.name)
        assert sizes is not None
        assert site.macs_per_token_before is not None
        assert site.macs_per_token_after is not None
        spared += math.prod(sizes) * (site.macs_per_token_before - site.macs_per_token_after)
        limit = site.macs_per_token_before / max(site.macs_per_token_after, 1)
        records.append({**asdict(timing), "limit": limit})
    total = multiplications(program)
    return {
        "limit": total / (total - spared),
        "site_latency": records,
        "slower_sites": slower(report, sites),
    }


def multiplications(program: ExportedProgram) -> int:
    """What the matrix products of a program do on its example, attention spelled out."""
    module = program.module()
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        module(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def misses(name: str, record: dict[str, Any]) -> list[str]:
    """Which goals the figures of a cell miss."""
    found = []
    if record["noise_ratio"] > record["proof"]["limit"]:
        found.append(f"noise {record['noise_ratio']:.3f} over {record['proof']['limit']:g}")
    if record["onnx_saves"] != record["report_saves"]:
        found.append(f"ONNX saves {record['onnx_saves']:,} of {record['report_saves']:,} bytes")
    if record.get("engine_saves", 0) < 0.95 * record.get("engine_report_saves", 0):
        found.append(f"the engine saves {record['engine_saves']:,}")
    chosen = record.get("chosen", {}).get("latency", ())
    found += [
        f"{t['speedup']:.2f} of the original's speed at {t['name']} as exported by default"
        for t in chosen
        if t["interval"][1] < 1 and record["chosen"]["sites"]
    ]
    return [f"{name}: {text}" for text in found]


def ratios(timings: list[dict[str, Any]]) -> str:
    return " / ".join(
        f"{t['speedup']:.2f} ({t['interval'][0]:.2f} … {t['interval'][1]:.2f})" for t in timings
    )


def row(name: str, dtype: str, record: dict[str, Any]) -> list[str]:
    engine = ""
    if "engine_saves" in record:
        whole = record["engine_report_saves"]  # of the first plan, which may save more
        part = record["engine_saves"] / whole if whole else 1.0
        engine = f"{record['engine_saves']:,} of {whole:,} ({100 * part:.1f} %)"
    predicted = record["predicted_noise"]
    return [
        name, dtype, f"{record['sites']} of {record['of_sites']}",
        f"{record['report_saves']:,}", f"{record['onnx_saves']:,}", engine,
        f"{predicted:.2f}" if predicted else "",
        f"{record['noise_ratio']:.2f} of {record['proof']['limit']:g}",
        str(len(record["proof"]["planned_for"])),
    ]  # fmt: skip


def speed_rows(name: str, dtype: str, record: dict[str, Any]) -> list[list[str]]:
    """The whole model in ONNX Runtime, and its kinds of site."""
    if "limit" not in record:
        return []
    chosen = record.get("chosen")
    by_default = f"{ratios(chosen['latency'])}, {chosen['sites']} sites" if chosen else ""
    kinds = {(t["original_ms"], t["speedup"]): t for t in record["site_latency"]}
    sites = ", ".join(
        f"{t['speedup']:.2f} of {t['limit']:.2f}"
        for t in sorted(kinds.values(), key=lambda t: t["speedup"])
    )
    left_out = f"{len(record['slower_sites'])} of {len(record['site_latency'])}"
    return [
        [name, dtype, ratios(record["latency"]), f"{record['limit']:.3f}", sites, left_out,
         by_default]
    ]  # fmt: skip


COLUMNS = ["model", "dtype", "products rewritten", "report saves", "ONNX saves",
           "engine weights save, of its report", "predicted noise", "noise in ONNX Runtime",
           "plans"]  # fmt: skip
SPEED = ["model", "dtype", "rewritten, all sites", "limit", "kinds of site, of their limits",
         "sites slower alone", "as exported by default"]  # fmt: skip


def earlier() -> dict[str, Any]:
    """Cells of the run before."""
    path = RESULTS / "deployment.json"
    return dict(json.loads(path.read_text())["cases"]) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case, nothing timed")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    given = parser.parse_args()
    names = ["ViT (DeiT-Tiny's)"] if given.quick else given.only
    dtypes = ["float32"] if given.quick else given.dtypes
    again = not given.quick and (len(names), len(dtypes)) != (len(CASES), len(DTYPES))
    records: dict[str, Any] = earlier() if again else {}
    for name, dtype in product(names, dtypes):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as place:
            records[f"{name}, {dtype}"] = measure(
                CASES[name](), Path(place), DTYPES[dtype], quick=given.quick
            )
        shown = row(name, dtype, records[f"{name}, {dtype}"])
        print(" | ".join(shown), flush=True)
    cells = [
        (name, dtype, records[f"{name}, {dtype}"])
        for name, dtype in product(CASES, DTYPES)
        if f"{name}, {dtype}" in records
    ]
    rows = [row(*cell) for cell in cells]
    speed = [line for cell in cells for line in speed_rows(*cell)]
    missed = [text for name, dtype, r in cells for text in misses(f"{name}, {dtype}", r)]
    origin = provenance(seed=0, packages=PACKAGES)
    text = "\n".join([
        "# Deployed artefacts", "", heading("deployment.py", origin), "",
        "Bytes of weights. Noise: error of the rewritten model over the original's, both in the",
        "runtime, against float64; \"plans\" is how many it took until the proof held. The engine",
        "is of the first plan: its ONNX model is not run here.", "",
        markdown_table(COLUMNS, rows), "",
        "Speed in ONNX Runtime: median of the ratio of pairs, original over rewritten, with its",
        "95 % interval, at the example's size and at one drawn from the open axes; the limit is",
        "that of the multiplications. The exporter leaves out sites that are slower alone.", "",
        markdown_table(SPEED, speed), "",
        "Missed: " + ("; ".join(missed) or "nothing") + ".", "",
    ])  # fmt: skip
    write("deployment", text, {**origin, "cases": records}, quick=given.quick)
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
