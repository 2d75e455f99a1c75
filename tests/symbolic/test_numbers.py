"""The formula that the proofs are about is the one that is computed.

Every derived tensor of ``transform_weights``, as the polynomial of the proof at the weights that it
was computed from, with the null-space directions that ``change_basis`` found in the place of M.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from bda_fx.passes import transform_weights as transforming
from bda_fx.passes.change_basis import ChangeOfBasis, change_basis
from tests import tolerances
from tests.symbolic.cases import CASES, Case
from tests.symbolic.prove import Prover


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_symbolic_weights_at_the_numbers_are_the_weights(case: Case) -> None:
    proving = Prover(case.make(), case.args, case.options, fixed_rows=case.fixed_rows)
    derived = proving.derive()
    tensors, changes = computed(proving)
    assert derived.keys() == tensors.keys()

    algebra = proving.mode.algebra
    numbers: dict[str, float] = {}

    def assign(symbols: Tensor, values: Tensor) -> None:
        for at, value in zip(symbols.flatten().long().tolist(), values.flatten(), strict=True):
            numbers[str(algebra.elements[at])] = float(value)

    for name, symbols in proving.inputs.items():
        if name in proving.original.tensors and symbols.is_floating_point():
            assign(symbols, proving.original.tensors[name])
    for symbolic, numeric in zip(proving.changes, changes, strict=True):
        size = len(numeric.rows)
        assign(symbolic.s[:, size:], numeric.s[:, size:])

    bound = tolerances.identity(max(change.condition for change in changes))
    for key, ids in derived.items():
        if not ids.is_floating_point():
            assert torch.equal(ids, tensors[key])
            continue
        values = [algebra.evaluate(at, numbers) for at in ids.flatten().long().tolist()]
        got = torch.tensor(values, dtype=torch.float64).view(ids.shape)
        assert float((got - tensors[key]).norm()) <= bound * float(tensors[key].norm())
