"""Every basis in float64: the rewritten program is the original up to roundoff.

``test_zoo`` does the same for every architecture, with the pivoted basis.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import bda_fx
from bda_fx.evaluate_float64 import evaluate_float64
from bda_fx.fidelity import relative_error
from tests import models, tolerances
from tests.models import Case

BASES = ("pivot", "window", "residual-min", "first")
SIZES = ("full", 7 / 8)
ARCHITECTURES = (
    "bert",
    "gpt2",
    "t5",
    "vit",
    "whisper",
    "deepseek_v2",
    "deepseek_v2_q_lora",
    "llama",
    "gpt_neox",
    "falcon",
    "albert",
    "bloom",
    "mha",
    "encoder",
)
"""One of each kind."""
CASES = tuple(
    case
    for case in models.CASES
    if case.architecture in ARCHITECTURES and case.attention in ("sdpa", "eager")
)


@cache
def original(case: Case) -> tuple[ExportedProgram, dict[str, Any], list[torch.Tensor]]:
    """One export per model in float64, its inputs, and what it gives."""
    example = models.make(case)
    example.model.double()
    kwargs = {
        name: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in example.kwargs.items()
    }
    program = models.exported(models.Example(example.model, kwargs))
    return program, kwargs, evaluate_float64(program, (), kwargs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_in_float64(case: Case, basis: str, size: str | float) -> None:
    program, kwargs, truth = original(case)
    rewrite = bda_fx.rewrite(program, options={"basis": basis, "basis_size": size})
    assert rewrite.report.rewritten
    outputs = evaluate_float64(rewrite.program, (), kwargs)
    assert len(outputs) == len(truth)
    conditions = [s.condition for s in rewrite.report.rewritten]
    limit = tolerances.FLOAT64_PIVOT if basis == "pivot" else tolerances.model(max(conditions))
    for value, exact in zip(outputs, truth, strict=True):
        assert value.dtype == exact.dtype
        assert value.shape == exact.shape
        if value.is_floating_point():
            assert relative_error(value, exact) <= limit
        else:
            assert torch.equal(value, exact)
