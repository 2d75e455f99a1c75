"""What the passes tell each other: sites, skips, plans — names and numbers, never live nodes.

Shape letters used throughout: B batch, S query tokens, T key tokens, H query heads, G key/value
heads, D features of one head that take part, E input features of a projection, F its output
features, r basis size.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

QK = "qk"
VO = "vo"


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
    NOT_REQUESTED = "left out by the options"
    NESTED = "inside a control-flow or other higher-order op"
    UNPROVEN = "the graph could not be followed at a second set of sizes"


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


@dataclass(frozen=True)
class Partner:
    """The other factor of a product: query features (``axis`` "out") or output columns ("in").

    ``features[i]`` are the D features of query head i in the order in which they meet the
    key/value head ``groups[i]``.
    """

    linear: Linear
    axis: str
    features: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """One product that may be rewritten: ``features[g]`` are the D output features of head g."""

    product: str
    linear: Linear
    features: tuple[tuple[int, ...], ...]
    partners: tuple[Partner, ...]
    contractions: tuple[str, ...]

    @property
    def num_kv_heads(self) -> int:
        return len(self.features)

    @property
    def num_heads(self) -> int:
        """Query heads served, counting each partner's heads once."""
        return max(len(p.features) for p in self.partners)

    @property
    def decomposed(self) -> int:
        """Features of a head that take part (D)."""
        return len(self.features[0])


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


@dataclass(frozen=True)
class SitePlan:
    """What will be done at a site, and what it is predicted to cost.

    ``basis`` names the basis: sites with one name share their rows and the gather of x. ``rows``
    are the rows for the weights that were planned with; another layer's weights have their own.
    ``noise`` is the predicted amplification of the site's rounding noise (1 = as the original).
    """

    site: Site
    basis: str
    strategy: str
    size: int
    rows: tuple[int, ...]
    noise: float
    worst_head_noise: float
    condition: float


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
