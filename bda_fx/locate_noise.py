"""Find where in a model the noise of a rewrite arises: the tensors that pass between its modules.

Both programs are exported with the module that each node belongs to. A tensor that is made in a
module and read outside of it is a checkpoint; those of one module, in order, are matched between
the two programs. At each the errors of reference and candidate are measured against the truth, as
they are for the outputs.

Tensors that a rewrite puts into another basis cannot be compared: keys, queries, values, the
attention output before its projection, the latents that a folded gather reorders. Which these are
follows from the mathematics of the reference alone: ``find_sites`` and ``find_folds`` say which
linears may change, and what they make is followed to the contraction or the next linear. What
changed shows at the next checkpoint, so each site is put down to the first that is behind it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from bda_fx.compare_outputs import ratio_of, relative_error, within_budget
from bda_fx.evaluate_float64 import Observer, Wide, evaluate
from bda_fx.fidelity_report import LayerFidelity
from bda_fx.passes.canonicalize import Program, canonicalize_exported
from bda_fx.passes.find_folds import find_folds
from bda_fx.passes.find_sites import find_sites
from bda_fx.passes.normalize_linears import normalize_linears
from bda_fx.passes.op_rules import LINEAR, METADATA
from bda_fx.passes.sites import IN, OUT, QK, Constant, Linear, Site

SAMPLE = 2**16
"""Values of a checkpoint that are kept, at random places: sampling moves an RMS error by less than
one per cent, and a model of hundreds of modules is not held in memory three times."""

Call = str
"""One call of a module: its key in ``nn_module_stack``, with "@1" at the second call."""


class CannotLocate(Exception):
    """The two programs cannot be compared inside; the text says why."""


def locate_noise(
    reference: ExportedProgram,
    candidate: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    budget: float,
    truth: torch.dtype = torch.float64,
    mask: Tensor | None = None,
) -> tuple[LayerFidelity, ...]:
    """Errors at every checkpoint that both programs have, in the order of execution.

    ``mask`` counts the positions of checkpoints whose shape begins with its own.

    Raises:
        CannotLocate: no module of one program has its like in the other.
    """
    ours, theirs = (_functional(p) for p in (reference, candidate))
    changing = _changing(reference)
    pairs = _matched(ours.graph, theirs.graph, changing)
    if not pairs:
        raise CannotLocate("no module of the reference gives what one of the candidate does")
    exact, own = _Samples(pairs, mask), _Samples(pairs, mask)
    found = _Samples([partner for partner, _ in pairs.values()], mask)
    evaluate(Wide(ours.graph_module, truth, exact), ours, args, kwargs)
    evaluate(_Observed(ours.graph_module, own), ours, args, kwargs)
    evaluate(_Observed(theirs.graph_module, found), theirs, args, kwargs)
    shown = _products_shown(ours.graph, changing, set(pairs))
    layers = []
    for name, (partner, label) in pairs.items():
        value, reached, true = own.values[name], found.values[partner], exact.values[name]
        # What overflowed in the reference is not compared, as in the outputs.
        true = true.where(value.isfinite(), torch.nan)
        errors = relative_error(reached, true), relative_error(value, true)
        layers.append(
            LayerFidelity(
                module=label,
                error_reference=errors[1],
                error_candidate=errors[0],
                noise_ratio=ratio_of(*errors),
                passed=within_budget(*errors, value.dtype, budget),
                products=tuple(shown[name]),
            )
        )
    return tuple(layers)


def _functional(program: ExportedProgram) -> ExportedProgram:
    functional = canonicalize_exported(program).exported
    assert functional is not None
    return functional


# -- what may change basis --------------------------------------------------------------------


@dataclass
class _Changing:
    """Names of nodes that a rewrite may put in another basis, and where each product ends."""

    interior: set[str] = field(default_factory=set)
    ends: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    """Product, weight name, and the contractions (QK) or output linears (VO) where it ends."""


def _changing(reference: ExportedProgram) -> _Changing:
    program = canonicalize_exported(reference)
    normalize_linears(program)
    # Sites inside opaque caches included: nobody says how the candidate was rewritten.
    found = find_sites(program, opaque_cache=True)
    folds = find_folds(program, found)
    nodes = {node.name: node for node in program.graph.nodes}
    contractions = {name for name, _ in found.products}
    changing = _Changing()
    for site in found.sites:
        starts = [nodes[name] for name in _turned(site)]
        passed = set(site.contractions) if site.product != QK else set()
        changing.interior |= _followed(starts, contractions - passed)
        outputs = [t for t, axis in _factors(site) if axis == IN and isinstance(t, Linear)]
        names = [name for linear in outputs for name in linear.nodes] or site.contractions
        changing.ends.append((site.product, site.linear.name, tuple(names)))
    for fold in folds.values():
        starts = [nodes[name] for name in fold.producer.nodes]
        changing.interior |= _followed(starts, contractions)
    _spell_as_before(program, changing)
    return changing


def _factors(site: Site) -> list[tuple[Linear | Constant, str]]:
    """All that changes basis at a site, and along which axis."""
    return [(site.linear, site.axis), *((p.tensor, p.axis) for p in site.partners)]


def _turned(site: Site) -> Iterator[str]:
    """The nodes with which the other basis begins."""
    for tensor, axis in _factors(site):
        if isinstance(tensor, Constant):
            yield from tensor.path
        elif axis == OUT:
            yield from tensor.nodes


def _followed(starts: Iterable[fx.Node], ends: set[str]) -> set[str]:
    """Names of ``starts`` and all that is made of them, up to linears and ``ends``."""
    found = {node.name for node in starts}
    stack = list(starts)
    while stack:
        for user in stack.pop().users:
            stops = user.target in LINEAR or user.target in METADATA or user.op == "output"
            if stops or user.name in ends or user.name in found or not _holds_tensor(user):
                continue
            found.add(user.name)
            stack.append(user)
    return found


def _holds_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | list | tuple)


def _spell_as_before(program: Program, changing: _Changing) -> None:
    """Names as in the graph whose linears were not spelled anew."""
    original = {s.linear: s.original for s in program.spellings}
    changing.interior |= {
        s.original for s in program.spellings if changing.interior & {s.linear, s.replacement}
    }
    changing.ends = [
        (product, weight, tuple(original.get(name, name) for name in names))
        for product, weight, names in changing.ends
    ]


def _products_shown(
    graph: fx.Graph, changing: _Changing, checkpoints: set[str]
) -> Mapping[str, list[str]]:
    """Checkpoint → the products that end before it and are seen at no checkpoint before."""
    shown: dict[str, list[str]] = defaultdict(list)
    for product, weight, ends in changing.ends:
        reached: set[fx.Node] = set()
        for node in graph.nodes:
            if node.name in ends or any(arg in reached for arg in node.all_input_nodes):
                reached.add(node)
                if node.name in checkpoints:
                    shown[node.name].append(f"{product} {weight}")
                    break
    return shown


# -- checkpoints ------------------------------------------------------------------------------


def _matched(mine: fx.Graph, other: fx.Graph, changing: _Changing) -> dict[str, tuple[str, str]]:
    """Checkpoint of the reference → that of the candidate and its label, as they are executed."""
    ours, theirs = _checkpoints(mine), _checkpoints(other)
    partners = {
        a: b
        for call, made in ours.items()
        if len(made) == len(theirs.get(call, []))
        for a, b in zip(made, theirs[call], strict=True)
    }
    scores = {name for product, _, ends in changing.ends if product == QK for name in ends}
    named = {node.name: node for node in other.nodes}
    matched = {}
    for node in mine.nodes:
        is_score = node.name in scores and _call(node) == _call(named.get(node.name, node))
        partner = named.get(node.name) if is_score else partners.get(node)
        if partner is None or node.name in changing.interior or not _alike(node, partner):
            continue
        matched[node.name] = partner.name, _label(node) + (" scores" if is_score else "")
    return matched


def _checkpoints(graph: fx.Graph) -> dict[Call, list[fx.Node]]:
    """Floating-point tensors that leave the innermost module that makes them, by its call."""
    found: dict[Call, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        call = _call(node)
        if value.is_floating_point() and any(_leaves(call, user) for user in node.users):
            found[call].append(node)
    return found


def _leaves(call: Call, reader: fx.Node) -> bool:
    inside = call in (reader.meta.get("nn_module_stack") or {"": None})
    return reader.op == "output" or (not inside and reader.target not in METADATA)


def _call(node: fx.Node) -> Call:
    return next(reversed(node.meta.get("nn_module_stack") or {"": None}))


def _label(node: fx.Node) -> str:
    """Path of the module, with the number of the call behind the first."""
    stack = node.meta.get("nn_module_stack")
    path = str(stack[_call(node)][0]) if stack else ""
    _, at, again = _call(node).rpartition("@")
    return f"{path}@{again}" if at else path


def _alike(mine: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes give the same kind of tensor; open sizes fit any."""
    a, b = mine.meta["val"], other.meta["val"]
    return (
        a.dtype == b.dtype
        and a.dim() == b.dim()
        and all(m == n for m, n in zip(a.shape, b.shape, strict=True) if type(m) is type(n) is int)
    )


class _Observed(fx.Interpreter):
    """Runs a graph as it is."""

    def __init__(self, module: fx.GraphModule, observe: Observer) -> None:
        super().__init__(module)
        self.observe = observe

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.observe(n, value)
        return value


class _Samples:
    """An observer that keeps values of the named nodes, at the same places for the same shape."""

    def __init__(self, names: Iterable[str], mask: Tensor | None) -> None:
        self.names = set(names)
        self.mask = mask
        self.values: dict[str, Tensor] = {}

    def __call__(self, node: fx.Node, value: Any) -> None:
        if node.name in self.names:
            self.values[node.name] = self.sample(value)

    def sample(self, value: Tensor) -> Tensor:
        mask = self.mask
        if mask is not None and value.shape[: mask.dim()] == mask.shape:
            value = value[mask.to(value.device).bool()]
        flat = value.detach().flatten()
        if flat.numel() <= SAMPLE:
            return flat.clone()
        random = torch.Generator().manual_seed(flat.numel())
        places = torch.randint(flat.numel(), (SAMPLE,), generator=random)
        return flat[places.to(flat.device)]
