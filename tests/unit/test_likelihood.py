"""Log-likelihoods, perplexity and the paired interval of its change, on data made for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.likelihood import (
    CONFIDENCE,
    Change,
    blocks_of,
    log_likelihoods,
    perplexity,
    relative_change,
)
from tests import tolerances

VOCABULARY = 11
BLOCKS = 64
TOKENS = 20


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal_pair(shift: float, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of two models, one worse by ``shift``, each block's tokens by chance."""
    reference = draw(BLOCKS, TOKENS, seed=2 * seed) - 3
    return reference, reference - shift - noise * draw(BLOCKS, TOKENS, seed=2 * seed + 1)


def test_blocks_are_spread_over_the_text() -> None:
    assert blocks_of(torch.arange(103), 4, 5).tolist() == [
        [0, 1, 2, 3, 4], [25, 26, 27, 28, 29], [50, 51, 52, 53, 54], [75, 76, 77, 78, 79],
    ]  # fmt: skip


def test_blocks_do_not_overlap() -> None:
    with pytest.raises(ValueError, match="4 blocks of 6 tokens overlap in a text of 23"):
        blocks_of(torch.arange(23), 4, 6)
    assert blocks_of(torch.arange(24), 4, 6).flatten().tolist() == list(range(24))


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_log_likelihoods_are_of_the_next_token(batch_size: int) -> None:
    """Against the loss that training uses, on a model of pairs of tokens."""
    table = draw(VOCABULARY, VOCABULARY).float()
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(VOCABULARY, (6, TOKENS), generator=generator)
    found = log_likelihoods(lambda ids: table[ids], blocks, batch_size)
    assert found.shape == (6, TOKENS - 1)
    assert found.dtype == torch.float64
    logits = table.double()[blocks[:, :-1]]
    loss = functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert perplexity(found) == pytest.approx(math.exp(loss), rel=tolerances.FLOAT64_IDENTITY)


def test_batches_are_whole() -> None:
    with pytest.raises(ValueError, match="6 blocks do not make batches of 4"):
        log_likelihoods(lambda ids: ids, torch.zeros(6, 3, dtype=torch.long), 4)


def test_the_same_model_changes_nothing() -> None:
    reference = draw(BLOCKS, TOKENS)
    change = relative_change(reference, reference.clone())
    assert change == Change(0.0, 0.0, 0.0)
    assert change.holds_zero


def test_change_is_that_of_the_perplexities() -> None:
    reference, candidate = normal_pair(shift=0.05, noise=0.1, seed=1)
    change = relative_change(reference, candidate)
    exact = perplexity(candidate) / perplexity(reference) - 1
    assert change.value == pytest.approx(exact, rel=tolerances.FLOAT64_PERPLEXITY_CHANGE)
    assert change.low < change.value < change.high


def test_pairing_takes_out_how_hard_a_block_is() -> None:
    """The interval is the same whether blocks are alike or differ by a hundred times the change."""
    reference, candidate = normal_pair(shift=0.01, noise=0.01, seed=2)
    hardness = draw(BLOCKS, 1, seed=99)
    plain = relative_change(reference, candidate)
    varied = relative_change(reference + hardness, candidate + hardness)
    for end in ("value", "low", "high"):
        expected = getattr(plain, end)
        assert getattr(varied, end) == pytest.approx(
            expected, rel=tolerances.FLOAT64_PERPLEXITY_CHANGE
        )
    unpaired = relative_change(reference + hardness, candidate + hardness.roll(1, 0))
    assert unpaired.high - unpaired.low > 30 * (plain.high - plain.low)


def test_interval_is_the_normal_one() -> None:
    """For the mean of normal differences: z s √((n−1)/n) / √n on either side."""
    reference, candidate = normal_pair(shift=0.0, noise=1e-3, seed=3)
    change = relative_change(reference, candidate)
    spread = (reference - candidate).mean(1).std(correction=0) / math.sqrt(BLOCKS)
    z = float(torch.special.ndtri(torch.tensor(0.5 + CONFIDENCE / 2, dtype=torch.float64)))
    width = 2 * z * float(spread)
    assert change.high - change.low == pytest.approx(width, rel=tolerances.BOOTSTRAP_WIDTH)


def test_interval_covers_as_often_as_it_says() -> None:
    shift, trials = 0.01, 400
    covered = 0
    for seed in range(trials):
        change = relative_change(*normal_pair(shift, 0.05, seed), resamples=2000, seed=seed)
        covered += change.low <= math.expm1(shift) <= change.high
    assert abs(covered / trials - CONFIDENCE) <= tolerances.coverage(trials)


def test_interval_tells_a_change_from_none() -> None:
    assert relative_change(*normal_pair(shift=0.0, noise=0.01, seed=4)).holds_zero
    assert not relative_change(*normal_pair(shift=0.01, noise=0.01, seed=4)).holds_zero


def test_overflow_is_an_infinite_change() -> None:
    reference = draw(BLOCKS, TOKENS)
    broken = reference.clone()
    broken[3, 4] = -math.inf
    assert relative_change(reference, broken) == Change(math.inf, math.inf, math.inf)
    assert not relative_change(reference, broken).holds_zero
    assert perplexity(broken) == math.inf


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the same tokens are compared, got \[3, 4\].*\[3, 5\]"):
        relative_change(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="two blocks or more"):
        relative_change(torch.zeros(1, 4), torch.zeros(1, 4))
