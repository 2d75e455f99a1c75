"""How a decomposed projection is spelled in the new graph, and the spelling by the operator.

    "aten"       slice or index_select, linear, add: what every compiler and exporter knows
    "operator"   bda_fx::basis_projection(x, C, order, b, start, r, slots)
    "packed"     bda_fx::packed_projection(x, pack(C), order, b, start, r, slots, F), on the CPU

All compute the same and read the same rows; which one is best depends on the device, the compiler
and the number of tokens. So whoever rewrites a graph gives a function that chooses for each piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, fx

from bda_fx.kernels.basis_projection import basis_projection
from bda_fx.kernels.packed_projection import pack, packed_projection
from bda_fx.passes.derived_inputs import DerivedInputs
from bda_fx.passes.emit_node import emit
from bda_fx.passes.transform_weights import Form, basis_key, weight_key

Spelling = Literal["aten", "operator", "packed"]
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
    *,
    packed: bool,
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
    if not packed:
        weight = inputs.input(key)
        return emit(inputs.graph, basis_projection.default, x, weight, order, bias, start, size,
                    slots, like=node)  # fmt: skip
    weight = inputs.computed(f"{key}_packed", _pack_one, (key,))
    return emit(inputs.graph, packed_projection.default, x, weight, order, bias, start, size, slots,
                len(piece.features), like=node)  # fmt: skip


def _pack_one(coefficients: tuple[Tensor]) -> Tensor:
    return pack(*coefficients)
