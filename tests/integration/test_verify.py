"""``verify``: passes what is equal, and fails on each of the errors that a rewrite could make."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import bda_fx
from tests import models
from tests.models import Case, Example

FULL = {"basis": "pivot", "basis_size": "full"}
COEFFICIENTS = "encoder.layer.0.attention.self.{}.weight_coefficients"
OUTPUT = "encoder.layer.0.attention.output.dense.weight"


@pytest.fixture(scope="module")
def example() -> Example:
    return models.make(Case("bert", "sdpa"))


@pytest.fixture
def candidate(example: Example) -> ExportedProgram:
    return bda_fx.rewrite(example.model, (), example.kwargs, options=FULL).program


def verify(example: Example, candidate: ExportedProgram) -> bda_fx.Fidelity:
    return bda_fx.verify(example.model, candidate, (), example.kwargs)


def parameter(program: ExportedProgram, name: str) -> Tensor:
    return program.state_dict[name].data


def test_the_unperturbed_passes(example: Example, candidate: ExportedProgram) -> None:
    fidelity = verify(example, candidate)
    assert fidelity.passed, str(fidelity)
    assert fidelity.noise_ratio <= fidelity.budget
    assert str(fidelity).startswith("equivalent (budget 4)")
    assert [o.name for o in fidelity.outputs] == ["output 0", "output 1"]
    assert all(o.dtype == "float32" and 0 < o.error_reference < 1 for o in fidelity.outputs)
    assert fidelity.to_dict()["passed"] is True


def test_the_original_has_ratio_one(example: Example) -> None:
    fidelity = bda_fx.verify(example.model, example.model, (), example.kwargs)
    assert fidelity.noise_ratio == 1.0
    assert all(o.max_abs == 0.0 for o in fidelity.outputs)


@pytest.mark.parametrize("projection", ["key", "value"])
def test_one_coefficient_off_by_a_percent(
    example: Example, candidate: ExportedProgram, projection: str
) -> None:
    coefficients = parameter(candidate, COEFFICIENTS.format(projection))
    coefficients.flatten()[coefficients.abs().argmax()] *= 1.01
    fidelity = verify(example, candidate)
    assert not fidelity.passed
    assert str(fidelity).startswith("NOT EQUIVALENT")
    assert "← fails" in str(fidelity)


@pytest.mark.parametrize("projection", ["key", "value"])
def test_two_heads_swapped(example: Example, candidate: ExportedProgram, projection: str) -> None:
    coefficients = parameter(candidate, COEFFICIENTS.format(projection))
    heads = coefficients.unflatten(0, (4, -1))
    heads[[0, 1]] = heads[[1, 0]]
    assert not verify(example, candidate).passed


def test_two_heads_swapped_in_the_output(example: Example, candidate: ExportedProgram) -> None:
    columns = parameter(candidate, OUTPUT).unflatten(1, (4, -1))
    columns[:, [2, 3]] = columns[:, [3, 2]]
    assert not verify(example, candidate).passed


def test_stale_weight(example: Example, candidate: ExportedProgram) -> None:
    """The model was trained on after the rewrite: a step of 1e-3 in one weight of 2 000 is seen."""
    moved = copy.deepcopy(example.model)
    with torch.no_grad():
        moved.encoder.layer[1].attention.self.value.weight[3, 5] += 1e-3
    assert not bda_fx.verify(moved, candidate, (), example.kwargs).passed


def test_a_module_that_is_compiled(example: Example) -> None:
    options = {"inner": "eager", "basis_size": "full"}
    fast = torch.compile(example.model, backend="bda", options=options)
    assert bda_fx.verify(example.model, fast, (), example.kwargs).passed


def test_a_tighter_budget_fails(example: Example, candidate: ExportedProgram) -> None:
    ratio = verify(example, candidate).noise_ratio
    budget = ratio / 2
    assert not bda_fx.verify(example.model, candidate, (), example.kwargs, budget=budget).passed


class Outputs(nn.Module):
    """Gives ``x`` times two in ways that the caller chooses."""

    def __init__(self, kind: str = "one") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        doubled = 2.0 * x
        return {
            "one": (doubled,),
            "two": (doubled, doubled),
            "shape": (doubled[:1],),
            "dtype": (doubled.to(torch.float16),),
            "integers": (x.argmax(-1),),
            "nan": (doubled * float("nan"),),
        }[self.kind]


X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)


@pytest.mark.parametrize(
    ("reference", "candidate", "text"),
    [
        ("one", "two", r"^the reference has 1 tensor outputs, the candidate 2$"),
        (
            "one",
            "shape",
            r"^output 0: the reference gives float32\[2, 3\], the candidate float32\[1, 3\]$",
        ),
        (
            "one",
            "dtype",
            r"^output 0: the reference gives float32\[2, 3\], the candidate float16\[2, 3\]$",
        ),
        (
            "integers",
            "integers",
            r"^no output is a floating-point tensor: there is nothing to compare$",
        ),
    ],
)
def test_outputs_that_cannot_be_compared(reference: str, candidate: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bda_fx.verify(Outputs(reference), Outputs(candidate), (X,))


def test_reference_is_a_module_or_program() -> None:
    wanted = r"^reference is an nn.Module or an ExportedProgram, got function$"
    with pytest.raises(TypeError, match=wanted):
        bda_fx.verify(lambda x: x, Outputs(), (X,))  # type: ignore[arg-type]


def test_nan_never_passes() -> None:
    fidelity = bda_fx.verify(Outputs(), Outputs("nan"), (X,), budget=float("inf"))
    assert not fidelity.passed or fidelity.noise_ratio == float("inf")
    assert not bda_fx.verify(Outputs(), Outputs("nan"), (X,)).passed


def test_logits_have_an_agreement() -> None:
    model = nn.Linear(3, 300)
    outputs = bda_fx.verify(model, model, (X,)).outputs
    assert [o.top1_agreement for o in outputs] == [1.0]
    assert "top-1 agreement 100.0 %" in str(bda_fx.verify(model, model, (X,)))
