"""Count costs: what a projection stores and multiplies, before and after, as formulas in its sizes.

                 before              after
    weights      heads · D · E       heads · D · (E - r)
    biases       β · heads · D       the same                (β · E for an output projection)
    index        -                   one entry for each number that a gather moves
    multiplies   heads · D · E       heads · D · (E - r)     for each token

E features that the basis is picked from (inputs, or outputs of an output projection), D features of
a head that take part, H query heads, G key/value heads, r basis size, S query tokens, T key tokens,
F output features of the whole linear, β bias vectors. The key/value side has G heads and T tokens,
the query/output side H and S. Partners keep their size and are not counted; neither are additions.

The formulas are sympy expressions, and the one source of what is reported, tabulated and tested:
``count_costs`` is a lambdified ``cost_formulas``. sympy is imported at first use: it comes with
torch, but not with ``import torch``.

Requires: a plan. Changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Generic, TypeVar

from bda_fx.passes.forms import basis_key
from bda_fx.passes.sites import IN, KV, OUT, QO, Plan, Site, SitePlan

if TYPE_CHECKING:
    from sympy import Expr, Symbol  # type: ignore[import-untyped]

ROWS, REST, ORDER, SLOTS = "rows", "rest", "order", "slots"
"""Index tensors of a basis: where x_B and x_R are gathered from, where outputs of a decomposed
output projection go, which basis feature each feature takes."""
LINEAR_ORDER, LINEAR_HEADS = "linear_order", "linear_heads"
"""Index tensors of a linear: where the features of its pieces go, and which columns make a head."""

Number = TypeVar("Number")


@dataclass(frozen=True)
class Layout:
    """What the costs of a decomposed projection depend on besides sizes.

    ``side`` and ``axis`` as in :class:`Site`, ``biases`` the number of bias vectors (layers that
    share a weight may have their own) or None to leave it open as β, ``index`` the index tensors
    that the graph reads: none where the rows are contiguous, folded into the producer, or all.
    """

    side: str = KV
    axis: str = OUT
    biases: int | None = None
    index: tuple[str, ...] = ()


@dataclass(frozen=True)
class Costs(Generic[Number]):
    """Numbers stored (weights, biases, index entries) and multiplications for each token."""

    params_before: Number
    params_after: Number
    macs_per_token_before: Number
    macs_per_token_after: Number


@dataclass(frozen=True)
class Sizes:
    """The symbols of the formulas. Positive integers."""

    E: int
    D: int
    H: int
    G: int
    r: int
    S: int = 1
    T: int = 1
    F: int = 1


@dataclass(frozen=True)
class BreakEven:
    """``variable`` at which two choices cost the same, and what holds above it."""

    question: str
    variable: Symbol
    value: Expr
    above: str


SCATTERED = (ROWS, REST)
LAYOUTS: dict[str, Layout] = {
    "keys or values, window or folded": Layout(),
    "keys or values, scattered rows": Layout(index=SCATTERED),
    "queries, window": Layout(side=QO),
    "queries, scattered rows": Layout(side=QO, index=SCATTERED),
    "outputs, window": Layout(side=QO, axis=IN),
    "outputs, scattered rows": Layout(side=QO, axis=IN, index=(ORDER,)),
}
"""The forms by name. Where r = E there is nothing to gather: the first of each kind at r = E."""


@functools.cache
def symbols() -> dict[str, Symbol]:
    """The symbols by name: those of :class:`Sizes`, and ``beta``."""
    import sympy

    names = [f.name for f in fields(Sizes)]
    found = {name: sympy.Symbol(name, integer=True, positive=True) for name in names}
    return {**found, "beta": sympy.Symbol("beta", integer=True, nonnegative=True)}


def heads_and_tokens(side: str) -> tuple[Symbol, Symbol]:
    """How many heads the decomposed projection of a side has, and how many tokens pass it."""
    s = symbols()
    return (s["G"], s["T"]) if side == KV else (s["H"], s["S"])


def index_entries(side: str, part: str) -> Expr:
    """Entries of an index tensor; a gather by it moves as many numbers for each token."""
    s, (heads, _) = symbols(), heads_and_tokens(side)
    return {
        ROWS: s["r"],
        REST: s["E"] - s["r"],
        ORDER: s["E"],
        SLOTS: heads * s["D"],
        LINEAR_ORDER: s["F"],
        LINEAR_HEADS: heads * s["D"],
    }[part]


@functools.cache
def cost_formulas(layout: Layout) -> Costs[Expr]:
    """The costs of a projection in the symbols of ``symbols()``."""
    s, (heads, _) = symbols(), heads_and_tokens(layout.side)
    weights = heads * s["D"] * s["E"]
    kept = heads * s["D"] * (s["E"] - s["r"])
    biased = heads * s["D"] if layout.axis == OUT else s["E"]
    biases = biased * (s["beta"] if layout.biases is None else layout.biases)
    index = sum(index_entries(layout.side, part) for part in layout.index)
    return Costs(weights + biases, kept + biases + index, weights, kept)


def count_costs(layout: Layout, sizes: Sizes) -> Costs[int]:
    """``cost_formulas`` at ``sizes``. The number of biases must be given."""
    return Costs(*_compiled(layout)(*astuple(sizes)))


@functools.cache
def _compiled(layout: Layout) -> Callable[..., tuple[int, ...]]:
    import sympy

    arguments = [symbols()[f.name] for f in fields(Sizes)]
    return sympy.lambdify(arguments, astuple(cost_formulas(layout)), modules="math")


def layouts_of(plan: Plan, read: Iterable[str] | None = None) -> list[Layout]:
    """The layout of each site of ``plan``.

    ``read`` are the keys of the derived tensors that the rewritten graph reads. Without it the
    index tensors are those of bases whose rows are neither contiguous nor folded. A tensor that
    several sites read counts at the first of them; of the slots each has its own.
    """
    folded = {fold.basis for fold in plan.folds}
    known = None if read is None else set(read)
    counted: set[str] = set()
    layouts = []
    for item in plan.sites:
        keys = _index_keys(item)
        if known is not None:
            keys = {key: part for key, part in keys.items() if key in known}
        elif _is_gathered(item, folded):
            keys = {key: part for key, part in keys.items() if part in (ROWS, REST, ORDER)}
        else:
            keys = {}
        index = tuple(p for key, p in keys.items() if p == SLOTS or key not in counted)
        counted |= set(keys)
        layouts.append(Layout(item.site.side, item.site.axis, _bias_vectors(item.site), index))
    return layouts


def sizes_of(item: SitePlan) -> Sizes:
    """The sizes of a planned site; tokens are left at one."""
    site = item.site
    return Sizes(
        E=site.basis_features,
        D=site.decomposed,
        H=site.num_heads,
        G=site.num_kv_heads,
        r=item.size,
        F=site.linear.out_features,
    )


def _index_keys(item: SitePlan) -> dict[str, str]:
    """Key and part of every index tensor that a site's form may read."""
    name, basis = item.site.linear.name, item.basis
    if item.site.axis == IN:
        return {basis_key(basis, ORDER): ORDER, f"{name}_heads": LINEAR_HEADS}
    own = {basis_key(basis, part): part for part in (ROWS, REST, SLOTS)}
    return {**own, f"{name}_order": LINEAR_ORDER}


def _is_gathered(item: SitePlan, folded: set[str]) -> bool:
    """Whether the basis of a program with fixed rows needs index tensors."""
    window = max(item.rows) - min(item.rows) == item.size - 1
    return not window and item.basis not in folded


def _bias_vectors(site: Site) -> int:
    return len({bias for bias in site.linear.biases if bias is not None})


def break_even_points() -> tuple[BreakEven, ...]:
    """Where one choice starts to pay more than another, solved from ``cost_formulas``."""
    import sympy

    s = symbols()
    r, t = s["r"], s["T"]
    weight_bytes = sympy.Symbol("w", integer=True, positive=True)
    r_q, r_k, r_v = (sympy.Symbol(f"r_{x}", integer=True, positive=True) for x in "QKV")
    length = sympy.Symbol("n", integer=True, positive=True)

    def saved(name: str) -> Expr:
        costs = cost_formulas(LAYOUTS[name])
        return costs.params_before - costs.params_after

    def saved_macs(name: str) -> Expr:
        costs, (_, tokens) = cost_formulas(LAYOUTS[name]), heads_and_tokens(LAYOUTS[name].side)
        return tokens * (costs.macs_per_token_before - costs.macs_per_token_after)

    def solve(difference: Expr, variable: Symbol) -> Expr:
        (root,) = sympy.solve(difference, variable)
        return sympy.simplify(root)

    window, rows = "keys or values, window or folded", "keys or values, scattered rows"
    queries, outputs = "queries, window", "outputs, scattered rows"
    index = saved(window) - saved(rows)
    shared = 2 * saved(window) - index
    apart = saved(rows).subs(r, r_k) + saved(rows).subs(r, r_v)
    twice = saved_macs(window).subs(r, r_k) + saved_macs(window).subs(r, r_v)
    on_queries = saved_macs(queries).subs(r, r_q)
    attention = whole_attention().subs({s["S"]: length, t: length})
    products = attention.coeff(length, 2) * length**2
    return (
        BreakEven(
            "index tensors of keys or values, in numbers",
            r,
            solve(saved(rows), r),
            "scattered rows store less than the original",
        ),
        BreakEven(
            "the same in bytes, w bytes a weight and 8 an index",
            r,
            solve(weight_bytes * saved(window) - 8 * index, r),
            "scattered rows take fewer bytes than the original",
        ),
        BreakEven(
            "index tensor of outputs, in numbers",
            r,
            solve(saved(outputs), r),
            "a scattered output projection stores less than the original",
        ),
        BreakEven(
            "key/value against query/output side, multiplications (G = H)",
            t,
            solve((saved_macs(window).subs(r, r_k) - on_queries).subs(s["H"], s["G"]), t),
            "the key/value side saves more",
        ),
        BreakEven(
            "one basis for K and V against two, multiplications",
            r,
            solve(2 * saved_macs(window) - twice, r),
            "one basis saves more",
        ),
        BreakEven(
            "one basis for K and V against two, numbers stored",
            r,
            solve(shared - apart, r),
            "one scattered basis stores less",
        ),
        BreakEven(
            "length n = S = T, for the share saved of all multiplications of an attention",
            length,
            solve(attention - 2 * (attention - products), length),
            "less than half of the share at n = 0 is saved",
        ),
    )


def whole_attention() -> Expr:
    """Multiplications of an attention layer: four projections, scores and weighted sum.

    A query has as many inputs as a key has, E, and so many outputs has the layer.
    """
    s = symbols()
    projections = 2 * s["S"] * s["H"] * s["D"] * s["E"] + 2 * s["T"] * s["G"] * s["D"] * s["E"]
    return projections + 2 * s["S"] * s["T"] * s["H"] * s["D"]
