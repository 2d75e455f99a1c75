"""The pipeline on a Dynamo graph, and its numbers once more for other weights.

Weights are inputs of a Dynamo graph, so derived weights become inputs of the rewritten one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from bda_fx.freed_memory import return_free_memory_now
from bda_fx.kernels import basis_projection_cuda
from bda_fx.kernels.packed_projection import serves
from bda_fx.options import Options
from bda_fx.outcome import Outcome, step
from bda_fx.passes.canonicalize import canonicalize_dynamo
from bda_fx.passes.derived_inputs import Computed
from bda_fx.passes.emit_projection import ChooseSpelling, Spelling, always_aten
from bda_fx.passes.forms import Form
from bda_fx.passes.read_weights import all_finite
from bda_fx.passes.sites import Plan
from bda_fx.passes.transform_weights import transform_weights
from bda_fx.pipeline import transform
from bda_fx.profitability import Offer, offer_aten


def rewrite_dynamo(
    module: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    patches: Mapping[str, Any],
) -> tuple[Outcome, list[str]]:
    """The rewritten graph and the names of the original's inputs. ``patches``: of Inductor's
    options, where that is the inner compiler.

    Raises:
        StepError: a step failed.
    """
    with step("canonicalize"):
        program = canonicalize_dynamo(module, example_inputs)
    inputs = [node.name for node in program.graph.find_nodes(op="placeholder")]
    outcome = transform(
        program,
        options,
        fixed_rows=False,
        spelling=spelling_for(options, patches),
        offer=offer_for(options),
    )
    return_free_memory_now()
    return outcome, inputs


def derive(
    plan: Plan,
    values: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    computed: Mapping[str, Computed],
) -> dict[str, Tensor] | None:
    """Derived tensors for other ``values`` of the weights of a plan, by key; None where these are
    not finite, or too noisy at the sizes of the plan, or leave the range of their dtype.

    ``fixed``: tensors that the plan alone makes; ``computed``: how others follow from all of these.
    """
    if not all(map(all_finite, values.values())):
        return None
    transformed = transform_weights(plan, values, use_planned_rows=False)
    if not transformed.usable or not plan.allows(transformed.noise):
        return None
    tensors = {**transformed.tensors, **fixed}
    tensors.update({key: make(tensors) for key, make in computed.items()})
    return tensors


def spelling_for(options: Options, patches: Mapping[str, Any]) -> ChooseSpelling:
    """The operator where a kernel serves it and the inner compiler is Inductor; else plain ATen.

    On CUDA, where the kernel may be slower, only if max-autotune will weigh it against ATen.
    """
    if options.inner != "inductor":
        return always_aten

    def choose(x: Tensor, form: Form, piece: int) -> Spelling:
        if x.device.type == "cuda":
            tuned = any(map(patches.get, ("max_autotune", "max_autotune_gemm")))
            served = basis_projection_cuda.serves(x.device, x.dtype)
            return "operator" if tuned and served else "aten"
        return "packed" if serves(x.device, x.dtype) else "aten"

    return choose


def offer_for(options: Options) -> Offer:
    """The spellings that are weighed against each other and the original."""
    if options.inner != "inductor":
        return offer_aten

    def offer(x: Tensor) -> Sequence[Spelling]:
        if basis_projection_cuda.serves(x.device, x.dtype):
            return "operator", "aten"
        return ("packed", "aten") if serves(x.device, x.dtype) else ("aten",)

    return offer
