"""Find the attention products that may legally be rewritten, and say why the others may not.

The labelled execution (``label_features``) reports, feature by feature, who meets whom and what
else reads it. This pass turns that into sites:

1. a feature is lost when anything but its contraction reads it, or when its weight is tied to
   another reader. Weights, not nodes, carry features: layers that share a weight either agree at
   every use or lose it;
2. what is left falls into components that must change basis together (``resolve_meetings``), and
   these into sites (``build_sites``);
3. every product that no site covers becomes a skip with the reason.

Requires: ``normalize_linears``. Changes nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from bda_fx.passes.build_sites import build_sites
from bda_fx.passes.canonicalize import Program, constant_nodes, roots_of
from bda_fx.passes.choose_sizes import choices_of_sizes, index_value
from bda_fx.passes.emit_node import innermost_frame
from bda_fx.passes.find_linears import constant_linears, overlapping_weights
from bda_fx.passes.label_features import label_features, live_nodes
from bda_fx.passes.labels import FIRST_CAUSE, Cause, Labelling, Meets, Product
from bda_fx.passes.op_rules import ATTENTION, LINEAR, MATMULS
from bda_fx.passes.resolve_meetings import resolve
from bda_fx.passes.sites import (
    BOTH,
    IN,
    OUT,
    QK,
    REMEDIES,
    VO,
    Constant,
    Found,
    Linear,
    Reason,
    Site,
    Skip,
)
from bda_fx.passes.track_features import Ports, Setting


def find_sites(program: Program, *, opaque_cache: bool = False) -> Found:
    """Sites and skips of a canonical program; together they cover each attention product.

    ``opaque_cache``: keys and values may leave the program into a cache that only its own
    attention reads.
    """
    constants = constant_nodes(program)
    linears = constant_linears(program, constants)
    ports = Ports(linears)
    weight_of = {node: linear.weight for linear in linears.values() for node in linear.nodes}
    labellings = [
        label_features(
            program.graph,
            Setting(
                weight_of, constants, program.names, ports, size, index_value(program, size),
                opaque_cache,
            ),
        )
        for size in choices_of_sizes(program.graph)
    ]  # fmt: skip
    meets: Meets = defaultdict(set)
    touched: dict[int, Cause] = {}
    for labelling in labellings:
        for pair, kinds in labelling.meets.items():
            meets[pair] |= kinds
        touched = {**labelling.touched, **touched}
    for weight, cause in _tied(program, constants, linears, ports, touched).items():
        for axis in (OUT, IN):
            for feature in ports.of(weight, axis).features:
                touched.setdefault(feature, cause)
    leaving = {ports.owner(f).tensor for f in (*labellings[0].kept, *labellings[0].appended)}
    cached = {tensor.weight for tensor in leaving if isinstance(tensor, Linear)}
    if opaque_cache:
        _lose_foreign_caches(meets, touched, labellings[0], ports, program)
    sites = build_sites(resolve(meets, touched), touched, ports, labellings[0].products)
    found = _account(sites, touched, labellings[0], ports, program, opaque_cache=opaque_cache)
    return replace(found, cached=tuple(sorted(cached)), linears=tuple(sorted(linears)))


def _lose_foreign_caches(
    meets: Meets, touched: dict[int, Cause], labelling: Labelling, ports: Ports, program: Program
) -> None:
    """Lose what leaves into a cache that is not seen to be that of a self-attention.

    A self-attention's queries and keys are made from common inputs. The program that reads its
    cache appends to it, so it holds the same weights and is rewritten alike. A cross-attention's
    cache is read by programs without the weights of its keys and values, which would not know of
    the change. And what is appended to but does not leave is no cache: those are keys and values of
    the caller's own.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    common: set[fx.Node] = set()
    for query, key in labelling.operands:
        common |= made_from(query) & made_from(key)
    for feature, where in labelling.kept.items():
        linear = ports.owner(feature).tensor
        if not isinstance(linear, Linear) or feature in labelling.appended:
            continue
        if not set().union(*(made_from(nodes[name]) for name in linear.nodes)) & common:
            touched.setdefault(feature, Cause(Reason.RETURNED, where))
    for feature, where in labelling.appended.items():
        if feature not in labelling.kept:
            touched.setdefault(feature, Cause(Reason.CACHED, where))


def made_from(node: fx.Node, depth: int = 3) -> set[fx.Node]:
    """Inputs of the linears that ``node`` comes from, up to ``depth`` of them in a row.

    Contractions end the search: what comes from there belongs to other tokens.
    """
    found: set[fx.Node] = set()
    level = [node]
    for _ in range(depth):
        inputs: list[fx.Node] = []
        stack, seen = level, set(level)
        while stack:
            current = stack.pop()
            if current.target in LINEAR:
                inputs.append(current.args[0])  # type: ignore[arg-type]
            elif current.target not in MATMULS and current.target not in ATTENTION:
                fresh = [arg for arg in current.all_input_nodes if arg not in seen]
                seen.update(fresh)
                stack.extend(fresh)
        found.update(inputs)
        level = inputs
    return found


def _tied(
    program: Program,
    constants: dict[str, fx.Node],
    linears: dict[str, Linear],
    ports: Ports,
    touched: dict[int, Cause],
) -> dict[str, Cause]:
    """Weights whose parameter is read by anything but a linear's weight argument, or in parts."""
    readers: dict[fx.Node, fx.Node] = {}
    live = live_nodes(program.graph)
    copied = _copied(ports, touched)
    nodes = {name for linear in linears.values() for name in linear.nodes}
    for node in live:
        if node.name in constants or node.op == "placeholder":
            continue
        is_linear = node.name in nodes
        for arg in node.all_input_nodes:
            read = not (is_linear and arg in node.args[1:3]) and (arg.name, node.name) not in copied
            if arg.name in constants and read:
                for root in roots_of(arg):
                    readers.setdefault(root, node)
    overlapping = overlapping_weights(constants, linears)
    found = {w: Cause(Reason.SHARED_WEIGHT, other) for w, other in overlapping.items()}
    for weight in linears:
        for root in roots_of(constants[weight]):
            if root in readers:
                found[weight] = Cause(Reason.SHARED_WEIGHT, readers[root].name)
    return found


def _copied(ports: Ports, touched: dict[int, Cause]) -> set[tuple[str, str]]:
    """Reads (constant, reader) that a rewrite gives a copy of the constant of their own."""
    found = set()
    for port in ports.all:
        constant = port.tensor
        if isinstance(constant, Constant) and not any(f in touched for f in port.features):
            chain = (constant.node, *constant.path, constant.user)
            found |= set(itertools.pairwise(chain))
    return found


def _account(
    sites: list[Site],
    touched: dict[int, Cause],
    labelling: Labelling,
    ports: Ports,
    program: Program,
    *,
    opaque_cache: bool,
) -> Found:
    """One skip for every product that no site covers."""
    covered: set[tuple[str, str]] = {
        (contraction, product)
        for site in sites
        for contraction in site.contractions
        for product in ((QK, VO) if site.product == BOTH else (site.product,))
    }
    nodes = {node.name: node for node in program.graph.nodes}
    where = {p.contraction: nodes[p.contraction].meta for p in labelling.products}
    places = {name: (module_of(meta), source_of(meta)) for name, meta in where.items()}
    skips, products = [], []
    for product in labelling.products:
        products.append((product.contraction, product.kind))
        if products[-1] in covered:
            continue
        cause = _cause_of(product, touched, labelling)
        name = ""
        if product.features:
            owner = ports.owner(min(product.features)).tensor
            name = owner.name
        remedy = REMEDIES.get(cause.reason, "")
        kept = product.features & labelling.kept.keys()
        if cause.reason is Reason.RETURNED and kept and not opaque_cache:
            remedy = REMEDIES[Reason.CACHED]
        module, source = places[product.contraction]
        skips.append(
            Skip(
                product.kind,
                product.contraction,
                cause.reason,
                cause.node or product.contraction,
                name,
                source=source,
                module=module,
                remedy=remedy,
            )
        )
    return Found(tuple(sites), tuple(skips), tuple(products), places=places)


def source_of(meta: Mapping[str, Any]) -> str:
    """File, line and text of the innermost frame of the user's that made a node."""
    lines = innermost_frame(meta.get("stack_trace") or "").strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])


def module_of(meta: Mapping[str, Any]) -> str:
    """Path of the innermost module that made a node."""
    stack = list((meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""


def _cause_of(product: Product, touched: dict[int, Cause], labelling: Labelling) -> Cause:
    causes = Counter(touched[f] for f in product.features if f in touched)
    if causes:
        return causes.most_common(1)[0][0]
    if product.features:
        reason = Reason.NO_OUTPUT_LINEAR if product.kind == VO else Reason.MISMATCHED
        return Cause(reason, product.contraction)
    spoilt = [c for i, c in enumerate(labelling.causes) if FIRST_CAUSE - i == product.code]
    return spoilt[0] if spoilt else Cause(Reason.NO_PROJECTION, product.contraction)
