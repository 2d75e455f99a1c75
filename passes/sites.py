"""What the passes tell each other: sites, skips, plans — names and numbers, never live nodes.

Shape letters used throughout: B batch, S query tokens, T key tokens, H query heads, G key/value
heads, D features of one head that take part, E input features of a projection, F its output
features, r basis size.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

QK = "qk"
VO = "vo"
BOTH = "qk+vo"
"""One projection that is both key and value: one change of basis serves both products."""
KV, QO = "kv", "qo"
OUT, IN, ELEMENT = "out", "in", "element"


class Reason(enum.Enum):
    """Why an attention product keeps its original weights. The set is closed; each has a test."""

    ROTATED = "rotated"
    NORMALISED = "normalised"
    ADDED = "another tensor is added to it"
    COMPUTED = "changed by an op that is not data movement"
    DATA_DEPENDENT = "moved by an index that depends on data"
    NO_PROJECTION = "not made by a linear with constant weights"
    NO_OUTPUT_LINEAR = "the attention output reaches no linear with constant weights"
    RETURNED = "returned by the program"
    CACHED = "kept in a cache with those of other calls"
    READ_ELSEWHERE = "read by another op"
    MISMATCHED = "features do not meet one to one"
    SHARED_WEIGHT = "the weight is read by another op"
    CHAINED = "the linear already takes part in another site"
    NO_VALUES = "the weight has no values (meta or fake tensor)"
    NOT_FLOATING = "the weight is not a real floating-point tensor"
    NOT_FINITE = "the weight holds inf or nan"
    NOTHING_SAVED = "too few features to save anything"
    RANK_DEFICIENT = "no basis of this size spans every head"
    TOO_NOISY = "predicted noise is over the budget at every basis size"
    OUT_OF_RANGE = "values would leave the dtype's range where the original's do not"
    NOT_REQUESTED = "left out by the options"
    NESTED = "inside a control-flow or other higher-order op"
    UNKNOWN_OP = "read by an op that is not known to be an attention"
    NOT_PROFITABLE = "not faster than the original"
    UNPROVEN = "the graph could not be followed at a second set of sizes"


REMEDIES = {
    Reason.CACHED: "pass kv_cache='opaque' if nobody but the model's own attention reads the cache",
    Reason.NESTED: "export or compile the body of the op by itself",
    Reason.NO_VALUES: "load the weights: everything but their values is known",
    Reason.RANK_DEFICIENT: "pass a smaller basis_size, or basis='pivot'",
    Reason.TOO_NOISY: "pass a larger noise_budget or a smaller basis_size",
    Reason.OUT_OF_RANGE: "rewrite in bfloat16, or the other side",
    Reason.NOT_REQUESTED: "change the option",
    Reason.NOT_PROFITABLE: "pass profitability='always' to save its weights all the same",
    Reason.UNKNOWN_OP: "if it is an attention, bda_fx.register_attention says how to read it",
    Reason.DATA_DEPENDENT: "make the index a constant buffer, if it is one",
    Reason.NOT_FLOATING: "rewrite before quantising",
}
"""What a user can do about a skip, where there is something."""


@dataclass(frozen=True)
class Linear:
    """A linear weight of the program: ``y = x Wᵀ + b`` with ``W`` of shape [F, E].

    ``weight`` is the name of a constant node; ``nodes`` are all the linear nodes that use it
    (several when layers share it) and ``biases`` the constant node of each one's bias, or None.
    ``name`` is the fully qualified weight name.
    """

    name: str
    weight: str
    nodes: tuple[str, ...]
    biases: tuple[str | None, ...]
    in_features: int
    out_features: int
    tokens: int = 1
    """Rows of x over all nodes, at the example's sizes."""


@dataclass(frozen=True)
class Constant:
    """A tensor of the program that is added to, or met by, features: a learned bias, a table.

    ``node`` is a constant node with ``numel`` elements; ``path`` are the moves from it to ``user``,
    the one node where this use of it counts. Other uses keep the original.
    """

    name: str
    node: str
    path: tuple[str, ...]
    user: str
    numel: int


@dataclass(frozen=True)
class Factor:
    """Vectors of D features that change basis with a site, and where they lie.

    ``axis`` says what ``features`` count: output features of a linear ("out"), its input columns
    ("in"), or elements of a constant ("element"). Vector ``features[i]`` belongs to head
    ``groups[i]`` of the site, its features in the order in which they meet the head's.
    ``against``: it meets the decomposed features and turns by Sᵀ; otherwise it meets what they
    meet and turns by S⁻¹ as they do.
    """

    tensor: Linear | Constant
    axis: str
    features: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    against: bool = True

    @property
    def linear(self) -> Linear:
        assert isinstance(self.tensor, Linear)
        return self.tensor


@dataclass(frozen=True)
class Site:
    """A product that may be rewritten: ``features[g]`` are the D features of head g in ``linear``.

    ``side`` "kv" decomposes the projection of keys or values, "qo" that of queries or outputs.
    ``axis`` is "out" where the heads are output features of ``linear`` and the basis is picked from
    its inputs, "in" (an output projection) where they are columns and the basis is picked from its
    outputs. ``partners`` are all the other factors that change basis with it. ``other`` is the
    same product seen from the other side, where that can be decomposed too.
    """

    product: str
    linear: Linear
    features: tuple[tuple[int, ...], ...]
    partners: tuple[Factor, ...]
    contractions: tuple[str, ...]
    side: str = KV
    axis: str = OUT
    other: Site | None = None

    @property
    def num_kv_heads(self) -> int:
        return len(self.features) if self.side == KV else self._num_partner_heads

    @property
    def num_heads(self) -> int:
        """Query heads served, counting each partner's heads once."""
        return self._num_partner_heads if self.side == KV else len(self.features)

    @property
    def _num_partner_heads(self) -> int:
        met = [p for p in self.partners if p.against and isinstance(p.tensor, Linear)]
        return max((len(p.features) for p in met), default=len(self.features))

    @property
    def decomposed(self) -> int:
        """Features of a head that take part (D)."""
        return len(self.features[0])

    @property
    def basis_features(self) -> int:
        """How many features the basis is picked from (E): inputs, or outputs of an "in" site."""
        return self.linear.in_features if self.axis == OUT else self.linear.out_features

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear that changes, each once, the decomposed one first."""
        others = (p.tensor for p in self.partners if isinstance(p.tensor, Linear))
        return tuple({t.weight: t for t in (self.linear, *others)}.values())

    @property
    def constants(self) -> tuple[Constant, ...]:
        return tuple(p.tensor for p in self.partners if isinstance(p.tensor, Constant))


@dataclass(frozen=True)
class Skip:
    """An attention product that is left as it is, why, and the node that is the cause."""

    product: str
    contraction: str
    reason: Reason
    node: str
    name: str = ""
    detail: str = ""
    source: str = ""
    """The line of the model that the product comes from."""
    module: str = ""
    """Path of the module that computes it."""
    remedy: str = ""
    """What the user can do about it, where there is something."""
    site: Site | None = None
    """What would be rewritten, where only the plan is against it."""

    def explain(self) -> str:
        text = f"{self.reason.value} (at {self.node})"
        return f"{text}: {self.detail}" if self.detail else text


@dataclass(frozen=True)
class Found:
    """Everything ``find_sites`` has to say about a program. Sites and skips cover each product."""

    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]
    products: tuple[tuple[str, str], ...]
    """(contraction node, product) of every attention product in the program."""
    cached: tuple[str, ...] = ()
    """Weights of keys and values that leave into a cache."""
    linears: tuple[str, ...] = ()
    """Weights of all linears of the program."""
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Module path and source line of every contraction."""


@dataclass(frozen=True)
class Alternative:
    """A basis that was not taken: its side, size and predicted noise, or a rough estimate of it."""

    side: str
    size: int
    noise: float
    estimated: bool


@dataclass(frozen=True)
class Weighed:
    """What was measured, or predicted, of a linear's form: the original's time over the form's.

    ``spelling`` is that of ``emit_projection``; "by tokens" is decomposed within ``ranges``, the
    first and the last number of tokens each, and dense elsewhere. "dense" is a form that is not
    faster but has to stay in its basis. ``speedups`` are (tokens, ratio).
    """

    spelling: str
    speedups: tuple[tuple[int, float], ...]
    how: str
    ranges: tuple[tuple[int, int], ...] = ()

    def explain(self) -> str:
        """For example "packed, 1.21 of the original's speed at 128 tokens, measured"."""
        return f"{self.spelling}, {explain_speedups(self.speedups)}, {self.how}"


def explain_speedups(speedups: Sequence[tuple[int, float]]) -> str:
    """For example "0.93, 1.04 of the original's speed at 1, 16 tokens"."""
    ratios = ", ".join(f"{ratio:.2f}" for _, ratio in speedups)
    return f"{ratios} of the original's speed at {', '.join(str(n) for n, _ in speedups)} tokens"


@dataclass(frozen=True)
class SitePlan:
    """What will be done at a site, and what it is predicted to cost.

    ``basis`` names the basis: sites with one name share their rows and the gather of x. ``rows``
    are the rows for the weights that were planned with; another layer's weights have their own.
    ``noise`` is the predicted amplification of the site's rounding noise (1 = as the original),
    ``shares`` the part of the model's own noise that comes from the site, for each of its outputs.
    ``balanced``: whether the other factor has a say in the change of basis. ``optimize_for``: the
    grid that the weights will be quantised to, and whose noise is meant. ``correction``: ``noise``
    over what it is predicted to be from the weights alone; that of later weights is corrected
    alike.
    """

    site: Site
    basis: str
    strategy: str
    size: int
    rows: tuple[int, ...]
    noise: float
    worst_head_noise: float
    condition: float
    shares: tuple[float, ...] = (0.0,)
    balanced: bool = True
    optimize_for: str | None = None
    correction: float = 1.0
    alternatives: tuple[Alternative, ...] = ()
    weighed: Weighed | None = None
    """What was found of the speed of its linear, where that was looked at."""

    def costs(self, noise: float) -> list[float]:
        """What ``noise`` at this site adds to the squared noise ratio of each output."""
        return [share * (noise**2 - 1) for share in self.shares]


@dataclass(frozen=True)
class Fold:
    """A free gather: ``producer`` writes its features from ``first`` on in basis order.

    ``constants`` are per-feature constants between the producer and x (node, fully qualified name),
    permuted along; ``readers`` are other linears that read x and have their columns permuted.
    ``basis`` is set by the plan.
    """

    producer: Linear
    first: int
    in_features: int
    constants: tuple[tuple[str, str], ...]
    readers: tuple[Linear, ...]
    basis: str = ""


@dataclass(frozen=True)
class Plan:
    """Sites that will be rewritten, products that will not, and gathers that are folded."""

    sites: tuple[SitePlan, ...]
    skips: tuple[Skip, ...]
    folds: tuple[Fold, ...] = ()
    cached: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    """As in :class:`Found`."""
    allowance: float = math.inf
    """What Σ share (noise² - 1) may come to, for each output."""
    alike: bool = False
    """Whether that holds for every site by itself, as shares are not known."""
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """As in :class:`Found`."""

    def noise_ratio(self, noises: Sequence[float] | None = None) -> float | None:
        """Predicted noise of the noisiest output over the original's, with these at the sites.

        None where shares are not known.
        """
        if self.alike:
            return None
        noises = [item.noise for item in self.sites] if noises is None else noises
        costs = [item.costs(noise) for item, noise in zip(self.sites, noises, strict=True)]
        return math.sqrt(max(0.0, 1 + max(map(sum, zip(*costs, strict=True)), default=0.0)))

    def allows(self, noises: Sequence[float]) -> bool:
        """Whether the budget has room for these noises of the sites."""
        costs = [item.costs(noise) for item, noise in zip(self.sites, noises, strict=True)]
        sums = map(max if self.alike else sum, zip(*costs, strict=True))
        return all(total <= self.allowance for total in sums)
