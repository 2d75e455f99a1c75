"""The pipeline, in one place: from a canonical program to a rewritten one, step by step.

    canonicalize → normalize linears → find sites → find folds → plan sites → choose forms
                 → transform weights → rewrite graph → restore spellings → renew values
                 → check graph

Each step is one pass in ``bda_fx.passes``. A step that fails raises
:class:`~bda_fx.outcome.StepError`, which names it; the backend turns that into a fall-back,
``rewrite`` into an error.
"""

from __future__ import annotations

from collections.abc import Sequence

from bda_fx.estimate_shares import Example, estimate_shares
from bda_fx.options import Options
from bda_fx.outcome import Outcome, step
from bda_fx.passes.canonicalize import Program
from bda_fx.passes.check_graph import check_graph
from bda_fx.passes.emit_projection import ChooseSpelling, always_aten
from bda_fx.passes.find_folds import find_folds
from bda_fx.passes.find_sites import find_sites
from bda_fx.passes.normalize_linears import normalize_linears, restore_spellings
from bda_fx.passes.plan_sites import Planning, plan_sites
from bda_fx.passes.read_weights import constants_of, extract_constants
from bda_fx.passes.renew_values import renew_values
from bda_fx.passes.rewrite_graph import rewrite_graph
from bda_fx.passes.sites import Plan
from bda_fx.passes.transform_weights import transform_weights
from bda_fx.prepare_inductor import beside_inductor
from bda_fx.profitability import Offer, choose_forms, offer_aten, spelling_of

REUSE = 0.8
"""Part of the budget's allowance that is spent where one graph will serve modules with other
weights, which may be noisier on the same sizes."""


def find_and_plan(
    program: Program,
    options: Options,
    calibration: Sequence[Example] | None = None,
    headroom: float = 1.0,
    *,
    fixed_rows: bool = True,
    offer: Offer = offer_aten,
) -> Plan:
    """The first half: find the sites of a canonical program and plan them.

    ``calibration``: inputs of the program, for the shares of noise; made up if not given.
    """
    with step("normalize linears"):
        normalize_linears(program)
    with step("find sites"), beside_inductor():
        opaque = options.kv_cache == "opaque"
        found = find_sites(program, opaque_cache=opaque)
    with step("find folds"):
        folds = find_folds(program, found)
    with step("estimate shares"), beside_inductor():
        # What a cache holds must not depend on the graph, nor on the sizes of its inputs.
        # Nor are shares of rounding noise those of quantised weights.
        unknown = opaque or options.basis_size != "auto" or options.optimize_for is not None
        shares = None if unknown else estimate_shares(program, found.sites, calibration)
    with step("plan sites"):
        values = extract_constants(program, constants_of(found.sites)).evaluate(program.tensors)
        planning = Planning(
            options.basis,
            options.basis_size,
            options.noise_budget,
            options.products,
            keep=options.keep,
            side="kv" if opaque and options.side == "auto" else options.side,
            opaque_cache=opaque,
            headroom=headroom,
            optimize_for=options.optimize_for,
            alternatives=fixed_rows,  # else nobody is told of them
        )
        if shares is None:
            plan = plan_sites(found, values, planning, folds)
        else:
            plan = plan_sites(found, values, planning, folds, shares.of_sites, shares.observed)
    with step("choose forms"):
        return choose_forms(program, plan, options, fixed_rows=fixed_rows, offer=offer)


def transform(
    program: Program,
    options: Options,
    *,
    fixed_rows: bool,
    calibration: Sequence[Example] | None = None,
    spelling: ChooseSpelling = always_aten,
    offer: Offer = offer_aten,
) -> Outcome:
    """The whole pipeline on a canonical program, in place.

    ``fixed_rows`` makes the basis rows part of the graph (an exported program) instead of inputs.
    ``spelling`` chooses between plain ATen, which every exporter knows, and the operator; where
    speed is weighed, that is between those of ``offer``.
    """
    headroom = 1.0 if fixed_rows else REUSE
    plan = find_and_plan(
        program, options, calibration, headroom, fixed_rows=fixed_rows, offer=offer
    )
    spelling = spelling_of(plan, spelling)
    roots = {}
    if options.kv_cache == "opaque":
        roots = {weight: extract_constants(program, [weight]).roots for weight in plan.linears}
    if not plan.sites:
        with step("restore spellings"):
            restore_spellings(program)
        return Outcome(program, plan, roots=roots)
    with step("transform weights"):
        reads = constants_of((item.site for item in plan.sites), plan.folds)
        constants = extract_constants(program, reads)
        values = constants.evaluate(program.tensors)
        transformed = transform_weights(plan, values, use_planned_rows=True)
    with step("rewrite graph"):
        rewritten = rewrite_graph(
            program, plan, transformed.tensors, fixed_rows=fixed_rows, spelling=spelling
        )
    with step("restore spellings"):
        restore_spellings(program)
    with step("renew values"):
        renew_values(program)
    with step("check graph"):
        check_graph(program)
    tensors = {**transformed.tensors, **rewritten.constants}
    tensors.update({key: make(tensors) for key, make in rewritten.computed.items()})
    return Outcome(
        program,
        plan,
        {key: tensors[key] for key in rewritten.inputs},
        rewritten.inputs,
        frozenset(rewritten.constants),
        constants,
        rewritten.computed,
        roots,
        transformed.usable and plan.allows(transformed.noise),
    )
