"""predict_noise: the formula by a naive loop, its limits, and measured noise on real weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bda_fx.passes.change_basis import ChangeOfBasis, change_basis
from bda_fx.passes.choose_basis import choose_basis
from bda_fx.passes.predict_noise import PartnerHeads, predict_head_noise, predict_noise
from tests.tolerances import (
    NOISE_PREDICTION,
    NOISE_PREDICTION_EXACT_WEIGHTS,
    identity,
)
from tests.unit.real_weights import MODELS, Projection, projections


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_energies(
    heads: Tensor, bias: Tensor, partners: list[PartnerHeads], change: ChangeOfBasis
) -> tuple[list[float], list[float]]:
    """Σ_j E[K_j²] E[Q_j²] per key head before and after, from K S⁻¹ and Q Sᵀ as matrices."""
    was, now = [0.0] * len(heads), [0.0] * len(heads)
    for partner in partners:
        for i, g in enumerate(partner.groups.tolist()):
            key = torch.cat([heads[g], bias[g : g + 1]])
            query = partner.weight[i]
            if partner.bias is not None:
                query = torch.cat([query, partner.bias[i][:, None]], 1)
            s = change.s[g]
            was[g] += float(key.square().sum(0) @ query.square().sum(1))
            moved = torch.linalg.solve(s, key, left=False)
            now[g] += float(moved.square().sum(0) @ (s @ query).square().sum(1))
    return was, now


@pytest.mark.parametrize("size", [1, 4, 7, 8])
def test_formula(size):
    heads, bias = randn(3, 20, 8, seed=0), randn(3, 8, seed=1)
    partners = [
        PartnerHeads(randn(6, 8, 13, seed=2), randn(6, 8, seed=3), torch.arange(6) // 2),
        PartnerHeads(randn(2, 8, 5, seed=4), None, torch.tensor([2, 0])),
    ]
    change = change_basis(heads, torch.arange(size), bias)
    was, now = naive_energies(heads, bias, partners, change)
    relative = identity(change.condition)
    ratios = [(n / w) ** 0.5 for n, w in zip(now, was, strict=True)]
    per_head = predict_head_noise(heads, bias, change, partners)
    assert per_head.tolist() == pytest.approx(ratios, rel=relative)
    site, worst = predict_noise(heads, bias, change, partners)
    assert site == pytest.approx((sum(now) / sum(was)) ** 0.5, rel=relative)
    assert worst == pytest.approx(max(ratios), rel=relative)
    exact = predict_noise(heads, bias, change, partners, exact_weights=True)
    assert exact == pytest.approx((2**0.5 * site, 2**0.5 * worst))


def test_site_weighs_heads_by_their_energy():
    heads, groups = randn(2, 20, 8, seed=0), torch.arange(2)
    partner = randn(2, 8, 13, seed=2)
    partner[1] *= 1e-3
    change = change_basis(heads, torch.arange(8))
    site, worst = predict_noise(heads, None, change, [PartnerHeads(partner, None, groups)])
    alone = change_basis(heads[:1], torch.arange(8))
    loud, _ = predict_noise(
        heads[:1], None, alone, [PartnerHeads(partner[:1], None, torch.tensor([0]))]
    )
    assert site == pytest.approx(loud, rel=worst**2 * 1e-6)  # head 1 has 1e-6 of the energy
    assert worst >= site


def test_features_that_are_inputs_already_are_noise_free():
    heads = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    change = change_basis(heads, torch.arange(8))
    partner = PartnerHeads(randn(3, 8, 5, seed=2), None, torch.arange(3))
    assert predict_noise(heads, None, change, [partner]) == pytest.approx((1.0, 1.0))


def test_zero_heads_count_as_one():
    heads = randn(3, 20, 8, seed=0)
    heads[1] = 0
    partner = PartnerHeads(randn(3, 8, 5, seed=2), None, torch.arange(3))
    change = change_basis(heads, torch.arange(7))
    assert float(predict_head_noise(heads, None, change, [partner])[1]) == 1.0
    silent = change_basis(0 * heads, torch.arange(7))
    assert predict_noise(0 * heads, None, silent, [partner]) == (1.0, 1.0)


def measured(site: Projection, change: ChangeOfBasis, dtype: torch.dtype) -> float:
    """Noise of the site's product after over before, both against float64, on white inputs."""
    x = randn(200, site.heads.shape[1], seed=1).to(dtype)
    y = randn(200, site.partner.shape[2], seed=2).to(dtype)
    mix = torch.softmax(2 * randn(len(site.heads), 200, 200, seed=3), -1).to(dtype)

    def product(new: bool, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
        groups = torch.arange(len(site.heads))
        if new:
            weight, bias = change.coefficients, change.bias
            partner = change.s[groups] @ site.partner.double()
        else:
            weight, bias, partner = site.heads, site.bias, site.partner
        key = x.to(dtype)[:, change.rest if new else slice(None)] @ weight.to(dtype)
        key = key + bias.to(dtype).unsqueeze(1)
        if new:
            key[:, :, : len(change.rows)] += x.to(dtype)[:, change.rows]
        if site.product == "vo":
            mixed = (mix.to(wide) @ key.to(wide)).to(dtype)
            return (mixed.to(wide) @ partner.to(dtype).to(wide)).double()
        query = y.to(dtype) @ partner.mT.to(dtype)
        if site.partner_bias is not None:
            shift = site.partner_bias.double().unsqueeze(1)
            query = query + (shift @ change.s.mT if new else shift).to(dtype)
        return (query.to(wide) @ key.to(wide).mT).double()

    reference = product(False, torch.float64, torch.float64)
    before, after = (product(new, dtype, torch.float32) - reference for new in (False, True))
    return float(after.norm() / before.norm())


def rounded(site: Projection, dtype: torch.dtype) -> Projection:
    """The same site with weights that are exact in ``dtype``."""
    bias = site.partner_bias
    return Projection(
        site.product,
        site.heads.to(dtype).float(),
        site.bias.to(dtype).float(),
        site.partner.to(dtype).float(),
        None if bias is None else bias.to(dtype).float(),
    )


def predicted(site: Projection, fraction: float) -> tuple[ChangeOfBasis, float]:
    rows = choose_basis(site.heads, int(site.heads.shape[2] * fraction), "pivot")
    change = change_basis(site.heads, rows, site.bias)
    groups = torch.arange(len(site.heads))
    partner = PartnerHeads(site.partner, site.partner_bias, groups)
    return change, predict_noise(site.heads, site.bias, change, [partner])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fraction", [1.0, 7 / 8])
@pytest.mark.parametrize("model", MODELS)
def test_prediction_is_near_what_is_measured(model, fraction, dtype):
    for site in projections(model)[2:6]:
        change, noise = predicted(site, fraction)
        ratio = measured(site, change, dtype) / noise
        assert 1 / NOISE_PREDICTION < ratio < NOISE_PREDICTION, (site.product, ratio)


@pytest.mark.parametrize("model", MODELS)
def test_rounding_of_the_new_weights_counts_where_the_old_are_exact(model):
    for site in projections(model)[:8:2]:
        site = rounded(site, torch.bfloat16)
        change, noise = predicted(site, 7 / 8)
        ratio = measured(site, change, torch.bfloat16) / (2**0.5 * noise)
        assert 1 / NOISE_PREDICTION_EXACT_WEIGHTS < ratio < NOISE_PREDICTION_EXACT_WEIGHTS
