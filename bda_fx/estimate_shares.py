"""Estimate what share of a program's rounding noise comes from each site, by one backward pass.

To first order an error δ in the value v of a node moves the output y by J δ. Where every node
rounds independently, δ = u v ε with ε of variance 1 for each rounding, and the output's noise is

    E‖Σ_n J_n δ_n‖² = u² Σ_n ρ_n Σ_i v_ni² ‖J_ni‖²,     ‖J_ni‖² = E_z[ (Jᵀz)_ni² ] for white z,

so that one backward pass from a random cotangent z gives what every node adds, and the sum over the
values that a site rounds (queries and keys; values and attention outputs) over the sum over all
nodes is the site's share. It is exact for one input up to the sampling of z, which many elements
average out. ρ_n counts roundings: one a value, and more for sums that are kept in the dtype itself;
data movement does not round, a cast down does, and nodes of a wider dtype do not count.

The same pass shows the second moments of values and gradients at each factor of a site, and of the
gradients of its weights: with them ``observe_noise`` foretells what a change of basis does.

Inputs are the caller's (``calibration=``), or made up from the program's signature, so that the
estimate depends on the weights and the program alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bda_fx.evaluate_float64 import Wide, user_outputs
from bda_fx.generate_inputs import make_tensor
from bda_fx.passes import op_rules
from bda_fx.passes.canonicalize import Program, constant_nodes
from bda_fx.passes.choose_sizes import example_size
from bda_fx.passes.observe_noise import Observed
from bda_fx.passes.predict_noise import keeps_sums_wide, partial_roundings
from bda_fx.passes.read_weights import FactorKey, factor_key
from bda_fx.passes.sites import IN, OUT, Linear, Site

log = logging.getLogger("bda_fx")

DRAWS = 2
"""Inputs that are made up, and cotangents for each: their estimates differ by a tenth."""
CAUTION, CAUTION_OF_LONG_SUMS = 1.1, 1.6
"""What shares on inputs that are made up are multiplied by, where sums are rounded once and where
they are kept in the dtype itself. On real text, single sites of MiniLM-L6 have up to 1.9 times the
share, all of them together 1.1 times; partial sums of real inputs are smaller or larger than those
of made-up ones, so that in float32 the excess of noise is 0.4 (MiniLM-L6) to 1.45 times (rxnfp)
what is predicted without this."""
MOST_OUTPUTS = 4
"""Outputs that are looked at: each takes a backward pass, and the first ones matter."""
MOST_WORK = 3e10
"""Multiplications of linears up to which an estimate is made unasked: a few seconds."""
MOST_BYTES = 4 << 30
"""Memory up to which an estimate is made unasked: a backward pass keeps the values of all nodes."""

Features = tuple[tuple[int, ...], ...]

_UNINITIALISED = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_permuted.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_MOVEMENT = op_rules.MOVES | op_rules.KEEPS | op_rules.SCATTERS | op_rules.WRITES | op_rules.STORES


@dataclass(frozen=True)
class Shares:
    """``of_sites``: the share of each site in the noise of each of the first outputs.

    ``observed``: moments of each factor of the sites, seen from either side, over all outputs.
    """

    of_sites: list[list[float]]
    observed: dict[FactorKey, Observed]


def estimate_shares(
    program: Program,
    sites: Sequence[Site],
    inputs: Sequence[Sequence[Any]] | None = None,
) -> Shares | None:
    """What share of the noise each site has, and what is observed of its factors on the way.

    ``inputs`` are flat inputs of the program, placeholders in order; None makes some up. Returns
    None where there is no telling: the program is too large to be run unasked, or an op of it
    cannot be run or differentiated.
    """
    if not sites:
        return Shares([], {})
    if inputs is None and (_work(program) > MOST_WORK or _kept(program) > MOST_BYTES):
        log.info("bda_fx: noise shares are not estimated, the program is too large")
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random = torch.Generator().manual_seed(0)
            given = inputs or [_made_up(program, random) for _ in range(DRAWS)]
            run = _Backward(program, sites)
            totals = [_shares(program, sites, run, flat, random) for flat in given]
    except Exception as error:  # whatever an op raises
        log.info("bda_fx: noise shares are not estimated: %s: %s", type(error).__name__, error)
        return None
    mean = torch.tensor(totals, dtype=torch.float64).mean(0)
    if inputs is None:
        wide = all(keeps_sums_wide(value.dtype) for value in _weights(program, sites))
        mean *= CAUTION if wide else CAUTION_OF_LONG_SUMS
    if not mean.numel() or not mean.isfinite().all():
        return None
    return Shares(mean.tolist(), run.observed())


def _weights(program: Program, sites: Sequence[Site]) -> list[Tensor]:
    nodes = {node.name: node for node in program.graph.nodes}
    return [nodes[site.linear.weight].meta["val"] for site in sites]


def _work(program: Program) -> float:
    """Multiplications of all linears at the example's sizes."""
    total = 0.0
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        tokens = [example_size(size) for size in node.meta["val"].shape]
        terms = example_size(node.args[0].meta["val"].shape[-1])
        total += float(torch.Size(tokens).numel()) * terms
    return total


def _kept(program: Program) -> int:
    """Bytes of all floating values at the example's sizes, in float32."""
    total = 0
    for node in program.graph.nodes:
        value = node.meta.get("val")
        computed = node.op == "call_function" and isinstance(value, Tensor)
        if computed and value.is_floating_point():
            total += 4 * torch.Size([example_size(n) for n in value.shape]).numel()
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
    program: Program,
    sites: Sequence[Site],
    run: _Backward,
    flat: Sequence[Any],
    random: torch.Generator,
) -> list[list[float]]:
    """For one input: each site's share in each output."""
    nodes = {node.name: node for node in program.graph.nodes}
    reads = [_reads(site, nodes) for site in sites]
    run.watched = {name for site in reads for name, _, _ in site}
    try:
        return _shares_of_outputs(program, run, run.run(*flat), reads, random)
    finally:
        run.release()


def _shares_of_outputs(
    program: Program,
    run: _Backward,
    results: Any,
    reads: Sequence[Sequence[tuple[str, Tensor, float]]],
    random: torch.Generator,
) -> list[list[float]]:
    shares: list[list[float]] = [[] for _ in reads]
    for output in _outputs(program, results)[:MOST_OUTPUTS]:
        cotangent = torch.randn(output.shape, generator=random).to(output.device, output.dtype)
        run.start()
        output.backward(cotangent, retain_graph=True)
        run.finish()
        for at, site in enumerate(reads):
            mine = sum(
                times * float(run.energies[name][features].sum())
                for name, features, times in site
                if name in run.energies
            )
            shares[at].append(0.0 if run.total == 0 else mine / run.total)
    return shares


def _factors(site: Site) -> list[tuple[Linear, str, Features]]:
    """The linears of a site: (linear, axis, features of each head), the decomposed one first."""
    factors: list[tuple[Linear, str, Any]] = [(site.linear, site.axis, site.features)]
    return factors + [
        (factor.tensor, factor.axis, factor.features)
        for factor in site.partners
        if isinstance(factor.tensor, Linear)
    ]


def _reads(site: Site, nodes: Mapping[str, fx.Node]) -> list[tuple[str, Tensor, float]]:
    """What a site rounds: (node, features along its last axis, roundings of each value)."""
    found = []
    for linear, axis, features in _factors(site):
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
    all but the last axis, of the nodes in ``watched``. ``observed``: moments of the sites' factors.
    """

    def __init__(self, program: Program, sites: Sequence[Site]) -> None:
        super().__init__(program.module, torch.float32)
        self.constants = set(constant_nodes(program))
        self.watched: set[str] = set()
        self.total = 0.0
        self.energies: dict[str, Tensor] = {}
        factors = {
            factor_key(*factor): factor
            for site in sites
            for view in (site, site.other)
            if view is not None
            for factor in _factors(view)
        }
        self.moments = {key: _FactorMoments(*factor) for key, factor in factors.items()}
        self.hooks: list[Any] = []
        self.linears: dict[str, list[_FactorMoments]] = {}
        for key, (linear, _, _) in factors.items():
            for name in linear.nodes:
                self.linears.setdefault(name, []).append(self.moments[key])

    def start(self) -> None:
        """Before a backward pass."""
        self.total, self.energies = 0.0, {}

    def finish(self) -> None:
        """After it."""
        for moments in self.moments.values():
            moments.finish(self.total)

    def release(self) -> None:
        """Let the graph of a run go: it holds its hooks, and these hold this object, where no
        garbage collector sees it."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.env.clear()

    def observed(self) -> dict[FactorKey, Observed]:
        found = {key: moments.observed() for key, moments in self.moments.items()}
        return {key: seen for key, seen in found.items() if seen is not None}

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
        if target is torch.ops.aten.view.default:  # another attention kernel, other strides (T5)
            target = torch.ops.aten.reshape.default
        value = super().call_function(target, args, kwargs)
        # What was in memory is overwritten, but until then it would count as values.
        return value.zero_() if target in _UNINITIALISED else value

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
                energy.masked_fill_(seen.isinf(), 0.0)  # as in masks: no rounding changes them
                self.total += rate * float(energy.sum())
                if watched:
                    by_feature = energy.flatten(0, -2).sum(0) if energy.dim() > 1 else energy
                    self.energies[n.name] = by_feature.cpu()

            self.hooks.append(value.register_hook(collect))
        if n.name in self.linears:
            self.watch_linear(n, value)
        return value

    def watch_linear(self, n: fx.Node, y: Tensor) -> None:
        """Watch a linear: y [*, F] and x [*, E], and the gradients of both."""
        (read, *_) = n.all_input_nodes
        x = self.env[read]
        inputs = x.detach().reshape(-1, x.shape[-1]).to(y.dtype)  # as the linear widens it
        outputs = y.detach().reshape(-1, y.shape[-1])

        def at_output(gradient: Tensor) -> None:
            gradient = gradient.detach().reshape(-1, y.shape[-1])
            for moments in self.linears[n.name]:
                moments.add_use(inputs, gradient)
                if moments.axis == OUT:
                    moments.add(outputs, gradient)

        def at_input(gradient: Tensor) -> None:
            for moments in self.linears[n.name]:
                if moments.axis == IN:
                    moments.add(inputs, gradient.detach().reshape(-1, x.shape[-1]))

        self.hooks.append(y.register_hook(at_output))
        if x.requires_grad and any(moments.axis == IN for moments in self.linears[n.name]):
            self.hooks.append(x.register_hook(at_input))


class _FactorMoments:
    """Adds up what backward passes show of one factor: heads of a linear's outputs or inputs."""

    def __init__(self, linear: Linear, axis: str, features: Features) -> None:
        self.axis, self.index = axis, torch.tensor(features)
        self.often = len(linear.nodes) > 1
        self.uses: list[tuple[Tensor, Tensor]] = []  # of a weight that is used often
        self.tokens = self.passes = 0
        shape = (*self.index.shape, self.index.shape[1])
        self.values, self.effects, self.weight_effects = torch.zeros(3, *shape, dtype=torch.float64)
        # of the pass under way
        self.effect, self.weight_effect = torch.zeros(2, *shape, dtype=torch.float64)

    def add(self, values: Tensor, gradients: Tensor) -> None:
        """Values and gradients of the linear's outputs or inputs, [tokens, features]."""
        self.tokens += len(values)
        self.values += self._gram(values.T)
        self.effect += self._gram(gradients.T)

    def add_use(self, inputs: Tensor, gradients: Tensor) -> None:
        """A use of the weight: the linear's ``inputs`` and ``gradients`` of its outputs, [tokens,
        features]. Weight gradients of several uses add up before they are squared."""
        own, other = (gradients, inputs) if self.axis == OUT else (inputs, gradients)
        if self.often:
            self.uses.append((own, other))
        else:
            self._see_weight_gradient(own, other)

    def _see_weight_gradient(self, own: Tensor, other: Tensor) -> None:
        """Γ = ownᵀ other, through the Gram matrix of whichever is smaller: tokens or features."""
        heads, width = own.T[self.index.to(own.device)], other.shape[1]
        if len(other) < width:
            gram = heads @ (other @ other.T) @ heads.mT
        else:
            gradient = heads @ other
            gram = gradient @ gradient.mT
        self.weight_effect.add_(gram.cpu(), alpha=1 / width)

    def _gram(self, rows: Tensor) -> Tensor:
        """Σ over columns of ``rows`` [features, M], heads apart: [n, D, D]."""
        heads = rows[self.index.to(rows.device)]
        return (heads @ heads.mT).cpu()

    def finish(self, total: float) -> None:
        """The pass is over; ``total`` is the noise of its output."""
        if self.uses:
            own, other = zip(*self.uses, strict=True)
            self._see_weight_gradient(torch.cat(own), torch.cat(other))
        if total > 0:
            self.effects.add_(self.effect, alpha=1 / total)
            self.weight_effects.add_(self.weight_effect, alpha=1 / total)
            self.passes += 1
        self.effect.zero_()
        self.weight_effect.zero_()
        self.uses = []

    def observed(self) -> Observed | None:
        """None where nothing was seen, or nothing that could be reckoned with."""
        if not self.tokens or not self.passes:
            return None
        effects, weight_effects = self.effects / self.passes, self.weight_effects / self.passes
        found = Observed(self.values / self.tokens, effects, weight_effects)
        every = (found.values, found.effects, found.weight_effects)
        return found if all(moment.isfinite().all() for moment in every) else None
