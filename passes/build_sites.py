"""From components to sites: which linear is decomposed, and which factors turn along.

Components of one kind (the same tensors on the same sides, the same number of features) are the
heads of one site. A site decomposes one linear: one that has exactly one block in each of its
components, so that the block can be made an identity by the component's own S. Where both sides
have such a linear, the site carries the view from either side.

Requires: ``resolve_meetings``. Changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from bda_fx.passes.labels import Cause, Product
from bda_fx.passes.resolve_meetings import Block, Component
from bda_fx.passes.sites import ELEMENT, IN, KV, OUT, QO, Factor, Linear, Reason, Site
from bda_fx.passes.track_features import Port, Ports

MIN_FEATURES = 2  # a head of one feature has nothing to change basis in


def build_sites(
    components: Iterable[Component],
    touched: dict[int, Cause],
    ports: Ports,
    products: Iterable[Product],
) -> list[Site]:
    """Sites in the order of the graph; features of components that make none are ``touched``."""
    alike: dict[object, list[Component]] = defaultdict(list)
    for component in components:
        owners = frozenset((ports.owner(b.features[0]).key, b.near) for b in component.blocks)
        alike[component.product, component.width, owners].append(component)
    spans = [(min(p.features), max(p.features), p) for p in products if p.features]
    sites = []
    for heads in alike.values():
        width = heads[0].width
        features = {f for head in heads for b in head.blocks for f in b.features}
        site = _site(heads, ports) if width >= MIN_FEATURES else None
        if site is None:
            reason = Reason.NOTHING_SAVED if width < MIN_FEATURES else Reason.MISMATCHED
            for feature in features:
                touched.setdefault(feature, Cause(reason, ""))
            continue
        kinds = site.product.split("+")
        low, high = min(features), max(features)
        met = {
            p.contraction
            for first, last, p in spans
            if first <= high and last >= low and p.kind in kinds
            if not p.features.isdisjoint(features)
        }
        contractions = tuple(sorted(met))
        if site.other:
            site = replace(site, other=replace(site.other, contractions=contractions))
        sites.append(replace(site, contractions=contractions))
    return _without_chains(sites, touched, ports)


def _site(heads: list[Component], ports: Ports) -> Site | None:
    """The site of components of one kind, seen from the side of keys and values if possible."""
    blocks: dict[tuple[Port, bool], list[tuple[Block, int]]] = defaultdict(list)
    heads = sorted(heads, key=lambda head: min(min(b.features) for b in head.blocks))
    for group, head in enumerate(heads):
        for block in head.blocks:
            blocks[ports.owner(block.features[0]), block.near].append((block, group))
    views = []
    for side in (KV, QO):
        lead = _decomposable(blocks, len(heads), near=side == KV)
        if lead is not None:
            views.append(_view(blocks, lead, side, heads[0].product))
    if not views:
        return None
    return replace(views[0], other=views[1] if len(views) > 1 else None)


def _decomposable(
    blocks: dict[tuple[Port, bool], list[tuple[Block, int]]], heads: int, *, near: bool
) -> Port | None:
    """The linear of a side that saves most, among those with one block in every component."""
    found = []
    for (port, side), members in blocks.items():
        if side != near or not isinstance(port.tensor, Linear) or len(members) != heads:
            continue
        if len({group for _, group in members}) < heads:
            continue
        # An output projection is decomposed as a whole: each of its outputs is a sum over heads.
        if port.axis == IN and heads * len(members[0][0].features) != port.width:
            continue
        found.append(port)

    def saving(port: Port) -> tuple[int, int]:
        linear, width = port.tensor, len(blocks[port, near][0][0].features)
        assert isinstance(linear, Linear)
        pool = linear.in_features if port.axis == OUT else linear.out_features
        return linear.tokens * min(width, pool), pool  # a larger pool is better conditioned

    return max(found, key=saving, default=None)


def _view(
    blocks: dict[tuple[Port, bool], list[tuple[Block, int]]], lead: Port, side: str, product: str
) -> Site:
    """The site with the linear of ``lead`` decomposed; heads in the order of its features."""
    near = side == KV
    members = blocks[lead, near]
    order = [group for _, group in sorted(members, key=lambda m: min(m[0].features))]
    place = {group: at for at, group in enumerate(order)}
    chosen = {group: block for block, group in members}
    # Features of a head in the order of the decomposed linear.
    sort = {
        g: sorted(range(len(b.features)), key=b.features.__getitem__) for g, b in chosen.items()
    }
    partners = []
    for (port, other), met in blocks.items():
        if port is lead and other == near:
            continue
        met = sorted(met, key=lambda m: (place[m[1]], min(m[0].features)))
        partners.append(
            Factor(
                port.tensor,
                port.axis,
                tuple(tuple(b.features[i] - port.first for i in sort[g]) for b, g in met),
                tuple(place[g] for _, g in met),
                against=other != near,
            )
        )
    assert isinstance(lead.tensor, Linear)
    return Site(
        product,
        lead.tensor,
        tuple(tuple(chosen[g].features[i] - lead.first for i in sort[g]) for g in order),
        tuple(partners),
        (),
        side,
        lead.axis,
    )


def _without_chains(sites: list[Site], touched: dict[int, Cause], ports: Ports) -> list[Site]:
    """A weight whose columns are in one site and whose features in another keeps the first."""

    def weights(site: Site, axis: str) -> set[str]:
        own = {site.linear.weight} if site.axis == axis else set()
        return own | {p.linear.weight for p in site.partners if p.axis == axis != ELEMENT}

    by_columns = {weight for site in sites for weight in weights(site, IN)}
    kept = []
    for site in sites:
        chained = weights(site, OUT) & by_columns
        if not chained:
            kept.append(site)
            continue
        linear = ports.of(min(chained), IN).tensor
        assert isinstance(linear, Linear)
        cause = Cause(Reason.CHAINED, linear.nodes[0])
        first = ports.of(site.linear.weight, site.axis).first
        for head in site.features:
            for f in head:
                touched.setdefault(first + f, cause)
    return kept
