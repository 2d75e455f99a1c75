"""Rewrite a model into an ExportedProgram, save it, load it without bda_fx, run it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from models import package_directory, rxnfp

import bda_fx


def main() -> None:
    assert package_directory("rxnfp").exists()
    model = rxnfp()
    inputs = {
        "input_ids": torch.randint(5, 500, (2, 32)),
        "attention_mask": torch.ones(2, 32).long(),
    }
    length = torch.export.Dim("length", min=2, max=512)
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: length} for name in inputs}

    # A window of rows is contiguous: slices of x instead of a gather, and no index tensors.
    options = {"basis": "window", "basis_size": "full"}
    rewrite = bda_fx.rewrite(model, (), inputs, dynamic_shapes=shapes, options=options)
    print(rewrite.report.summary())

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rxnfp-bda.pt2"
        torch.export.save(rewrite.program, path)
        print(f"saved {path.stat().st_size:,} bytes")
        loaded = torch.export.load(path).module()
    longer = {
        "input_ids": torch.randint(5, 500, (3, 60)),
        "attention_mask": torch.ones(3, 60).long(),
    }
    with torch.no_grad():
        difference = (model(**longer)[0] - loaded(**longer)[0]).abs().max()
    print(f"largest difference at another batch and length: {difference:.1e}")


if __name__ == "__main__":
    main()
