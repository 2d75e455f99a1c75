"""Forms of linears: how each that takes part will be computed, and the names of what it reads.

The output features of a linear fall into *pieces*:

* a dense piece: features computed as before;
* a decomposed piece per basis: coefficients over the other inputs (the identity is no weight).

Mostly they follow each other head by head, or one after the other (:class:`Arrangement`).

Where the output projection is the one that is decomposed, r of its outputs are sums of the heads'
leading features and only the other outputs have weights.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from bda_fx.kernels.slot_pattern import period_of
from bda_fx.passes.sites import IN, Constant, Linear, Plan, SitePlan


@dataclass(frozen=True)
class Piece:
    """Output features of a linear that are computed together, in ascending order.

    ``basis`` is the name of the basis they are decomposed on, or None for a dense piece. Feature n
    takes basis feature ``slots[n]`` of x unchanged, or none where that is -1.
    """

    features: tuple[int, ...]
    basis: str | None = None
    size: int = 0
    slots: tuple[int, ...] = ()


@dataclass(frozen=True)
class Form:
    """How a linear that takes part will be computed.

    ``heads``, of an output projection that is decomposed: the columns of each head. Its one piece
    is the outputs, in the order of the basis and then the others.
    """

    linear: Linear
    pieces: tuple[Piece, ...]
    heads: tuple[tuple[int, ...], ...] = ()

    @property
    def whole(self) -> bool:
        """One dense piece: same shape as before, other values."""
        return len(self.pieces) == 1 and self.pieces[0].basis is None


def forms_of(plan: Plan) -> list[Form]:
    """The pieces of every linear that the plan touches."""
    linears: dict[str, Linear] = {}
    decomposed: dict[str, list[SitePlan]] = {}
    outputs: dict[str, SitePlan] = {}
    for item in plan.sites:
        for linear in item.site.linears:
            linears.setdefault(linear.weight, linear)
        if item.site.axis == IN:
            outputs[item.site.linear.weight] = item
        else:
            decomposed.setdefault(item.site.linear.weight, []).append(item)
    for fold in plan.folds:
        for linear in (fold.producer, *fold.readers):
            linears.setdefault(linear.weight, linear)
    forms = []
    for weight, linear in linears.items():
        if weight in outputs:
            item = outputs[weight]
            every = tuple(range(linear.out_features))
            forms.append(Form(linear, (Piece(every, item.basis, item.size),), item.site.features))
            continue
        slots: dict[str, dict[int, int]] = {}
        sizes: dict[str, int] = {}
        for item in decomposed.get(weight, ()):
            sizes[item.basis] = item.size
            for head in item.site.features:
                for slot, feature in enumerate(head):
                    taken = slot if slot < item.size else -1
                    slots.setdefault(item.basis, {})[feature] = taken
        done = {f for chosen in slots.values() for f in chosen}
        dense = tuple(f for f in range(linear.out_features) if f not in done)
        pieces = [Piece(dense)] if dense else []
        for basis, chosen in slots.items():
            features = tuple(sorted(chosen))
            pieces.append(Piece(features, basis, sizes[basis], tuple(chosen[f] for f in features)))
        forms.append(Form(linear, tuple(pieces)))
    return forms


@dataclass(frozen=True)
class Arrangement:
    """How the pieces of a linear follow each other: ``order`` of them, ``groups`` times.

    ``widths``, in that order: features of each piece in a group.
    """

    order: tuple[int, ...]
    widths: tuple[int, ...]
    groups: int


def arrangement_of(form: Form) -> Arrangement | None:
    """How the several pieces of a form follow each other; None where they are mixed otherwise."""
    total = form.linear.out_features
    owner = [0] * total
    for at, piece in enumerate(form.pieces):
        for feature in piece.features:
            owner[feature] = at
    period = period_of(tuple(owner))
    runs = [(at, len(list(same))) for at, same in itertools.groupby(owner[:period])]
    if len({at for at, _ in runs}) < len(runs):
        return None
    order, widths = zip(*runs, strict=True)
    return Arrangement(order, widths, total // period)


def weight_key(form: Form, piece: int) -> str:
    """Name of the derived weight of a piece."""
    if form.whole:
        return form.linear.name
    kind = "dense" if form.pieces[piece].basis is None else f"coefficients{piece or ''}"
    return f"{form.linear.name}_{kind}"


def bias_key(form: Form, piece: int, bias: str) -> str:
    """Name of the derived bias of a piece; ``bias`` is the original's constant node."""
    which = form.linear.biases.index(bias)
    return f"{weight_key(form, piece)}_bias{which or ''}"


def basis_key(basis: str, part: str) -> str:
    """Name of an index tensor of a basis; ``part`` is "rows" or "rest"."""
    return f"{basis}_{part}"


def constant_key(constant: Constant) -> str:
    """Name of the copy of a constant that one use of it reads."""
    return f"{constant.name}_at_{constant.user}"
