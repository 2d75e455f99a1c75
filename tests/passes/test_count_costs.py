"""Costs: the formulas against the tensors and the multiplications of real programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

import bda_fx
from bda_fx.options import Options
from bda_fx.passes.canonicalize import canonicalize_module
from bda_fx.passes.count_costs import (
    LAYOUTS,
    LINEAR_HEADS,
    LINEAR_ORDER,
    ORDER,
    REST,
    ROWS,
    SCATTERED,
    SLOTS,
    Costs,
    Layout,
    Sizes,
    break_even_points,
    cost_formulas,
    count_costs,
    index_entries,
    layouts_of,
    sizes_of,
    symbols,
    whole_attention,
)
from bda_fx.passes.sites import IN, QO, Plan
from bda_fx.pipeline import find_and_plan
from tests import zoo
from tests.programs import FULL, Attention, B, D, E, FusedAttention, H, example, randn
from tests.symbolic.cases import CASES, named

WIDE = randn(B, 5, 3 * E)
ODD = Sizes(E=20, D=6, H=4, G=2, r=5, S=3, T=7, F=48)


def programs() -> Iterator[Any]:
    """(model, args, kwargs, options) of every form, at sizes where no two counts are equal."""
    for case in CASES:
        yield pytest.param(case.make(), case.args, {}, case.options, id=case.name)
    for side in ("kv", "qo"):
        for basis in ("pivot", "window"):
            for size in ("full", 0.5):
                options = {"side": side, "basis": basis, "basis_size": size}
                model = Attention(embed=3 * E)
                yield pytest.param(model, (WIDE,), {}, options, id=f"{side} {basis} {size}")
    for kv_heads in (1, 2):
        model = Attention(kv_heads=kv_heads, embed=3 * E)
        yield pytest.param(model, (WIDE,), {}, FULL, id=f"{kv_heads} key heads")
    many, few = randn(B, 11, E), randn(B, 3, E, seed=1)
    for side in ("kv", "qo"):
        options = {**FULL, "side": side}
        yield pytest.param(Attention(), (many, few), {}, options, id=f"many queries {side}")
    for order in ("chunk", "interleaved", "permuted", "strided"):
        yield pytest.param(FusedAttention(order), (example(),), {}, FULL, id=f"fused {order}")
    for name in ("bert", "gpt2", "llama", "deepseek_v3"):
        case = next(c for c in zoo.CASES if (c.architecture, c.attention) == (name, "sdpa"))
        yield pytest.param(case, (), None, FULL, id=name)


def built(model: Any, kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Models of the zoo are built when they are needed."""
    if kwargs is not None:
        return model, kwargs
    made = zoo.make(model)
    return made.model, made.kwargs


def numbers_read(program: ExportedProgram) -> int:
    """Elements of all constants that the graph reads, shared storage counted once."""
    read = {node.name for node in program.graph.find_nodes(op="placeholder") if node.users}
    targets = [s.target for s in program.graph_signature.input_specs if s.arg.name in read]
    known = {**program.constants, **program.state_dict}
    tensors = [known[t] for t in targets if isinstance(known.get(t), Tensor)]
    return sum({(t.data_ptr(), t.shape): t.numel() for t in tensors}.values())


def multiplications(module: nn.Module, args: Any, kwargs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args, **kwargs)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("model", "args", "kwargs", "options"), list(programs()))
def test_counts_are_those_of_the_program(model: Any, args: Any, kwargs: Any, options: Any) -> None:
    """Numbers stored by the artefact, and multiplications as torch counts them, fall as reported.

    Attention itself costs the same before and after, so all of the difference is the projections'.
    """
    model, kwargs = built(model, kwargs)
    original = torch.export.export(model, args, kwargs, strict=False)
    original.graph.eliminate_dead_code()  # as the rewrite does, whatever it finds
    rewritten = bda_fx.rewrite(model, args, kwargs, options=options)
    sites = rewritten.report.rewritten
    assert sites
    stored = numbers_read(original) - numbers_read(rewritten.program)
    assert sum(s.params_before - s.params_after for s in sites) == stored

    plan = find_and_plan(canonicalize_module(model, args, kwargs), Options.of(options))
    tokens = [item.site.linear.tokens for item in plan.sites]
    saved = [s.macs_per_token_before - s.macs_per_token_after for s in sites]
    before = multiplications(original.module(), args, kwargs)
    after = multiplications(rewritten.program.module(), args, kwargs)
    assert sum(t * n for t, n in zip(tokens, saved, strict=True)) == before - after


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", ["kv", "qo"])
def test_before_is_the_projection_itself(side: str, bias: bool) -> None:
    model = Attention(bias=bias)
    report = bda_fx.analyze(model, (example(),), options={**FULL, "side": side})
    parameters = dict(model.named_parameters())
    for site in report.rewritten:
        weight = parameters[site.name]
        added = parameters[site.name.replace("weight", "bias")].numel() if bias else 0
        assert site.params_before == weight.numel() + added
        assert site.macs_per_token_before == weight.numel()


@pytest.mark.parametrize("basis", ["pivot", "window"])
@pytest.mark.parametrize("side", ["kv", "qo"])
def test_the_plan_alone_tells_as_much(side: str, basis: str) -> None:
    """``analyze`` foresees the index tensors that ``rewrite`` makes."""
    options = {**FULL, "side": side, "basis": basis}
    model = Attention(embed=3 * E)
    foreseen = bda_fx.analyze(model, (WIDE,), options=options).rewritten
    done = bda_fx.rewrite(model, (WIDE,), options=options).report.rewritten
    assert [s.params_after for s in foreseen] == [s.params_after for s in done]
    biases = (H * D, H * D) if side == "kv" else (H * D, 3 * E)
    numbers = zip(done, biases, strict=True)
    index = [s.params_after - s.macs_per_token_after - bias for s, bias in numbers]
    assert index == [0, 0] if basis == "window" else [3 * E, 3 * E]


def test_an_index_tensor_of_two_sites_counts_once() -> None:
    plan = planned(named("fused, one after the other").make(), randn(1, 2, 3))
    assert len({item.basis for item in plan.sites}) == 1
    assert [layout.index for layout in layouts_of(plan)] == [SCATTERED, ()]


def test_slots_of_a_shared_basis_are_each_site_s_own() -> None:
    plan = planned(named("fused, heads innermost").make(), randn(1, 2, 3))
    (basis,) = {item.basis for item in plan.sites}
    read = [f"{basis}_{part}" for part in (ROWS, REST, SLOTS)]
    indices = [set(layout.index) for layout in layouts_of(plan, read)]
    assert indices == [{*SCATTERED, SLOTS}, {SLOTS}]


def planned(model: nn.Module, x: Tensor) -> Plan:
    return find_and_plan(canonicalize_module(model, (x,)), Options.of(FULL))


def test_biases_of_several_nodes_are_each_counted() -> None:
    plan = planned(Attention(), example())
    item = plan.sites[0]
    linear = dataclasses.replace(
        item.site.linear, nodes=("a", "b", "c", "d"), biases=("x", "y", "x", None)
    )
    two = dataclasses.replace(item, site=dataclasses.replace(item.site, linear=linear))
    (layout,) = layouts_of(Plan((two,), ()))
    assert layout.biases == 2
    costs = count_costs(layout, sizes_of(two))
    assert costs.params_before == costs.macs_per_token_before + 2 * H * D


# -- the formulas -----------------------------------------------------------------------------

EVERY = [
    dataclasses.replace(layout, biases=n) for layout in LAYOUTS.values() for n in (0, 1, 2)
] + [
    Layout(biases=1, index=(*SCATTERED, SLOTS, LINEAR_ORDER)),
    Layout(QO, IN, 1, (ORDER, LINEAR_HEADS)),
]


@pytest.mark.parametrize("layout", EVERY, ids=str)
@pytest.mark.parametrize("sizes", [ODD, dataclasses.replace(ODD, r=1), Sizes(6, 6, 1, 1, 6)])
def test_numbers_are_the_formulas_at_the_sizes(layout: Layout, sizes: Sizes) -> None:
    values = {symbols()[name]: value for name, value in dataclasses.asdict(sizes).items()}
    formulas = dataclasses.astuple(cost_formulas(layout))
    counts = count_costs(layout, sizes)
    assert counts == Costs(*(int(f.subs(values)) for f in formulas))
    assert all(type(n) is int for n in dataclasses.astuple(counts))


def test_the_open_number_of_biases() -> None:
    beta = symbols()["beta"]
    for layout in LAYOUTS.values():
        for n in (0, 1):
            given = cost_formulas(dataclasses.replace(layout, biases=n))
            for open_, at in zip(
                dataclasses.astuple(cost_formulas(layout)), dataclasses.astuple(given), strict=True
            ):
                assert sympy.expand(open_.subs(beta, n) - at) == 0


def test_all_that_is_saved_is_r_over_e() -> None:
    """The design's claim, for either side and any layout without index tensors."""
    s = symbols()
    for layout in LAYOUTS.values():
        costs = cost_formulas(dataclasses.replace(layout, biases=0, index=()))
        for before, after in (
            (costs.params_before, costs.params_after),
            (costs.macs_per_token_before, costs.macs_per_token_after),
        ):
            assert sympy.simplify(after / before - (1 - s["r"] / s["E"])) == 0


def test_nothing_is_left_where_the_basis_is_all() -> None:
    s = symbols()
    for layout in LAYOUTS.values():
        costs = cost_formulas(dataclasses.replace(layout, biases=0, index=()))
        assert costs.params_after.subs(s["r"], s["E"]) == 0
        assert costs.macs_per_token_after.subs(s["r"], s["E"]) == 0


# -- break-even points ------------------------------------------------------------------------


def saving(name: str, **sizes: int) -> int:
    """Numbers saved at whole sizes, biases apart."""
    layout = dataclasses.replace(LAYOUTS[name], biases=0)
    costs = count_costs(layout, dataclasses.replace(ODD, **sizes))
    return costs.params_before - costs.params_after


def break_even(question: str, **values: int) -> Any:
    (value,) = {p.value for p in break_even_points() if p.question.startswith(question)}
    return value.subs({s: values[str(s)] for s in value.free_symbols})


def test_index_tensors_eat_the_saving() -> None:
    """240 features, 2 heads of 6: 20 rows of basis pay for the index."""
    assert break_even("index tensors of keys or values", E=240, D=6, G=2) == 20
    name = "keys or values, scattered rows"
    signs = [saving(name, E=240, r=r) for r in (19, 20, 21)]
    assert [n < 0 for n in signs] == [True, False, False]
    assert signs[1] == 0


def test_in_bytes_an_index_weighs_more() -> None:
    """Index entries are int64; against bf16 they weigh as much as four weights."""
    plan = bda_fx.rewrite(Attention(embed=3 * E), (WIDE,), options=FULL)
    index = [t for t in plan.program.state_dict.values() if not t.is_floating_point()]
    assert {t.element_size() for t in index} == {8}
    assert break_even("the same in bytes", E=240, D=6, G=2, w=2) == 4 * 20
    assert break_even("the same in bytes", E=240, D=6, G=2, w=8) == 20


def test_outputs_pay_for_their_order() -> None:
    name = "outputs, scattered rows"
    r = break_even("index tensor of outputs", E=240, D=6, H=4)
    assert (r, saving(name, E=240, r=10)) == (10, 0)
    assert saving(name, E=240, r=9) < 0 < saving(name, E=240, r=11)


def test_the_side_with_more_saved_is_the_one_beyond_the_break_even() -> None:
    """12 query tokens at r = 5 against key tokens at r = 6."""
    t = break_even("key/value against query/output side", S=12, r_K=6, r_Q=5)
    assert t == 10
    kv, qo = (count_costs(dataclasses.replace(LAYOUTS[name], biases=0), sizes)
              for name, sizes in (
                  ("keys or values, window or folded", Sizes(20, 6, 4, 4, 6)),
                  ("queries, window", Sizes(20, 6, 4, 4, 5)),
              ))  # fmt: skip
    saved = [c.macs_per_token_before - c.macs_per_token_after for c in (kv, qo)]
    assert [tokens * saved[0] - 12 * saved[1] > 0 for tokens in (9, 10, 11)] == [False, False, True]


def test_the_side_that_saves_more_is_what_the_planner_takes() -> None:
    """At equal basis sizes the break-even is T = S."""
    assert break_even("key/value against query/output side", S=7, r_K=6, r_Q=6) == 7
    for tokens, side in ((6, "qo"), (8, "kv")):
        args = (randn(B, 7, E), randn(B, tokens, E, seed=1))
        report = bda_fx.analyze(Attention(), args, options=FULL)
        assert {s.side for s in report.rewritten if s.product == "qk"} == {side}


def test_one_basis_stores_one_index() -> None:
    """K and V of 6 and 4 rows: one basis of 5 multiplies as much and has one index of E less."""
    assert break_even("one basis for K and V against two, multiplications", r_K=6, r_V=4) == 5
    r = break_even("one basis for K and V against two, numbers", r_K=6, r_V=4, D=6, G=2, E=24)
    apart = saving("keys or values, scattered rows", E=24, r=6)
    apart += saving("keys or values, scattered rows", E=24, r=4)
    shared = 2 * saving("keys or values, window or folded", E=24, r=int(r)) - 24
    assert (r, shared) == (4, apart)


def test_half_of_the_share_is_left_at_this_length() -> None:
    n = break_even("length n", E=20, G=2, H=4)
    assert n == 30
    s = symbols()
    values = {s["E"]: 20, s["G"]: 2, s["H"]: 4, s["D"]: 6}
    projections = whole_attention().subs({**values, s["S"]: 1, s["T"]: 1}) - 2 * 4 * 6
    assert whole_attention().subs({**values, s["S"]: n, s["T"]: n}) == 2 * n * projections


def test_whole_attention_is_what_torch_counts() -> None:
    model = Attention(kv_heads=2, core="spelled")
    s = symbols()
    args = (randn(1, 3, E), randn(1, 7, E))
    values = {s["E"]: E, s["D"]: D, s["H"]: H, s["G"]: 2, s["S"]: 3, s["T"]: 7}
    assert multiplications(model, args, {}) == whole_attention().subs(values)


def test_every_index_tensor_has_its_size() -> None:
    s = symbols()
    assert index_entries("kv", ROWS) + index_entries("kv", REST) == s["E"]
    assert index_entries("qo", ORDER) == s["E"]
    assert index_entries("qo", LINEAR_HEADS) == s["H"] * s["D"]
