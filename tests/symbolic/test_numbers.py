"""The formula that the proofs are about is the one that is computed.

Every derived tensor of ``transform_weights``, as the polynomial of the proof at the weights that it
was computed from, with the null-space directions that ``change_basis`` found in the place of M.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from bda_fx.passes import transform_weights as transforming
from bda_fx.passes.change_basis import ChangeOfBasis, change_basis
from tests import tolerances
from tests.symbolic.cases import CASES, Case, named
from tests.symbolic.prove import Prover


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sites are changed in the order of the plan, as what is recorded on the way relies on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def computed(proving: Prover) -> tuple[dict[str, Tensor], list[ChangeOfBasis]]:
    """Tensors of the pass itself, and the changes of basis that it made."""
    changes: list[ChangeOfBasis] = []

    def note(*args: Tensor | None) -> ChangeOfBasis:
        changes.append(change_basis(*args))  # type: ignore[arg-type]
        return changes[-1]

    outcome = proving.outcome
    assert outcome.constants is not None
    values = outcome.constants.evaluate(proving.original.tensors)
    with mock.patch.object(transforming, "change_basis", note):
        result = transforming.transform_weights(outcome.plan, values, use_planned_rows=True)
    return result.tensors, changes


def worst_error(proving: Prover, derived: dict[str, Tensor]) -> tuple[float, float]:
    """Largest relative error of a derived tensor at the numbers, and the largest condition of S."""
    tensors, changes = computed(proving)
    assert derived.keys() == tensors.keys()
    algebra = proving.mode.algebra
    numbers: dict[str, float] = {}

    def assign(symbols: Tensor, values: Tensor) -> None:
        ids = symbols.flatten().long().tolist()
        for at, value in zip(ids, values.flatten().tolist(), strict=True):
            numbers[str(algebra.elements[at])] = value

    for name, value in proving.original.tensors.items():
        if value.is_floating_point():
            assign(proving.inputs[name], value)
    for symbolic, numeric in zip(proving.changes, changes, strict=True):
        size = len(numeric.rows)
        assign(symbolic.s[:, size:], numeric.s[:, size:])

    worst = 0.0
    for key, ids in derived.items():
        expected = tensors[key]
        if not ids.is_floating_point():
            assert torch.equal(ids, expected)
        elif ids.numel():
            values = [algebra.evaluate(at, numbers) for at in ids.flatten().long().tolist()]
            got = torch.tensor(values, dtype=torch.float64).view(ids.shape)
            worst = max(worst, float((got - expected).norm() / expected.norm()))
    return worst, max(change.condition for change in changes)


def prover(case: Case) -> Prover:
    return Prover(case.make(), case.args, case.options, fixed_rows=case.fixed_rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_symbolic_weights_at_the_numbers_are_the_weights(case: Case) -> None:
    proving = prover(case)
    error, condition = worst_error(proving, proving.derive())
    assert error <= tolerances.identity(condition)


def test_other_formulas_give_other_weights() -> None:
    proving = prover(named("fewer basis rows than features"))

    def transposed(*args: Tensor) -> ChangeOfBasis:
        change = proving.complete_freely(*args)
        return dataclasses.replace(change, s=change.s.mT)

    error, condition = worst_error(proving, proving.derive(transposed))
    assert error > 1e6 * tolerances.identity(condition)
