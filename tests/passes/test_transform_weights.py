"""Derived weights against a naive reference: one head at a time, straight from the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bda_fx.passes.find_sites import find_sites
from bda_fx.passes.plan_sites import Planning, plan_sites
from bda_fx.passes.read_weights import constants_of, extract_constants
from bda_fx.passes.sites import Plan
from bda_fx.passes.transform_weights import Transformed, transform_weights
from tests import tolerances
from tests.programs import Attention, B, D, E, H, S, canonical, randn


def transformed(model: Attention, **options: object) -> tuple[Plan, Transformed]:
    dtype = model.k.weight.dtype
    program = canonical(model, randn(B, S, E, dtype=dtype))
    found = find_sites(program)
    values = extract_constants(program, constants_of(found.sites)).evaluate(program.tensors)
    plan = plan_sites(found, values, Planning(basis_size="full", **options))  # type: ignore[arg-type]
    return plan, transform_weights(plan, values, use_planned_rows=True)


def bound(plan: Plan) -> float:
    return tolerances.program([site.condition for site in plan.sites])


def keys(t: dict[str, Tensor], x: Tensor, name: str, groups: int, bias: bool) -> Tensor:
    """K' or V' [groups, tokens, D] as the rewritten graph computes it."""
    product = "qk" if name == "k" else "vo"
    rows, rest = (t[f"{name}.weight_{product}0_{part}"] for part in ("rows", "rest"))
    y = x[:, rest] @ t[f"{name}.weight_coefficients"].T
    if bias:
        y = y + t[f"{name}.weight_coefficients_bias"]
    y = y.view(-1, groups, D).transpose(0, 1).clone()
    y[..., : len(rows)] += x[:, rows]
    return y


def products(
    t: dict[str, Tensor], x: Tensor, kv_heads: int, bias: bool
) -> list[tuple[Tensor, Tensor]]:
    """Q' K'ᵀ and V' O' of every query head, as the rewritten graph computes them."""
    moved = x @ t["q.weight"].T + (t["q.weight_bias"] if bias else 0)
    q = moved.view(-1, H, D).transpose(0, 1)
    k, v = (keys(t, x, n, kv_heads, bias) for n in "kv")
    found = []
    for i in range(H):
        g = i * kv_heads // H
        found.append((q[i] @ k[g].T, v[g] @ t["o.weight"][:, i * D : (i + 1) * D].T))
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("basis", ["pivot", "first"])
def test_products_are_what_they_were(basis: str, kv_heads: int, bias: bool) -> None:
    model = Attention(kv_heads=kv_heads, bias=bias).double()
    plan, result = transformed(model, basis=basis)
    t = result.tensors
    x = randn(9, E, seed=7, dtype=torch.float64)
    with torch.no_grad():
        k, v = (f(x).view(-1, kv_heads, D).transpose(0, 1) for f in (model.k, model.v))
        q = model.q(x).view(-1, H, D).transpose(0, 1)
        for i, moved in enumerate(products(t, x, kv_heads, bias)):
            g = i * kv_heads // H
            columns = slice(i * D, (i + 1) * D)
            original = (q[i] @ k[g].T, v[g] @ model.o.weight[:, columns].T)
            for expected, got in zip(original, moved, strict=True):
                assert float((got - expected).norm() / expected.norm()) <= bound(plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_errors_of_half_precision_make_up_for_each_other(dtype: torch.dtype, kv_heads: int) -> None:
    """Of both products: nearer than with every factor rounded to nearest."""
    model = Attention(kv_heads=kv_heads).to(dtype)
    _, low = transformed(model)
    _, high = transformed(model.double())
    x = randn(200, E, seed=7, dtype=torch.float64)

    def wide(t: dict[str, Tensor], through: torch.dtype) -> dict[str, Tensor]:
        floating = {k: v.to(through).double() for k, v in t.items() if v.is_floating_point()}
        return {**t, **floating}

    exact = products(high.tensors, x, kv_heads, True)
    errors = []
    for tensors in (wide(low.tensors, dtype), wide(high.tensors, dtype)):
        got = products(tensors, x, kv_heads, True)
        pairs = [zip(a, b, strict=True) for a, b in zip(got, exact, strict=True)]
        errors.append([sum(float((y - z).square().sum()) for y, z in p) for p in pairs])
    together, nearest = (torch.tensor(e).sum() for e in errors)
    assert together < nearest
    assert all(low.tensors[key].dtype == dtype for key in ("q.weight", "o.weight"))


def test_rounded_once_from_float64() -> None:
    dtype = torch.float32
    model = Attention().to(dtype)
    _, low = transformed(model)
    _, high = transformed(model.double())
    assert low.tensors.keys() == high.tensors.keys()
    for key, value in low.tensors.items():
        if value.is_floating_point():
            assert value.dtype == dtype
            assert torch.equal(value, high.tensors[key].to(dtype))


def test_rows_are_chosen_anew_for_other_weights() -> None:
    model, other = Attention(seed=0).double(), Attention(seed=5).double()
    program = canonical(model, randn(B, S, E, dtype=torch.float64))
    found = find_sites(program)
    constants = extract_constants(program, constants_of(found.sites))
    plan = plan_sites(found, constants.evaluate(program.tensors), Planning(basis_size="full"))
    theirs = {name: dict(other.named_parameters())[program.names[name]] for name in constants.roots}
    anew = transform_weights(plan, constants.evaluate(theirs), use_planned_rows=False)
    _, own = transformed(other)
    assert anew.tensors.keys() == own.tensors.keys()
    for key, value in own.tensors.items():
        assert torch.equal(anew.tensors[key], value)


def test_each_site_reports_its_noise_and_residual() -> None:
    plan, result = transformed(Attention())
    planned = tuple(site.noise for site in plan.sites)
    assert result.noise == pytest.approx(planned, rel=tolerances.FLOAT64_SEARCH)
    assert all(residual <= tolerances.FLOAT64_IDENTITY for residual in result.residual)
