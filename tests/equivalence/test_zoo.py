"""Every architecture of the zoo: the sites are those its mathematics has, and nothing is changed.

Sites are compared with the table in ``tests/zoo``; the rewritten program is compared with the
original in float64, casts and all. Representatives also run with dynamic sizes, from a program of
core ATen ops, in bfloat16, and under ``torch.compile``.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

import bda_fx
from bda_fx.evaluate_float64 import evaluate_float64
from bda_fx.fidelity import relative_error
from tests import models, tolerances, zoo
from tests.zoo import Case, Example
from tests.zoo.find_differences import assert_sites, count

FULL = {"basis_size": "full"}
"""The noise budget plays no part: whatever is legal is rewritten."""


def in_dtype(case: Case, dtype: torch.dtype) -> Example:
    """The case's example with floating-point weights and inputs of ``dtype``."""
    example = zoo.make(case)
    kwargs = {
        name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in example.kwargs.items()
    }
    return Example(example.model.to(dtype), kwargs)


def assert_equal_in_float64(
    original: ExportedProgram, rewritten: ExportedProgram, kwargs: dict[str, Any]
) -> None:
    truth = evaluate_float64(original, (), kwargs)
    outputs = evaluate_float64(rewritten, (), kwargs)
    assert len(outputs) == len(truth)
    for value, exact in zip(outputs, truth, strict=True):
        assert (value.dtype, value.shape) == (exact.dtype, exact.shape)
        if value.is_floating_point():
            assert relative_error(value, exact) <= tolerances.FLOAT64_PIVOT
        else:
            assert torch.equal(value, exact)


def assert_applied(original: ExportedProgram, rewrite: bda_fx.Rewrite) -> None:
    """What the report calls rewritten is: new weights are read, and the old ones are gone."""
    program = rewrite.program
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    new = set(program.state_dict) - set(original.state_dict)
    unread = {
        str(targets[node.name])
        for node in program.graph.find_nodes(op="placeholder")
        if targets[node.name] in new and not node.users
    }
    assert not unread
    assert not {site.name for site in rewrite.report.rewritten} & set(program.state_dict)


@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_sites_and_outputs(case: Case) -> None:
    example = in_dtype(case, torch.float64)
    program = models.exported(example)
    rewrite = bda_fx.rewrite(program, options=FULL)
    assert_equal_in_float64(program, rewrite.program, example.kwargs)
    assert_applied(program, rewrite)
    assert_sites(rewrite.report, zoo.expected(case))


# -- representatives ------------------------------------------------------------------------


@dataclass(frozen=True)
class Representative:
    """A case, and which dimensions of its inputs are free."""

    case: Case
    free: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        return str(self.case)

    def dynamic_shapes(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: dict.fromkeys(self.free[name], Dim.DYNAMIC) if name in self.free else None
            for name in kwargs
        }

    def larger(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs repeated: twice along the first dimension, three times along the second."""
        larger = dict(kwargs)
        for name, dims in self.free.items():
            value = kwargs[name]
            for dim in dims:
                value = torch.cat([value] * (dim + 2), dim)
            larger[name] = value
        return larger


def representative(architecture: str, attention: str, **free: tuple[int, ...]) -> Representative:
    return Representative(Case(architecture, attention), free)


REPRESENTATIVES = (
    representative("bert", "sdpa", input_ids=(0, 1), attention_mask=(0, 1)),
    representative("gpt2", "eager", input_ids=(0, 1)),
    representative("t5", "eager", input_ids=(0, 1), decoder_input_ids=(0, 1)),
    representative("bart", "sdpa", input_ids=(0, 1), decoder_input_ids=(0, 1)),
    representative("bloom", "eager", input_ids=(0, 1)),
    representative("gpt_neox", "sdpa", input_ids=(0, 1)),
    representative("llama", "sdpa", input_ids=(0, 1)),
    representative("gpt_bigcode", "eager", input_ids=(0, 1)),
    representative("deepseek_v3", "sdpa", input_ids=(0, 1)),
    representative("minicpm3", "eager", input_ids=(0, 1)),
    representative("whisper", "sdpa", input_features=(0,), decoder_input_ids=(0, 1)),
    representative("vit", "sdpa", pixel_values=(0,)),
    representative("timm_swin", "eager", x=(0,)),
    representative("mha_cross", "sdpa", x=(0, 1), k=(0, 1), v=(0, 1)),
    representative("decoder", "sdpa", x=(0, 1), memory=(0, 1)),
    representative("diffusers_block", "eager", hidden_states=(0, 1), encoder_hidden_states=(0, 1)),
)


@pytest.mark.parametrize("chosen", REPRESENTATIVES, ids=str)
def test_dynamic_sizes(chosen: Representative) -> None:
    """Exported with free batch and tokens; equal at sizes that were not traced."""
    example = in_dtype(chosen.case, torch.float64)
    shapes = chosen.dynamic_shapes(example.kwargs)
    with torch.no_grad():
        original = torch.export.export(
            example.model, (), example.kwargs, dynamic_shapes=shapes, strict=False
        )
    rewrite = bda_fx.rewrite(original, options=FULL)
    for kwargs in (example.kwargs, chosen.larger(example.kwargs)):
        assert_equal_in_float64(original, rewrite.program, kwargs)
    assert_applied(original, rewrite)
    assert_sites(rewrite.report, zoo.expected(chosen.case))


@pytest.mark.parametrize("case", [Case("bert", "sdpa"), Case("deepseek_v3", "eager")], ids=str)
def test_one_wrong_coefficient_shows(case: Case) -> None:
    """A thousandth of one coefficient, in any site, is seen a hundred times over the tolerance."""
    example = in_dtype(case, torch.float64)
    program = bda_fx.rewrite(models.exported(example), options=FULL).program
    truth = evaluate_float64(program, (), example.kwargs)[0]
    names = [name for name in program.state_dict if name.endswith("_coefficients")]
    assert names
    for name in names:
        coefficient = program.state_dict[name].view(-1)[5:6]
        coefficient.mul_(1.001)
        wrong = evaluate_float64(program, (), example.kwargs)[0]
        coefficient.div_(1.001)
        assert relative_error(wrong, truth) > 100 * tolerances.FLOAT64_PIVOT, name


@pytest.mark.parametrize("chosen", REPRESENTATIVES, ids=str)
def test_core_aten_program(chosen: Representative) -> None:
    """The same sites where every op was decomposed before (addmm, expand and bmm, …)."""
    example = in_dtype(chosen.case, torch.float64)
    program = models.exported(example).run_decompositions()
    rewrite = bda_fx.rewrite(program, options=FULL)
    assert_equal_in_float64(program, rewrite.program, example.kwargs)
    assert_applied(program, rewrite)
    assert_sites(rewrite.report, zoo.expected(chosen.case))


@pytest.mark.parametrize("chosen", REPRESENTATIVES, ids=str)
def test_bfloat16(chosen: Representative) -> None:
    """The same sites from a module in bfloat16, where there are casts around norms and softmax."""
    example = in_dtype(chosen.case, torch.bfloat16)
    report = bda_fx.analyze(example.model, (), example.kwargs, options=FULL)
    assert_sites(report, zoo.expected(chosen.case))


@pytest.mark.parametrize("chosen", REPRESENTATIVES, ids=str)
def test_compiled(chosen: Representative, caplog: pytest.LogCaptureFixture) -> None:
    """As many sites in the graphs of Dynamo as in the exported one, and equal outputs."""
    example = zoo.make(chosen.case)
    options = {"inner": "eager", "basis_size": "full", "strict": True}
    torch._dynamo.reset()
    compiled = torch.compile(example.model, backend="bda", options=options)
    with torch.no_grad(), caplog.at_level(logging.INFO, "bda_fx"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="bda_fx")
        theirs, ours = example.model(**example.kwargs), compiled(**example.kwargs)
    torch._dynamo.reset()
    for value, truth in zip(tensors(ours), tensors(theirs), strict=True):
        assert float((value - truth).norm() / truth.norm()) <= tolerances.FLOAT32_MODEL
    reports = [
        argument
        for record in caplog.records
        for argument in (record.args if isinstance(record.args, tuple) else ())
        if isinstance(argument, bda_fx.Report)
    ]
    rewritten = sum(len(report.rewritten) for report in reports)
    assert rewritten == count(zoo.expected(chosen.case)), "\n".join(map(str, reports))


def tensors(output: Any) -> list[Tensor]:
    """Floating-point tensors of a model's output, in order."""
    found = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [v for v in found if isinstance(v, Tensor) and v.is_floating_point()]
