"""Cut one site out of a program: from what the projection reads to where its features meet others.

    forward    from the weights of the projection, through moves, sums and scalings, to the op that
               computes something of them (the contraction; for an output projection its sum)
    backward   from there to what does not move data: the hidden states and the weights

The same cut of the original and of the rewritten program is the picture before and after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx
from torch.export import ExportedProgram

from bda_fx.passes import op_rules as rules

_FOLLOWED = rules.MOVES | rules.KEEPS | rules.SCALES | rules.ADDS | rules.LINEAR
_FOLLOWED |= rules.MATMULS | rules.overloads("addmm", "sum.dim_IntList")


@dataclass(frozen=True)
class Box:
    """An op, a weight or an activation that comes from elsewhere. ``shape`` has symbols in it where
    sizes are open; ``kind`` is "op", "weight" or "input"."""

    name: str
    label: str
    shape: str
    kind: str


@dataclass(frozen=True)
class SiteGraph:
    """Boxes in the order of execution, and edges as pairs of their places in it."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


def site_graph(program: ExportedProgram, weight: str, contractions: Iterable[str]) -> SiteGraph:
    """The site whose projection has the weight ``weight`` (its name in the original program).

    Raises:
        LookupError: the program does not read such a weight.
    """
    weights = _weights(program)
    ends = set(contractions)
    # What stands for a weight in a rewritten program has its name, with something behind it.
    sources = [n for n, name in weights.items() if name == weight or name.startswith(f"{weight}_")]
    if not sources:
        raise LookupError(weight)
    inside = _forward(sources, ends)
    shown = set(inside)
    leaves: set[fx.Node] = set()
    for node in inside:
        if node not in sources and not _is_end(node, ends):
            _backward(node, shown, leaves)
    order = [node for node in program.graph.nodes if node in shown]
    places = {node: at for at, node in enumerate(order)}
    boxes = tuple(_box(node, node in leaves, weights) for node in order)
    edges = [
        (places[source], places[node])
        for node in order
        if node not in leaves
        for source in node.all_input_nodes
        if source in places
    ]
    return SiteGraph(boxes, tuple(edges))


def _weights(program: ExportedProgram) -> dict[fx.Node, str]:
    """Placeholders of parameters, buffers and constants, with their names in the state."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    nodes = program.graph.find_nodes(op="placeholder")
    return {node: names[node.name] for node in nodes if node.name in names}


def _is_end(node: fx.Node, ends: set[str]) -> bool:
    return node.name in ends or (node.op != "placeholder" and node.target not in _FOLLOWED)


def _forward(sources: list[fx.Node], ends: set[str]) -> list[fx.Node]:
    """``sources`` and what is made of them, up to and with what ends a site."""
    found = dict.fromkeys(sources)
    waiting = deque(sources)
    while waiting:
        node = waiting.popleft()
        if _is_end(node, ends):
            continue
        for user in node.users:
            if user not in found and user.op == "call_function":
                found[user] = None
                waiting.append(user)
    return list(found)


def _backward(node: fx.Node, shown: set[fx.Node], leaves: set[fx.Node]) -> None:
    """Put the inputs of ``node`` among ``shown``, through moves to what they move."""
    for source in node.all_input_nodes:
        if source in shown or not isinstance(source.meta.get("val"), Tensor):
            continue
        shown.add(source)
        if source.op == "call_function" and source.target in rules.MOVES | rules.KEEPS:
            _backward(source, shown, leaves)
        else:
            leaves.add(source)


def _box(node: fx.Node, leaf: bool, weights: dict[fx.Node, str]) -> Box:
    value = node.meta.get("val")
    shape = " × ".join(map(str, value.shape)) if isinstance(value, Tensor) else ""
    if node in weights:
        return Box(node.name, _last_parts(weights[node]), shape, "weight")
    target = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    if leaf:
        return Box(node.name, node.name, shape, "input")
    return Box(node.name, target, shape, "op")


def _last_parts(name: str) -> str:
    """``query.weight`` of ``encoder.layer.0.attention.self.query.weight``."""
    return ".".join(name.split(".")[-2:])
