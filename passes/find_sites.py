"""Find the attention products that may legally be rewritten, and say why the others may not.

The labelled execution (``label_features``) reports, feature by feature, who meets whom and what
else reads it. This pass turns that into sites:

1. a feature is lost when anything but its contraction reads it, and takes with it every feature
   that it meets, on both sides, to the end of the chain;
2. what is left must pair up: a feature belongs to one head only, a query head meets one key head;
3. heads of one weight with equally many features form a site. Weights, not nodes, carry features:
   layers that share a weight either agree at every use or lose it.

Requires: ``normalize_linears``. Changes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from torch import fx

from bda_fx.passes.canonicalize import Program, constant_nodes
from bda_fx.passes.choose_sizes import choices_of_sizes, index_value
from bda_fx.passes.label_features import label_features, live_nodes
from bda_fx.passes.labels import FIRST_CAUSE, Cause, Labelling, Product
from bda_fx.passes.op_rules import LINEAR
from bda_fx.passes.resolve_meetings import Meets, resolve
from bda_fx.passes.sites import VO, Found, Linear, Partner, Reason, Site, Skip
from bda_fx.passes.track_features import Ports

MIN_FEATURES = 2  # a head of one feature has nothing to change basis in


def find_sites(program: Program) -> Found:
    """Sites and skips of a canonical program; together they cover each attention product."""
    constants = constant_nodes(program)
    linears = constant_linears(program, constants)
    ports = _lay_out(linears)
    weight_of = {node: linear.weight for linear in linears.values() for node in linear.nodes}
    labellings = [
        label_features(program.graph, weight_of, constants, ports, size, index_value(program, size))
        for size in choices_of_sizes(program.graph)
    ]
    meets: Meets = defaultdict(set)
    touched: dict[int, Cause] = {}
    for labelling in labellings:
        for pair, kinds in labelling.meets.items():
            meets[pair] |= kinds
        touched = {**labelling.touched, **touched}
    touched.update(_tied(program, constants, linears, ports, touched))
    resolve(meets, touched)
    sites = _build(meets, touched, linears, ports, labellings[0])
    return _account(sites, touched, labellings[0], linears, ports, program)


def constant_linears(program: Program, constants: dict[str, fx.Node]) -> dict[str, Linear]:
    """Every linear with a constant 2-d weight, keyed by the weight's node name."""
    nodes: dict[str, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.target not in LINEAR or not node.users:
            continue
        weight, bias = (*node.args, None)[1:3]
        known = weight.name in constants and (bias is None or bias.name in constants)
        if known and weight.meta["val"].dim() == 2:
            nodes[weight.name].append(node)
    found = {}
    for weight, users in nodes.items():
        rows, columns = (int(s) for s in constants[weight].meta["val"].shape)
        name = weight_name(constants[weight], program)
        given = [(*n.args, None)[2] for n in users]
        biases = tuple(bias.name if isinstance(bias, fx.Node) else None for bias in given)
        found[weight] = Linear(name, weight, tuple(n.name for n in users), biases, columns, rows)
    return found


def weight_name(node: fx.Node, program: Program) -> str:
    """The parameter's name; expressions of it (slices, transposes of a slice) get a suffix."""
    roots = _roots(node)
    name = program.names[roots[0].name]
    path, whole = node, True
    while path.op != "placeholder":
        whole &= path.meta["val"].numel() == path.all_input_nodes[0].meta["val"].numel()
        path = path.all_input_nodes[0]
    if whole and len(roots) == 1:
        return name
    siblings = [
        n.name for n in program.graph.nodes if n.op == "call_function" and roots[0] in _roots(n)
    ]
    return f"{name}_part{siblings.index(node.name)}"


def _roots(node: fx.Node) -> list[fx.Node]:
    """The placeholders that a constant expression is made of."""
    if node.op == "placeholder":
        return [node]
    found: dict[fx.Node, None] = {}
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            found[current] = None
        stack.extend(current.all_input_nodes)
    return list(found)


def _lay_out(linears: dict[str, Linear]) -> Ports:
    """Number all output features and input columns of all weights in one space."""
    first_feature, first_column, at = {}, {}, 0
    for weight, linear in linears.items():
        first_feature[weight] = at
        first_column[weight] = at + linear.out_features
        at += linear.out_features + linear.in_features
    return Ports(first_feature, first_column)


def _tied(
    program: Program,
    constants: dict[str, fx.Node],
    linears: dict[str, Linear],
    ports: Ports,
    touched: dict[int, Cause],
) -> dict[int, Cause]:
    """Features of weights whose parameter is read by anything but a linear's weight argument."""
    readers: dict[fx.Node, fx.Node] = {}
    live = live_nodes(program.graph)
    for node in live:
        if node.name in constants or node.op == "placeholder":
            continue
        is_linear = node.target in LINEAR and getattr(node.args[1], "name", None) in linears
        for arg in node.all_input_nodes:
            if arg.name in constants and not (is_linear and arg in node.args[1:3]):
                for root in _roots(arg):
                    readers.setdefault(root, node)
    found = {}
    for weight, linear in linears.items():
        for root in _roots(constants[weight]):
            if root in readers:
                cause = Cause(Reason.SHARED_WEIGHT, readers[root].name)
                first = ports.first_feature[weight]
                for port in range(first, first + linear.out_features + linear.in_features):
                    if port not in touched:
                        found[port] = cause
    return found


# -- sites ----------------------------------------------------------------------------------


def _build(
    meets: Meets,
    touched: dict[int, Cause],
    linears: dict[str, Linear],
    ports: Ports,
    labelling: Labelling,
) -> list[Site]:
    where: dict[int, tuple[Linear, str, int]] = {}
    for weight, linear in linears.items():
        for axis, first, width in (
            ("out", ports.first_feature[weight], linear.out_features),
            ("in", ports.first_column[weight], linear.in_features),
        ):
            where.update({first + i: (linear, axis, i) for i in range(width)})

    # (product, weight of K or V, features per head) → head → partner heads by weight and axis
    grouped: dict[Any, dict[tuple[int, ...], dict[Any, list[tuple[int, ...]]]]] = {}
    for (kv, partner), kinds in meets.items():
        for kv_part, partner_part in _by_linear(kv, partner, where):
            linear = where[kv_part[0]][0]
            other, axis, _ = where[partner_part[0]]
            key = (min(kinds), linear.weight, len(kv_part))
            ports_met = grouped.setdefault(key, {}).setdefault(kv_part, {})
            ports_met.setdefault((other.weight, axis), []).append(partner_part)

    sites = []
    for (product, weight, width), heads in grouped.items():
        if width < MIN_FEATURES:
            for kv in heads:
                for f in kv:
                    touched.setdefault(f, Cause(Reason.NOTHING_SAVED, weight))
            continue
        order = sorted(heads)
        local = tuple(tuple(where[f][2] for f in kv) for kv in order)
        partners: dict[Any, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
        for group, kv in enumerate(order):
            for port, found in heads[kv].items():
                for partner in found:
                    partners[port].append((tuple(where[f][2] for f in partner), group))
        taken = {f for kv in order for f in kv}
        contractions = sorted(
            {p.contraction for p in labelling.products if p.kind == product and p.features & taken}
        )
        sites.append(
            Site(
                product,
                linears[weight],
                local,
                tuple(
                    Partner(
                        linears[w], axis, tuple(f for f, _ in found), tuple(g for _, g in found)
                    )
                    for (w, axis), found in partners.items()
                ),
                tuple(contractions),
            )
        )
    return _without_chains(sites, touched, ports)


def _by_linear(
    kv: tuple[int, ...], partner: tuple[int, ...], where: dict[int, tuple[Linear, str, int]]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split a head whose features come from several linears: each part changes basis by itself."""
    parts: dict[Any, tuple[list[int], list[int]]] = {}
    for a, b in zip(kv, partner, strict=True):
        part = parts.setdefault((where[a][0].weight, where[b][0].weight), ([], []))
        part[0].append(a)
        part[1].append(b)
    return [(tuple(a), tuple(b)) for a, b in parts.values()]


def _without_chains(sites: list[Site], touched: dict[int, Cause], ports: Ports) -> list[Site]:
    """A weight whose columns are in one site and whose features in another keeps the first."""
    by_columns = {p.linear.weight for s in sites for p in s.partners if p.axis == "in"}
    kept = []
    for site in sites:
        rows = {site.linear.weight} | {p.linear.weight for p in site.partners if p.axis == "out"}
        chained = rows & by_columns
        if not chained:
            kept.append(site)
            continue
        first = ports.first_feature[site.linear.weight]
        for head in site.features:
            for f in head:
                touched.setdefault(first + f, Cause(Reason.CHAINED, min(chained)))
    return kept


def _account(
    sites: list[Site],
    touched: dict[int, Cause],
    labelling: Labelling,
    linears: dict[str, Linear],
    ports: Ports,
    program: Program,
) -> Found:
    """One skip for every product that no site covers."""
    covered: dict[str, set[int]] = defaultdict(set)
    for site in sites:
        first = ports.first_feature[site.linear.weight]
        covered[site.product] |= {first + f for head in site.features for f in head}
    nodes = {node.name: node for node in program.graph.nodes}
    owner = [(ports.first_feature[w], linear) for w, linear in linears.items()]
    skips, products = [], []
    for product in labelling.products:
        products.append((product.contraction, product.kind))
        if product.features & covered[product.kind]:
            continue
        cause = _cause_of(product, touched, labelling)
        name = ""
        if product.features:
            low = min(product.features)
            name = max((first, linear.name) for first, linear in owner if first <= low)[1]
        source = nodes[product.contraction].meta.get("stack_trace") or ""
        skips.append(
            Skip(
                product.kind, product.contraction, cause.reason, cause.node, name,
                source=source.strip().splitlines()[-1].strip() if source else "",
            )
        )  # fmt: skip
    return Found(tuple(sites), tuple(skips), tuple(products))


def _cause_of(product: Product, touched: dict[int, Cause], labelling: Labelling) -> Cause:
    causes = Counter(touched[f] for f in product.features if f in touched)
    if causes:
        return causes.most_common(1)[0][0]
    if product.features:
        reason = Reason.NO_OUTPUT_LINEAR if product.kind == VO else Reason.MISMATCHED
        return Cause(reason, product.contraction)
    spoilt = [c for i, c in enumerate(labelling.causes) if FIRST_CAUSE - i == product.code]
    return spoilt[0] if spoilt else Cause(Reason.NO_PROJECTION, product.contraction)
