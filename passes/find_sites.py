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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.passes.canonicalize import Program, constant_nodes
from bda_fx.passes.label_features import Cause, Labelling, Ports, Product, label_features, live_nodes
from bda_fx.passes.op_rules import LINEAR
from bda_fx.passes.sites import QK, VO, Found, Linear, Partner, Reason, Site, Skip

MIN_FEATURES = 2  # a head of one feature has nothing to change basis in
MAX_INDEX = 1 << 20  # constant indices up to this many elements are looked at

Meets = dict[tuple[tuple[int, ...], tuple[int, ...]], set[str]]


def find_sites(program: Program) -> Found:
    """Sites and skips of a canonical program; together they cover each attention product."""
    constants = constant_nodes(program)
    linears = constant_linears(program, constants)
    ports = _lay_out(linears)
    weight_of = {node: linear.weight for linear in linears.values() for node in linear.nodes}
    labellings = [
        label_features(
            program.graph, weight_of, constants, ports, size, _index_value(program, size)
        )
        for size in _choices_of_sizes(program.graph)
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
        biases = tuple(n.args[2].name if len(n.args) > 2 and n.args[2] else None for n in users)
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
    siblings = [n.name for n in program.graph.nodes if n.op == "call_function" and roots[0] in _roots(n)]
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


# -- sizes ----------------------------------------------------------------------------------


def _choices_of_sizes(graph: fx.Graph) -> list[Callable[[Any], int]]:
    """The example's sizes, and a second set for dynamic dimensions: a finding must hold at both."""
    symbols: dict[Any, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for dim in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(dim, torch.SymInt):
                expression = dim.node.expr
                if expression.is_Symbol and dim.node.has_hint():
                    symbols[expression] = int(dim.node.hint)

    def at(assignment: dict[Any, int]) -> Callable[[Any], int]:
        def size(value: Any) -> int:
            if not isinstance(value, torch.SymInt):
                return value  # type: ignore[no-any-return]
            return int(value.node.expr.subs(assignment))

        return size

    if not symbols:
        return [at({})]
    return [at(symbols), at({s: 2 * n for s, n in symbols.items()})]


def _index_value(program: Program, size: Callable[[Any], int]) -> Callable[[fx.Node], Tensor | None]:
    """Evaluate small integer index tensors that depend on sizes and constants alone."""
    memo: dict[fx.Node, Tensor | None] = {}

    def evaluate(node: fx.Node) -> Tensor | None:
        if node not in memo:
            memo[node] = compute(node)
        return memo[node]

    def compute(node: fx.Node) -> Tensor | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.is_floating_point():
            return None
        if node.op == "placeholder" and program.exported is not None:
            return program.tensors.get(node.name)  # a buffer of a compiled module may change
        if node.op == "get_attr":
            return getattr(program.module, str(node.target), None)
        if node.op != "call_function":
            return None
        if torch.Size([size(s) for s in value.shape]).numel() > MAX_INDEX:
            return None
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        failed = False

        def argument(n: fx.Node) -> Any:
            nonlocal failed
            inner = n.meta.get("val")
            if not isinstance(inner, Tensor):
                return size(inner)
            result = evaluate(n)
            failed |= result is None
            return result

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
        if failed:
            return None
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator,no-any-return]
        except (RuntimeError, TypeError, ValueError):
            return None

    return evaluate


# -- legality -------------------------------------------------------------------------------


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
        linear = node.target in LINEAR and getattr(node.args[1], "name", None) in linears
        for arg in node.all_input_nodes:
            if arg.name in constants and not (linear and arg in node.args[1:3]):
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


def resolve(meets: Meets, touched: dict[int, Cause]) -> None:
    """Drop lost features from ``meets`` until what is left pairs up, one head to one head.

    ``touched`` grows by the features that are lost on the way, each with the cause that lost it.
    """
    while True:
        _spread(meets, touched)
        _drop(meets, touched)
        clashes = _clashes(meets)
        if not clashes:
            return
        for feature, where in clashes.items():
            touched.setdefault(feature, Cause(Reason.MISMATCHED, where))


def _spread(meets: Meets, touched: dict[int, Cause]) -> None:
    """A feature that meets a lost one is lost."""
    edges: dict[int, set[int]] = defaultdict(set)
    for kv, partner in meets:
        for a, b in zip(kv, partner, strict=True):
            edges[a].add(b)
            edges[b].add(a)
    stack = [f for f in edges if f in touched]
    while stack:
        feature = stack.pop()
        for other in edges[feature]:
            if other not in touched:
                touched[other] = touched[feature]
                stack.append(other)


def _drop(meets: Meets, touched: dict[int, Cause]) -> None:
    for (kv, partner), kinds in list(meets.items()):
        kept = [(a, b) for a, b in zip(kv, partner, strict=True) if a not in touched]
        if len(kept) == len(kv):
            continue
        del meets[kv, partner]
        if kept:
            left, right = zip(*kept, strict=True)
            meets[left, right] |= kinds


def _clashes(meets: Meets) -> dict[int, str]:
    """Features that sit in two different heads, or whose head meets two different heads."""
    heads: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    owner: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    roles: dict[int, set[str]] = defaultdict(set)
    for (kv, partner), kinds in meets.items():
        owner[partner].add(kv)
        for feature in kv:
            heads[feature].add(kv)
            roles[feature] |= {f"kv {kind}" for kind in kinds}
        for feature in partner:
            heads[feature].add(partner)
            roles[feature].add("partner")
    found = {}
    for kv, partner in meets:
        clash = len(owner[partner]) > 1 or any(
            len(heads[f]) > 1 or len(roles[f]) > 1 or len(set(head)) < len(head)
            for head in (kv, partner)
            for f in head
        )
        if clash:
            found.update(dict.fromkeys((*kv, *partner), ""))
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
            heads = grouped.setdefault(key, {}).setdefault(kv_part, {})
            heads.setdefault((other.weight, axis), []).append(partner_part)

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
        contractions = sorted({c for kv in order for f in kv for c in labelling.contractions[f]})
        sites.append(
            Site(
                product,
                linears[weight],
                local,
                tuple(
                    Partner(linears[w], axis, tuple(f for f, _ in found), tuple(g for _, g in found))
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
    """A weight whose columns take part in one site and whose features in another keeps the first."""
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
    spoilt = [c for i, c in enumerate(labelling.causes) if -4 - i == product.code]
    return spoilt[0] if spoilt else Cause(Reason.NO_PROJECTION, product.contraction)


__all__ = ["QK", "VO", "find_sites"]
