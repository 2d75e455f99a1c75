"""choose_basis: valid rows, the right ones by brute force, deficient heads, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bda_fx.passes.change_basis import change_basis
from bda_fx.passes.choose_basis import (
    MIN_GAIN,
    STRATEGIES,
    _changes,
    _exchange,
    _invert,
    _judge,
    choose_basis,
    obliqueness,
)
from bda_fx.passes.orthonormal_heads import orthonormal_heads
from bda_fx.passes.pick_rows import pick_rows
from tests.tolerances import EXCHANGE_TO_BEST, FLOAT64_SEARCH, identity
from tests.unit.real_weights import MODELS, projections

SHAPES = [(1, 12, 8), (3, 37, 16), (4, 23, 7), (2, 8, 8), (2, 6, 9), (16, 64, 24)]  # G, E, D


def sizes_for(e: int, d: int) -> list[int]:
    return sorted({s for s in (1, d // 2, d * 7 // 8, d) if 1 <= s <= min(d, e)} | {min(d, e)})


def random_heads(g: int, e: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(g, e, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(heads: Tensor, rows: Tensor) -> float:
    return float(obliqueness(heads, rows).sum())


def naive_obliqueness(head: Tensor, rows: Tensor) -> float:
    """J of one head of full rank by its definition: angles by projection, row by row."""
    y, _ = torch.linalg.qr(head)
    total = float(head.shape[1] - len(rows))
    for row in rows.tolist():
        others = y[[other for other in rows.tolist() if other != row]]
        apart = y[row]
        if len(others):
            q, _ = torch.linalg.qr(others.T)
            apart = apart - q @ (q.T @ apart)
        total += float((y[row].norm() / apart.norm()) ** 2)
    return total / head.shape[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("g", "e", "d"), SHAPES)
def test_rows_are_distinct_ascending_and_deterministic(strategy, g, e, d):
    heads = random_heads(g, e, d)
    for size in sizes_for(e, d):
        rows = choose_basis(heads, size, strategy)
        assert rows.dtype == torch.int64
        assert rows.shape == (size,)
        assert (rows.diff() > 0).all()
        assert rows.min() >= 0
        assert rows.max() < e
        assert torch.equal(rows, choose_basis(heads.clone(), size, strategy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_float_dtype(strategy, dtype):
    heads = random_heads(3, 37, 16).to(dtype)
    assert torch.equal(
        choose_basis(heads, 14, strategy), choose_basis(heads.double(), 14, strategy)
    )


@pytest.mark.parametrize("size", [1, 4, 7, 8])
def test_obliqueness_is_its_definition(size):
    heads = random_heads(3, 20, 8)
    rows = torch.arange(size) * 2
    expected = [naive_obliqueness(head, rows) for head in heads]
    assert obliqueness(heads, rows).tolist() == pytest.approx(expected, rel=FLOAT64_SEARCH)


def test_obliqueness_ignores_the_scale_of_a_head():
    heads = random_heads(2, 20, 8)
    scaled = heads * torch.tensor([1e-30, 1e30], dtype=torch.float64)[:, None, None]
    rows = torch.arange(8)
    expected = obliqueness(heads, rows).tolist()
    assert obliqueness(scaled, rows).tolist() == pytest.approx(expected, rel=FLOAT64_SEARCH)


@pytest.mark.parametrize("size", [3, 6, 8])
def test_predicted_changes_match_recomputation(size):
    heads = random_heads(3, 20, 8)
    search, rows = orthonormal_heads(heads), torch.arange(size)
    inverse, log_det = _invert(search, rows)
    changes = _changes(search, rows, _judge(search, rows, inverse, log_det), inverse)
    before = total(heads, rows)
    for row, slot in [(size, 0), (19, size - 1), (13, size // 2)]:
        trial = rows.clone()
        trial[slot] = row
        assert before + float(changes[row, slot]) == pytest.approx(
            total(heads, trial), rel=FLOAT64_SEARCH
        )


@pytest.mark.parametrize(("g", "e", "d", "size"), [(1, 8, 3, 3), (3, 9, 4, 4), (2, 9, 4, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_pivot_is_near_the_best_subset(g, e, d, size, seed):
    heads = random_heads(g, e, d, seed)
    subsets = itertools.combinations(range(e), size)
    best = min(total(heads, torch.tensor(subset)) for subset in subsets)
    found = total(heads, choose_basis(heads, size, "pivot"))
    assert best <= found * (1 + FLOAT64_SEARCH)
    assert found <= EXCHANGE_TO_BEST * best


@pytest.mark.parametrize(("g", "e", "d"), SHAPES)
def test_window_is_the_best_of_all_windows(g, e, d):
    heads = random_heads(g, e, d)
    for size in sizes_for(e, d):
        rows = choose_basis(heads, size, "window")
        assert torch.equal(rows, torch.arange(int(rows[0]), int(rows[0]) + size))
        windows = [torch.arange(s, s + size) for s in range(e - size + 1)]
        best = min(total(heads, window) for window in windows)
        assert total(heads, rows) == pytest.approx(best, rel=FLOAT64_SEARCH)


def test_window_finds_its_way_past_singular_windows():
    heads = random_heads(2, 60, 8)
    heads[:, 10:30] = heads[:, 10:11]  # windows in here have rank 1
    heads[:, 40:50] = 1e-9 * heads[:, 40:50] + heads[:, 39:40]  # and in here nearly so
    rows = choose_basis(heads, 8, "window")
    best = min(total(heads, torch.arange(s, s + 8)) for s in range(53))
    assert total(heads, rows) == pytest.approx(best, rel=FLOAT64_SEARCH)


@pytest.mark.parametrize(("g", "e", "d"), SHAPES)
def test_exchanges_never_raise_the_noise(g, e, d):
    heads = random_heads(g, e, d)
    search = orthonormal_heads(heads)
    for size in sizes_for(e, d):
        greedy = pick_rows(search, size)
        assert total(heads, _exchange(search, greedy)) <= total(heads, greedy) * (
            1 + FLOAT64_SEARCH
        )


def test_no_exchange_is_left_that_gains():
    heads = random_heads(4, 40, 8)
    rows = choose_basis(heads, 8, "pivot")
    least = (1 - MIN_GAIN) * total(heads, rows) * (1 - FLOAT64_SEARCH)
    for slot, row in itertools.product(range(8), sorted(set(range(40)) - set(rows.tolist()))):
        trial = rows.clone()
        trial[slot] = row
        assert total(heads, trial) >= least


@pytest.mark.parametrize(("g", "e", "d"), SHAPES)
def test_pivot_beats_the_others_on_random_weights(g, e, d):
    heads = random_heads(g, e, d)
    for size in sizes_for(e, d):
        pivot = total(heads, choose_basis(heads, size, "pivot"))
        for other in ("first", "residual-min", "window"):
            assert pivot <= total(heads, choose_basis(heads, size, other)) * (1 + FLOAT64_SEARCH)


@pytest.mark.parametrize("model", MODELS)
def test_pivot_beats_the_others_on_real_weights(model):
    for heads in [p.heads for p in projections(model)][:2]:
        d = heads.shape[2]
        for size in (d * 7 // 8, d):
            pivot = total(heads, choose_basis(heads, size, "pivot"))
            for other in ("first", "residual-min", "window"):
                assert pivot < total(heads, choose_basis(heads, size, other))


def test_residual_min_takes_the_better_end():
    heads = random_heads(2, 40, 8)
    heads[:, 1] = heads[:, 0] * (1 + 1e-6)
    assert choose_basis(heads, 8, "residual-min").tolist() == list(range(32, 40))
    assert choose_basis(heads.flip(1), 8, "residual-min").tolist() == list(range(8))


def test_first_takes_the_first():
    assert choose_basis(random_heads(2, 40, 8), 5, "first").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_inputs_are_the_only_choice(strategy):
    assert choose_basis(random_heads(2, 6, 9), 6, strategy).tolist() == list(range(6))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_heads_do_not_count(strategy):
    heads = random_heads(3, 37, 8)
    padded = torch.cat([torch.zeros(1, 37, 8, dtype=torch.float64), heads, 0 * heads[:1]])
    assert torch.equal(choose_basis(padded, 8, strategy), choose_basis(heads, 8, strategy))
    assert choose_basis(0 * heads, 8, strategy).numel() == 8


@pytest.mark.parametrize("size", [4, 7, 8])
def test_low_rank_heads_neither_poison_the_others_nor_are_lost(size):
    heads = random_heads(4, 37, 8)
    low = heads.clone()
    low[1] = heads[1, :, :1] @ heads[1, :1]
    low[2] = heads[2, :, :3] @ heads[2, :3]
    rows = choose_basis(low, size, "pivot")
    others = [0, 3]
    best = total(heads[others], choose_basis(heads[others], size, "pivot"))
    assert total(heads[others], rows) < EXCHANGE_TO_BEST * best
    change = change_basis(low, rows)
    assert change.residual <= identity(change.condition)


def test_a_head_that_one_row_alone_spans_gets_that_row():
    heads = random_heads(3, 37, 8)
    heads[1] = 0
    heads[1, 29] = 1e-3
    assert 29 in choose_basis(heads, 8, "pivot").tolist()
    assert 29 in choose_basis(heads, 8, "window").tolist()


def test_duplicate_and_zero_rows_are_not_taken_twice():
    heads = random_heads(3, 36, 8)
    heads[:, 1::2] = heads[:, ::2]
    heads[:, 8:12] = 0
    rows = choose_basis(heads, 8, "pivot")
    assert not set(rows.tolist()) & set(range(8, 12))
    assert len({row // 2 for row in rows.tolist()}) == 8


@pytest.mark.parametrize("size", [0, -1, 9])
def test_size_out_of_range(size):
    message = rf"basis size {size} for heads with 20 inputs and 8 features: choose between 1 and 8$"
    with pytest.raises(ValueError, match=message):
        choose_basis(random_heads(2, 20, 8), size, "pivot")


def test_unknown_strategy():
    with pytest.raises(ValueError, match=r"unknown basis strategy 'best': choose one of .*'pivot'"):
        choose_basis(random_heads(2, 20, 8), 4, "best")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    heads = random_heads(3, 20, 8)
    heads[2, 5, 1] = value
    with pytest.raises(ValueError, match=r"head 2 hold inf or nan: .* leave this projection"):
        choose_basis(heads, 4, "first")
