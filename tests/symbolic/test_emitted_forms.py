"""Every form that the passes emit is the original, as rational functions; what is wrong is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from bda_fx.passes.change_basis import ChangeOfBasis, turn_vectors
from tests.symbolic.cases import CASES, Case, named
from tests.symbolic.prove import Prover

aten = torch.ops.aten


def prover(case: Case) -> Prover:
    return Prover(case.make(), case.args, case.options, fixed_rows=case.fixed_rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rewrite_is_the_original(case: Case) -> None:
    proving = prover(case)
    plan, derived = proving.outcome.plan, set(proving.outcome.inputs)
    assert tuple((s.site.product, s.site.side, s.size) for s in plan.sites) == case.sites
    assert not plan.skips
    assert derived >= set(case.emits)
    assert not derived & set(case.lacks)
    proof = proving.prove()
    assert proof.holds
    assert proof.numbers >= 3


# -- proofs can fail --------------------------------------------------------------------------

FORMS = [
    "scattered rows",
    "grouped queries",
    "fewer basis rows than features",
    "query side",
    "decoupled rotary",
    "values are keys",
    "content and position",
    "learned keys",
    "folded into the producer",
]


def fails(case: Case, wrong: Callable[[Prover], dict[str, object]]) -> bool:
    proving = prover(case)
    proof = proving.prove(**wrong(proving))  # type: ignore[arg-type]
    assert proof.holds == (proof.differing == 0)
    return not proof.holds


def wrong_change(
    alter: Callable[[ChangeOfBasis], ChangeOfBasis],
) -> Callable[[Prover], dict[str, object]]:
    """The change of basis of the proof, altered."""

    def wrong(proving: Prover) -> dict[str, object]:
        def change(
            heads: Tensor, rows: Tensor, bias: Tensor | None = None, moments: object = None
        ) -> ChangeOfBasis:
            return alter(proving.complete_freely(heads, rows, bias))

        return {"change": change}

    return wrong


def negated(change: ChangeOfBasis) -> ChangeOfBasis:
    return dataclasses.replace(change, coefficients=-change.coefficients)


def transposed(change: ChangeOfBasis) -> ChangeOfBasis:
    return dataclasses.replace(change, s=change.s.mT)


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_sign_of_the_coefficients_fails(form: str) -> None:
    assert fails(named(form), wrong_change(negated))


@pytest.mark.parametrize("form", FORMS)
def test_a_transposed_s_fails(form: str) -> None:
    assert fails(named(form), wrong_change(transposed))


@pytest.mark.parametrize("form", FORMS)
def test_a_basis_in_the_wrong_order_fails(form: str) -> None:
    """S, C and b' are those of the rows in reverse; the graph gathers them as they are."""

    def wrong(proving: Prover) -> dict[str, object]:
        def change(
            heads: Tensor, rows: Tensor, bias: Tensor | None = None, moments: object = None
        ) -> ChangeOfBasis:
            return proving.complete_freely(heads, rows.flip(0), bias)

        return {"change": change}

    assert fails(named(form), wrong)


@pytest.mark.parametrize("form", ["scattered rows", "values are keys", "grouped queries"])
def test_a_bias_that_does_not_turn_fails(form: str) -> None:
    def kept(change: ChangeOfBasis) -> ChangeOfBasis:
        assert change.bias is not None
        return dataclasses.replace(change, bias=(change.bias.unsqueeze(1) @ change.s).squeeze(1))

    assert fails(named(form), wrong_change(kept))


@pytest.mark.parametrize("form", ["content and position", "learned keys", "two streams"])
def test_what_turns_along_must_turn_by_the_inverse(form: str) -> None:
    def turn(vectors: Tensor, change: ChangeOfBasis, groups: Tensor, *, against: bool) -> Tensor:
        return turn_vectors(vectors, change, groups, against=True)

    assert fails(named(form), lambda _: {"turn": turn})


@pytest.mark.parametrize("form", ["scattered rows", "query side"])
def test_heads_that_meet_the_wrong_s_fail(form: str) -> None:
    def turn(vectors: Tensor, change: ChangeOfBasis, groups: Tensor, *, against: bool) -> Tensor:
        return turn_vectors(vectors, change, groups.flip(0), against=against)

    assert fails(named(form), lambda _: {"turn": turn})


def subtract(graph: fx.Graph) -> None:
    """The identity part with the wrong sign."""
    (first, *_) = (n for n in graph.nodes if n.target is aten.add.Tensor)
    first.target = aten.sub.Tensor


def gather_in_reverse(graph: fx.Graph) -> None:
    """The basis features in another order."""
    gather = graph.find_nodes(op="call_function", target=aten.index_select.default)[0]
    x, axis, rows = gather.args
    with graph.inserting_before(gather):
        gather.args = (x, axis, graph.call_function(aten.flip.default, (rows, [0])))


def pad_in_front(graph: fx.Graph) -> None:
    """[0 | x_B] in place of [x_B | 0]."""
    for pad in graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default):
        pad.args = (pad.args[0], list(reversed(pad.args[1])))


@pytest.mark.parametrize(
    ("form", "spoil"),
    [
        ("scattered rows", subtract),
        ("scattered rows", gather_in_reverse),
        ("fewer basis rows, two heads", pad_in_front),
    ],
)
def test_a_wrong_graph_fails(form: str, spoil: Callable[[fx.Graph], None]) -> None:
    assert fails(named(form), lambda _: {"spoil": spoil})
