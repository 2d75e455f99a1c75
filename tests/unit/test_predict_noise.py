"""predict_noise: the formula by a naive loop, its limits, and measured noise on real weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from bda_fx.passes.change_basis import ChangeOfBasis, change_basis
from bda_fx.passes.choose_basis import choose_basis
from bda_fx.passes.measure_sums import longest_run
from bda_fx.passes.predict_noise import (
    DAMPING,
    PartnerHeads,
    conditional_variances,
    partial_roundings,
    predict_noise,
    rounding_order,
    second_moments,
)
from bda_fx.passes.sites import IN, OUT, Factor, Linear, Plan, Site, SitePlan
from bda_fx.passes.transform_weights import transform_weights
from tests import tolerances
from tests.tolerances import NOISE_PREDICTION, QUANTISED_NOISE_PREDICTION, identity
from tests.unit.real_weights import MODELS, Projection, projections

DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_runs(terms: int) -> float:
    """Energies of the partial sums of ``terms`` products, over that of the whole sum: in a run of m
    1/m + 2/m + … + m/m = m/2 (+ 1/2, which is the rounding of the sum itself)."""
    runs = max(1, -(-terms // longest_run()))
    return terms / runs / 2


def naive_alone(rows: Tensor, order: list[int]) -> Tensor:
    """Of each feature of ``rows`` [n, D], the energy that those after it in ``order`` leave."""
    size = rows.shape[1]
    own = rows.square().sum(0)
    # the Hessian's damping, as rows of a regression
    rows = torch.cat([rows, (DAMPING * rows.square().sum() / size).sqrt() * torch.eye(size)])
    alone = torch.empty(size, dtype=rows.dtype)
    for at, feature in enumerate(order):
        later, target = rows[:, order[at + 1 :]], rows[:, [feature]]
        left = target - later @ torch.linalg.lstsq(later, target).solution
        alone[feature] = left.square().sum()
    return alone.minimum(own)


def by_cost(costs: list[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda j: -costs[j])


def naive_energies(
    heads: Tensor,
    bias: Tensor,
    partners: list[PartnerHeads],
    change: ChangeOfBasis,
    dtype: torch.dtype,
) -> tuple[list[float], list[float]]:
    """Noise of each key head's product before and after, in squares of one rounding."""

    def rho(terms: float) -> float:
        return 1 + (in_runs(terms) if dtype == torch.float32 else 0)

    size, (_, e, d) = len(change.rows), heads.shape
    sizes = [float(partner.weight.square().sum()) for partner in partners]
    mean = sum(n * rho(p.terms) for n, p in zip(sizes, partners, strict=True)) / sum(sizes)
    was, now = [], []
    for g, s in enumerate(change.s):
        key = torch.cat([heads[g], bias[g : g + 1]])
        met = [torch.zeros(1, d, dtype=torch.float64)]
        for partner in partners:
            for i in (partner.groups == g).nonzero().flatten().tolist():
                met.append(partner.weight[i].T)
                if partner.bias is not None:
                    met.append(partner.bias[i : i + 1])
        query = torch.cat(met)
        k, q = (m.square().sum(0).tolist() for m in (key, query))
        moved, turned = torch.linalg.solve(s, key, left=False), query @ s.T
        kappa, p = (m.square().sum(0).tolist() for m in (moved, turned))
        c = [kappa[j] - 1 if j < size else kappa[j] for j in range(d)]
        if dtype == torch.float32:
            alone_q, alone_k = p, kappa
        else:
            alone_q = naive_alone(turned, by_cost([c[j] * p[j] for j in range(d)])).tolist()
            alone_k = naive_alone(moved, by_cost([kappa[j] * p[j] for j in range(d)])).tolist()
        was.append(sum(k[j] * q[j] * (rho(e) + mean) for j in range(d)))
        now.append(
            sum(
                kappa[j] * p[j] * mean
                + c[j] * p[j] * rho(e - size)
                + (kappa[j] * p[j] if j < size else 0)
                + c[j] * alone_q[j]
                + p[j] * alone_k[j]
                for j in range(d)
            )
        )
    return was, now


@pytest.mark.parametrize(
    ("size", "balanced", "dtype"),
    [
        (size, balanced, dtype)
        for size in (1, 4, 7, 8)
        for balanced in (False, True)
        for dtype in DTYPES
        # balanced features cost the same: which is rounded first is a matter of chance
        if not (balanced and size < 7 and dtype == torch.bfloat16)
    ],
)
def test_formula(size: int, balanced: bool, dtype: torch.dtype) -> None:
    heads, bias = randn(3, 20, 8, seed=0), randn(3, 8, seed=1)
    partners = [
        PartnerHeads(randn(6, 8, 13, seed=2), randn(6, 8, seed=3), torch.arange(6) // 2, 13),
        PartnerHeads(randn(2, 8, 5, seed=4), None, torch.tensor([2, 0]), 500),
        PartnerHeads(randn(3, 8, 1, seed=5), None, torch.arange(3)),
    ]
    moments = second_moments(heads, bias, partners)
    both = (moments.key, moments.query) if balanced else None
    change = change_basis(heads, torch.arange(size), bias, both)
    was, now = naive_energies(heads, bias, partners, change, dtype)
    noise = predict_noise(moments, change.s, change.s_inv, size, dtype)
    relative = identity(max(change.condition**2, 8 / DAMPING))  # of second moments, damped
    assert relative < tolerances.FLOAT64_SEARCH
    assert noise.site == pytest.approx((sum(now) / sum(was)) ** 0.5, rel=relative)
    ratios = [(n / w) ** 0.5 for n, w in zip(now, was, strict=True)]
    assert noise.worst == pytest.approx(max(ratios), rel=relative)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fellows_are_keys_of_their_head(dtype: torch.dtype) -> None:
    """A feature that turns along has energy as the heads have, whichever of the two it is in."""
    heads, groups = randn(2, 20, 8, seed=0), torch.arange(2)
    partner = PartnerHeads(randn(2, 8, 13, seed=2), None, groups, 13)
    fellow = PartnerHeads(randn(2, 8, 3, seed=3), None, groups)
    apart = second_moments(heads, None, [partner], [fellow])
    joined = second_moments(torch.cat([heads, fellow.weight.mT], 1), None, [partner])
    assert torch.allclose(apart.key, joined.key, rtol=identity(1.0))
    assert torch.equal(apart.query, joined.query)


def test_partial_sums_are_rounded_as_often_as_said() -> None:
    """Variance of float32 dot products over that of one rounding, for runs and beyond."""
    for terms in (32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048):
        x, w = randn(200, terms, seed=terms).float(), randn(256, terms, seed=1).float()
        exact = x.double() @ w.double().T
        once = (exact.float() - exact).square().sum()
        more = float(((x @ w.T) - exact).square().sum() / once) - 1
        ratio = more / partial_roundings(terms)
        assert 1 / tolerances.PARTIAL_ROUNDINGS < ratio < tolerances.PARTIAL_ROUNDINGS, terms


def test_site_weighs_heads_by_their_energy() -> None:
    heads, groups = randn(2, 20, 8, seed=0), torch.arange(2)
    partner = randn(2, 8, 13, seed=2)
    partner[1] *= 1e-3
    change = change_basis(heads, torch.arange(8))

    def noise(*which: int) -> tuple[float, float]:
        some = list(which)
        met = PartnerHeads(partner[some], None, groups[: len(some)])
        moments = second_moments(heads[some], None, [met])
        found = predict_noise(moments, change.s[some], change.s_inv[some], 8, torch.bfloat16)
        return found.site, found.worst

    site, worst = noise(0, 1)
    loud, quiet = noise(0)[0], noise(1)[0]
    assert worst == pytest.approx(max(loud, quiet))
    assert site == pytest.approx(loud, rel=worst**2 * 1e-6)  # head 1 has 1e-6 of the energy


@pytest.mark.parametrize("terms", [0, 5, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_that_are_inputs_already(dtype: torch.dtype, terms: int) -> None:
    """K = x: no sum and no coefficients. Left are x_B "added" to nothing, and Q's new weights."""
    heads = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    change = change_basis(heads, torch.arange(8))
    partner = PartnerHeads(randn(3, 8, 5, seed=2), None, torch.arange(3), terms)
    moments = second_moments(heads, None, [partner])
    noise = predict_noise(moments, change.s, change.s_inv, 8, dtype)
    sums = (4.0, in_runs(terms)) if dtype == torch.float32 else (0.0, 0.0)
    # One rounding each of x, Q and U Sᵀ, whose error no other feature of a white K makes up for.
    expected = ((3 + sums[1]) / (2 + sums[0] + sums[1])) ** 0.5
    assert (noise.site, noise.worst) == pytest.approx((expected, expected), rel=DAMPING)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_summed_as_before(dtype: torch.dtype) -> None:
    """Where an output projection is decomposed nothing is computed from basis inputs: S = 1 adds
    the rounding of new weights alone."""
    heads = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    change = change_basis(heads, torch.arange(8))
    partner = PartnerHeads(randn(3, 8, 5, seed=2), None, torch.arange(3))
    moments = second_moments(heads, None, [partner], inputs=False)
    noise = predict_noise(moments, change.s, change.s_inv, 8, dtype)
    assert noise.site == pytest.approx(1.5**0.5, rel=DAMPING)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_does_not_matter(dtype: torch.dtype) -> None:
    heads, groups = randn(2, 20, 8, seed=0), torch.arange(2)
    weight = randn(2, 8, 13, seed=2)

    def noise(k: float, q: float) -> float:
        moments = second_moments(k * heads, None, [PartnerHeads(q * weight, None, groups)])
        change = change_basis(k * heads, torch.arange(7), None, (moments.key, moments.query))
        return predict_noise(moments, change.s, change.s_inv, 7, dtype).site

    expected = pytest.approx(noise(1.0, 1.0), rel=tolerances.FLOAT64_SEARCH)
    assert noise(2.0**20, 2.0**-9) == expected
    assert noise(2.0**-60, 2.0**70) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_heads_count_as_one(dtype: torch.dtype) -> None:
    partner = PartnerHeads(randn(3, 8, 5, seed=2), None, torch.arange(3))
    for zeros in (0, 1, 2, 3):
        heads = randn(3, 20, 8, seed=0)
        heads[:zeros] = 0
        moments = second_moments(heads, None, [partner])
        change = change_basis(heads, torch.arange(7), None, (moments.key, moments.query))
        noise = predict_noise(moments, change.s, change.s_inv, 7, dtype)
        loud = second_moments(
            heads[zeros:],
            None,
            [PartnerHeads(partner.weight[zeros:], None, torch.arange(3 - zeros))],
        )
        alone = predict_noise(loud, change.s[zeros:], change.s_inv[zeros:], 7, dtype)
        assert noise.site == pytest.approx(alone.site)
        assert noise.worst == pytest.approx(max(alone.worst, 1.0 if zeros else 0.0))
        if zeros == 3:
            assert (noise.site, noise.worst) == (1.0, 1.0)


def test_a_variance_given_later_features() -> None:
    rows = randn(40, 6, seed=0) @ randn(6, 6, seed=1)
    rows[:, 4] = rows[:, 1] + rows[:, 2]  # later in the order, it leaves of them only the damping
    hessian, weights = rows.T @ rows, randn(1, 6, seed=2).square()
    order = rounding_order(torch.ones(1, 6, dtype=torch.float64), weights)
    assert order.tolist() == [by_cost(weights[0].tolist())]
    found = conditional_variances(hessian[None], order)[0]
    expected = naive_alone(rows, order[0].tolist())
    relative = identity(6 / DAMPING)  # no condition is larger than trace over damping
    assert found.tolist() == pytest.approx(expected.tolist(), rel=relative)
    assert float(found.min()) > 0
    assert float(found[order[0, -1]]) == pytest.approx(
        float(hessian.diagonal()[order[0, -1]]), rel=2 * DAMPING
    )


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_singular_hessian_has_variances(rank: int) -> None:
    rows = randn(rank, 6, seed=0)
    order = torch.arange(6).unsqueeze(0)
    found = conditional_variances((rows.T @ rows)[None], order)[0]
    assert (found >= 0).all()
    assert (found <= rows.square().sum(0)).all()


def on_weights(
    site: Projection, fraction: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Weights of the site in ``dtype``, those of its rewrite, and the noise predicted for it."""
    num_heads, e, d = site.heads.shape
    values = {
        "k": site.heads.mT.reshape(-1, e).to(dtype),
        "k_bias": site.bias.flatten().to(dtype),
        "q": site.partner.reshape(num_heads * d, -1).to(dtype),
    }
    if site.partner_bias is not None:
        values["q_bias"] = site.partner_bias.flatten().to(dtype)
    if site.product == "vo":
        values["q"] = values["q"].T.contiguous()
    bias = "q_bias" if "q_bias" in values else None
    k = Linear("k", "k", ("k",), ("k_bias",), e, num_heads * d)
    q = Linear("q", "q", ("q",), (bias,), *reversed(values["q"].shape))
    features = tuple(tuple(range(g * d, g * d + d)) for g in range(num_heads))
    axis = OUT if site.product == "qk" else IN
    partner = Factor(q, axis, features, tuple(range(num_heads)))
    found = Site(site.product, k, features, (partner,), ("contraction",))
    heads = values["k"].view(num_heads, d, e).mT
    rows = choose_basis(heads, int(d * fraction), "pivot")
    plan = SitePlan(found, "basis", "pivot", len(rows), tuple(rows.tolist()), 0.0, 0.0, 0.0)
    new = transform_weights(Plan((plan,), ()), values, use_planned_rows=True)
    return values, new.tensors, new.noise[0]


def measured(
    site: Projection, old: dict[str, Tensor], new: dict[str, Tensor], dtype: torch.dtype
) -> float:
    """Noise of the site's product after over before, both against float64, on white inputs.

    The product itself is exact, so that only the rounding of its factors counts.
    """
    num_heads, e, d = site.heads.shape
    x, y = randn(200, e, seed=1).to(dtype), randn(200, site.partner.shape[2], seed=2).to(dtype)
    mix = torch.softmax(2 * randn(num_heads, 200, 200, seed=3), -1).to(dtype)

    def heads(features: Tensor) -> Tensor:
        return features.view(200, num_heads, d).transpose(0, 1)

    def product(key: Tensor, q: Tensor, bias: Tensor | None) -> Tensor:
        if site.product == "qk":
            query = linear(y.to(key.dtype), q, bias)
            return heads(query).double() @ heads(key).double().mT
        mixed = (mix.to(key.dtype) @ heads(key)).double()
        return mixed @ q.double().T.reshape(num_heads, d, -1)

    def before(dtype: torch.dtype) -> Tensor:
        weights = {name: value.to(dtype) for name, value in old.items()}
        key = linear(x.to(dtype), weights["k"], weights["k_bias"])
        return product(key, weights["q"], weights.get("q_bias"))

    key = linear(x[:, new["basis_rest"]], new["k_coefficients"], new["k_coefficients_bias"])
    heads(key)[:, :, : len(new["basis_rows"])] += x[:, new["basis_rows"]]
    after = product(key, new["q"], new.get("q_bias"))
    exact = before(torch.float64)
    return float((after - exact).norm() / (before(dtype) - exact).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fraction", [1.0, 7 / 8])
@pytest.mark.parametrize("model", MODELS)
def test_prediction_is_near_what_is_measured(
    model: str, fraction: float, dtype: torch.dtype
) -> None:
    for site in projections(model)[2:6]:
        old, new, noise = on_weights(site, fraction, dtype)
        ratio = measured(site, old, new, dtype) / noise
        bound = NOISE_PREDICTION[dtype]
        assert 1 / bound < ratio < bound, (site.product, ratio)


def quantised(weight: Tensor, grid: str) -> Tensor:
    """Rounded with one scale per row: to 255 levels, or to a float of 4 significant bits."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    if grid == "int8":
        return (weight / scale).round() * scale
    return (weight / scale).to(torch.float8_e4m3fn).double() * scale


@pytest.mark.parametrize("grid", ["int8", "fp8"])
@pytest.mark.parametrize("product", ["qk", "vo"])
@pytest.mark.parametrize("size", [8, 12, 16])
def test_noise_of_weights_that_are_quantised(product, size, grid):
    """Measured error of the product K Q (of V O) of weights, which is that over white inputs."""
    heads, other = randn(1, 64, 16, seed=0), randn(1, 16, 64, seed=1)
    partner = PartnerHeads(other, None, torch.tensor([0]), 64 if product == "qk" else 0)
    moments = second_moments(heads, None, [partner])
    change = change_basis(heads, torch.arange(size), None, (moments.key, moments.query))
    key, query = change.coefficients[0], change.s[0] @ other[0]

    def rounded(factor: Tensor, features_are_rows: bool) -> Tensor:
        """Features of ``factor`` [D, n] have a scale each, or its other axis has."""
        return quantised(factor, grid) if features_are_rows else quantised(factor.T, grid).T

    def error(below: Tensor, above: Tensor, q: Tensor) -> float:
        k = torch.cat([above, rounded(below.T, True).T])
        exact = torch.cat([above, below]) @ q
        return float((k @ rounded(q, product == "qk") - exact).norm())

    before = error(heads[0], heads[0][:0], other[0])
    after = error(key, torch.eye(16, dtype=torch.float64)[:size], query)
    noise = predict_noise(moments, change.s, change.s_inv, size, torch.float32, grid)
    assert 1 / QUANTISED_NOISE_PREDICTION < after / before / noise.site < QUANTISED_NOISE_PREDICTION
