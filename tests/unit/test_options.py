"""Options: every refusal names the value, what was expected and the remedy."""

from __future__ import annotations

import dataclasses
import re

import pytest

import bda_fx
from bda_fx import OptionError, Options


def test_defaults_obey_the_budget() -> None:
    options = Options()
    assert (options.basis, options.basis_size, options.noise_budget) == ("auto", "auto", "auto")
    assert options.products == ("qk", "vo")
    assert options.inner == "inductor"
    assert options.strict is False


def test_of_takes_nothing_a_dict_or_options() -> None:
    options = Options(basis="window")
    assert Options.of(None) == Options()
    assert Options.of({}) == Options()
    assert Options.of({"basis": "window"}) == options
    assert Options.of(options) is options


def test_unknown_name_lists_the_known_ones() -> None:
    known = ", ".join(f.name for f in dataclasses.fields(Options))
    text = f"unknown option 'bassis'; the options are {known}"
    with pytest.raises(OptionError, match=f"^{re.escape(text)}$"):
        Options.of({"bassis": "pivot"})


def test_all_unknown_names_are_given_in_order() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'a', 'b';"):
        Options.of({"b": 1, "strict": True, "a": 2})


@pytest.mark.parametrize("value", ["best", None, 1, ""])
def test_basis(value: object) -> None:
    names = "'auto', 'pivot', 'window', 'slices', 'residual-min', 'first'"
    text = f"basis is one of {names}, got {value!r}"
    with pytest.raises(OptionError, match=f"^{re.escape(text)}$"):
        Options.of({"basis": value})


@pytest.mark.parametrize(
    "value", [0, -0.5, 1.01, 2, float("nan"), float("inf"), True, "half", None, (1,)]
)
def test_impossible_basis_size(value: object) -> None:
    text = f'basis_size is "auto", "full" or a fraction of the head size in (0, 1], got {value!r}'
    with pytest.raises(OptionError, match=f"^{re.escape(text)}$"):
        Options.of({"basis_size": value})


@pytest.mark.parametrize("value", ["auto", "full", 1, 1.0, 0.5, 15 / 16, 1e-3])
def test_possible_basis_size(value: str | float) -> None:
    assert Options(basis_size=value).basis_size == value


@pytest.mark.parametrize("value", [0, -1.0, 0.99, float("nan"), True, "2", None])
def test_noise_budget(value: object) -> None:
    text = f'noise_budget is "auto" or a number from 1.0 on, got {value!r}'
    with pytest.raises(OptionError, match=f"^{re.escape(text)}$"):
        Options.of({"noise_budget": value})


def test_products_is_no_string() -> None:
    text = "products is a sequence, got the string 'qk': write (\"qk\",)"
    with pytest.raises(OptionError, match=f"^{re.escape(text)}$"):
        Options.of({"products": "qk"})


def test_products_known() -> None:
    with pytest.raises(OptionError, match=r"^products is one of 'qk', 'vo', got 'kv'$"):
        Options.of({"products": ("qk", "kv")})


@pytest.mark.parametrize("value", [None, 3])
def test_products_is_a_sequence(value: object) -> None:
    with pytest.raises(OptionError, match=r"^products is a sequence, got"):
        Options.of({"products": value})


def test_products_becomes_a_tuple() -> None:
    assert Options.of({"products": ["vo"]}).products == ("vo",)
    assert Options(products=()).products == ()


def test_inner() -> None:
    with pytest.raises(OptionError, match=r"^inner is one of 'inductor', 'aot_eager', 'eager', "):
        Options.of({"inner": "nvfuser"})


def test_inner_options() -> None:
    with pytest.raises(OptionError, match=r"^inner_options is a mapping, got list$"):
        Options.of({"inner_options": ["max_autotune"]})


@pytest.mark.parametrize("value", [1, "yes", None])
def test_strict(value: object) -> None:
    text = f"strict is True or False, got {value!r}"
    with pytest.raises(OptionError, match=f"^{re.escape(text)}$"):
        Options.of({"strict": value})


@pytest.mark.parametrize("value", ["basis=pivot", 3, [("basis", "pivot")]])
def test_of_takes_nothing_else(value: object) -> None:
    with pytest.raises(OptionError, match=r"^options are bda_fx.Options or a dict of them, got"):
        Options.of(value)  # type: ignore[arg-type]


def test_unhashable_value_is_an_option_error() -> None:
    with pytest.raises(OptionError, match=r"basis is one of .* got \['pivot'\]"):
        Options.of({"basis": ["pivot"]})


def test_frozen_and_an_error_of_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().basis = "pivot"  # type: ignore[misc]
    assert issubclass(OptionError, ValueError)
    assert bda_fx.OptionError is OptionError


@pytest.mark.parametrize("value", ["int4", 8, ""])
def test_optimize_for(value: object) -> None:
    text = f"optimize_for is one of None, 'int8', 'fp8', got {value!r}"
    with pytest.raises(OptionError, match=f"^{re.escape(text)}$"):
        Options.of({"optimize_for": value})


@pytest.mark.parametrize("value", ["k.weight", None, 3])
def test_keep_is_a_sequence(value: object) -> None:
    text = f"keep is a sequence of names, got {value!r}: write (name,)"
    with pytest.raises(OptionError, match=f"^{re.escape(text)}$"):
        Options.of({"keep": value})
    assert Options.of({"keep": ["a", "b.*"]}).keep == ("a", "b.*")
