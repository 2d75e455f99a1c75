"""Transform weights: from a plan and the original weights to every tensor the new graph reads.

For each linear that takes part, its output features fall into *pieces*:

* a dense piece: features computed as before, with query features turned by S (U Sᵀ);
* a decomposed piece per basis: coefficients C over the other inputs (the identity is no weight).

A linear that only meets attention outputs keeps its shape; the columns that meet head i become
O_i' = S_g O_i. Everything is computed in float64 and rounded once to the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bda_fx.passes.change_basis import (
    ChangeOfBasis,
    change_basis,
    transform_output_side,
    transform_query_side,
)
from bda_fx.passes.choose_basis import choose_basis
from bda_fx.passes.predict_noise import predict_noise
from bda_fx.passes.read_weights import read_site
from bda_fx.passes.sites import Fold, Linear, Plan, SitePlan


@dataclass(frozen=True)
class Piece:
    """Output features of a linear that are computed together, in ascending order.

    ``basis`` is the name of the basis they are decomposed on, or None for a dense piece. Feature n
    takes basis feature ``slots[n]`` of x unchanged, or none where that is -1.
    """

    features: tuple[int, ...]
    basis: str | None = None
    size: int = 0
    slots: tuple[int, ...] = ()


@dataclass(frozen=True)
class Form:
    """How a linear that takes part will be computed."""

    linear: Linear
    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> bool:
        """One dense piece: same shape as before, other values."""
        return len(self.pieces) == 1 and self.pieces[0].basis is None


@dataclass(frozen=True)
class Transformed:
    """Derived tensors by name, and what this set of weights came to at each site."""

    tensors: dict[str, Tensor]
    noise: tuple[float, ...]
    residual: tuple[float, ...]


def forms_of(plan: Plan) -> list[Form]:
    """The pieces of every linear that the plan touches."""
    linears: dict[str, Linear] = {}
    decomposed: dict[str, list[SitePlan]] = {}
    for item in plan.sites:
        for linear in (item.site.linear, *(p.linear for p in item.site.partners)):
            linears.setdefault(linear.weight, linear)
        decomposed.setdefault(item.site.linear.weight, []).append(item)
    for fold in plan.folds:
        for linear in (fold.producer, *fold.readers):
            linears.setdefault(linear.weight, linear)
    forms = []
    for weight, linear in linears.items():
        slots: dict[str, dict[int, int]] = {}
        sizes: dict[str, int] = {}
        for item in decomposed.get(weight, ()):
            sizes[item.basis] = item.size
            for head in item.site.features:
                for slot, feature in enumerate(head):
                    taken = slot if slot < item.size else -1
                    slots.setdefault(item.basis, {})[feature] = taken
        done = {f for chosen in slots.values() for f in chosen}
        dense = tuple(f for f in range(linear.out_features) if f not in done)
        pieces = [Piece(dense)] if dense else []
        for basis, chosen in slots.items():
            features = tuple(sorted(chosen))
            pieces.append(Piece(features, basis, sizes[basis], tuple(chosen[f] for f in features)))
        forms.append(Form(linear, tuple(pieces)))
    return forms


def weight_key(form: Form, piece: int) -> str:
    """Name of the derived weight of a piece."""
    if form.whole:
        return form.linear.name
    kind = "dense" if form.pieces[piece].basis is None else f"coefficients{piece or ''}"
    return f"{form.linear.name}_{kind}"


def bias_key(form: Form, piece: int, bias: str) -> str:
    """Name of the derived bias of a piece; ``bias`` is the original's constant node."""
    which = form.linear.biases.index(bias)
    return f"{weight_key(form, piece)}_bias{which or ''}"


def basis_key(basis: str, part: str) -> str:
    """Name of an index tensor of a basis; ``part`` is "rows" or "rest"."""
    return f"{basis}_{part}"


def transform_weights(
    plan: Plan, values: Mapping[str, Tensor], *, use_planned_rows: bool
) -> Transformed:
    """Every derived tensor of ``plan`` for the constants ``values`` (weights, biases by node).

    With ``use_planned_rows`` the rows are those of the plan; otherwise they are chosen anew for
    these weights, with the plan's strategy and size, so that one graph serves many layers.
    """
    forms = forms_of(plan)
    rows = _rows(plan, values, use_planned_rows)
    matrices = {f.linear.weight: _float64(values[f.linear.weight]).clone() for f in forms}
    biases = {
        bias: _float64(values[bias]).clone()
        for f in forms
        for bias in f.linear.biases
        if bias is not None
    }
    noise, residual = [], []
    for item in plan.sites:
        weights = read_site(item.site, values)
        change = change_basis(weights.heads, rows[item.basis], weights.bias)
        noise.append(predict_noise(weights.heads, weights.bias, change, weights.partners)[0])
        residual.append(change.residual)
        _apply(item, change, values, matrices, biases)
    tensors: dict[str, Tensor] = {}
    for fold in plan.folds:
        _permute(fold, rows[fold.basis], values, matrices, biases, tensors)
    for form in forms:
        _round(form, rows, values, matrices, biases, tensors)
    return Transformed(tensors, tuple(noise), tuple(residual))


def _rows(plan: Plan, values: Mapping[str, Tensor], planned: bool) -> dict[str, Tensor]:
    if planned:
        return {item.basis: torch.tensor(item.rows) for item in plan.sites}
    sharing: dict[str, list[SitePlan]] = {}
    for item in plan.sites:
        sharing.setdefault(item.basis, []).append(item)
    return {
        basis: choose_basis(
            torch.cat([read_site(i.site, values).heads for i in items]),
            items[0].size,
            items[0].strategy,
        )
        for basis, items in sharing.items()
    }


def _apply(
    item: SitePlan,
    change: ChangeOfBasis,
    values: Mapping[str, Tensor],
    matrices: dict[str, Tensor],
    biases: dict[str, Tensor],
) -> None:
    """Write one site's K' (with the basis rows' columns left as they are) and partners."""
    site = item.site
    features = torch.tensor(site.features)
    matrix = matrices[site.linear.weight]
    block = matrix[features]
    block[..., change.rest] = change.coefficients.transpose(1, 2)
    matrix[features] = block
    for name in {bias for bias in site.linear.biases if bias is not None}:
        heads = _float64(values[name])[features].unsqueeze(1)
        biases[name][features] = (heads @ change.s_inv).squeeze(1)
    if change.bias is not None:
        first = next(bias for bias in site.linear.biases if bias is not None)
        biases[first][features] = change.bias
    for partner in site.partners:
        index, groups = torch.tensor(partner.features), torch.tensor(partner.groups)
        weight = partner.linear.weight
        original = _float64(values[weight])
        if partner.axis == "in":
            turned = transform_output_side(original.T[index], change, groups)
            matrices[weight][:, index.flatten()] = turned.flatten(0, 1).T
            continue
        heads, _ = transform_query_side(original[index].transpose(1, 2), None, change, groups)
        matrices[weight][index] = heads.transpose(1, 2)
        for name in {bias for bias in partner.linear.biases if bias is not None}:
            turned_bias = change.s[groups] @ _float64(values[name])[index].unsqueeze(-1)
            biases[name][index] = turned_bias.squeeze(-1)


def _permute(
    fold: Fold,
    rows: Tensor,
    values: Mapping[str, Tensor],
    matrices: dict[str, Tensor],
    biases: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Put the features of x in basis order, from the linear that makes it to those that read it."""
    producer = fold.producer
    order = torch.cat([rows, _rest(rows, fold.in_features)])
    part = slice(fold.first, fold.first + len(order))
    matrices[producer.weight][part] = matrices[producer.weight][part][order]
    for name in {bias for bias in producer.biases if bias is not None}:
        biases[name][part] = biases[name][part][order]
    for reader in fold.readers:
        matrices[reader.weight] = matrices[reader.weight][:, order]
    for name, key in fold.constants:
        tensors[key] = values[name].detach()[order.to(values[name].device)]


def _round(
    form: Form,
    rows: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    matrices: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    like = values[form.linear.weight]
    for at, piece in enumerate(form.pieces):
        matrix = matrices[form.linear.weight][list(piece.features)]
        if piece.basis is not None:
            rest = _rest(rows[piece.basis], form.linear.in_features)
            tensors[basis_key(piece.basis, "rows")] = rows[piece.basis].to(like.device)
            tensors[basis_key(piece.basis, "rest")] = rest.to(like.device)
            matrix = matrix[:, rest]
        tensors[weight_key(form, at)] = matrix.to(like.dtype).to(like.device).contiguous()
        for name in {bias for bias in form.linear.biases if bias is not None}:
            value = biases[name][list(piece.features)]
            tensors[bias_key(form, at, name)] = value.to(values[name].dtype).to(like.device)


def _rest(rows: Tensor, in_features: int) -> Tensor:
    keep = torch.ones(in_features, dtype=torch.bool)
    keep[rows] = False
    return keep.nonzero().flatten()


def _float64(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64)
