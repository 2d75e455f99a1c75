"""prune_low_rank: optimal, exact once pruned, small; the identities under it; errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bda_fx.passes.choose_basis import STRATEGIES
from bda_fx.passes.prune_low_rank import (
    decompose_product_columns,
    decompose_product_rows,
    prune_low_rank,
)
from tests.tolerances import (
    FLOAT64_IDENTITY,
    FLOAT64_SECOND_MOMENT,
    PRUNED_NOISE,
    identity,
)
from tests.unit.real_weights import projections

SHAPES = [(12, 9, 5), (9, 14, 9), (7, 7, 7), (31, 23, 1), (40, 24, 11)]  # m, n, r


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, samples: int, seed: int = 7) -> Tensor:
    """E[x xᵀ] of correlated inputs of very different sizes, [n, n]."""
    x = randn(samples, n, seed=seed) @ randn(n, n, seed=seed + 1)
    x = x * torch.logspace(-2, 2, n, dtype=torch.float64)
    return x.T @ x / samples


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def assert_close(got: Tensor, expected: Tensor, size: float, condition: float) -> None:
    assert float((got - expected).norm()) <= identity(condition) * size


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_equals_the_truncated_svd(strategy, m, n, r):
    weight = randn(m, n, seed=0)
    pruned = prune_low_rank(weight, r, strategy)
    expected = truncated(weight, r)
    assert_close(pruned.dense(), expected, float(weight.norm()), pruned.condition)
    assert pruned.error == pytest.approx(
        float((weight - expected).norm() / weight.norm()), abs=FLOAT64_IDENTITY
    )
    assert pruned.numbers == r * (m + n - r)
    assert (pruned.basis.shape, pruned.coefficients.shape) == ((r, n), (m - r, r))
    assert sorted([*pruned.rows.tolist(), *pruned.rest.tolist()]) == list(range(m))


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_basis_and_coefficients_compute_the_product(m, n, r):
    pruned, x = prune_low_rank(randn(m, n, seed=0), r), randn(n, 3, seed=1)
    y = x.new_empty(m, 3)
    y[pruned.rows] = pruned.basis @ x
    y[pruned.rest] = pruned.coefficients @ y[pruned.rows]
    size = float(pruned.dense().norm() * x.norm())
    assert_close(y, pruned.dense() @ x, size, pruned.condition)


@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("samples", [200, 15], ids=["regular", "singular"])
def test_weighted_by_inputs_it_is_the_best_for_these_inputs(rank, samples):
    weight, m2 = randn(31, 23, seed=0), moment(23, samples)

    def cost(approximation: Tensor) -> float:
        off = weight - approximation
        return float(((off @ m2) * off).sum())

    pruned = prune_low_rank(weight, rank, second_moment=m2)
    own = cost(pruned.dense())
    assert pruned.error == pytest.approx(
        (own / cost(torch.zeros_like(weight))) ** 0.5, rel=FLOAT64_SECOND_MOMENT
    )
    assert own < cost(truncated(weight, rank))
    values, axes = torch.linalg.eigh(m2)
    sizes = torch.linalg.svdvals(weight @ axes * values.clamp_min(0).sqrt())
    assert own == pytest.approx(float(sizes[rank:].square().sum()), rel=FLOAT64_SECOND_MOMENT)


def test_the_scale_of_the_second_moment_does_not_matter():
    weight, m2 = randn(12, 9, seed=0), moment(9, 50)
    first, second = (prune_low_rank(weight, 4, second_moment=c * m2) for c in (1.0, 1024.0))
    assert torch.equal(first.rows, second.rows)
    assert first.error == pytest.approx(second.error, rel=FLOAT64_SECOND_MOMENT)


def test_white_inputs_are_the_default():
    weight = randn(12, 9, seed=0)
    white = prune_low_rank(weight, 4, second_moment=3 * torch.eye(9))
    assert_close(white.dense(), prune_low_rank(weight, 4).dense(), float(weight.norm()), 10.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pivoted_rows_lose_least_in_a_working_dtype(dtype):
    """On a real weight, in multiples of what rounding the two factors of plain low rank costs."""
    weight = projections("minilm")[0].heads.mT.flatten(0, 1).double()
    rank = 96
    u, s, vh = torch.linalg.svd(weight)
    a, b = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
    plain = float((a.to(dtype).double() @ b.to(dtype).double() - a @ b).norm())

    def rounding(strategy: str) -> float:
        pruned = prune_low_rank(weight, rank, strategy)
        exact = pruned.dense()
        basis, coefficients = (t.to(dtype).double() for t in (pruned.basis, pruned.coefficients))
        off = (
            (coefficients @ basis - exact[pruned.rest])
            .norm()
            .hypot((basis - exact[pruned.rows]).norm())
        )
        return float(off) / plain

    pivot = rounding("pivot")
    print(f"{dtype}: pivot {pivot:.2f}, first {rounding('first'):.2f} times plain low rank")
    assert pivot <= PRUNED_NOISE
    assert pivot < rounding("window") <= rounding("first")


@pytest.mark.parametrize("rank", [0, 10])
def test_rank_out_of_range(rank):
    message = rf"rank {rank} for a weight \[12, 9\]: choose between 1 and 9$"
    with pytest.raises(ValueError, match=message):
        prune_low_rank(randn(12, 9, seed=0), rank)


def test_rank_above_that_of_the_weight():
    weight = randn(12, 3, seed=0) @ randn(3, 9, seed=1)
    assert prune_low_rank(weight, 3).error <= FLOAT64_IDENTITY
    with pytest.raises(ValueError, match=r"rank 4 for a weight of rank 3: choose between 1 and 3"):
        prune_low_rank(weight, 4)


def test_bad_second_moments():
    weight = randn(12, 9, seed=0)
    with pytest.raises(ValueError, match=r"second moment \[8, 8\] for inputs of size 9: expected"):
        prune_low_rank(weight, 4, second_moment=torch.eye(8))
    with pytest.raises(ValueError, match=r"second moment with eigenvalue -1\.0e\+00: expected E"):
        prune_low_rank(weight, 4, second_moment=torch.diag(torch.arange(-1.0, 8.0)))
    with pytest.raises(ValueError, match=r"the second moment holds inf or nan"):
        prune_low_rank(weight, 4, second_moment=torch.full((9, 9), float("nan")))


def test_values_that_are_not_finite():
    weight = randn(12, 9, seed=0)
    weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"the weight holds inf or nan: .* leave it as it is"):
        prune_low_rank(weight, 4)


@pytest.mark.parametrize(("m", "r", "n"), [(12, 5, 9), (7, 7, 7), (5, 1, 3)])
def test_product_from_its_rows_and_columns(m, r, n):
    a, b = randn(m, r, seed=0), randn(r, n, seed=1)
    product, size = a @ b, float(a.norm() * b.norm())
    rows, columns = torch.arange(m - r, m), torch.arange(r)
    basis, coefficients = decompose_product_rows(a, b, rows)
    assert (basis.shape, coefficients.shape) == ((r, n), (m, r))
    assert torch.equal(coefficients[rows], torch.eye(r, dtype=torch.float64))
    condition = float(torch.linalg.cond(a[rows]))
    assert_close(coefficients @ basis, product, size, condition)
    basis, coefficients = decompose_product_columns(a, b, columns)
    assert (basis.shape, coefficients.shape) == ((m, r), (r, n))
    condition = float(torch.linalg.cond(b[:, columns]))
    assert_close(basis @ coefficients, product, size, condition)


def test_product_needs_independent_rows():
    a, b = randn(12, 3, seed=0), randn(3, 9, seed=1)
    a[1] = 0
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2\] of the product are linearly dependent"):
        decompose_product_rows(a, b, torch.arange(3))
    with pytest.raises(ValueError, match=r"2 rows for a product of inner size 3: expected as many"):
        decompose_product_rows(a, b, torch.arange(2))
