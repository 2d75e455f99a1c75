"""sample_errors: features that stand for all, and which nodes have none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from bda_fx import run_backward
from bda_fx.estimate_shares import Shares, estimate_shares
from bda_fx.passes.find_sites import find_sites
from bda_fx.sample_errors import FEW_TOKENS, MANY, PART, sample_of
from tests import tolerances
from tests.programs import Attention, canonical, randn, seeded

WIDTH = 2 * MANY


def node_of(target: object, *args: Tensor) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(
        target, tuple(graph.placeholder(f"x{at}") for at in range(len(args)))
    )


def linear(tokens: int, features: int) -> tuple[fx.Node, tuple[Tensor, ...], Tensor]:
    x, w, b = randn(tokens, 8, seed=1), randn(features, 8, seed=2), randn(features, seed=3)
    return node_of(torch.ops.aten.linear.default, x, w, b), (x, w, b), x @ w.T + b


def test_a_sample_is_exact_where_features_are_loud_and_stands_for_the_others() -> None:
    n, args, value = linear(64, WIDTH)
    value[:, 17] *= 1e3
    sample = sample_of(n, args, value)
    assert sample is not None
    assert len(sample.features) == 2 * (WIDTH // (2 * PART))
    assert len(sample.features.unique()) == len(sample.features)
    assert sample.weights[sample.features == 17].tolist() == [1.0]
    # All features count once, whether they are looked at or stood for.
    assert float(sample.weights.square().sum()) == pytest.approx(WIDTH)
    stands_for = (sample.of(value) * sample.weights).square().sum()
    assert float(stands_for) == pytest.approx(
        float(value.square().sum()), rel=tolerances.SORTED_SAMPLE
    )


def test_arguments_make_the_same_features() -> None:
    n, args, value = linear(64, WIDTH)
    sample = sample_of(n, args, value)
    assert sample is not None
    made = torch.ops.aten.linear.default(*sample.arguments(args))
    torch.testing.assert_close(made, sample.of(value))
    x, w, _ = args
    assert sample.arguments((x, w, None))[2] is None


@pytest.mark.parametrize(
    ("tokens", "features"), [(FEW_TOKENS - 1, WIDTH), (64, MANY - 1)], ids=["tokens", "features"]
)
def test_few_are_looked_at_entirely(tokens: int, features: int) -> None:
    assert sample_of(*linear(tokens, features)) is None


def test_what_is_no_linear_is_looked_at_entirely() -> None:
    x = randn(64, WIDTH)
    assert sample_of(node_of(torch.ops.aten.gelu.default, x), (x,), x) is None
    w = randn(8)
    y = x[:, :8] @ w  # a weight without a features axis
    assert sample_of(node_of(torch.ops.aten.linear.default, x, w), (x[:, :8], w), y) is None


def test_shares_are_those_of_all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a wide feed-forward part, some of whose features are loud."""

    class Wide(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.gelu(self.up(super().forward(x)[..., :16])))

    model = seeded(Wide())
    with torch.no_grad():
        model.down.weight[::100] *= 30
    program = canonical(model, randn(2, 40, model.q.in_features))
    sites = find_sites(program).sites
    asked: list[bool] = []

    def all_features(*args: object) -> None:
        asked.append(True)

    def shares() -> Shares:
        found = estimate_shares(program, sites)
        assert found is not None
        return found

    sampled = shares()
    monkeypatch.setattr(run_backward, "sample_of", all_features)
    every = shares()
    assert asked
    assert sampled.of_sites != every.of_sites  # negative control: there was something to sample
    for mine, all_of_them in zip(sampled.of_sites, every.of_sites, strict=True):
        assert mine == pytest.approx(all_of_them, rel=tolerances.SAMPLED_ERRORS)
