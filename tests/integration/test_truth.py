"""The truth: float64 with little memory, or float32 with an error bar that holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bda_fx
from bda_fx import choose_truth
from bda_fx.evaluate_float64 import evaluate_float64, float64_peak_bytes
from bda_fx.fidelity import relative_error
from tests import models
from tests.models import Case

HALVES = (torch.float16, torch.bfloat16)


def in_dtype(case: Case, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    example = models.make(case)
    kwargs = {
        name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in example.kwargs.items()
    }
    return models.exported(models.Example(example.model.to(dtype), kwargs)), kwargs


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("architecture", ["bert", "t5", "deepseek_v2", "detr", "swin", "whisper"])
def test_the_error_bar_of_float32_holds(architecture: str, dtype: torch.dtype) -> None:
    """It covers the float32 run's distance to float64, and is far below what is measured by it.

    Two roundings of 2⁻²⁴ √n, n ≤ 64 terms here, at each of some ten ops in a row, against a unit
    roundoff of 2⁻¹¹: below one per cent.
    """
    program, kwargs = in_dtype(Case(architecture, "sdpa"), dtype)
    exact, _ = choose_truth.Truth(torch.float64).outputs(program, (), kwargs)
    single, shaken = choose_truth.Truth(torch.float32).outputs(program, (), kwargs)
    assert shaken is not None
    for true, near, off in zip(exact, single, shaken, strict=True):
        if true.is_floating_point():
            bar = relative_error(off, near)
            assert 0 < relative_error(near, true) <= bar < 0.01 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_both_truths_agree(dtype: torch.dtype) -> None:
    program, kwargs = in_dtype(Case("bert", "sdpa"), dtype)
    candidate = bda_fx.rewrite(program, options={"basis": "pivot", "basis_size": "full"}).program
    first = bda_fx.verify(program, candidate, (), kwargs)
    second = bda_fx.verify(program, candidate, (), kwargs, truth="float32")
    assert (first.truth, first.truth_reason) == ("float64", None)
    assert (second.truth, second.truth_reason) == ("float32", "as asked")
    assert "against float32, itself off by about" in str(second)
    for true, near in zip(first.outputs, second.outputs, strict=True):
        assert true.truth_error is None
        assert near.truth_error is not None
        assert abs(near.error_reference - true.error_reference) <= near.truth_error
        assert abs(near.error_candidate - true.error_candidate) <= near.truth_error
        assert near.noise_interval is not None
        assert true.noise_interval is not None
        # The bar of the truth is in the interval, beyond that of the rows.
        assert near.noise_interval[0] <= true.noise_interval[0]
        assert near.noise_interval[1] >= true.noise_interval[1]


class Product(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(300, 40, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sin()


def small_memory(device: torch.device) -> int:
    return 1000


def test_float64_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_truth, "available_bytes", small_memory)
    half = Product(torch.bfloat16)
    x = torch.ones(7, 300, dtype=torch.bfloat16)
    fidelity = bda_fx.verify(half, half, (x,))
    assert fidelity.truth == "float32"
    assert fidelity.truth_reason is not None
    assert fidelity.truth_reason.startswith("a float64 run needs 0.0 GiB of 0.0 GiB")
    assert bda_fx.verify(half, half, (x,), truth="float64").truth == "float64"
    single = Product(torch.float32)
    wanted = r"^a float64 run needs .* are free, and a float32 run is no truth for a model that "
    with pytest.raises(ValueError, match=wanted):
        bda_fx.verify(single, single, (x.float(),))


def test_a_float32_truth_for_a_float32_model() -> None:
    model = Product(torch.float32)
    wanted = r"^a float32 run is no truth for a model that computes in float32: it has the same ro"
    with pytest.raises(ValueError, match=wanted):
        bda_fx.verify(model, model, (torch.ones(7, 300),), truth="float32")
    with pytest.raises(ValueError, match=r"^truth is 'auto', 'float64' or 'float32', got 'exact'$"):
        bda_fx.verify(model, model, (torch.ones(7, 300),), truth="exact")  # type: ignore[arg-type]


@torch.library.custom_op("bda_fx_test::narrow_only", mutates_args=())
def narrow_only(x: Tensor) -> Tensor:
    """An op without a float64 kernel."""
    if x.dtype == torch.float64:
        raise RuntimeError("\"narrow_only\" not implemented for 'Double'")
    return x + 1


@narrow_only.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Narrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return narrow_only(x) * 0.3


def test_an_op_without_float64() -> None:
    x = torch.ones(2, 3, dtype=torch.float16)
    fidelity = bda_fx.verify(Narrow(), Narrow(), (x,))
    assert fidelity.truth == "float32"
    assert fidelity.truth_reason == (
        "the reference does not run in float64 (\"narrow_only\" not implemented for 'Double')"
    )
    with pytest.raises(ValueError, match=r"pass truth='float32' for a half-precision model$"):
        bda_fx.verify(Narrow(), Narrow(), (x,), truth="float64")
    with pytest.raises(ValueError, match=r"^the reference does not run in float64 .* and a float3"):
        bda_fx.verify(Narrow(), Narrow(), (x.float(),))


def test_peak_memory_is_foreseen() -> None:
    """One weight at a time is widened: 8 bytes each for x, W, b and the result of the linear."""
    model = Product(torch.float32)
    program = torch.export.export(model, (torch.ones(7, 300),))
    peak = float64_peak_bytes(program, (torch.ones(7, 300),))
    assert peak == 8 * (7 * 300 + 300 * 40 + 40 + 7 * 40)


class Tally(nn.Module):
    """Writes to a view of a buffer and reads the buffer afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen[1:3].add_(x)
        self.calls.add_(1)
        return self.seen * self.calls


def test_what_is_written_is_read_again_and_stays_inside() -> None:
    model = Tally()
    x = torch.tensor([1.0, 2.0])
    program = torch.export.export(model, (x,), strict=False)
    for _ in range(2):
        (result,) = evaluate_float64(program, (x,))
        assert torch.equal(result, torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64))
    assert not program.state_dict["seen"].any()
    assert not program.state_dict["calls"]
