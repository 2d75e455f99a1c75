"""Transform weights: from a plan and the original weights to every tensor the new graph reads.

Decomposed pieces of a linear (``forms``) get coefficients C over the other inputs, dense ones with
query features are turned by S (U Sᵀ). A linear that only meets attention outputs keeps its shape;
the columns that meet head i become O_i' = S_g O_i. Constants that take part (biases added to
queries, tables) turn element by element.

Everything is computed in float64 and rounded once to the weight's dtype; where products are summed
in a wider one, so that errors of the two factors make up for each other (``round_weights``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bda_fx.passes.change_basis import ChangeOfBasis, change_basis, turn_vectors
from bda_fx.passes.choose_basis import choose_basis
from bda_fx.passes.fit_basis import MAX_RESIDUAL
from bda_fx.passes.forms import Form, basis_key, bias_key, constant_key, forms_of, weight_key
from bda_fx.passes.predict_noise import Moments, keeps_sums_wide, predict_noise
from bda_fx.passes.predict_range import keeps_range
from bda_fx.passes.read_weights import SiteWeights, float64, moments_of, read_site, read_vectors
from bda_fx.passes.round_weights import refit, round_with_feedback
from bda_fx.passes.side_by_side import in_turn
from bda_fx.passes.sites import OUT, Constant, Fold, Linear, Plan, Site, SitePlan


@dataclass(frozen=True)
class Transformed:
    """Derived tensors by name, and what this set of weights came to at each site (see ``Fit``)."""

    tensors: dict[str, Tensor]
    noise: tuple[float, ...]
    residual: tuple[float, ...]
    in_range: tuple[bool, ...]

    @property
    def usable(self) -> bool:
        """Whether every change of basis is exact and keeps its factors within their range."""
        return all(self.in_range) and all(r <= MAX_RESIDUAL for r in self.residual)


def transform_weights(
    plan: Plan, values: Mapping[str, Tensor], *, use_planned_rows: bool
) -> Transformed:
    """Every derived tensor of ``plan`` for the constants ``values`` (weights, biases by node).

    With ``use_planned_rows`` the rows are those of the plan; otherwise they are chosen anew for
    these weights, with the plan's strategy and size, so that one graph serves many layers.
    """
    forms = forms_of(plan)
    rows = _rows(plan, values, use_planned_rows)
    turned = _Turned(
        {},
        {
            bias: float64(values[bias]).clone()
            for f in forms
            for bias in f.linear.biases
            if bias is not None
        },
        {
            constant: float64(values[constant.node]).clone().flatten()
            for item in plan.sites
            for constant in item.site.constants
        },
    )
    noise, residual, in_range = [], [], []
    tensors: dict[str, Tensor] = {}
    orders: dict[str, Tensor] = {}
    for fold in plan.folds:
        for item in plan.sites:
            if item.basis == fold.basis:
                orders[item.site.linear.weight] = _order(rows[fold.basis], fold.in_features)
    last = _last_uses(plan)
    changed = in_turn(lambda item: _changed(item, rows[item.basis], values), plan.sites)
    for at, (item, site) in enumerate(zip(plan.sites, changed, strict=True)):
        noise.append(site.noise)
        residual.append(site.residual)
        in_range.append(site.in_range)
        for linear in item.site.linears:
            turned.begin(linear.weight, values)
        _turn(item.site, site.factors, values, turned)
        for form in forms:
            if last.get(form.linear.weight) == at:
                _round(form, rows, orders, values, turned, tensors)
                del turned.matrices[form.linear.weight]
    for fold in plan.folds:
        for linear in (fold.producer, *fold.readers):
            turned.begin(linear.weight, values)
        _permute(fold, rows[fold.basis], values, turned, tensors)
    for form in forms:
        if form.linear.weight not in last:
            _round(form, rows, orders, values, turned, tensors)
    for constant, elements in turned.constants.items():
        like = values[constant.node]
        copy = torch.empty_like(like)  # as strided as the original, which a view may rely on
        tensors[constant_key(constant)] = copy.copy_(elements.view(like.shape))
    return Transformed(tensors, tuple(noise), tuple(residual), tuple(in_range))


def _rows(plan: Plan, values: Mapping[str, Tensor], planned: bool) -> dict[str, Tensor]:
    if planned:
        return {item.basis: torch.tensor(item.rows) for item in plan.sites}
    sharing: dict[str, list[SitePlan]] = {}
    for item in plan.sites:
        sharing.setdefault(item.basis, []).append(item)

    def chosen(items: list[SitePlan]) -> Tensor:
        heads = torch.cat([read_site(item.site, values).heads for item in items])
        return choose_basis(heads, items[0].size, items[0].strategy)

    return dict(zip(sharing, in_turn(chosen, sharing.values()), strict=True))


def _last_uses(plan: Plan) -> dict[str, int]:
    """The last site that turns each weight: then it can be rounded, and its float64 copy go. Those
    that folds reorder are left out: they are needed to the end."""
    last = {linear.weight: at for at, item in enumerate(plan.sites) for linear in item.site.linears}
    for fold in plan.folds:
        for linear in (fold.producer, *fold.readers):
            last.pop(linear.weight, None)
    return last


@dataclass
class _Turned:
    """Weights [F, E], biases [F] and flattened constants on their way to the new basis."""

    matrices: dict[str, Tensor]
    biases: dict[str, Tensor]
    constants: dict[Constant, Tensor]

    def begin(self, weight: str, values: Mapping[str, Tensor]) -> None:
        """A float64 copy of a weight, unless there is one."""
        if weight not in self.matrices:
            self.matrices[weight] = values[weight].detach().to("cpu", torch.float64, copy=True)


@dataclass(frozen=True)
class _Feedback:
    """What rounding with feedback needs to know: E[K'ᵀK'], E[Q'ᵀQ'] [G, D, D] and the dtype."""

    key: Tensor
    query: Tensor
    dtype: torch.dtype

    def round(self, vectors: Tensor, groups: Tensor, *, against: bool) -> Tensor:
        """Vectors [n, M, D] of the heads ``groups``, by the errors that their products show."""
        hessian = self.key if against else self.query
        return round_with_feedback(vectors, hessian[groups], self.dtype)


@dataclass(frozen=True)
class _Factors:
    """How the factors of a site turn (``change``), and the decomposed projection in the new basis:
    ``coefficients`` [G, E - r, D] and ``bias`` [G, D]. All are rounded if ``feedback`` is set."""

    change: ChangeOfBasis
    coefficients: Tensor
    bias: Tensor | None
    feedback: _Feedback | None = None

    def turn(self, vectors: Tensor, groups: Tensor, *, against: bool) -> Tensor:
        """``vectors`` [n, M, D] of the heads ``groups`` [n], against the decomposed or along."""
        moved = turn_vectors(vectors, self.change, groups, against=against)
        if self.feedback is None:
            return moved
        return self.feedback.round(moved, groups, against=against)


@dataclass(frozen=True)
class _Changed:
    """What a site comes to in its basis."""

    factors: _Factors
    noise: float
    residual: float
    in_range: bool


def _changed(item: SitePlan, rows: Tensor, values: Mapping[str, Tensor]) -> _Changed:
    weights = read_site(item.site, values)
    moments = moments_of(weights)
    both = moments.balancing(item.balanced)
    change = change_basis(weights.heads, rows, weights.bias, both)
    dtype = values[item.site.linear.weight].dtype
    predicted = predict_noise(moments, change.s, change.s_inv, item.size, dtype, item.optimize_for)
    return _Changed(
        _factors(weights, change, moments, dtype),
        predicted.site * item.correction,
        change.residual,
        keeps_range(weights, moments, change.s, change.s_inv, dtype),
    )


def _factors(
    weights: SiteWeights, change: ChangeOfBasis, moments: Moments, dtype: torch.dtype
) -> _Factors:
    """Coefficients in the new basis; where they are rounded with feedback, S is fitted once more,
    so that the other factor makes up for what they lack."""
    if not keeps_sums_wide(dtype):
        return _Factors(change, change.coefficients, change.bias)
    feedback = _Feedback(*moments.turned(change.s, change.s_inv), dtype)
    below = [change.coefficients]
    heads = weights.heads.double()
    old = [heads[:, change.rows], heads[:, change.rest]]
    if change.bias is not None and weights.bias is not None:
        below.append(change.bias.unsqueeze(1))
        old.append(weights.bias.unsqueeze(1))
    count, every = len(change.rest), torch.arange(len(change.s))
    rounded = feedback.round(torch.cat(below, 1), every, against=False)
    identity = torch.eye(rounded.shape[2], dtype=rounded.dtype)[: len(change.rows)]
    new = torch.cat([identity.expand(len(rounded), -1, -1), rounded], 1)
    pairs = [(new, torch.cat(old, 1), every)]
    for fellow in weights.fellows:
        vectors, groups = fellow.weight.mT.double(), fellow.groups
        along = turn_vectors(vectors, change, groups, against=False)
        pairs.append((feedback.round(along, groups, against=False), vectors, groups))
    fitted = replace(change, s=refit(pairs, change.s))
    bias = None if change.bias is None else rounded[:, count]
    return _Factors(fitted, rounded[:, :count], bias, feedback)


def _turn(site: Site, factors: _Factors, values: Mapping[str, Tensor], turned: _Turned) -> None:
    """Write one site's factors in the new basis; the basis' own weights are left as they are."""
    index = torch.tensor(site.features)
    matrix = turned.matrices[site.linear.weight]
    view = matrix if site.axis == OUT else matrix.T
    block = view[index]
    block[..., factors.change.rest] = factors.coefficients.mT
    view[index] = block
    if site.axis == OUT:
        every = torch.arange(len(index))
        _turn_biases(site.linear, index, factors, every, False, values, turned)
        if factors.bias is not None:
            first = next(bias for bias in site.linear.biases if bias is not None)
            turned.biases[first][index] = factors.bias
    for factor in site.partners:
        index, groups = torch.tensor(factor.features), torch.tensor(factor.groups)
        heads, _ = read_vectors(factor.tensor, factor.axis, factor.features, values)
        moved = factors.turn(heads, groups, against=factor.against)
        if isinstance(factor.tensor, Constant):
            turned.constants[factor.tensor][index] = moved.squeeze(1).double()
            continue
        matrix = turned.matrices[factor.tensor.weight]
        (matrix if factor.axis == OUT else matrix.T)[index] = moved.mT.double()
        if factor.axis == OUT:
            _turn_biases(factor.tensor, index, factors, groups, factor.against, values, turned)


def _turn_biases(
    linear: Linear,
    index: Tensor,
    factors: _Factors,
    groups: Tensor,
    against: bool,
    values: Mapping[str, Tensor],
    turned: _Turned,
) -> None:
    for name in {bias for bias in linear.biases if bias is not None}:
        heads = float64(values[name])[index].unsqueeze(1)
        turned.biases[name][index] = factors.turn(heads, groups, against=against).squeeze(1)


def _permute(
    fold: Fold,
    rows: Tensor,
    values: Mapping[str, Tensor],
    turned: _Turned,
    tensors: dict[str, Tensor],
) -> None:
    """Put the features of x in basis order, from the linear that makes it to those that read it."""
    producer = fold.producer
    order = _order(rows, fold.in_features)
    part = slice(fold.first, fold.first + len(order))
    matrix = turned.matrices[producer.weight]
    matrix[part] = matrix[part][order]
    for name in {bias for bias in producer.biases if bias is not None}:
        turned.biases[name][part] = turned.biases[name][part][order]
    for reader in fold.readers:
        turned.matrices[reader.weight] = turned.matrices[reader.weight][:, order]
    for name, key in fold.constants:
        tensors[key] = values[name].detach()[order.to(values[name].device)]


def _round(
    form: Form,
    rows: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    turned: _Turned,
    tensors: dict[str, Tensor],
) -> None:
    """Cut the turned weight of a linear into its pieces; x comes in the order of ``orders``."""
    if form.heads:
        _round_outputs(form, rows, values, turned, tensors)
        return
    like = values[form.linear.weight]
    for at, piece in enumerate(form.pieces):
        matrix = turned.matrices[form.linear.weight][list(piece.features)]
        if piece.basis is not None:
            rest = _rest(rows[piece.basis], form.linear.in_features)
            tensors[basis_key(piece.basis, "rows")] = rows[piece.basis].to(like.device)
            tensors[basis_key(piece.basis, "rest")] = rest.to(like.device)
            matrix = matrix[:, rest]
        elif form.linear.weight in orders:
            matrix = matrix[:, orders[form.linear.weight]]
        tensors[weight_key(form, at)] = matrix.to(like.dtype).to(like.device).contiguous()
        for name in {bias for bias in form.linear.biases if bias is not None}:
            value = turned.biases[name][list(piece.features)]
            tensors[bias_key(form, at, name)] = value.to(values[name].dtype).to(like.device)


def _round_outputs(
    form: Form,
    rows: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    turned: _Turned,
    tensors: dict[str, Tensor],
) -> None:
    """A decomposed output projection: weights of the outputs that are not in the basis."""
    like, basis = values[form.linear.weight], form.pieces[0].basis or ""
    rest = _rest(rows[basis], form.linear.out_features)
    matrix = turned.matrices[form.linear.weight][rest]
    tensors[weight_key(form, 0)] = matrix.to(like.dtype).to(like.device).contiguous()
    tensors[basis_key(basis, "order")] = (
        _order(rows[basis], form.linear.out_features).argsort().to(like.device)
    )
    for name in {bias for bias in form.linear.biases if bias is not None}:
        for part, outputs in (("basis", rows[basis]), ("rest", rest)):
            tensors[f"{bias_key(form, 0, name)}_{part}"] = values[name].detach()[
                outputs.to(values[name].device)
            ]


def _order(rows: Tensor, features: int) -> Tensor:
    """The basis first, then the other features."""
    return torch.cat([rows, _rest(rows, features)])


def _rest(rows: Tensor, features: int) -> Tensor:
    keep = torch.ones(features, dtype=torch.bool)
    keep[rows] = False
    return keep.nonzero().flatten()
