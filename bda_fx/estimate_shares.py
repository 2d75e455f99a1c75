"""Estimate what share of a program's rounding noise comes from each site, by one backward pass.

To first order an error δ in the value v of a node moves the output y by J δ. Where every node
rounds independently, δ = u v ε with ε of variance 1 for each rounding, and the output's noise is

    E‖Σ_n J_n δ_n‖² = u² Σ_n ρ_n Σ_i v_ni² ‖J_ni‖²,     ‖J_ni‖² = E_z[ (Jᵀz)_ni² ] for white z,

so that one backward pass from a random cotangent z gives what every node adds, and the sum over the
values that a site rounds (queries and keys; values and attention outputs) over the sum over all
nodes is the site's share. It is exact for one input up to the sampling of z, which many elements
average out. ρ_n counts roundings: one a value, and more for sums that are kept in the dtype itself;
data movement does not round, a cast down does, and nodes of a wider dtype do not count.

Inputs are the caller's (``calibration=``), or made up from the program's signature, so that the
estimate depends on the weights and the program alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bda_fx.evaluate_float64 import Wide, user_outputs
from bda_fx.generate_inputs import make_tensor
from bda_fx.passes import op_rules
from bda_fx.passes.canonicalize import Program, constant_nodes
from bda_fx.passes.choose_sizes import example_size
from bda_fx.passes.predict_noise import keeps_sums_wide, partial_roundings
from bda_fx.passes.sites import OUT, Linear, Site

log = logging.getLogger("bda_fx")

DRAWS = 2
"""Inputs that are made up, and cotangents for each: their estimates differ by a tenth."""
CAUTION = 1.1
"""What shares on inputs that are made up are multiplied by: on real text, single sites of MiniLM-L6
have up to 1.9 times the share, all of them together 1.1 times."""
MOST_OUTPUTS = 4
"""Outputs that are looked at: each takes a backward pass, and the first ones matter."""
MOST_WORK = 3e10
"""Multiplications of linears up to which an estimate is made unasked: a few seconds."""

_MOVEMENT = op_rules.MOVES | op_rules.KEEPS | op_rules.SCATTERS | op_rules.WRITES | op_rules.STORES


def estimate_shares(
    program: Program,
    sites: Sequence[Site],
    inputs: Sequence[Sequence[Any]] | None = None,
) -> list[list[float]] | None:
    """The share of each site in the noise of each of the first outputs.

    ``inputs`` are flat inputs of the program, placeholders in order; None makes some up. Returns
    None where there is no telling: the program is too large to be run unasked, or an op of it
    cannot be run or differentiated.
    """
    if not sites:
        return []
    if inputs is None and _work(program) > MOST_WORK:
        log.info("bda_fx: noise shares are not estimated, the program is too large")
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random = torch.Generator().manual_seed(0)
            given = inputs or [_made_up(program, random) for _ in range(DRAWS)]
            totals = [_shares(program, sites, flat, random) for flat in given]
    except Exception as error:  # whatever an op raises
        log.info("bda_fx: noise shares are not estimated: %s: %s", type(error).__name__, error)
        return None
    mean = torch.tensor(totals, dtype=torch.float64).mean(0) * (1.0 if inputs else CAUTION)
    return mean.tolist() if mean.numel() and mean.isfinite().all() else None


def _work(program: Program) -> float:
    """Multiplications of all linears at the example's sizes."""
    total = 0.0
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        tokens = [example_size(size) for size in node.meta["val"].shape]
        terms = example_size(node.args[0].meta["val"].shape[-1])
        total += float(torch.Size(tokens).numel()) * terms
    return total


def _made_up(program: Program, random: torch.Generator) -> list[Any]:
    values: list[Any] = []
    for node in program.graph.find_nodes(op="placeholder"):
        like = node.meta.get("val")
        if node.name in program.tensors:
            values.append(program.tensors[node.name])
        elif isinstance(like, Tensor):
            values.append(make_tensor(node, [example_size(n) for n in like.shape], random))
        else:
            values.append(example_size(like) if like is not None else None)
    return values


def _shares(
    program: Program, sites: Sequence[Site], flat: Sequence[Any], random: torch.Generator
) -> list[list[float]]:
    """For one input: each site's share in each output."""
    nodes = {node.name: node for node in program.graph.nodes}
    reads = [_reads(site, nodes) for site in sites]
    run = _Backward(program.module, torch.float32)
    run.constants = set(constant_nodes(program))
    run.watched = {name for site in reads for name, _, _ in site}
    results = run.run(*flat)
    shares: list[list[float]] = [[] for _ in sites]
    for output in _outputs(program, results)[:MOST_OUTPUTS]:
        cotangent = torch.randn(output.shape, generator=random).to(output.device, output.dtype)
        run.total, run.energies = 0.0, {}
        output.backward(cotangent, retain_graph=True)
        for at, site in enumerate(reads):
            mine = sum(
                times * float(run.energies[name][features].sum())
                for name, features, times in site
                if name in run.energies
            )
            shares[at].append(mine / run.total if run.total > 0 else 0.0)
    return shares


def _reads(site: Site, nodes: Mapping[str, fx.Node]) -> list[tuple[str, Tensor, float]]:
    """What a site rounds: (node, features along its last axis, roundings of each value)."""
    found = []
    factors: list[tuple[Linear, str, Any]] = [(site.linear, site.axis, site.features)]
    factors += [
        (factor.tensor, factor.axis, factor.features)
        for factor in site.partners
        if isinstance(factor.tensor, Linear)
    ]
    for linear, axis, features in factors:
        index = torch.tensor(sorted({f for head in features for f in head}))
        for name in linear.nodes:
            node = nodes[name]
            read = node if axis == OUT else node.args[0]
            assert isinstance(read, fx.Node)
            value = node.meta["val"]
            times = _roundings(node) if axis == OUT else torch.finfo(value.dtype).eps ** 2
            found.append((read.name, index, times))
    return found


def _outputs(program: Program, results: Any) -> list[Tensor]:
    """Floating outputs that the caller sees, each once."""
    if program.exported is not None:
        results = user_outputs(program.exported, results)
    leaves = pytree.tree_leaves(results)
    seen = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad}
    return list(seen.values())


def _roundings(node: fx.Node) -> float:
    """ρ ε² of a node: the variance of its relative rounding error, but for a common factor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return 0.0
    if node.target in _MOVEMENT and not _casts_down(node, value):
        return 0.0
    return torch.finfo(value.dtype).eps ** 2 * _rounded_values(node, value)


def _rounded_values(node: fx.Node, value: Tensor) -> float:
    terms = 0
    if not keeps_sums_wide(value.dtype):
        if node.target in op_rules.LINEAR | op_rules.MATMULS:
            terms = example_size(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
        elif node.target in op_rules.ATTENTION:
            terms = example_size(value.shape[-1])
    return 1 + partial_roundings(terms)


def _casts_down(node: fx.Node, value: Tensor) -> bool:
    before = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
    return (
        isinstance(before, Tensor)
        and before.is_floating_point()
        and torch.finfo(value.dtype).eps > torch.finfo(before.dtype).eps
    )


class _Backward(Wide):
    """Runs a graph; a backward pass then adds up what the rounding of its nodes does.

    ``total``: Σ ρ ε² v² (Jᵀz)² over all nodes that depend on inputs. ``energies``: Σ v² (Jᵀz)² over
    all but the last axis, of the nodes in ``watched``.
    """

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(module, dtype)
        self.constants: set[str] = set()
        self.watched: set[str] = set()
        self.total = 0.0
        self.energies: dict[str, Tensor] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def widen(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_inference():
            value = value.clone()  # an inference tensor cannot be kept for a backward pass
        if isinstance(value, Tensor) and value.dtype in self.wider:
            return value.to(self.wider[value.dtype])
        return super().widen(value)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.copy.default:  # has no derivative of its own
            return self.widen(args[1]).expand_as(args[0])
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if n.op != "call_function" or n.name in self.constants or not floating:
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        rate, watched = _roundings(n), n.name in self.watched
        if rate or watched:
            seen = value.detach()

            def collect(gradient: Tensor) -> None:
                energy = (seen * gradient).double().square()
                self.total += rate * float(energy.sum())
                if watched:
                    by_feature = energy.flatten(0, -2).sum(0) if energy.dim() > 1 else energy
                    self.energies[n.name] = by_feature.cpu()

            value.register_hook(collect)
        return value
