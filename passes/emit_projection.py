"""How a decomposed projection is spelled in the new graph, and the spelling by the operator.

    "aten"       slice or index_select, linear, add: what every compiler and exporter knows
    "operator"   bda_fx::basis_projection(x, C, order, b, start, r, slots)
    "packed"     bda_fx::packed_projection(x, pack(C), order, b, start, r, slots, F), on the CPU
    ByTokens     bda_fx::packed_projection_by_tokens(…, W', ranges): "packed" or dense at each call
    "dense"      linear(x, W', b), the original's shape in the new basis: all pieces in one

All compute the same and read the same rows; which one is best depends on the device, the compiler
and the number of tokens. So whoever rewrites a graph gives a function that chooses for each piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx

from bda_fx.kernels.basis_projection import basis_projection, dense_weight
from bda_fx.kernels.packed_projection import (
    pack,
    packed_projection,
    packed_projection_by_tokens,
)
from bda_fx.passes.derived_inputs import DerivedInputs
from bda_fx.passes.emit_node import emit
from bda_fx.passes.forms import Form, basis_key, weight_key


@dataclass(frozen=True)
class ByTokens:
    """Decomposed at numbers of tokens within ``ranges``, (first, last) each; dense elsewhere."""

    ranges: tuple[tuple[int, int], ...]


Spelling = Literal["aten", "operator", "packed", "dense"] | ByTokens
ChooseSpelling = Callable[[Tensor, Form, int], Spelling]
"""From x (a fake tensor), the linear's form and which of its pieces, to the spelling."""


def always_aten(x: Tensor, form: Form, piece: int) -> Spelling:
    """For exporters, and for compilers that know no operator of ours."""
    return "aten"


def emit_projection(
    inputs: DerivedInputs,
    node: fx.Node,
    form: Form,
    at: int,
    bias: fx.Node | None,
    window: int | None,
    width: int,
    spelling: Spelling,
) -> fx.Node:
    """One piece of the linear ``node`` by the operator, at the graph's insertion point.

    ``window`` is the basis' first row where that is known and its rows are contiguous; else they
    are read from an input. The piece's slots repeat with a period of ``width``.
    """
    piece = form.pieces[at]
    assert piece.basis is not None
    x, size, slots = node.args[0], piece.size, list(piece.slots[:width])
    order = None
    if window is None:
        order = inputs.computed(
            basis_key(piece.basis, "features"),
            torch.cat,
            (basis_key(piece.basis, "rows"), basis_key(piece.basis, "rest")),
        )
    key = weight_key(form, at)
    start = window or 0
    if spelling == "operator":
        weight = inputs.input(key)
        return emit(inputs.graph, basis_projection.default, x, weight, order, bias, start, size,
                    slots, like=node)  # fmt: skip
    weight = inputs.computed(f"{key}_packed", _pack_one, (key,))
    count = len(piece.features)
    if not isinstance(spelling, ByTokens):
        return emit(inputs.graph, packed_projection.default, x, weight, order, bias, start, size,
                    slots, count, like=node)  # fmt: skip
    recipe = [Recipe(piece.features, size, piece.slots, window)]
    dense = inputs.computed(
        f"{key}_in_one", partial(join_weights, recipe), weight_keys(form, at, window)
    )
    ranges = [bound for pair in spelling.ranges for bound in pair]
    return emit(inputs.graph, packed_projection_by_tokens.default, x, weight, order, bias, start,
                size, slots, count, dense, ranges, like=node)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a piece's part of a joint weight is made of; ``window`` None: rows are tensors too."""

    features: tuple[int, ...]
    size: int = 0
    slots: tuple[int, ...] = ()
    window: int | None = None


def weight_keys(form: Form, at: int, window: int | None) -> tuple[str, ...]:
    """Keys of the tensors that ``join_weights`` takes for a piece."""
    basis = form.pieces[at].basis
    if basis is None or window is not None:
        return (weight_key(form, at),)
    return (weight_key(form, at), basis_key(basis, "rows"), basis_key(basis, "rest"))


def join_weights(recipes: Sequence[Recipe], tensors: Sequence[Tensor]) -> Tensor:
    """W' [F, E] of several pieces: their rows in the order of the output features."""
    given = iter(tensors)
    parts = []
    for recipe in recipes:
        weight = next(given)
        if recipe.slots:
            order = torch.cat([next(given), next(given)]) if recipe.window is None else None
            weight = dense_weight(weight, order, recipe.window or 0, recipe.size, recipe.slots)
        parts.append(weight)
    return join_features([recipe.features for recipe in recipes], parts)


def join_features(features: Sequence[Sequence[int]], parts: Sequence[Tensor]) -> Tensor:
    """Parts of a weight or a bias, in the order of the output features."""
    if len(parts) == 1:
        return parts[0]
    placed = torch.tensor([f for each in features for f in each], device=parts[0].device)
    return torch.cat(list(parts)).index_select(0, placed.argsort())


def _pack_one(coefficients: tuple[Tensor]) -> Tensor:
    return pack(*coefficients)
