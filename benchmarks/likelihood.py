"""Log-likelihoods of text under a language model, and what a rewrite changes in its perplexity.

Two models that are nearly one are compared token by token on the same text. With ℓ the mean
log-likelihood per token, PPL = exp(−ℓ), and the relative change of the perplexity is

    PPL' / PPL − 1 = exp(mean of d) − 1,     d_b = ℓ_b − ℓ'_b   for each block b of text.

Blocks differ in how hard they are by far more than two such models differ in one block, so only
the paired differences say anything: the interval is that of the mean of d_b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Change:
    """Relative change of the perplexity as a fraction (0.01 is 1 %), with its interval."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds zero: the blocks cannot tell the two models apart."""
        return self.low <= 0 <= self.high


def blocks_of(ids: Tensor, count: int, length: int) -> Tensor:
    """``count`` blocks of ``length`` tokens [count, length], spread evenly over ``ids`` [N].

    Raises:
        ValueError: the blocks would overlap.
    """
    if count * length > len(ids):
        raise ValueError(
            f"{count} blocks of {length} tokens overlap in a text of {len(ids)}: ask for fewer"
        )
    return ids[: len(ids) // count * count].view(count, -1)[:, :length]


def log_likelihoods(
    logits_of: Callable[[Tensor], Tensor], blocks: Tensor, batch_size: int
) -> Tensor:
    """log p(token | those before it in its block), in float64: [N, T] ids → [N, T − 1].

    ``logits_of`` maps ids [batch_size, T] to logits [batch_size, T, vocabulary] of any dtype. These
    are taken as they come: the softmax in float64 adds nothing of its own.

    Raises:
        ValueError: ``batch_size`` does not divide the number of blocks.
    """
    if len(blocks) % batch_size:
        raise ValueError(f"{len(blocks)} blocks do not make batches of {batch_size}")
    rows = []
    with torch.no_grad():
        for ids in blocks.split(batch_size):
            logits = logits_of(ids)[:, :-1].double()
            chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
            rows.append(chosen - logits.logsumexp(-1))
    return torch.cat(rows)


def perplexity(likelihoods: Tensor) -> float:
    """exp of the mean negative log-likelihood; inf where one of them is not finite."""
    if not likelihoods.isfinite().all():
        return math.inf
    return math.exp(-float(likelihoods.mean()))


def relative_change(
    reference: Tensor, candidate: Tensor, *, resamples: int = RESAMPLES, seed: int = 0
) -> Change:
    """Change of the perplexity from ``reference`` to ``candidate``.

    Both are log-likelihoods of the same tokens, [blocks, tokens of a block]. The interval is the
    percentile bootstrap over blocks (Efron 1979): for normal differences of n blocks it is narrower
    than Student's by √((n−1)/n) z/t, which is 3 % at 64.

    Raises:
        ValueError: the shapes differ, or there are fewer than two blocks.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"the same tokens are compared, got {list(reference.shape)} log-likelihoods "
            f"and {list(candidate.shape)}"
        )
    if len(reference) < 2:
        raise ValueError("an interval takes two blocks or more, got one")
    if not (reference.isfinite().all() and candidate.isfinite().all()):
        return Change(math.inf, math.inf, math.inf)
    differences = (reference.double() - candidate.double()).mean(1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(differences), (resamples, len(differences)), generator=generator)
    tail = (1 - CONFIDENCE) / 2
    ends = differences[drawn].mean(1).quantile(torch.tensor([tail, 1 - tail]).double())
    low, high = (math.expm1(float(end)) for end in ends)
    return Change(math.expm1(float(differences.mean())), low, high)
