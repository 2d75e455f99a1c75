"""``verify``: passes what is equal, and fails on each of the errors that a rewrite could make."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

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


# -- several inputs ---------------------------------------------------------------------------


class Noisy(nn.Module):
    """``x`` in float16 arithmetic that the candidate repeats ``times`` times."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = (x * 3.0 + 1.0) / 3.0
        return x if self.times == 1 else x - (self.times - 1) / 3.0


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(dtype)


def test_several_inputs_are_pooled() -> None:
    """Σ over inputs of squared distances, over that of squared truths; sizes may differ."""
    batches = [normal(n, 50, seed=n) for n in (1, 2, 5)]
    inputs = [((x,), {}) for x in batches]
    fidelity = bda_fx.verify(Noisy(), Noisy(3), inputs=inputs)
    (output,) = fidelity.outputs
    truth = torch.cat([x.double() + 1 / 3 for x in batches])
    for error, model in ((output.error_reference, Noisy()), (output.error_candidate, Noisy(3))):
        distance = torch.cat([model(x) for x in batches]).double() - truth
        assert error == pytest.approx(float(distance.norm() / truth.norm()), rel=1e-9)
    assert output.noise_ratio == output.error_candidate / output.error_reference
    assert output.noise_interval is not None
    assert output.noise_interval[0] < output.noise_ratio < output.noise_interval[1]
    assert fidelity.num_inputs == 3
    assert "pooled over 3 inputs" in str(fidelity)


def test_one_batch_has_an_interval_over_its_rows() -> None:
    (rows,) = bda_fx.verify(Noisy(), Noisy(3), (normal(20, 50),)).outputs
    assert rows.noise_interval is not None
    assert rows.noise_interval[0] < rows.noise_ratio < rows.noise_interval[1]
    assert f"{rows.noise_interval[0]:.2f} … {rows.noise_interval[1]:.2f}" in str(
        bda_fx.verify(Noisy(), Noisy(3), (normal(20, 50),))
    )
    for single in (normal(1, 50), normal(50)):
        assert bda_fx.verify(Noisy(), Noisy(3), (single,)).outputs[0].noise_interval is None


@pytest.mark.parametrize(
    ("error", "given", "text"),
    [
        (ValueError, {"args": (X,), "inputs": [((X,), {})]}, r"^pass either args and kwargs, or"),
        (ValueError, {"inputs": []}, r"^inputs= is empty: there is nothing to run$"),
        (TypeError, {"inputs": [X]}, r"^input 0 is a pair of a tuple args and a mapping kwargs"),
        (TypeError, {"args": X}, r"^input 0 is a pair of a tuple args .* write \(\(x,\), \{\}\)"),
        (
            ValueError,
            {},
            r"^Outputs takes x: pass args and kwargs, or several of them as inputs=",
        ),
        (
            ValueError,
            {"args": (X,), "task": "speech"},
            r"^task is 'logits', 'embedding' or None, got 'speech'$",
        ),
    ],
)
def test_inputs_that_are_none(error: type[Exception], given: dict[str, Any], text: str) -> None:
    with pytest.raises(error, match=text):
        bda_fx.verify(Outputs(), Outputs(), **given)


class Counter(nn.Module):
    """Writes into its input, as a model does into a cache."""

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1.0)
        return 2.0 * x


def test_each_run_has_inputs_of_its_own() -> None:
    x = X.clone()
    assert bda_fx.verify(Counter(), Counter(), (x,)).outputs[0].max_abs == 0.0
    assert torch.equal(x, X)


# -- masks ------------------------------------------------------------------------------------


class Padded(nn.Module):
    """[B, S, E] that is nonsense where ``mask`` [B, S] is zero."""

    def __init__(self, nonsense: float = 0.0) -> None:
        super().__init__()
        self.nonsense = nonsense

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[..., None].bool(), 2.5 * torch.sin(x), self.nonsense)


TOKENS = {"x": normal(2, 4, 3, dtype=torch.float32), "mask": torch.tensor([[1, 1, 1, 0], [1] * 4])}


@pytest.mark.parametrize("mask", ["mask", TOKENS["mask"], lambda output: TOKENS["mask"].bool()])
@pytest.mark.parametrize("nonsense", [5.0, float("nan")])
def test_only_valid_positions_count(mask: Any, nonsense: float) -> None:
    fidelity = bda_fx.verify(Padded(), Padded(nonsense), (), TOKENS, mask=mask, task="logits")
    assert fidelity.passed, str(fidelity)
    (output,) = fidelity.outputs
    assert (output.noise_ratio, output.max_abs) == (1.0, 0.0)
    assert (output.top1_agreement, output.kl_divergence) == (1.0, 0.0)
    assert not bda_fx.verify(Padded(), Padded(nonsense), (), TOKENS).passed


def test_a_wrong_value_at_a_valid_position_counts() -> None:
    wrong = {**TOKENS, "mask": TOKENS["mask"].roll(1, 1)}
    assert not bda_fx.verify(Padded(), Padded(5.0), (), TOKENS, mask=wrong["mask"]).passed


@pytest.mark.parametrize(
    ("error", "mask", "text"),
    [
        (ValueError, "attention_mask", r"not the name of a keyword input .*those are x, mask$"),
        (ValueError, torch.ones(5), r"^mask= is float32\[5\], and no output has a shape that"),
        (ValueError, lambda output: torch.ones(5), r"^mask= gives float32\[5\] for an output"),
        (ValueError, torch.zeros(2, 4), r"^output 0: the mask leaves nothing to compare$"),
        (TypeError, 3, r"^mask is a tensor, the name of a keyword input or a function of an out"),
    ],
)
def test_masks_that_do_not_fit(error: type[Exception], mask: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        bda_fx.verify(Padded(), Padded(), (), TOKENS, mask=mask)


def test_one_mask_for_several_inputs() -> None:
    inputs = [((), TOKENS), ((), TOKENS)]
    assert bda_fx.verify(Padded(), Padded(5.0), inputs=inputs, mask="mask").passed
    with pytest.raises(ValueError, match=r"^one mask for 2 inputs: pass the name of the keyword"):
        bda_fx.verify(Padded(), Padded(), inputs=inputs, mask=TOKENS["mask"])


# -- what is not finite -----------------------------------------------------------------------


class Scaled(nn.Module):
    """``a · (b · x)``: with a large ``b``, more than float16 holds on the way."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a * (self.b * x)


HALF = torch.tensor([[1.0, 2.0, 100.0], [3.0, -4.0, 5.0]], dtype=torch.float16)


def test_what_overflows_in_the_reference_does_not_count_against_the_candidate() -> None:
    overflows, safe = Scaled(2.0**-10, 2.0**10), Scaled(2.0**-8, 2.0**8)
    for candidate in (overflows, safe):
        fidelity = bda_fx.verify(overflows, candidate, (HALF,))
        assert fidelity.passed
        assert fidelity.outputs[0].not_finite == 1
        assert "output 0: 1 values are not finite in the reference" in str(fidelity)
    fidelity = bda_fx.verify(safe, overflows, (HALF,))
    assert not fidelity.passed
    assert fidelity.noise_ratio == float("inf")
    assert fidelity.outputs[0].max_abs == float("inf")
    assert fidelity.outputs[0].not_finite == 0


class Barred(nn.Module):
    """−inf where x is negative, as scores have it behind a mask."""

    def __init__(self, bar: float = float("-inf")) -> None:
        super().__init__()
        self.bar = bar

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(x < 0, self.bar)


def test_infinite_on_purpose() -> None:
    same = bda_fx.verify(Barred(), Barred(), (X,), task="logits")
    assert same.passed
    assert same.outputs[0].kl_divergence == 0.0
    assert same.outputs[0].not_finite == 3
    other = bda_fx.verify(Barred(), Barred(-1e4), (X,))
    assert not other.passed
    assert other.noise_ratio == float("inf")


def test_a_reference_that_is_nan() -> None:
    wanted = r"^output 0: the reference is nan at 6 of 6 values, in exact arithmetic too: pass oth"
    with pytest.raises(ValueError, match=wanted):
        bda_fx.verify(Outputs("nan"), Outputs(), (X,))
    with pytest.raises(ValueError, match=r"^output 0: no value of the reference is finite where "):
        bda_fx.verify(Barred(), Barred(), (-X.abs() - 1.0,))


# -- tasks and text ---------------------------------------------------------------------------


class Logits(nn.Module):
    """Logarithms of three probabilities."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([probabilities], dtype=torch.float64).log())

    def forward(self) -> Tensor:
        return self.logits + 1.0


def test_divergence_of_logits() -> None:
    """Σ p log(p / q) of the probabilities, which no common shift changes."""
    ours, theirs = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)
    (output,) = bda_fx.verify(Logits(*ours), Logits(*theirs), task="logits").outputs
    exact = sum(p * math.log(p / q) for p, q in zip(ours, theirs, strict=True))
    assert output.kl_divergence == pytest.approx(exact, rel=1e-12)
    assert output.top1_agreement == 0.0
    assert output.cosine_worst is None


class Turned(nn.Module):
    """Rows turned in the plane by an angle each."""

    def __init__(self, *angles: float) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.tensor(angles, dtype=torch.float64))

    def forward(self) -> Tensor:
        return torch.stack([self.angles.cos(), self.angles.sin()], -1)


def test_cosines_of_embeddings() -> None:
    (output,) = bda_fx.verify(Turned(0.0, 1.0), Turned(0.5, 1.0), task="embedding").outputs
    assert output.cosine_worst == pytest.approx(math.cos(0.5))
    assert output.cosine_mean == pytest.approx((1 + math.cos(0.5)) / 2)
    assert output.top1_agreement is None


def test_markdown_and_plain_data(example: Example, candidate: ExportedProgram) -> None:
    fidelity = bda_fx.verify(example.model, candidate, (), example.kwargs, localize=True)
    lines = fidelity.to_markdown().splitlines()
    assert lines[0] == "equivalent (budget 4)"
    assert "| output 1 | float32 |" in fidelity.to_markdown()
    tables = [line for line in lines if line.startswith("| ---")]
    assert len(tables) == 2
    assert {line.count("|") for line in lines[2:6]} == {12}
    data = json.loads(json.dumps(fidelity.to_dict()))
    assert data["passed"] is True
    assert data["inputs"] == "given"
    assert data["truth"] == "float64"
    assert data["first_jump"] is None
    assert len(data["layers"]) == len(fidelity.layers or ())
    assert data["outputs"][0]["noise_ratio"] == fidelity.outputs[0].noise_ratio
