"""Check an exported ONNX file: valid, shapes inferable, and still small after optimisation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from bda_fx.exporters.exported import ExportError
from bda_fx.exporters.measure_onnx import weight_bytes
from bda_fx.exporters.place_output import Staging
from bda_fx.exporters.rewrite_pair import Pair
from bda_fx.exporters.run_onnx import LEVELS, Session

SURVIVES = 0.95
"""Part of the saving that must be left in what ONNX Runtime makes of the model. It folds constants:
shapes, masks, casts of half-precision weights to float32; if it multiplied the factors out again,
all of the saving would be gone."""


def check_onnx(pair: Pair, original: Path, staging: Staging) -> dict[str, Any]:
    """Check the staged file, and load it at every optimisation level beside the original.

    Returns:
        Ops by number, and bytes of weights in what ONNX Runtime saves as optimised, before and
        after, by level.

    Raises:
        ExportError: the model is invalid, does not load, or grew back.
    """
    try:
        onnx.checker.check_model(str(staging.path), full_check=True)  # with shape inference
    except Exception as error:
        raise ExportError(f"onnx.checker refuses the model: {error}; please report this") from error
    ops = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in onnx.load(str(staging.path), load_external_data=False).graph.node
    )
    saved = weight_bytes(original) - weight_bytes(staging.path)
    optimized: dict[str, dict[str, int]] = {}
    for level in LEVELS:
        sizes = []
        for at, path in enumerate((original, staging.path)):
            target = staging.scratch / f"optimized_{level}_{at}.onnx"
            Session(path, pair.original, level=level, save_optimized=target,
                    providers=["CPUExecutionProvider"])  # fmt: skip
            sizes.append(weight_bytes(target))
            target.unlink()
        optimized[level] = {"original": sizes[0], "rewritten": sizes[1]}
        if pair.report.rewritten and sizes[0] - sizes[1] < SURVIVES * saved:
            raise ExportError(
                f"ONNX Runtime's optimisation level {level!r} undoes the rewrite: of {saved:,} "
                f"bytes saved {sizes[0] - sizes[1]:,} are left; please report this"
            )
    return {"ops": dict(sorted(ops.items())), "optimized_weight_bytes": optimized}
