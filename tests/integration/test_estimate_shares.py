"""estimate_shares: in closed form, against injected noise, and what it leaves alone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bda_fx
from bda_fx import estimate_shares as module
from bda_fx import run_backward
from bda_fx.estimate_shares import (
    CAUTION,
    CAUTION_OF_LONG_SUMS,
    CAUTION_WHEN_CALIBRATED,
    Example,
    estimate_shares,
)
from bda_fx.evaluate_float64 import Wide
from bda_fx.passes.canonicalize import Program
from bda_fx.passes.find_sites import find_sites
from bda_fx.passes.predict_noise import partial_roundings
from bda_fx.passes.sites import OUT, Factor, Linear, Site
from bda_fx.run_backward import roundings
from tests import models, tolerances
from tests.programs import Attention, B, D, E, H, S, canonical, randn, seeded

TOKENS, WIDTH = 400, 4


class TwoLinears(nn.Module):
    """y = x K + x Q: no attention, but three nodes whose noise can be written down."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.k = nn.Linear(E, WIDTH, bias=False, dtype=dtype)
        self.q = nn.Linear(E, WIDTH, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.k(x) + self.q(x)


def linear_of(program: Program, weight: str) -> Linear:
    node = next(
        n
        for n in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        if program.names[n.args[1].name] == f"{weight}.weight"
    )
    return Linear(weight, node.args[1].name, (node.name,), (None,), E, WIDTH)


def two_linears(dtype: torch.dtype) -> tuple[Program, Site, Site, Tensor]:
    """The program, a site of half of K and Q's features, one of K's alone, and an input."""
    model = seeded(TwoLinears(dtype))
    x = randn(TOKENS, E, seed=5, dtype=dtype)
    program = canonical(model, x)
    k, q = linear_of(program, "k"), linear_of(program, "q")
    both = Site("qk", k, ((0, 1),), (Factor(q, OUT, ((2, 3),), (0,)),), ())
    return program, both, Site("qk", k, ((0,), (3,)), (), ()), x


def shares_in(
    program: Program, sites: Sequence[Site], inputs: list[list[Any]] | None = None
) -> list[list[float]] | None:
    examples = None if inputs is None else [Example(flat) for flat in inputs]
    found = estimate_shares(program, sites, examples)
    return None if found is None else found.of_sites


def flat_inputs(program: Program, *user: Tensor) -> list[Any]:
    left = iter(user)
    return [
        program.tensors[n.name] if n.name in program.tensors else next(left)
        for n in program.graph.find_nodes(op="placeholder")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_in_closed_form(dtype: torch.dtype) -> None:
    """All Jacobians are 1: a share is the site's noise over that of K, Q and their sum. On inputs
    that are given, in float32, it is the errors that are made; else one rounding a value."""
    program, both, alone, x = two_linears(dtype)
    found = shares_in(program, [both, alone], [flat_inputs(program, x)])
    weights = {program.names[name]: value.detach() for name, value in program.tensors.items()}
    k, q = (x.double() @ weights[f"{name}.weight"].double().T for name in "kq")
    parts, caution = (k, q, k + q), 1.0
    if dtype == torch.float32:
        single = [x @ weights[f"{name}.weight"].T for name in "kq"]
        both_single = single[0] + single[1]
        exact = single[0].double() + single[1].double()
        parts = (single[0] - k, single[1] - q, both_single - exact)
        caution = CAUTION_WHEN_CALIBRATED
    k, q, total = (part.double().square() for part in parts)
    whole = float(k.sum() + q.sum() + total.sum()) / caution
    expected = [
        float(k[:, :2].sum() + q[:, 2:].sum()) / whole,
        float(k[:, [0, 3]].sum()) / whole,
    ]
    assert found is not None
    assert [share for (share,) in found] == pytest.approx(expected, rel=tolerances.SAMPLED_SHARE)


def shares_of(model: nn.Module, *args: Tensor, given: bool = True) -> list[list[float]] | None:
    program = canonical(model, *args)
    sites = find_sites(program).sites
    return shares_in(program, sites, [flat_inputs(program, *args)] if given else None)


class _Noisy(Wide):
    """float64, with relative noise of RMS ``size`` in the values of the nodes that ``rate`` names:
    for node n, rate(n) is the square root of how many roundings each feature has, or None."""

    def __init__(
        self, program: Program, rate: Callable[[fx.Node, Tensor], Tensor | None], size: float
    ) -> None:
        super().__init__(program.module, torch.float64)
        self.rate, self.size = rate, size
        self.random = torch.Generator().manual_seed(7)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "call_function" or not isinstance(value, Tensor):
            return value
        rate = self.rate(n, value)
        if rate is None:
            return value
        noise = torch.randn(value.shape, generator=self.random, dtype=torch.float64)
        return value * (1 + self.size * rate * noise)


@pytest.mark.parametrize("core", ["sdpa", "spelled"])
def test_shares_are_those_of_injected_noise(core: str) -> None:
    """Noise in what the sites round, over noise in all that is rounded: once each in bfloat16."""
    model = Attention(core=core).to(torch.bfloat16)
    x = randn(B, 40, E, seed=3, dtype=torch.bfloat16)
    program = canonical(model, x)
    sites = find_sites(program).sites
    flat = flat_inputs(program, x)
    found = shares_in(program, sites, [flat])
    assert found is not None
    nodes = {node.name: node for node in program.graph.nodes}
    mine = {name: features for site in sites for name, features, _ in module._reads(site, nodes)}

    def everywhere(n: fx.Node, value: Tensor) -> Tensor | None:
        return torch.ones(()) if roundings(n) else None

    def at_sites(n: fx.Node, value: Tensor) -> Tensor | None:
        if n.name not in mine:
            return None
        rate = torch.zeros(value.shape[-1], dtype=torch.float64)
        rate[mine[n.name]] = 1
        return rate

    def variance(rate: Callable[[fx.Node, Tensor], Tensor | None]) -> float:
        size = 1e-5  # small enough to be linear, large enough to be far from float64
        run = _Noisy(program, rate, size)
        with torch.no_grad():
            exact = Wide(program.module, torch.float64).run(*flat)[0]
            return sum(float((run.run(*flat)[0] - exact).square().sum()) for _ in range(20))

    expected = variance(at_sites) / variance(everywhere)
    assert 0.05 < expected < 1  # negative control: there is something to be measured
    total = sum(share for (share,) in found)
    assert total == pytest.approx(expected, rel=tolerances.SAMPLED_SHARE)


def test_each_output_has_its_own_shares() -> None:
    class Two(Attention):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x * 2, super().forward(x) * 3

    shares = shares_of(Two(), randn(B, S, E))
    assert shares is not None
    assert all(len(site) == 3 for site in shares)
    assert all(site[0] > 0 and site[1] == 0 for site in shares)  # x * 2 depends on no site
    # The third is the first but for one more rounding, and a cotangent of its own.
    assert [site[2] for site in shares] == pytest.approx([s[0] for s in shares], rel=0.5)


def test_made_up_inputs_are_always_the_same_and_cautious() -> None:
    model, x = Attention().to(torch.bfloat16), randn(B, 40, E, dtype=torch.bfloat16)
    first, second = (shares_of(model, x, given=False) for _ in range(2))
    assert first == second
    given = shares_of(model, x)
    assert first is not None
    assert given is not None
    assert sum(s for (s,) in first) == pytest.approx(
        CAUTION * sum(s for (s,) in given), rel=2 * tolerances.SAMPLED_SHARE
    )


def test_made_up_inputs_of_float32_by_errors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form above, on white inputs: K's and Q's values have ρ roundings each, and that is
    measured, whatever the model of sums says."""
    program, both, _, _ = two_linears(torch.float32)
    monkeypatch.setattr(run_backward, "partial_roundings", lambda terms: 100.0)
    found = shares_in(program, [both])
    rho = 1 + partial_roundings(E)
    expected = CAUTION_OF_LONG_SUMS * rho / (2 * rho + 2)  # half of K and half of Q; E(k + q)² = 2
    assert found is not None
    assert found[0][0] == pytest.approx(expected, rel=2 * tolerances.SAMPLED_SHARE)


def test_positions_that_a_mask_leaves_out_do_not_count() -> None:
    """Attention reaches the first half of the outputs alone."""

    class Half(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x)[:, : S // 2], x[:, S // 2 :] * 2.5], 1)

    model, x = Half(), randn(B, S, E)
    program = canonical(model, x)
    sites, flat = find_sites(program).sites, flat_inputs(program, x)
    first = torch.zeros(B, S, dtype=torch.int64)
    first[:, : S // 2] = 1

    def shares(mask: Tensor | None) -> list[float]:
        found = estimate_shares(program, sites, [Example(flat, mask)])
        assert found is not None
        return [share for (share,) in found.of_sites]

    assert all(share > 0 for share in shares(first))
    assert sum(shares(first)) > sum(shares(None))
    assert shares(1 - first) == [0.0] * len(sites)
    assert shares(first[:, :-1]) == shares(None)  # no output has such a shape


def test_no_sites_no_shares() -> None:
    assert shares_in(canonical(Attention(), randn(B, S, E)), []) == []


@pytest.mark.parametrize("limit", ["MOST_WORK", "MOST_BYTES"])
def test_a_program_too_large_is_not_run_unasked(
    limit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = canonical(Attention(), randn(B, S, E))
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "call_function"]
    most = {
        "MOST_WORK": B * S * E * H * D * 4,
        "MOST_BYTES": sum(4 * v.numel() for v in values if v.is_floating_point()),
    }[limit]
    monkeypatch.setattr(module, limit, most)
    assert shares_of(Attention(), randn(B, S, E), given=False) is not None
    monkeypatch.setattr(module, limit, most - 1)
    with caplog.at_level("INFO", "bda_fx"):
        assert shares_of(Attention(), randn(B, S, E), given=False) is None
    assert "not estimated, the program is too large" in caplog.text
    assert shares_of(Attention(), randn(B, S, E)) is not None  # on the caller's inputs, it is asked


def test_an_op_without_derivative(caplog: pytest.LogCaptureFixture) -> None:
    def finish(module: Attention, out: Tensor) -> Tensor:
        return torch.special.zeta(module.o(out).exp() + 2, x.square() + 1)

    x = randn(B, S, E)
    model = Attention(finish=finish)
    with caplog.at_level("INFO", "bda_fx"):
        assert shares_of(model, x) is None
    assert "noise shares are not estimated: " in caplog.text


def test_the_global_random_state_stays() -> None:
    program = canonical(Attention(), randn(B, S, E))
    sites = find_sites(program).sites
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = shares_in(program, sites)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert shares_in(program, sites) == first


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_caller_s_grad_mode_does_not_matter(mode: Any) -> None:
    program = canonical(Attention(), randn(B, S, E))
    sites = find_sites(program).sites
    expected = shares_in(program, sites)
    assert expected is not None
    x = randn(B, S, E)
    on_x = shares_in(program, sites, [flat_inputs(program, x)])
    with mode():
        assert shares_in(program, sites) == expected
        made_inside = flat_inputs(program, randn(B, S, E))  # inference tensors under inference_mode
        assert shares_in(program, sites, [made_inside]) == on_x
    assert all(t.grad is None for t in program.tensors.values())


def test_weights_that_are_inference_tensors() -> None:
    program = canonical(Attention(), randn(B, S, E))
    sites = find_sites(program).sites
    expected = shares_in(program, sites)
    with torch.inference_mode():
        program.tensors = {name: value.clone() for name, value in program.tensors.items()}
    assert shares_in(program, sites) == expected


def test_no_graph_outlives_an_estimate() -> None:
    program, both, own, _ = two_linears(torch.float32)

    def recorded() -> int:
        gc.collect()
        return sum(type(x) is Tensor and x.grad_fn is not None for x in gc.get_objects())

    before = recorded()
    assert estimate_shares(program, [both, own]) is not None
    assert recorded() == before


def test_a_view_that_another_attention_kernel_made_impossible() -> None:
    """T5's bias requires grad in the backward pass: another kernel, other strides of its output."""
    example = models.make(models.Case("t5", "sdpa"))
    ids = example.kwargs["input_ids"]
    report = bda_fx.analyze(example.model.encoder, (), {"input_ids": ids})
    assert report.rewritten
    assert report.noise_ratio is not None


def test_memory_that_is_overwritten_is_no_noise() -> None:
    class Filled(Attention):
        def forward(self, x: Tensor) -> Tensor:
            room = x.new_empty(x.shape)
            room[:] = x
            return super().forward(room)

    x = randn(B, S, E)
    expected = shares_of(Attention(), x)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills such memory with nan
    try:
        assert shares_of(Filled(), x) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_scores_masked_with_infinity() -> None:
    def scores(s: Tensor) -> Tensor:
        return s + torch.full_like(s, -torch.inf).triu(1)

    found = shares_of(Attention(core="spelled", scores=scores), randn(B, S, E))
    assert found is not None
    assert all(0 < share < 1 for (share,) in found)


def test_an_op_that_knows_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it errs by is then what the model of sums says."""
    compute = Wide.call_function

    def alone(self: Wide, target: Any, args: Any, kwargs: Any) -> Any:
        if self.dtype == torch.float64 and target is torch.ops.aten.linear.default:
            raise RuntimeError("float32 alone")
        return compute(self, target, args, kwargs)

    x = randn(B, S, E)
    usual = shares_of(Attention(), x)
    monkeypatch.setattr(Wide, "call_function", alone)
    found = shares_of(Attention(), x)
    assert found is not None
    assert usual is not None
    assert all(share > 0 for (share,) in found)
    assert found != usual
