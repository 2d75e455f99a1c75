"""Read the weights of a site: constant expressions evaluated, split into heads, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from bda_fx.passes.canonicalize import Program, constant_nodes
from bda_fx.passes.predict_noise import PartnerHeads
from bda_fx.passes.sites import Fold, Linear, Site


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
    linears = [linear for s in sites for linear in (s.linear, *(p.linear for p in s.partners))]
    for fold in folds:
        linears += [fold.producer, *fold.readers]
        found |= {name for name, _ in fold.constants}
    for linear in linears:
        found.add(linear.weight)
        found |= {bias for bias in linear.biases if bias is not None}
    return found


@dataclass(frozen=True)
class SiteWeights:
    """A site's weights by heads, float64: ``heads`` [G, E, D], ``bias`` [G, D] or None."""

    heads: Tensor
    bias: Tensor | None
    partners: list[PartnerHeads]


def read_site(site: Site, values: Mapping[str, Tensor]) -> SiteWeights:
    """Split the weights of ``site`` into the heads that take part, on the CPU."""
    features = torch.tensor(site.features)
    partners = []
    for partner in site.partners:
        index = torch.tensor(partner.features)
        weight = _matrix(partner.linear, values)
        if partner.axis == "out":
            bias = _bias(partner.linear, values)
            heads = weight[index]
            partner_bias = None if bias is None else bias[index]
        else:
            heads, partner_bias = weight.T[index], None
        partners.append(PartnerHeads(heads, partner_bias, torch.tensor(partner.groups)))
    bias = _bias(site.linear, values)
    heads = _matrix(site.linear, values)[features].transpose(1, 2)
    return SiteWeights(heads, None if bias is None else bias[features], partners)


def _matrix(linear: Linear, values: Mapping[str, Tensor]) -> Tensor:
    return values[linear.weight].to("cpu", torch.float64)


def _bias(linear: Linear, values: Mapping[str, Tensor]) -> Tensor | None:
    names = [bias for bias in linear.biases if bias is not None]
    return values[names[0]].to("cpu", torch.float64) if names else None
