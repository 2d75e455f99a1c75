"""Estimate what share of a program's rounding noise comes from each site, by one backward pass.

To first order an error δ in the value v of a node moves the output y by J δ. Where every node
rounds independently, δ = u v ε with ε of variance 1 for each rounding, and the output's noise is

    E‖Σ_n J_n δ_n‖² = u² Σ_n ρ_n Σ_i v_ni² ‖J_ni‖²,     ‖J_ni‖² = E_z[ (Jᵀz)_ni² ] for white z,

so that one backward pass from a random cotangent z gives what every node adds, and the sum over the
values that a site rounds (queries and keys; values and attention outputs) over the sum over all
nodes is the site's share. It is exact for one input up to the sampling of z, which many elements
average out. ρ_n counts roundings: one a value, and more for sums that are kept in the dtype itself;
data movement does not round, a cast down does, and nodes of a wider dtype do not count. float32
nodes are run once more in float64, and their own errors take the place of u v ε: those of real
sums, of attention kernels and of approximate functions. That matters: by ρ alone the sites of
MiniLM-L6 and rxnfp would have two to three times their share, as other nodes round more than once.
Of wide linears that no site rounds, some features stand for all (``sample_errors``).

The same pass shows values and gradients at each factor of a site, and second moments of the
gradients of its weights: with them ``observe_noise`` foretells what a change of basis does.

Inputs are the caller's (``calibration=``), or made up from the program's signature, so that the
estimate depends on the weights and the program alone. Of token ids half are uniform and half
log-uniform, as most vocabularies list the frequent ones first: on uniform tokens alone rxnfp's
sites have half of the share that they have on reactions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bda_fx.evaluate_float64 import user_outputs
from bda_fx.generate_inputs import make_tensor
from bda_fx.passes.canonicalize import Program
from bda_fx.passes.choose_sizes import example_size
from bda_fx.passes.observe_noise import Observed
from bda_fx.passes.predict_noise import keeps_sums_wide
from bda_fx.passes.read_weights import FactorKey
from bda_fx.passes.sites import OUT, Site
from bda_fx.run_backward import ROUNDING, Backward, factors_of

log = logging.getLogger("bda_fx")

DRAWS = 2
"""Inputs that are made up, every other one with log-uniform indices; one cotangent for each."""
CAUTION, CAUTION_OF_LONG_SUMS = 1.15, 2.5
"""What shares on inputs that are made up are multiplied by, where sums are rounded once and where
they are kept in the dtype itself. On real text, single sites of MiniLM-L6 have up to 1.9 times the
share, all of them together 1.1 times. In float32 the excess of noise is 1.0 to 1.4 times
(MiniLM-L6) or 2.0 to 2.5 times (rxnfp) what is predicted without this."""
CAUTION_WHEN_CALIBRATED = 1.65
"""The same for shares on the caller's inputs in float32. On other inputs of the kind the excess of
noise is 1.0 to 1.1 times (MiniLM-L6) or 1.2 to 1.6 times (rxnfp) what is predicted without it, the
more where a GEMM's runs are short: what C makes of real inputs has larger partial sums."""
MOST_OUTPUTS = 4
"""Outputs that are looked at: each takes a backward pass, and the first ones matter."""
MOST_WORK = 8e10
"""Multiplications of linears, over all draws, up to which an estimate is made unasked: a few
seconds. Where two draws would take more, there is one."""
MOST_BYTES = 4 << 30
"""Memory up to which an estimate is made unasked: a backward pass keeps the values of all nodes."""


@dataclass(frozen=True)
class Example:
    """Flat inputs of a program, placeholders in order. ``mask``: nonzero where outputs count, for
    those whose shape begins with its own."""

    inputs: Sequence[Any]
    mask: Tensor | None = None


@dataclass(frozen=True)
class Shares:
    """``of_sites``: the share of each site in the noise of each of the first outputs.

    ``observed``: what was seen of each factor of the sites, from either side, over all outputs.
    """

    of_sites: list[list[float]]
    observed: dict[FactorKey, Observed]


def estimate_shares(
    program: Program,
    sites: Sequence[Site],
    examples: Sequence[Example] | None = None,
) -> Shares | None:
    """What share of the noise each site has, and what is observed of its factors on the way.

    Without ``examples`` inputs are made up. Returns None where there is no telling: the program is
    too large to be run unasked, or an op of it cannot be run or differentiated.
    """
    if not sites:
        return Shares([], {})
    draws = min(DRAWS, int(MOST_WORK // max(_work(program), 1.0)))
    if examples is None and (draws < 1 or _kept(program) > MOST_BYTES):
        log.info("bda_fx: noise shares are not estimated, the program is too large")
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random = torch.Generator().manual_seed(0)
            given = examples or [
                Example(_made_up(program, random, by_rank=draw % 2 == 1)) for draw in range(draws)
            ]
            run = Backward(program, sites, typical=examples is not None)
            totals = [_shares(program, sites, run, example, random) for example in given]
    except Exception as error:  # whatever an op raises
        log.info("bda_fx: noise shares are not estimated: %s: %s", type(error).__name__, error)
        return None
    mean = torch.tensor(totals, dtype=torch.float64).mean(0)
    wide = all(keeps_sums_wide(value.dtype) for value in _weights(program, sites))
    if examples is None:
        mean *= CAUTION if wide else CAUTION_OF_LONG_SUMS
    elif not wide:
        mean *= CAUTION_WHEN_CALIBRATED
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


def _made_up(program: Program, random: torch.Generator, *, by_rank: bool) -> list[Any]:
    values: list[Any] = []
    for node in program.graph.find_nodes(op="placeholder"):
        like = node.meta.get("val")
        if node.name in program.tensors:
            values.append(program.tensors[node.name])
        elif isinstance(like, Tensor):
            values.append(
                make_tensor(node, [example_size(n) for n in like.shape], random, by_rank=by_rank)
            )
        else:
            values.append(example_size(like) if like is not None else None)
    return values


def _shares(
    program: Program,
    sites: Sequence[Site],
    run: Backward,
    example: Example,
    random: torch.Generator,
) -> list[list[float]]:
    """For one example: each site's share in each output."""
    nodes = {node.name: node for node in program.graph.nodes}
    reads = [_reads(site, nodes) for site in sites]
    run.watched = {name for site in reads for name, _, _ in site}
    try:
        results = run.run(*example.inputs)
        return _shares_of_outputs(program, run, results, reads, example.mask, random)
    finally:
        run.release()


def _shares_of_outputs(
    program: Program,
    run: Backward,
    results: Any,
    reads: Sequence[Sequence[_Read]],
    mask: Tensor | None,
    random: torch.Generator,
) -> list[list[float]]:
    shares: list[list[float]] = [[] for _ in reads]
    for output in _outputs(program, results)[:MOST_OUTPUTS]:
        cotangent = torch.randn(output.shape, generator=random).to(output.device, output.dtype)
        if mask is not None and output.shape[: mask.dim()] == mask.shape:
            counts = mask.to(output.device) != 0
            cotangent *= counts.reshape(*mask.shape, *(1,) * (output.dim() - mask.dim()))
        run.start()
        output.backward(cotangent, retain_graph=True)
        run.finish()
        for at, site in enumerate(reads):
            mine = sum(float(run.noise_of(*read)) for read in site)
            shares[at].append(0.0 if run.total == 0 else mine / run.total)
    return shares


_Read = tuple[str, Tensor, float | None]


def _reads(site: Site, nodes: Mapping[str, fx.Node]) -> list[_Read]:
    """What a site rounds: (node, features along its last axis, ρ ε² if not the node's own)."""
    found = []
    for linear, axis, features in factors_of(site):
        index = torch.tensor(sorted({f for head in features for f in head}))
        for name in linear.nodes:
            node = nodes[name]
            read = node if axis == OUT else node.args[0]
            assert isinstance(read, fx.Node)
            eps = torch.finfo(node.meta["val"].dtype).eps
            found.append((read.name, index, None if axis == OUT else ROUNDING * eps**2))
    return found


def _outputs(program: Program, results: Any) -> list[Tensor]:
    """Floating outputs that the caller sees, each once."""
    if program.exported is not None:
        results = user_outputs(program.exported, results)
    leaves = pytree.tree_leaves(results)
    seen = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad}
    return list(seen.values())
