"""change_basis: both products unchanged in float64, deficient heads, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bda_fx.passes.change_basis import (
    FLATTEST,
    ChangeOfBasis,
    change_basis,
    complete_basis,
    turn_vectors,
)
from bda_fx.passes.choose_basis import STRATEGIES, choose_basis
from tests.tolerances import BALANCED_ENERGY, FLOAT64_IDENTITY, FLOAT64_SEARCH, identity

# G key/value heads, H query heads, E inputs, D features
SHAPES = [(1, 1, 12, 8), (3, 3, 37, 16), (2, 6, 23, 7), (1, 4, 40, 8), (2, 2, 8, 8), (2, 4, 6, 9)]
TOKENS, QUERY_WIDTH, OUT_WIDTH = 11, 13, 17


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizes_for(e: int, d: int) -> list[int]:
    return sorted({s for s in (1, d // 2, d * 7 // 8, d) if 1 <= s <= min(d, e)} | {min(d, e)})


def naive_scores(
    x: Tensor, y: Tensor, w: Tensor, b: Tensor, u: Tensor, a: Tensor, groups: Tensor
) -> list[Tensor]:
    """[S, T] scores of each query head, head by head."""
    return [(y @ u[i] + a[i]) @ (x @ w[g] + b[g]).T for i, g in enumerate(groups.tolist())]


def naive_values(x: Tensor, w: Tensor, b: Tensor, o: Tensor, groups: Tensor) -> list[Tensor]:
    """[T, F] each query head's V O, before attention mixes the tokens."""
    return [(x @ w[g] + b[g]) @ o[i] for i, g in enumerate(groups.tolist())]


def projected(x: Tensor, change: ChangeOfBasis, g: int) -> Tensor:
    """K' = [x_B | 0] + x_R C + b', [T, D]."""
    out = x[:, change.rest] @ change.coefficients[g]
    out[:, : len(change.rows)] += x[:, change.rows]
    return out if change.bias is None else out + change.bias[g]


def assert_close(got: Tensor, expected: Tensor, factors: float, condition: float) -> None:
    """Error relative to the norms of the factors, as the product itself may cancel."""
    assert float((got - expected).norm()) <= identity(condition) * factors


def assert_products_unchanged(heads: Tensor, bias: Tensor, rows: Tensor, groups: Tensor) -> None:
    _, e, d = heads.shape
    h = len(groups)
    x, y = randn(TOKENS, e, seed=1), randn(5, QUERY_WIDTH, seed=2)
    u, a = randn(h, QUERY_WIDTH, d, seed=3), randn(h, d, seed=4)
    o = randn(h, d, OUT_WIDTH, seed=5)
    change = change_basis(heads, rows, bias)
    assert change.residual <= identity(change.condition)
    moved_u = turn_vectors(u, change, groups, against=True)
    moved_a = turn_vectors(a.unsqueeze(1), change, groups, against=True).squeeze(1)
    moved_o = turn_vectors(o.mT, change, groups, against=True).mT
    scores = naive_scores(x, y, heads, bias, u, a, groups)
    values = naive_values(x, heads, bias, o, groups)
    for i, group in enumerate(groups.tolist()):
        key = projected(x, change, group)
        query = y @ moved_u[i] + moved_a[i]
        size = float((y @ u[i] + a[i]).norm() * (x @ heads[group] + bias[group]).norm())
        assert_close(query @ key.T, scores[i], size, change.condition)
        size = float((x @ heads[group] + bias[group]).norm() * o[i].norm())
        assert_close(key @ moved_o[i], values[i], size, change.condition)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("g", "h", "e", "d"), SHAPES)
def test_both_products_are_unchanged(strategy, g, h, e, d):
    heads, bias = randn(g, e, d, seed=0), randn(g, d, seed=9)
    groups = torch.arange(h) // (h // g)
    for size in sizes_for(e, d):
        assert_products_unchanged(heads, bias, choose_basis(heads, size, strategy), groups)


def test_groups_may_come_in_any_order():
    heads, bias = randn(3, 37, 8, seed=0), randn(3, 8, seed=9)
    groups = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    assert_products_unchanged(heads, bias, choose_basis(heads, 7, "pivot"), groups)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_nearly_singular_basis_costs_its_condition_and_no_more(gap):
    heads, bias = randn(2, 20, 8, seed=0), randn(2, 8, seed=9)
    heads[:, 1] = heads[:, 0] + gap * heads[:, 1]
    change = change_basis(heads, torch.arange(8))
    assert change.condition > 1 / gap
    assert_products_unchanged(heads, bias, torch.arange(8), torch.arange(2))


def test_shapes_dtypes_and_the_identity_block():
    heads, bias = randn(3, 20, 8, seed=0).float(), randn(3, 8, seed=9).float()
    rows = torch.tensor([17, 3, 5, 0, 11])
    change = change_basis(heads, rows, bias)
    assert torch.equal(change.rows, rows)
    assert torch.equal(change.rest, torch.tensor(sorted(set(range(20)) - set(rows.tolist()))))
    assert change.coefficients.shape == (3, 15, 8)
    assert change.bias is not None
    assert change.bias.shape == (3, 8)
    assert {t.dtype for t in (change.s, change.s_inv, change.coefficients)} == {torch.float64}
    assert torch.equal(change.s[:, :5], heads[:, rows].double())
    eye = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    error = (change.s @ change.s_inv - eye).norm(dim=(1, 2)).max()
    assert float(error) <= identity(change.condition)


def test_completion_is_orthogonal_and_as_large_as_the_basis():
    heads = randn(2, 20, 8, seed=0)
    change = change_basis(heads, torch.arange(5))
    top, null = change.s[:, :5], change.s[:, 5:]
    mean = torch.linalg.svdvals(top).mean(1)
    size = float(top.norm() * null.norm())
    assert float((top @ null.mT).norm()) <= FLOAT64_IDENTITY * size
    expected = mean[:, None, None].square() * torch.eye(3, dtype=torch.float64)
    assert float((null @ null.mT - expected).norm()) <= FLOAT64_IDENTITY * float(expected.norm())


def test_condition_is_that_of_the_worst_head():
    heads = randn(3, 20, 8, seed=0)
    change = change_basis(heads, torch.arange(8))
    assert change.condition == pytest.approx(
        float(torch.linalg.cond(change.s).max()), rel=identity(change.condition)
    )


def test_deterministic():
    heads, bias = randn(3, 20, 8, seed=0), randn(3, 8, seed=9)
    first, second = (change_basis(heads.clone(), torch.arange(5), bias) for _ in range(2))
    assert torch.equal(first.s, second.s)
    assert torch.equal(first.coefficients, second.coefficients)
    largest = first.s[:, 5:].gather(2, first.s[:, 5:].abs().argmax(2, keepdim=True))
    assert (largest > 0).all()


def test_all_inputs_in_the_basis_leave_no_projection():
    heads, bias = randn(2, 6, 9, seed=0), randn(2, 9, seed=9)
    change = change_basis(heads, torch.arange(6))
    assert change.coefficients.shape == (2, 0, 9)
    assert change.residual == 0
    assert_products_unchanged(heads, bias, torch.arange(6), torch.arange(2))


@pytest.mark.parametrize("size", [1, 4, 7, 8])
def test_zero_head(size):
    heads = randn(3, 20, 8, seed=0)
    heads[1] = 0
    change = change_basis(heads, torch.arange(size))
    assert change.residual <= identity(change.condition)
    assert not change.coefficients[1].any()
    alone = change_basis(heads[1:2], torch.arange(size))
    assert (alone.residual, alone.condition) == (0.0, 1.0)


def test_bias_of_a_zero_head_needs_a_spare_direction():
    heads, bias = randn(3, 20, 8, seed=0), randn(3, 8, seed=9)
    heads[1] = 0
    assert_products_unchanged(heads, bias, torch.arange(7), torch.arange(3))
    assert change_basis(heads, torch.arange(8), bias).residual == pytest.approx(1.0)


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_head_is_exact_while_the_basis_spans_it(size, rank):
    heads = randn(3, 20, 8, seed=0)
    heads[1] = heads[1, :, :rank] @ heads[1, :rank]
    change = change_basis(heads, torch.arange(size))
    assert change.residual <= identity(change.condition)


def test_spare_directions_take_what_a_deficient_basis_misses():
    heads, bias = randn(2, 20, 8, seed=0), randn(2, 8, seed=9)
    heads[1, 1:4] = heads[1, :1]  # W_B of head 1 has rank 1 of 4; the other rows span two more
    heads[1, 4:] = heads[1, 4:, :2] @ heads[1, 10:12]
    assert_products_unchanged(heads, bias, torch.arange(4), torch.arange(2))


def test_residual_tells_when_the_basis_misses_a_direction():
    heads = randn(2, 20, 8, seed=0)
    heads[1, 1] = heads[1, 0]
    change = change_basis(heads, torch.arange(8))
    assert change.residual > 1e-3
    assert change.condition < float("inf")
    # negative control: one wrong coefficient shows in the residual's definition
    good = change_basis(heads, torch.arange(1, 9))
    spoiled = good.coefficients.clone()
    spoiled[0, 3, 2] *= 1 + 1e-3
    off = (spoiled @ good.s - heads[:, good.rest]).norm() / heads.norm()
    assert float(off) > identity(good.condition)


@pytest.mark.parametrize("scale", [1e-100, 1e-200, 1e-300])
def test_a_residual_does_not_vanish_with_the_weights(scale):
    heads = randn(2, 20, 8, seed=0)
    heads[1, 1] = heads[1, 0]
    expected = change_basis(heads, torch.arange(8)).residual
    small = change_basis(scale * heads, torch.arange(8))
    assert small.residual == pytest.approx(expected, rel=identity(small.condition))
    good = change_basis(scale * heads, torch.arange(1, 9))
    assert good.residual <= identity(good.condition)


def test_weights_without_an_inverse_are_no_change_of_basis():
    """1 / 1e-310 is inf in float64."""
    heads = 1e-310 * randn(2, 20, 8, seed=0)
    assert change_basis(heads, torch.arange(8)).residual == float("inf")
    assert complete_basis(heads, torch.arange(8))[1] == float("inf")


def test_a_nonfinite_head_is_named():
    heads = randn(3, 20, 8, seed=0)
    heads[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"head 2 hold inf or nan: expected finite values"):
        change_basis(heads, torch.arange(8))
    bias = randn(3, 8, seed=9)
    bias[1, 0] = float("inf")
    with pytest.raises(ValueError, match=r"weights or bias of head 1 hold inf or nan"):
        change_basis(randn(3, 20, 8, seed=0), torch.arange(8), bias)


@pytest.mark.parametrize("rows", [[], [0, 0], [0, 20], [-1, 2]])
def test_bad_rows(rows):
    with pytest.raises(ValueError, match=r"expected distinct input features in 0\.\.19; take them"):
        change_basis(randn(3, 20, 8, seed=0), torch.tensor(rows, dtype=torch.int64))


def test_too_many_rows():
    with pytest.raises(ValueError, match=r"9 basis rows for heads with 20 inputs and 8 features"):
        change_basis(randn(3, 20, 8, seed=0), torch.arange(9))


def factors_of(seed: int = 0, g: int = 3, e: int = 20, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Heads [G, E, D] and the second moments [G, D, D] of both factors, neither of them white."""
    scales = torch.logspace(0, -1, d, dtype=torch.float64)
    heads = randn(g, e, d, seed=seed) * scales @ randn(g, d, d, seed=seed + 1)
    query = randn(g, 30, d, seed=seed + 2) * scales @ randn(g, d, d, seed=seed + 3)
    return heads, heads.mT @ heads, query.mT @ query


def energies(change: ChangeOfBasis, key: Tensor, query: Tensor) -> Tensor:
    """E[K'²] E[Q'²] of each feature, [G, D]."""
    kappa = (change.s_inv.mT @ key @ change.s_inv).diagonal(dim1=1, dim2=2)
    return kappa * (change.s @ query @ change.s.mT).diagonal(dim1=1, dim2=2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 4, 6, 7, 8])
def test_balanced_completion(size: int, seed: int) -> None:
    heads, key, query = factors_of(seed)
    rows = choose_basis(heads, size, "pivot")
    plain, change = (change_basis(heads, rows, None, m) for m in (None, (key, query)))
    assert torch.equal(change.s[:, :size], heads[:, rows])
    assert change.residual <= identity(change.condition)
    eye = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    assert float((change.s @ change.s_inv - eye).norm()) <= identity(change.condition)
    # basis features are x_B and nothing else
    unit = torch.linalg.solve(change.s, heads[:, rows], left=False)
    assert float((unit - eye[:, :size]).norm()) <= identity(change.condition)
    found, before = energies(change, key, query), energies(plain, key, query)
    assert (found[:, :size] <= before[:, :size] * (1 + FLOAT64_SEARCH)).all()
    assert (found.sum(1) <= before.sum(1) * BALANCED_ENERGY).all()
    spare = found[:, size:]
    if size < 8:
        expected = spare.mean(1, keepdim=True).expand_as(spare)
        # A singular value below √FLATTEST of the largest is taken for that.
        level = spare.shape[1] * FLATTEST**0.5
        assert spare.flatten().tolist() == pytest.approx(expected.flatten().tolist(), rel=level)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_no_completion_does_better_at_what_is_balanced(size: int) -> None:
    """Basis features have the least energy at all, the others the least product with these."""
    heads, key, query = factors_of()
    change = change_basis(heads, torch.arange(size), None, (key, query))
    least = energies(change, key, query)
    for seed in range(100):
        step = (1.0, 0.1, 0.01)[seed % 3] * randn(3, 8 - size, 8, seed=seed)
        anything, within = change.s.clone(), change.s.clone()
        anything[:, size:] += step * anything[:, size:].norm()
        within[:, size:] += step[:, :, size:] @ within[:, size:]
        for s in (anything, within):
            other = energies(replace(change, s=s, s_inv=torch.linalg.inv(s)), key, query)
            assert (other[:, :size] >= least[:, :size] * (1 - FLOAT64_SEARCH)).all()
        squares = other[:, size:].sqrt().sum(1), least[:, size:].sqrt().sum(1)
        assert (squares[0] >= squares[1] * (1 - FLOAT64_SEARCH)).all()


def test_spare_features_share_the_singular_values_of_their_product() -> None:
    """Σ E[K'²] E[Q'²] = (Σ σ)² / n, σ those of K P Qᵀ, where P leaves what basis features lack."""
    heads, key, query = factors_of()
    change = change_basis(heads, torch.arange(5), None, (key, query))
    null = torch.linalg.svd(heads[:, :5]).Vh[:, 5:]
    met = null @ key
    rest = met.mT @ torch.linalg.solve(met @ null.mT, met)  # E[(K P)ᵀ K P]
    squares = torch.linalg.eigvals(rest @ query).real.sort(1).values[:, -3:]
    expected = squares.sqrt().sum(1).square() / 3
    got = energies(change, key, query)[:, 5:].sum(1)
    assert got.tolist() == pytest.approx(expected.tolist(), rel=FLOAT64_SEARCH)


@pytest.mark.parametrize("what", ["zero head", "zero query", "rank one query", "low rank head"])
def test_degenerate_heads_are_balanced_as_far_as_they_can_be(what: str) -> None:
    heads, key, query = factors_of()
    if what == "zero head":
        heads[1] = 0
    elif what == "zero query":
        query[1] = 0
    elif what == "rank one query":
        query[1] = query[1, :1].mT @ query[1, :1]
    else:
        heads[1] = heads[1, :, :3] @ heads[1, :3]
    key = heads.mT @ heads
    change = change_basis(heads, torch.arange(5), None, (key, query))
    assert change.s.isfinite().all()
    assert change.residual <= identity(change.condition)
    if what in ("zero head", "low rank head"):
        plain = change_basis(heads, torch.arange(5))
        assert torch.equal(change.s[1], plain.s[1])
    expected = change_basis(*(factors_of()[0], torch.arange(5), None), factors_of()[1:])
    assert torch.equal(change.s[0], expected.s[0])


@pytest.mark.parametrize("scale", [1e-30, 1e-100, 1e-160, 1e-300, 1e-310])
def test_small_heads_are_balanced_or_left_but_finite(scale: float) -> None:
    heads, _, query = factors_of()
    heads = scale * heads
    change = change_basis(heads, torch.arange(5), None, (heads.mT @ heads, query))
    assert change.s.isfinite().all()
    if scale > 1e-300:
        assert change.residual <= identity(change.condition)
    assert complete_basis(heads, torch.arange(5), None, (heads.mT @ heads, query))[0].equal(
        change.s
    )


def test_balanced_completion_is_deterministic() -> None:
    heads, key, query = factors_of()
    first, second = (
        change_basis(heads.clone(), torch.arange(5), None, (key.clone(), query.clone()))
        for _ in range(2)
    )
    assert torch.equal(first.s, second.s)
    assert torch.equal(first.coefficients, second.coefficients)


def test_balanced_products_are_unchanged() -> None:
    heads, key, query = factors_of()
    bias = randn(3, 8, seed=9)
    key = key + bias.unsqueeze(2) * bias.unsqueeze(1)
    change = change_basis(heads, torch.arange(5), bias, (key, query))
    x = randn(TOKENS, 20, seed=1)
    u = randn(3, QUERY_WIDTH, 8, seed=3)
    moved = turn_vectors(u, change, torch.arange(3), against=True)
    for g in range(3):
        original = x @ heads[g] + bias[g]
        size = float(u[g].norm() * original.norm())
        assert_close(
            moved[g] @ projected(x, change, g).T, u[g] @ original.T, size, change.condition
        )
