"""AOTInductor packages of rewritten models: how noisy they are, and whether C++ computes the same.

    python benchmarks/packages.py [--quick]

The models of deployment.py in float32. Noise: error of the package over the eager original's, both
against float64. The C++ program of ``examples/run_in_cpp`` runs each package on the example's
inputs; its outputs are compared with those of Python bit by bit. Takes a few minutes for each
model. Ends with exit code 1 if a package is noisier than its budget, or C++ gives other outputs.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from deployed_models import CASES, Case
from record import heading, markdown_table, provenance, write

import bda_fx
from bda_fx.exporters.export_aoti import package_runner
from bda_fx.exporters.rewrite_pair import rewrite_pair


def build_cpp(directory: Path) -> Path:
    """Build ``examples/run_in_cpp``; the program."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    source = str(Path(__file__).resolve().parents[1] / "examples" / "run_in_cpp")
    for command in (
        ["cmake", "-S", source, "-B", str(directory), prefix],
        ["cmake", "--build", str(directory)],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory / "run_package"


def measure(case: Case, directory: Path, cpp: Path) -> dict[str, Any]:
    """A package of one model, run by Python and by the program ``cpp``."""
    pair = rewrite_pair(case.model, (), case.kwargs, case.dynamic_shapes, {})
    package = bda_fx.export_aoti(
        pair, directory / "model.pt2", measure=False, dynamic_shapes=case.dynamic_shapes
    )
    assert package.fidelity is not None
    (args, kwargs), *_ = pair.inputs(None)[0]
    names = pair.original.graph_signature.user_inputs
    tensors = [*args, *(kwargs[name] for name in names if name in kwargs)]
    torch.save(tensors, directory / "inputs.pt")
    outputs = directory / "outputs.pt"
    command = [str(cpp), str(package.path), str(directory / "inputs.pt"), str(outputs)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    expected = package_runner(package.path, pair.original)((args, kwargs))
    found = list(torch.load(outputs))
    return {
        "sites": len(package.report.rewritten),
        "of_sites": len(package.report.sites),
        "noise_ratio": package.fidelity.noise_ratio,
        "limit": package.fidelity.budget,
        "proof": package.details["proof"],
        "saves": package.bytes_saved,
        "package_bytes": package.file_bytes,
        "outputs": len(expected),
        "cpp_equals_python": len(found) == len(expected)
        and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)),
    }


def row(name: str, record: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{record['sites']} of {record['of_sites']}",
        f"{record['saves']:,}",
        f"{record['package_bytes']:,}",
        f"{record['noise_ratio']:.2f} of {record['limit']:g}",
        "equal" if record["cpp_equals_python"] else "DIFFERENT",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one small model")
    quick = parser.parse_args().quick
    records: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as build:
        cpp = build_cpp(Path(build))
        for name in ["ViT (DeiT-Tiny's)"] if quick else CASES:
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as place:
                records[name] = measure(CASES[name](), Path(place), cpp)
            print(" | ".join(row(name, records[name])), flush=True)
    origin = provenance(seed=0, packages=("transformers",))
    columns = ["model", "products rewritten", "bytes saved", "bytes of the package", "noise",
               "C++ and Python"]  # fmt: skip
    text = "\n\n".join(
        [
            "# AOTInductor packages",
            heading("packages.py", origin),
            "Noise: error of the package over the eager original's, against float64.",
            markdown_table(columns, [row(name, record) for name, record in records.items()]),
            "",
        ]
    )
    write("packages", text, {**origin, "cases": records}, quick=quick)
    if any(r["noise_ratio"] > r["limit"] or not r["cpp_equals_python"] for r in records.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
