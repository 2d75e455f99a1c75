"""round_weights: a lattice's nearest plane by hand, never worse than nearest, the fit of S."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bda_fx.passes.predict_noise import DAMPING, conditional_variances, rounding_order
from bda_fx.passes.round_weights import PANEL, refit, round_with_feedback
from tests import tolerances

DTYPES = [torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessians(count: int, size: int, *, seed: int, rank: int | None = None) -> Tensor:
    """Of features as correlated as those of a change of basis: singular values from 1 to 1/30."""
    rank = size if rank is None else rank
    rows = torch.linalg.qr(randn(count, size, size, seed=seed)).Q[:, :rank]
    rows = torch.logspace(0, -1.5, size, dtype=torch.float64)[:rank, None] * rows
    return rows.mT @ rows


def losses(got: Tensor, rows: Tensor, hessian: Tensor) -> Tensor:
    errors = got - rows
    return ((errors @ hessian) * errors).sum((1, 2))


def assert_sound(got: Tensor, rows: Tensor, hessian: Tensor, dtype: torch.dtype) -> None:
    """In the dtype, and never worse than nearest but for the float32 in which losses are judged."""
    assert got.dtype == torch.float64
    assert torch.equal(got, got.to(dtype).double())
    nearest = losses(rows.to(dtype).double(), rows, hessian)
    assert (losses(got, rows, hessian) <= nearest * (1 + tolerances.FLOAT32_LOSS)).all()


def nearest_plane(row: Tensor, hessian: Tensor, order: list[int], dtype: torch.dtype) -> Tensor:
    """Babai: each feature rounded at its best place given those already fixed, by least squares."""
    size = len(row)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(size)
    result = torch.zeros_like(row)
    for at, feature in enumerate(order):
        fixed, free = order[:at], order[at:]
        # the free features at the least loss, given the errors of the fixed ones
        errors = result[fixed] - row[fixed]
        answer = torch.linalg.solve(damped[free][:, free], damped[free][:, fixed] @ errors)
        result[feature] = (row[free] - answer)[0].to(dtype).double()
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_is_the_nearest_plane(size: int, dtype: torch.dtype) -> None:
    rows, hessian = randn(3, 7, size, seed=0), hessians(3, size, seed=1)
    got = round_with_feedback(rows, hessian, dtype)
    order = rounding_order(rows.square().mean(1), hessian.diagonal(dim1=1, dim2=2))
    for g in range(3):
        expected = torch.stack(
            [nearest_plane(row, hessian[g], order[g].tolist(), dtype) for row in rows[g]]
        )
        if losses(expected[None], rows[g : g + 1], hessian[g : g + 1]) < losses(
            rows[g : g + 1].to(dtype).double(), rows[g : g + 1], hessian[g : g + 1]
        ):
            assert torch.equal(got[g], expected)
        else:
            assert torch.equal(got[g], rows[g].to(dtype).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 5])
@pytest.mark.parametrize("count", [1, 40])
def test_never_worse_than_nearest(count: int, size: int, dtype: torch.dtype) -> None:
    rows, hessian = randn(3, count, size, seed=0), hessians(3, size, seed=1)
    got = round_with_feedback(rows, hessian, dtype)
    assert_sound(got, rows, hessian, dtype)
    if size > 1 and count > 1:
        assert (losses(got, rows, hessian) < 0.7 * losses(rows.to(dtype), rows, hessian)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 3, 15])
def test_singular_hessians(rank: int, dtype: torch.dtype) -> None:
    """Directions that are never read do not take up errors without bound."""
    rows, hessian = randn(2, 20, 16, seed=0), hessians(2, 16, seed=1, rank=rank)
    hessian[1] = hessians(1, 16, seed=2)[0]
    got = round_with_feedback(rows, hessian, dtype)
    assert_sound(got, rows, hessian, dtype)
    # Damping charges an unread error its DAMPING-th part, so all of it is below what nearest costs.
    damped = hessian + DAMPING * hessian.diagonal(dim1=1, dim2=2).mean(1)[
        :, None, None
    ] * torch.eye(16, dtype=torch.float64)
    assert (losses(got, rows, damped) <= 2 * losses(rows.to(dtype), rows, damped)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_values_stay(dtype: torch.dtype) -> None:
    rows = randn(2, 20, 16, seed=0).to(dtype).double()
    assert torch.equal(round_with_feedback(rows, hessians(2, 16, seed=1), dtype), rows)


def test_the_end_of_the_range() -> None:
    """A value that feedback would push over the largest one stays where it is finite."""
    largest = torch.finfo(torch.float16).max
    hessian = hessians(3, 8, seed=1)
    rows = randn(3, 20, 8, seed=0)
    rows[0] = largest * (
        1 - 2.0**-12 * rows[0].abs().clamp_max(1)
    )  # nearest: the largest, or below
    rows[1] = rows[1].sign() * largest
    got = round_with_feedback(rows, hessian, torch.float16)
    assert got.isfinite().all()
    assert_sound(got, rows, hessian, torch.float16)


def test_subnormal_values() -> None:
    rows, hessian = 2.0**-22 * randn(2, 20, 8, seed=0), hessians(2, 8, seed=1)
    got = round_with_feedback(rows, hessian, torch.float16)
    assert got.isfinite().all()
    assert_sound(got, rows, hessian, torch.float16)


def test_values_beyond_the_range_leave_other_heads_alone() -> None:
    rows, hessian = randn(2, 20, 8, seed=0), hessians(2, 8, seed=1)
    alone = round_with_feedback(rows[1:], hessian[1:], torch.float16)
    rows[0, 3, 2] = 1e6
    got = round_with_feedback(rows, hessian, torch.float16)
    assert torch.equal(got[0], rows[0].half().double())  # inf where nearest is
    assert torch.equal(got[1:], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_is_that_predicted(dtype: torch.dtype) -> None:
    """u² Σ_j c_j d_j, where u² is the mean square of one rounding."""
    rows, hessian = randn(4, 400, 32, seed=0), hessians(4, 32, seed=1)
    got = losses(round_with_feedback(rows, hessian, dtype), rows, hessian)
    energies = rows.square().mean(1)
    order = rounding_order(energies, hessian.diagonal(dim1=1, dim2=2))
    once = float((rows.to(dtype) - rows).square().sum() / rows.square().sum())
    predicted = once * len(rows[0]) * (energies * conditional_variances(hessian, order)).sum(1)
    ratios = (got / predicted).tolist()
    assert all(1 / tolerances.FEEDBACK_LOSS < r < tolerances.FEEDBACK_LOSS for r in ratios), ratios


def bases(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """S [G, D, D], old weights [G, n, D] and their rounded new ones."""
    s = randn(3, 8, 8, seed=seed)
    old = randn(3, 30, 8, seed=seed + 1)
    new = torch.linalg.solve(s, old, left=False)
    return s, old, new.bfloat16().double()


def misfit(new: Tensor, t: Tensor, old: Tensor) -> Tensor:
    return (new @ t - old).square().sum((1, 2))


def test_refit_is_the_least_squares_solution() -> None:
    s, old, new = bases()
    fitted = refit([(new, old, torch.arange(3))], s)
    expected = torch.linalg.lstsq(new, old).solution
    condition = float(torch.linalg.cond(new).max())
    size = float(expected.norm())
    assert float((fitted - expected).norm()) <= tolerances.identity(condition**2) * size
    assert (misfit(new, fitted, old) < misfit(new, s, old)).all()


def test_refit_weighs_fellows_of_the_same_head() -> None:
    s, old, new = bases()
    groups = torch.tensor([2, 0, 2])
    more_old = randn(3, 5, 8, seed=9)
    more = torch.linalg.solve(s[groups], more_old, left=False).bfloat16().double()
    fitted = refit([(new, old, torch.arange(3)), (more, more_old, groups)], s)
    for g in range(3):
        mine = groups == g
        every = torch.cat([new[g], more[mine].flatten(0, 1)])
        target = torch.cat([old[g], more_old[mine].flatten(0, 1)])
        expected = torch.linalg.lstsq(every, target).solution
        bound = tolerances.identity(float(torch.linalg.cond(every)) ** 2)
        assert float((fitted[g] - expected).norm()) <= bound * float(expected.norm())


def test_refit_of_exact_weights_changes_nothing() -> None:
    s, old, _ = bases()
    new = torch.linalg.solve(s, old, left=False)
    fitted = refit([(new, old, torch.arange(3))], s)
    condition = float(torch.linalg.cond(new).max()) ** 2 * float(torch.linalg.cond(s).max())
    assert float((fitted - s).norm()) <= tolerances.identity(condition) * float(s.norm())


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_heads_that_lack_rank_keep_s(rank: int) -> None:
    s, old, new = bases()
    expected = refit([(new, old, torch.arange(3))], s)
    new[1] = new[1, :, :rank] @ randn(rank, 8, seed=5)
    fitted = refit([(new, old, torch.arange(3))], s)
    assert torch.equal(fitted[1], s[1])
    assert torch.equal(fitted[::2], expected[::2])


def test_a_wrong_entry_shows() -> None:
    """Negative control: what never-worse and the least-squares tests would see."""
    rows, hessian = randn(1, 40, 8, seed=0), hessians(1, 8, seed=1)
    got = round_with_feedback(rows, hessian, torch.bfloat16)
    got[0, 3, 2] *= 1.5
    with pytest.raises(AssertionError):
        assert_sound(got, rows, hessian, torch.bfloat16)
