"""Read the weights of a site: constant expressions evaluated, split into heads, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bda_fx.passes.canonicalize import Program, constant_nodes
from bda_fx.passes.predict_noise import PartnerHeads
from bda_fx.passes.sites import Linear, Site


def evaluate_constants(
    program: Program, names: Iterable[str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values of the constant nodes ``names``, given the placeholders' ``tensors``."""
    nodes = constant_nodes(program)
    values: dict[str, Tensor] = {}

    def value(node: fx.Node) -> Tensor:
        if node.op == "placeholder":
            return tensors[node.name].detach()
        if node.name not in values:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
            values[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[node.name]

    with torch.no_grad():
        return {name: value(nodes[name]) for name in names}


def constants_of(sites: Iterable[Site]) -> set[str]:
    """Names of all weights and biases that the sites read."""
    found: set[str] = set()
    for site in sites:
        for linear in (site.linear, *(p.linear for p in site.partners)):
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
