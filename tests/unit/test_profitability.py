"""Which forms are chosen, from timings that are given, and what is kept of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import bda_fx
from bda_fx import measure_projection, predict_projection, profitability
from bda_fx.kernels.packed_projection import serves
from bda_fx.measure_projection import ORIGINAL, Case, Measure
from bda_fx.passes.canonicalize import Program, canonicalize_module
from bda_fx.passes.sites import Plan, Reason
from bda_fx.pipeline import find_and_plan
from bda_fx.predict_projection import Predict
from bda_fx.timing_cache import TimingCache
from tests.programs import Attention, FusedAttention, example

OPTIONS = bda_fx.Options(basis_size="full", profitability="measure")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serves(CPU, torch.float32)  # built and loaded from the usual cache
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


class Given:
    """A price list: ``speedup`` of a candidate (its name) at a number of tokens."""

    how = "measured"

    def __init__(self, speedup: Callable[[str, int], float]) -> None:
        self.speedup, self.asked = speedup, [("", 0)][:0]

    def known(self, case: Case, tokens: int) -> bool:
        return False

    def __call__(self, case: Case, tokens: int) -> dict[str, float]:
        self.asked.append((case.key(tokens), tokens))
        seconds = {c.name: 1 / self.speedup(c.name, tokens) for c in case.candidates}
        return {ORIGINAL: 1.0, **seconds}


def program_of(
    model: nn.Module, x: Tensor, *, dynamic: bool = False, options: bda_fx.Options = OPTIONS
) -> tuple[Program, Plan]:
    shapes = {"x": {0: Dim("batch", max=4096)}} if dynamic else None
    program = canonicalize_module(model, (x,), None, shapes)
    return program, find_and_plan(program, replace(options, profitability="always"))


def choose(
    model: nn.Module,
    speedup: Callable[[str, int], float],
    *,
    dynamic: bool = False,
    options: bda_fx.Options = OPTIONS,
) -> Plan:
    program, plan = program_of(model, example(), dynamic=dynamic, options=options)
    offer = lambda x: ("packed", "aten")  # noqa: E731
    price = Given(speedup)
    return profitability.choose_forms(
        program, plan, options, fixed_rows=False, offer=offer, price=price
    )


def weighed(plan: Plan) -> set[tuple[str, tuple[tuple[int, int], ...]]]:
    return {(i.weighed.spelling, i.weighed.ranges) for i in plan.sites if i.weighed}


def test_always_weighs_nothing() -> None:
    options = replace(OPTIONS, profitability="always")
    plan = choose(Attention(), lambda name, tokens: 0.5, options=options)
    assert len(plan.sites) == 2
    assert not weighed(plan)


@pytest.mark.parametrize("fastest", ["packed", "aten"])
def test_the_fastest_form_is_taken(fastest: str) -> None:
    plan = choose(Attention(), lambda name, tokens: 1.3 if name.startswith(fastest) else 1.1)
    assert len(plan.sites) == 2
    assert weighed(plan) == {(fastest, ())}
    text = bda_fx.report.report_of(plan).rewritten[0].speed
    assert text is not None
    assert text.startswith(f"{fastest}, 1.30 of the original's speed at ")
    assert text.endswith(" tokens, measured")


def test_what_is_hardly_faster_is_not_taken_and_the_skip_says_how_fast() -> None:
    plan = choose(Attention(), lambda name, tokens: 1.01 if name.startswith("aten") else 0.93)
    assert not plan.sites
    skips = [skip for skip in plan.skips if skip.reason is Reason.NOT_PROFITABLE]
    assert {skip.product for skip in skips} == {"qk", "vo"}
    tokens = example().shape[:-1].numel()
    text = f"1.01 of the original's speed at {tokens} tokens, measured"
    assert {skip.detail for skip in skips} == {text}
    (shown, _) = bda_fx.report.report_of(plan).skipped
    assert shown.reason_code == "NOT_PROFITABLE"
    assert shown.remedy == "pass profitability='always' to save its weights all the same"
    assert shown.source is not None
    assert shown.in_features is not None


def test_one_linear_may_pay_where_the_other_does_not() -> None:
    plan = choose(Attention(), lambda name, tokens: 1.2 if "k.weight" in name else 0.9)
    assert [item.site.product for item in plan.sites] == ["qk"]
    assert [s.product for s in plan.skips if s.reason is Reason.NOT_PROFITABLE] == ["vo"]


def test_one_basis_of_a_fused_weight_may_pay_alone() -> None:
    apart = replace(OPTIONS, noise_budget=1.1)  # no room for K and V on one basis
    plan = choose(FusedAttention(), lambda name, tokens: 0.9 if "+" in name else 1.2, options=apart)
    assert len(plan.sites) == 1
    (skip,) = [s for s in plan.skips if s.reason is Reason.NOT_PROFITABLE]
    assert "faster without this one: " in skip.detail


def test_any_number_of_tokens_chooses_at_run_time() -> None:
    faster = {1: 1.1, 16: 0.9, 128: 1.1, 1024: 1.2}
    plan = choose(Attention(), lambda name, tokens: faster[tokens], dynamic=True)
    assert weighed(plan) == {("by tokens", ((1, 1), (128, profitability.EVERY)))}


def test_any_number_of_tokens_where_all_are_faster_needs_no_choice() -> None:
    plan = choose(Attention(), lambda name, tokens: 1.1, dynamic=True)
    assert weighed(plan) == {("packed", ())}


def test_aten_must_be_slower_nowhere() -> None:
    def speedup(name: str, tokens: int) -> float:
        return 0.8 if name.startswith("packed") else 0.99 if tokens == 1 else 1.5

    assert not choose(Attention(), speedup, dynamic=True).sites


@pytest.mark.parametrize(
    ("ratios", "ranges"),
    [
        ((1.1, 0.9, 0.9, 0.9), ((1, 1),)),
        ((0.9, 1.1, 1.1, 0.9), ((16, 128),)),
        ((0.9, 0.9, 0.9, 1.1), ((1024, profitability.EVERY),)),
        ((1.1, 0.9, 1.1, 0.9), ((1, 1), (128, 128))),
        ((1.1, 1.0, 1.1, 1.1), ((1, 1), (128, profitability.EVERY))),
    ],
)
def test_ranges(ratios: tuple[float, ...], ranges: Any) -> None:
    speedups = tuple(zip(profitability.TOKENS, ratios, strict=True))
    assert profitability._ranges(speedups) == ranges


def test_with_an_opaque_cache_the_basis_stays() -> None:
    options = replace(OPTIONS, kv_cache="opaque")
    plan = choose(Attention(), lambda name, tokens: 0.9, options=options)
    assert len(plan.sites) == 2
    assert weighed(plan) == {("dense", ())}


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profitability, "SECONDS", -1.0)
    plan = choose(Attention(), lambda name, tokens: 2.0)
    assert not plan.sites
    details = {s.detail for s in plan.skips if s.reason is Reason.NOT_PROFITABLE}
    assert details == {"not measured: -1 s were spent on other linears"}


# -- measuring ------------------------------------------------------------------------------------


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> tuple[int, ...]:
    """[tokens, F], also where pieces [tokens, groups, width] are not joined."""
    if isinstance(result, Tensor):
        return tuple(result.shape)
    return len(result[0]), sum(part[0].numel() for part in result)


class FakeTimer:
    """Runs each call once and says that all take equally long."""

    def __init__(self) -> None:
        self.shapes: list[set[tuple[int, ...]]] = []

    def __call__(
        self, calls: Mapping[str, Callable[[], Tensor]], device: torch.device
    ) -> dict[str, float]:
        self.shapes.append({outputs_of(call()) for call in calls.values()})
        return dict.fromkeys(calls, 1.0)


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def measured(model: nn.Module, timer: FakeTimer, x: Tensor | None = None) -> Plan:
    program, plan = program_of(model, example() if x is None else x)
    price = Measure(CPU, timer)
    return profitability.choose_forms(program, plan, OPTIONS, fixed_rows=False, price=price)


def test_each_shape_is_measured_once_whatever_the_process() -> None:
    timer = FakeTimer()
    plan = measured(Stack(4), timer)
    assert len(timer.shapes) == 1  # K and V of four layers
    assert all(len(shapes) == 1 for shapes in timer.shapes)  # every form has the original's shape
    assert "1.00 of the original's speed" in plan.skips[0].detail
    measured(Stack(2), timer)
    assert len(timer.shapes) == 1
    measured(Stack(2), timer, example()[:1])
    assert len(timer.shapes) == 2


@pytest.mark.parametrize("model", [Attention, FusedAttention])
@pytest.mark.parametrize("side", ["kv", "qo"])
@pytest.mark.parametrize("fixed", [False, True])
def test_every_form_can_be_timed(model: type[nn.Module], side: str, fixed: bool) -> None:
    program = canonicalize_module(model().float(), (example().float(),))
    plan = find_and_plan(program, bda_fx.Options(basis_size=0.8, side=side))
    assert plan.sites
    timer = FakeTimer()
    offer = lambda x: ("packed", "operator", "aten", "dense")  # noqa: E731
    profitability.choose_forms(
        program, plan, OPTIONS, fixed_rows=fixed, offer=offer, price=Measure(CPU, timer)
    )
    assert timer.shapes
    assert all(len(shapes) == 1 for shapes in timer.shapes)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 1}', '{"format": 1, "seconds": {"a": {"original": "x"}}}', "null",
     '{"format": 1, "seconds": {"a": {"original": -1}}}', '{"format": 9, "seconds": {}}'],
)  # fmt: skip
def test_a_corrupt_cache_is_as_none(text: str) -> None:
    path = TimingCache(CPU).path
    path.parent.mkdir(parents=True)
    path.write_text(text)
    timer = FakeTimer()
    measured(Attention(), timer)
    assert len(timer.shapes) == 1
    assert json.loads(path.read_text())["seconds"]
    measured(Attention(), timer)
    assert len(timer.shapes) == 1


def test_processes_add_to_one_file() -> None:
    one, two = TimingCache(CPU), TimingCache(CPU)
    one.put("a", {ORIGINAL: 1.0})
    two.put("b", {ORIGINAL: 2.0})
    third = TimingCache(CPU)
    assert third.known == {"a": {ORIGINAL: 1.0}, "b": {ORIGINAL: 2.0}}
    assert not list(third.path.parent.glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: (_ for _ in ()).throw(OSError()))
    cache = TimingCache(CPU)
    cache.put("a", {ORIGINAL: 1.0})
    assert cache.get("a") == {ORIGINAL: 1.0}


def test_threads_have_timings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    path = TimingCache(CPU).path
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert TimingCache(CPU).path != path


def test_many_tokens_are_not_all_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_projection, "MOST_WORK", 1e5)
    timer = FakeTimer()
    measured(Attention(), timer, example()[:1].expand(600, -1, -1))
    ((shape,),) = timer.shapes
    most = 1e5 * torch.get_num_threads() / (shape[1] * example().shape[-1])
    assert 192 <= shape[0] <= most


def test_more_tokens_are_timed_on_a_unit_for_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_projection, "MOST_WORK", 3e5)
    timed = []
    for unit in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda unit=unit: {"amx_bf16": unit})
        timer = FakeTimer()
        measured(Attention().bfloat16(), timer, example().bfloat16()[:1].expand(4096, -1, -1))
        ((shape,),) = timer.shapes
        timed.append(shape[0])
    assert 192 <= timed[0] < timed[1]


def test_a_slow_call_is_timed_a_few_times_only() -> None:
    import time

    counts = dict.fromkeys([ORIGINAL, "0", "1"], 0)

    def call(name: str, seconds: float) -> Callable[[], Tensor]:
        def run() -> Tensor:
            counts[name] += 1
            time.sleep(seconds)
            return torch.empty(0)

        return run

    calls = {ORIGINAL: call(ORIGINAL, 0.05), "0": call("0", 0.03), "1": call("1", 0.2)}
    seconds = measure_projection.time_calls(calls, CPU)
    assert counts == {ORIGINAL: 8, "0": 8, "1": 3}
    assert seconds["0"] < seconds[ORIGINAL] < seconds["1"]


# -- predicting -----------------------------------------------------------------------------------


class Rates:
    """A device of 1e9 multiplications and 1e10 bytes a second, 1 µs a call: nothing is run."""

    def __init__(self) -> None:
        self.calls = 0

    def rates(self, dtype: torch.dtype) -> dict[str, float]:
        size = predict_projection.SIZE
        rates = {"byte": 1e-10, "call linear": 1e-6, "call packed": 1e-6}
        for tokens in predict_projection.TOKENS:
            for kind in ("linear", "packed"):
                rates[f"{kind} {tokens}"] = 1e-6 + tokens * size * size * 1e-9
        return rates


def test_the_model_follows_the_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predict, "rates", Rates().rates)
    monkeypatch.setattr(profitability, "CALL", 0.0)
    program, plan = program_of(Attention(), example())
    options = replace(OPTIONS, profitability="model")
    offer = lambda x: ("packed",)  # noqa: E731
    chosen = profitability.choose_forms(program, plan, options, fixed_rows=False, offer=offer)
    assert {i.weighed.how for i in chosen.sites if i.weighed} == {"predicted"}
    item = chosen.sites[0]
    limit = 1 / (1 - item.size / item.site.linear.in_features)
    assert item.weighed is not None
    ((_, ratio),) = item.weighed.speedups
    assert 1 + 0.6 * (limit - 1) < ratio < limit  # it moves x once more


def test_rates_are_measured_once() -> None:
    timer = FakeTimer()
    first = Predict(CPU, timer).rates(torch.float64)
    count = len(timer.shapes)
    assert count == len(predict_projection.TOKENS) + 2
    assert Predict(CPU, timer).rates(torch.float64) == first
    assert len(timer.shapes) == count
