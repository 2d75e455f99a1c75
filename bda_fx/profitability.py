"""Choose forms: which linears stay decomposed, and in which spelling, so that none is slower.

    speed-up = seconds(original) / seconds(form)          at the numbers of tokens that x has

Sites of one weight share its product, so a linear is decided as a whole: all of its bases, or
(where it has several) one of them, in each spelling that the target offers. A form has to be 2 %
faster than the original. Where x has any number of tokens, forms are compared at a few of them; the
kernel on the CPU then chooses at each call: decomposed between two numbers at which that is faster,
a plain product in the same basis elsewhere. Other forms must be faster somewhere, slower nowhere.

Requires: a plan for the program. Leaves: the plan without the sites that do not pay, which become
skips with what was found, and :class:`Weighed` at the others. Changes of basis are independent of
each other, so any part of a plan is a plan. A fold goes with its basis.

With an opaque cache nothing is left out: what it holds must not depend on the number of tokens.
A linear that does not pay is computed as one plain product in the new basis, which costs what the
original does. (A decomposed output projection is then left as it is.)
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, fx

from bda_fx.measure_projection import ORIGINAL, Candidate, Case, Measure
from bda_fx.options import Options
from bda_fx.passes.canonicalize import Program
from bda_fx.passes.choose_sizes import example_size
from bda_fx.passes.emit_projection import ByTokens, ChooseSpelling, Spelling
from bda_fx.passes.forms import Form, forms_of
from bda_fx.passes.read_parts import read_parts
from bda_fx.passes.site_choices import skips_of
from bda_fx.passes.sites import Plan, Reason, SitePlan, Skip, Weighed, explain_speedups
from bda_fx.predict_projection import Predict

GAIN = 1.02
"""How much faster a form has to be to replace the original: timings are no better than that."""
CALL = 5e-7
"""Seconds by which calls of a few microseconds differ from one process to the next, all alike: they
are added to the form's."""
TOKENS = (1, 16, 128, 1024)
"""Where forms are compared if the number of tokens is not fixed."""
SECONDS = 4.0
"""What measuring may take for one graph. What is not known by then stays as it was."""
EVERY = 2**63 - 1

Offer = Callable[[Tensor], Sequence[Spelling]]
"""The spellings that the target has for a projection of x (a fake tensor)."""
Speedups = tuple[tuple[int, float], ...]


class Price(Protocol):
    """Seconds of every candidate, by name, and of the original."""

    how: str

    def known(self, case: Case, tokens: int) -> bool: ...

    def __call__(self, case: Case, tokens: int) -> dict[str, float]: ...


def offer_aten(x: Tensor) -> Sequence[Spelling]:
    """For programs that know no operator of ours."""
    return ("aten",)


def price_for(options: Options, device: torch.device) -> Price:
    """Where times come from."""
    return Measure(device) if options.profitability == "measure" else Predict(device)


def choose_forms(
    program: Program,
    plan: Plan,
    options: Options,
    *,
    fixed_rows: bool,
    offer: Offer = offer_aten,
    price: Price | None = None,
) -> Plan:
    """The plan with what pays, see above. Nothing is weighed with ``profitability="always"``."""
    if options.profitability == "always" or not plan.sites:
        return plan
    nodes = {node.name: node for node in program.graph.nodes}
    linears = {item.site.linear.weight: item.site.linear for item in plan.sites}
    deadline = time.perf_counter() + SECONDS
    kept: list[SitePlan] = []
    skips: list[Skip] = list(plan.skips)
    prices: dict[torch.device, Price] = {}
    for weight, linear in linears.items():
        sites = [item for item in plan.sites if item.site.linear.weight == weight]
        inputs = [nodes[name].args[0].meta["val"] for name in linear.nodes]
        x, opaque = inputs[0], options.kv_cache == "opaque"
        if x.device.type not in ("cpu", "cuda"):
            kept += sites
            continue
        if x.device not in prices:
            prices[x.device] = price or price_for(options, x.device)
        case = Case(
            linear,
            x.dtype,
            x.device,
            any(bias is not None for bias in linear.biases),
            fixed_rows,
            _candidates(plan, sites, [nodes[n] for n in linear.nodes], offer(x), whole=opaque),
        )
        wanted = _Tokens.of(inputs)
        chosen = _choose(case, wanted, prices[x.device], deadline, opaque)
        for item in sites:
            if isinstance(chosen, str):
                skips += _skips(plan, item, chosen)
            elif item.basis not in chosen.bases:
                detail = f"faster without this one: {chosen.weighed.explain()}"
                skips += _skips(plan, item, detail)
            else:
                kept.append(replace(item, weighed=chosen.weighed))
    order = {id(item.site): at for at, item in enumerate(plan.sites)}
    kept.sort(key=lambda item: order[id(item.site)])
    bases = {item.basis for item in kept}
    folds = tuple(fold for fold in plan.folds if fold.basis in bases)
    return replace(plan, sites=tuple(kept), skips=tuple(skips), folds=folds)


def spelling_of(plan: Plan, otherwise: ChooseSpelling) -> ChooseSpelling:
    """The spellings that were chosen, and ``otherwise`` for linears that were not weighed."""
    chosen: dict[str, Spelling] = {}
    for item in plan.sites:
        if item.weighed is not None:
            spelled = item.weighed.spelling
            chosen[item.site.linear.weight] = (
                ByTokens(item.weighed.ranges) if spelled == "by tokens" else spelled  # type: ignore[assignment]
            )

    def choose(x: Tensor, form: Form, piece: int) -> Spelling:
        return chosen.get(form.linear.weight) or otherwise(x, form, piece)

    return choose


@dataclass(frozen=True)
class _Tokens:
    """How many rows x has at each node of a linear, or, if any number, where forms are compared."""

    counts: tuple[int, ...]
    any_number: bool

    @classmethod
    def of(cls, inputs: Sequence[Tensor]) -> _Tokens:
        sizes = [list(x.shape[:-1]) for x in inputs]
        if any(isinstance(size, torch.SymInt) for shape in sizes for size in shape):
            return cls(TOKENS, True)
        return cls(tuple(math.prod(map(example_size, shape)) for shape in sizes), False)


@dataclass(frozen=True)
class _Chosen:
    bases: frozenset[str]
    weighed: Weighed


def _candidates(
    plan: Plan,
    sites: Sequence[SitePlan],
    nodes: Sequence[fx.Node],
    spellings: Sequence[Spelling],
    whole: bool,
) -> tuple[Candidate, ...]:
    """All bases of the linear together and, unless ``whole``, each by itself, in each spelling.

    ``nodes``: the uses of the linear.
    """
    bases = list(dict.fromkeys(item.basis for item in sites))
    parts = [bases] if whole or len(bases) == 1 else [bases, *([basis] for basis in bases)]
    candidates = []
    for part in parts:
        items = tuple(item for item in sites if item.basis in part)
        folds = tuple(fold for fold in plan.folds if fold.basis in part)
        alone = Plan(items, (), folds)
        weight = items[0].site.linear.weight
        (form,) = (form for form in forms_of(alone) if form.linear.weight == weight)
        possible = ("aten",) if form.heads else spellings
        joined = len(form.pieces) > 1 and any(read_parts(node, form) is None for node in nodes)
        candidates += [
            Candidate(f"{spelled} {'+'.join(part)}", spelled, form, alone, joined)
            for spelled in possible
        ]
    return tuple(candidates)


def _choose(
    case: Case, tokens: _Tokens, price: Price, deadline: float, opaque: bool
) -> _Chosen | str:
    """The fastest form, or why the original stays."""
    counts = [count for count in tokens.counts if count > 0]
    if not all(price.known(case, n) for n in counts) and time.perf_counter() > deadline:
        found: Speedups = ()
        text = f"not measured: {SECONDS:g} s were spent on other linears"
        return _same_basis(case, found, text) if opaque else text
    seconds = {count: price(case, count) for count in dict.fromkeys(counts)}
    options: list[tuple[float, _Chosen]] = []
    losing: list[tuple[float, Speedups]] = []
    for candidate in case.candidates:
        speedups = _speedups(seconds, candidate.name, counts, tokens.any_number)
        spelled, ranges, worth = _decide(candidate, speedups, tokens.any_number)
        if spelled is None:
            losing.append((worth, speedups))
            continue
        weighed = Weighed(spelled, speedups, price.how, ranges)
        bases = frozenset(item.basis for item in candidate.plan.sites)
        options.append((worth, _Chosen(bases, weighed)))
    if options:
        return max(options, key=lambda option: option[0])[1]
    best = max(losing, key=lambda item: item[0])[1]
    text = f"{explain_speedups(best)}, {price.how}" if best else "no tokens"
    return _same_basis(case, best, price.how) if opaque else text


def _same_basis(case: Case, speedups: Speedups, how: str) -> _Chosen:
    """For an opaque cache: the original's cost in the new basis."""
    candidate = case.candidates[0]
    bases = frozenset(item.basis for item in candidate.plan.sites)
    spelled = "aten" if candidate.form.heads else "dense"
    return _Chosen(bases, Weighed(spelled, speedups, how))


def _speedups(
    seconds: dict[int, dict[str, float]], name: str, counts: Sequence[int], any_number: bool
) -> Speedups:
    """At each number of tokens or, where they are fixed, of all nodes together."""
    if any_number or not counts:
        return tuple((n, speedup(times[ORIGINAL], times[name])) for n, times in seconds.items())
    uses = Counter(counts)
    before, after = (sum(seconds[n][which] * uses[n] for n in uses) for which in (ORIGINAL, name))
    return ((sum(counts), speedup(before, after)),)


def speedup(original: float, form: float) -> float:
    """What a form has to have of at least GAIN: seconds of the original over the form's."""
    return original / (form + CALL)


def _decide(
    candidate: Candidate, speedups: Speedups, any_number: bool
) -> tuple[str | None, tuple[tuple[int, int], ...], float]:
    """How to spell it (None: not at all), in which ranges it is decomposed, and what it gains."""
    worth = math.fsum(math.log(ratio) for _, ratio in speedups)
    if not speedups or all(ratio < GAIN for _, ratio in speedups):
        return None, (), worth
    if all(ratio >= (1.0 if any_number else GAIN) for _, ratio in speedups):
        return str(candidate.spelling), (), worth
    if candidate.spelling != "packed" or len(candidate.form.pieces) > 1:
        return None, (), worth
    ranges = _ranges(speedups)
    gained = math.fsum(math.log(max(ratio, 1.0)) for _, ratio in speedups)
    return "by tokens", ranges, gained


def _ranges(speedups: Speedups) -> tuple[tuple[int, int], ...]:
    """From the first to the last of neighbours that are faster; beyond TOKENS there is no end.

    Between a number at which the form is faster and one at which it is slower it is not taken.
    """
    ranges: list[tuple[int, int]] = []
    faster = False
    for tokens, ratio in speedups:
        if ratio >= GAIN:
            first = ranges.pop()[0] if faster else tokens
            ranges.append((first, tokens))
        faster = ratio >= GAIN
    if faster:
        ranges.append((ranges.pop()[0], EVERY))
    return tuple(ranges)


def _skips(plan: Plan, item: SitePlan, detail: str) -> list[Skip]:
    skips = skips_of(item.site, Reason.NOT_PROFITABLE, detail)
    places = [plan.places.get(skip.contraction, ("", "")) for skip in skips]
    return [
        replace(skip, module=module, source=source)
        for skip, (module, source) in zip(skips, places, strict=True)
    ]
