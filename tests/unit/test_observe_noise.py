"""observe_noise: the formula by a naive loop where it is exact, and what it is told apart from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bda_fx.passes.change_basis import change_basis
from bda_fx.passes.observe_noise import Observed, Rounded, pick_tokens
from bda_fx.passes.predict_noise import (
    Moments,
    PartnerHeads,
    partial_roundings,
    predict_noise,
    second_moments,
)

E, D, SIZE = 7, 4, 3
GROUPS = torch.tensor([0, 1, 1])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outer(vectors: Tensor) -> Tensor:
    return vectors.unsqueeze(2) * vectors.unsqueeze(1)


class OneToken:
    """Two key heads met by three vectors of queries; one token, and one weight gradient for every
    input, so that means of products are products of means."""

    def __init__(self, *, computed: bool) -> None:
        self.heads, self.queries = randn(2, E, D, seed=0), randn(3, D, E, seed=1)
        self.k, self.q = randn(2, D, seed=2), randn(3, D, seed=3)
        self.k_effect, self.q_effect = randn(2, D, seed=4), randn(3, D, seed=5)
        self.k_gradient, self.q_gradient = randn(2, D, seed=6), randn(3, D, seed=7)
        self.computed = computed
        k, q = self.k.unsqueeze(1), self.q.unsqueeze(1)
        own = Observed(k, self.k_effect.unsqueeze(1), outer(self.k_gradient))
        met = Observed(q, self.q_effect.unsqueeze(1), outer(self.q_gradient))
        partner = PartnerHeads(self.queries, None, GROUPS, E if computed else 0, met)
        self.moments = second_moments(self.heads, None, [partner], observed=own)
        self.change = change_basis(self.heads, torch.arange(SIZE))

    def noise(self, dtype: torch.dtype, moments: Moments | None = None) -> float:
        change = self.change
        return predict_noise(moments or self.moments, change.s, change.s_inv, SIZE, dtype).site

    def naive(self, rate: float) -> float:
        """Value by value, weight by weight; weights rounded to nearest."""
        s, s_inv = self.change.s, self.change.s_inv
        was = now = 0.0
        more, less = (1 + rate * partial_roundings(n) for n in (E, E - SIZE))
        for g in range(2):
            value, effect = self.k[g] @ s_inv[g], self.k_effect[g] @ s[g].T
            weight, gradient = self.heads[g] @ s_inv[g], self.k_gradient[g] @ s[g].T
            for j in range(D):
                was += float(self.k[g, j] ** 2 * self.k_effect[g, j] ** 2) * more
                rounded = value[j] ** 2 * effect[j] ** 2
                left = weight[SIZE:, j].square().sum()
                now += float(left * gradient[j] ** 2)
                now += float(rounded * left / weight[:, j].square().sum()) * less
                now += float(rounded) if j < SIZE else 0.0
        for i, g in enumerate(GROUPS.tolist()):
            there, back = (s[g].T, s_inv[g]) if self.computed else (s_inv[g], s[g].T)
            value, effect = self.q[i] @ there, self.q_effect[i] @ back
            weight, gradient = self.queries[i].T @ s[g].T, self.q_gradient[i] @ s_inv[g]
            for j in range(D):
                times = more if self.computed else 1
                was += float(self.q[i, j] ** 2 * self.q_effect[i, j] ** 2) * times
                now += float(value[j] ** 2 * effect[j] ** 2) * times
                now += float(weight[:, j].square().sum() * gradient[j] ** 2)
        return (now / was) ** 0.5


@pytest.mark.parametrize("computed", [True, False], ids=["queries", "outputs"])
def test_value_by_value(computed: bool) -> None:
    given = OneToken(computed=computed)
    assert given.noise(torch.float32) == pytest.approx(given.naive(rate=1.0))
    # Rounding with feedback leaves less of an error in a weight than rounding to nearest.
    assert given.noise(torch.bfloat16) < given.naive(rate=0.0)


def test_effects_that_no_output_hears_cost_nothing() -> None:
    """What is said of keys is that no output depends on them: their bits may be lost."""
    given = OneToken(computed=True)
    deaf = [
        replace(part, effects=torch.zeros_like(part.effects)) if part.along else part
        for part in given.moments.rounded
    ]
    alone = given.noise(torch.float32, replace(given.moments, rounded=tuple(deaf)))
    queries = [part for part in given.moments.rounded if not part.along]
    assert alone == pytest.approx(
        given.noise(torch.float32, replace(given.moments, rounded=tuple(queries)))
    )


def test_a_factor_that_was_not_seen_leaves_the_weights_to_tell() -> None:
    given = OneToken(computed=True)
    unseen = PartnerHeads(given.queries, None, GROUPS, E)
    k, k_effect = given.k.unsqueeze(1), given.k_effect.unsqueeze(1)
    own = Observed(k, k_effect, outer(given.k_gradient))
    blind = second_moments(given.heads, None, [unseen], observed=own)
    assert blind.rounded == ()
    weights = replace(given.moments, rounded=())
    assert given.noise(torch.float32, blind) == given.noise(torch.float32, weights)
    assert given.noise(torch.float32, weights) != pytest.approx(given.noise(torch.float32))


def rounded(values: Tensor, effects: Tensor, *, typical: bool) -> Rounded:
    return Rounded(values, effects, torch.zeros(1, dtype=torch.int64), True, typical=typical)


@pytest.mark.parametrize("typical", [True, False])
def test_tokens_with_large_values_that_are_not_heard(typical: bool) -> None:
    """On real inputs they cost nothing; on made-up ones nobody knows which tokens these will be."""
    values = torch.tensor([[[1000.0, 1000.0], [1.0, 2.0]]])
    effects = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    s = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    size, heard, both = rounded(values, effects, typical=typical).turned(s, torch.linalg.inv(s))
    assert size.tolist() == [[(1000**2 + 1) / 4, 1000**2 + 4]]
    assert heard.tolist() == [[4.0, 1.0]]
    means = [[(1000**2 + 1) / 4 * 4 / 2, (1000**2 + 4) / 2]]
    assert both.tolist() == ([[1.0, 4.0]] if typical else means)


def test_picked_tokens_stand_for_all() -> None:
    values, effects = randn(3, 1000, D, seed=0), randn(3, 1000, D, seed=1)
    values[:, 17] *= 100  # one token that makes most of the noise
    few = pick_tokens(values, effects, count=100)
    assert few[0].shape == few[1].shape == (3, 100, D)
    every, kept = ((v * e).square().sum((0, 2)) for v, e in ((values, effects), few))
    assert float(kept.max()) == float(every.max())
    assert float(kept.sum()) == pytest.approx(float(every.sum()), rel=0.01)
    others = every.sum() - every.max(), kept.sum() - kept.max()
    assert float(others[1]) == pytest.approx(float(others[0]), rel=0.1)


def test_tokens_that_are_not_typical_are_picked_evenly() -> None:
    values, effects = randn(3, 1000, D, seed=0), randn(3, 1000, D, seed=1)
    few = pick_tokens(values, effects, count=128, typical=False)
    assert few[0].shape == few[1].shape == (3, 128, D)
    mean, size = (float(v.square().mean()) for v in (values, few[0]))
    assert size == pytest.approx(mean, rel=0.1)
    every, heard = (float(e.square().sum()) for e in (effects, few[1]))
    assert heard == pytest.approx(every, rel=0.1)


def test_few_tokens_are_all_kept() -> None:
    values, effects = randn(2, 8, D, seed=0), randn(2, 8, D, seed=1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(pick_tokens(values, effects, count=8), (values, effects), strict=True)
    )
