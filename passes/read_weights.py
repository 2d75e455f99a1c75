"""Read the weights of a site: constant expressions evaluated, split into heads, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from bda_fx.passes.canonicalize import Program, constant_nodes
from bda_fx.passes.observe_noise import Observed
from bda_fx.passes.predict_noise import Moments, PartnerHeads, second_moments
from bda_fx.passes.sites import IN, OUT, Constant, Fold, Linear, Site


@dataclass(frozen=True)
class Constants:
    """How to compute constant nodes from placeholders, independent of the graph they came from."""

    roots: tuple[str, ...]
    """Placeholders that are read, sorted."""
    names: tuple[str, ...]
    steps: tuple[tuple[str, Any, Any, Any], ...]
    """(name, op, args, kwargs) in order; arguments that are :class:`_Ref` are earlier results."""

    def evaluate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of ``names``, given a tensor for each root."""
        values = {root: tensors[root].detach() for root in self.roots}
        with torch.no_grad():
            for name, op, args, kwargs in self.steps:
                args, kwargs = tree_map_only(_Ref, lambda ref: values[ref.name], (args, kwargs))
                values[name] = op(*args, **kwargs)
        return {name: values[name] for name in self.names}


@dataclass(frozen=True)
class _Ref:
    name: str


def extract_constants(program: Program, names: Iterable[str]) -> Constants:
    """The recipe for the constant nodes ``names`` that ``program`` has values for."""
    nodes = constant_nodes(program)
    roots: dict[str, None] = {}
    steps: dict[str, tuple[str, Any, Any, Any]] = {}

    def visit(node: fx.Node) -> bool:
        if node.name in roots or node.name in steps:
            return True
        if node.op == "placeholder":
            if node.name not in program.tensors:
                return False
            roots[node.name] = None
            return True
        if not all(visit(n) for n in node.all_input_nodes):
            return False
        args, kwargs = tree_map_only(
            fx.Node, lambda n: _Ref(n.name), (node.args, dict(node.kwargs))
        )
        steps[node.name] = (node.name, node.target, args, kwargs)
        return True

    known = [name for name in sorted(names) if visit(nodes[name])]
    return Constants(tuple(sorted(roots)), tuple(known), tuple(steps.values()))


def constants_of(sites: Iterable[Site], folds: Iterable[Fold] = ()) -> set[str]:
    """Names of all constants that the sites and folds read."""
    found: set[str] = set()
    linears: list[Linear] = []
    for site in sites:
        linears += site.linears
        found |= {constant.node for constant in site.constants}
    for fold in folds:
        linears += [fold.producer, *fold.readers]
        found |= {name for name, _ in fold.constants}
    for linear in linears:
        found.add(linear.weight)
        found |= {bias for bias in linear.biases if bias is not None}
    return found


@dataclass(frozen=True)
class SiteWeights:
    """A site's weights by heads, as stored: ``heads`` [G, E, D], ``bias`` [G, D] (float64) or None.

    ``partners`` meet the decomposed heads; ``fellows`` turn along with them.
    """

    heads: Tensor
    bias: Tensor | None
    partners: list[PartnerHeads]
    fellows: list[PartnerHeads] = field(default_factory=list)
    inputs: bool = True
    """Whether E counts inputs; outputs of an output projection otherwise."""
    observed: Observed | None = None


FactorKey = tuple[str, str, tuple[tuple[int, ...], ...]]
"""A linear's weight, the axis of the heads in it, and their features."""


def factor_key(linear: Linear, axis: str, features: tuple[tuple[int, ...], ...]) -> FactorKey:
    return linear.weight, axis, features


def read_site(
    site: Site, values: Mapping[str, Tensor], observed: Mapping[FactorKey, Observed] | None = None
) -> SiteWeights:
    """Split the weights of ``site`` into the heads that take part, on the CPU.

    ``observed``: what a run of the program showed of them.
    """
    observed = observed or {}
    heads, bias = read_vectors(site.linear, site.axis, site.features, values)
    partners: list[PartnerHeads] = []
    fellows: list[PartnerHeads] = []
    for factor in site.partners:
        weight, added = read_vectors(factor.tensor, factor.axis, factor.features, values)
        computed = factor.axis == OUT and isinstance(factor.tensor, Linear)
        terms = factor.linear.in_features if computed else 0
        seen = None
        if isinstance(factor.tensor, Linear):
            seen = observed.get(factor_key(factor.tensor, factor.axis, factor.features))
        read = PartnerHeads(weight.mT, added, torch.tensor(factor.groups), terms, seen)
        (partners if factor.against else fellows).append(read)
    own = observed.get(factor_key(site.linear, site.axis, site.features))
    return SiteWeights(heads, bias, partners, fellows, site.axis == OUT, own)


def moments_of(weights: SiteWeights) -> Moments:
    """What the noise of a site depends on besides S."""
    return second_moments(
        weights.heads,
        weights.bias,
        weights.partners,
        weights.fellows,
        inputs=weights.inputs,
        observed=weights.observed,
    )


def read_vectors(
    tensor: Linear | Constant,
    axis: str,
    features: tuple[tuple[int, ...], ...],
    values: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Vectors of D features [n, M, D] and, for outputs of a linear, their biases [n, D] in float64.

    They are on the CPU, in the dtype that they are stored in: all sites of a model are held at a
    time, and numerics widen them one by one.

    M counts inputs of a linear ("out"), its outputs ("in"), or is 1 for elements of a constant.
    """
    index = torch.tensor(features)
    if isinstance(tensor, Constant):
        return values[tensor.node].detach().cpu().flatten()[index].unsqueeze(1), None
    matrix = values[tensor.weight].detach()
    if axis == IN:
        return _select(matrix, 1, index).transpose(0, 1), None
    rows = _select(matrix, 0, index)
    biases = [bias for bias in tensor.biases if bias is not None]
    return rows.mT, float64(values[biases[0]])[index] if biases else None


def _select(matrix: Tensor, axis: int, index: Tensor) -> Tensor:
    """Rows or columns [n, D] of a matrix, on the CPU: a view where they follow each other."""
    flat = index.flatten()
    first, count = int(flat[0]), len(flat)
    if torch.equal(flat, torch.arange(first, first + count)):
        chosen = matrix.narrow(axis, first, count)
    else:
        chosen = matrix.index_select(axis, flat.to(matrix.device))
    return chosen.cpu().unflatten(axis, index.shape)


def float64(value: Tensor) -> Tensor:
    """On the CPU, where all numerics are done."""
    return value.detach().to("cpu", torch.float64)


def all_finite(value: Tensor) -> bool:
    """Whether no element of a floating-point tensor is inf or nan: both show in its extremes, which
    are found in one pass and without a tensor of booleans."""
    if value.numel() == 0:
        return True
    least, most = torch.aminmax(value)
    return bool(least.isfinite() & most.isfinite())
