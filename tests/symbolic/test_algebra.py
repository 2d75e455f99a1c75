"""The table of polynomials tells equal from unequal, and refuses what it does not know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.symbolic.execute import Symbolically
from tests.symbolic.polynomials import ONE, ZERO, Polynomials


@pytest.fixture
def mode() -> Symbolically:
    return Symbolically(Polynomials())


def test_equal_polynomials_have_one_id() -> None:
    table = Polynomials()
    a, b = table.symbols(["a", "b"])
    square = table.multiply(table.add(a, b), table.add(a, b))
    terms = [table.multiply(a, a), table.multiply(b, b), *[table.multiply(a, b)] * 2]
    assert square == table.total(terms)
    assert square != table.total(terms[:-1])
    assert table.add(a, a, -1) == ZERO
    assert table.multiply(a, ONE) == a
    assert table.number(0.5) != table.number(0.25)
    assert table.add(table.number(0.5), table.number(0.5)) == ONE


def test_ids_survive_new_symbols() -> None:
    table = Polynomials()
    a, b = table.symbols(["a", "b"])
    before = table.multiply(a, b)
    table.symbols(["c"])
    assert table.multiply(a, b) == table.multiply(b, a) == before


def test_a_symbol_has_one_name() -> None:
    table = Polynomials()
    table.symbols(["a"])
    with pytest.raises(ValueError, match="exist already"):
        table.symbols(["b", "a"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_inverse(mode: Symbolically, size: int) -> None:
    s = mode.symbols("s", (2, size, size))
    inverse = mode.invert(s)
    with mode:
        assert torch.equal(s @ inverse, torch.eye(size, dtype=s.dtype).expand(2, -1, -1))
        assert torch.equal(inverse @ s, torch.eye(size, dtype=s.dtype).expand(2, -1, -1))
        assert size == 1 or not torch.equal(s.mT @ inverse, inverse.mT @ s)


def test_no_inverse_of_what_is_singular_or_shares_its_symbols(mode: Symbolically) -> None:
    s = mode.symbols("s", (2, 2))
    with pytest.raises(ValueError, match="singular whatever"):
        mode.invert(s[:1].expand(1, 2, 2))
    mode.invert(s[None])
    with pytest.raises(ValueError, match="share a leading symbol"):
        mode.invert(s.T[None])


def test_functions_are_equal_at_equal_arguments_only(mode: Symbolically) -> None:
    x = mode.symbols("x", (2, 3))
    with mode:
        total = (x + x).softmax(-1)
        assert torch.equal(total, (2 * x).softmax(-1))
        assert not torch.equal(total, x.softmax(-1))
        assert not torch.equal(x.tanh(), x.sigmoid())
        assert not torch.equal(x.flip(1).softmax(-1).flip(1), x.softmax(-1))


def test_linear_and_attention_are_what_they_are_made_of(mode: Symbolically) -> None:
    x, w, b = (mode.symbols(n, s) for n, s in (("x", (1, 2, 3)), ("w", (4, 3)), ("b", (4,))))
    with mode:
        y = F.linear(x, w, b)
        assert torch.equal(y, (x.unsqueeze(2) * w).sum(-1) + b)
        attention = F.scaled_dot_product_attention(y, y, y, scale=1.0)
        weights = torch.ops.aten._safe_softmax(y @ y.mT, -1)
        assert torch.equal(attention, weights @ y)


@pytest.mark.parametrize(
    "unknown",
    [
        lambda x: x.exp2(),
        lambda x: x > 0,
        lambda x: x.argmax(),
        lambda x: torch.full((2,), 0.5, dtype=x.dtype),
        lambda x: torch.arange(3, dtype=x.dtype),
        lambda x: torch.arange(3).double(),
        lambda x: torch.where(torch.tensor([True, False, True]), x, 0.5),
        lambda x: F.pad(x, (0, 1), value=2.0),
        lambda x: torch.linalg.svdvals(x[None]),
    ],
)
def test_what_would_compute_on_ids_is_refused(
    mode: Symbolically, unknown: Callable[[Tensor], Tensor]
) -> None:
    x = mode.symbols("x", (3,))
    with mode, pytest.raises(NotImplementedError, match="on polynomials"):
        unknown(x)


def test_moves_and_indices_run_as_they_are(mode: Symbolically) -> None:
    x: Tensor = mode.symbols("x", (2, 3))
    with mode:
        written = x.clone()
        written.T[torch.tensor([2, 0])] = x.T[:2]
        padded = F.pad(x, (0, 1))
        assert (torch.arange(3) * 2).tolist() == [0, 2, 4]
    assert torch.equal(written, x[:, [1, 1, 0]])
    assert torch.equal(padded, torch.cat([x, torch.full((2, 1), float(ZERO))], 1))
