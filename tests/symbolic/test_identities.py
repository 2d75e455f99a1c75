"""The formulas of the design hold for matrices of any size, and fail where one is wrong."""

from __future__ import annotations

import pytest

from tests.symbolic.identities import Claim, Turn, claims, is_zero, matrix

WITHOUT_C = {"completion", "what turns along", "vo, other side: outputs of the basis"}


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: claim.name)
def test_holds(claim: Claim) -> None:
    assert claim.holds


@pytest.mark.parametrize("turn", [lambda s: s, lambda s: s.I, lambda s: -s.T])
def test_a_wrong_turn_fails(turn: Turn) -> None:
    """S or S⁻¹ where Sᵀ belongs, or Sᵀ with the wrong sign."""
    assert {claim.name for claim in claims(turn=turn) if claim.holds} == {"completion"}


def test_a_wrong_sign_of_the_coefficients_fails() -> None:
    assert {claim.name for claim in claims(sign=-1) if claim.holds} == WITHOUT_C


def test_products_do_not_commute() -> None:
    a, b = matrix("A", 3, 3), matrix("B", 3, 3)
    assert is_zero(a * b - a * b)
    assert not is_zero(a * b - b * a)
