"""The operator ``bda_fx::basis_projection``: a decomposed projection from one read of x.

    y = x_R Cᵀ + spread(x_B) + b       x_B [*, r] the basis features of x, x_R [*, E - r] the others
    spread(x_B)[f] = x_B[slots[f % width]], or 0 where that slot is -1

    basis_projection(x [*, E], coefficients C [F, E - r], order [E] | None, bias [F] | None,
                     start, size = r, slots [width]) -> y [*, F]

* ``order`` holds the basis features and then the others: x_B = x[..., order[:r]] and
  x_R = x[..., order[r:]]. Without it the basis is the window x[..., start : start + r], and the
  others are what lies before and after it.
* ``slots`` is the pattern with which basis features enter the outputs; it repeats over the
  F / width groups. One head of D features takes (0, …, r - 1, -1, …, -1); K and V of one x on one
  basis take two of these in a row, or as their features lie in the fused weight.
* r = E leaves no coefficients (C is [F, 0]), r = 0 a plain linear.

A kernel multiplies and adds in float32 (float64 for float64) and rounds once. Where none serves a
device, the operator is its decomposition, :func:`project_in_aten`, which rounds where ATen does:
the product, and the sum. In float64 that is the reference for every kernel.

Q has this form too. O, where it is decomposed, has not: its basis are outputs, r of which are sums
over heads of z and need no weight. It stays ATen: Inductor fuses the sum, the concatenation and the
order of the outputs into one pass over y, which is what a kernel's epilogue could save at best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SCHEMA = (
    "basis_projection(Tensor x, Tensor coefficients, Tensor? order, Tensor? bias, "
    "SymInt start, SymInt size, int[] slots) -> Tensor"
)
# The kernels take x with any strides, so that Inductor need not copy it.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

library = torch.library.Library("bda_fx", "FRAGMENT")
library.define(SCHEMA, tags=TAGS)


def project_in_aten(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
) -> Tensor:
    """The operator in plain ATen ops: its decomposition, and the reference.

    Shapes as in the module's docstring.

    Raises:
        ValueError: shapes, types or slots that do not belong together.
    """
    check_arguments(x, coefficients, order, bias, start, size, slots)
    out_features = coefficients.shape[0]
    if size == 0:
        ordered = x if order is None else x.index_select(-1, order)
        return F.linear(ordered, coefficients, bias)
    basis, rest = split_features(x, order, start, size)
    identity = _spread(basis, slots).unsqueeze(-2)
    if size == x.shape[-1]:
        groups = out_features // len(slots)
        y = identity.expand(*x.shape[:-1], groups, len(slots)).flatten(-2)
        return y.clone() if bias is None else y + bias
    y = F.linear(rest, coefficients, bias).unflatten(-1, (-1, len(slots)))
    return (y + identity).flatten(-2)


def dense_weight(
    coefficients: Tensor,
    order: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
) -> Tensor:
    """W' [F, E] with ``basis_projection(x, C, order, b, …) = linear(x, W', b)``.

    C in the columns of the other features, a one where an output takes a basis feature.

    For numbers of tokens at which a plain product is faster, in the same basis.
    """
    out_features = coefficients.shape[0]
    columns = torch.tensor(slots, device=coefficients.device).repeat(out_features // len(slots))
    identity = coefficients.new_zeros(out_features, size)
    taken = (columns >= 0).nonzero().flatten()
    identity[taken, columns[taken]] = 1
    if order is None:
        return torch.cat([coefficients[:, :start], identity, coefficients[:, start:]], 1)
    return torch.cat([identity, coefficients], 1).index_select(1, order.argsort())


def split_features(x: Tensor, order: Tensor | None, start: int, size: int) -> tuple[Tensor, Tensor]:
    """x_B [*, r] and x_R [*, E - r]."""
    if order is not None:
        return x.index_select(-1, order[:size]), x.index_select(-1, order[size:])
    before, after = x[..., :start], x[..., start + size :]
    return x[..., start : start + size], torch.cat([before, after], -1)


def check_arguments(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
) -> None:
    """Raise ValueError with the value and what was expected, unless the arguments fit together."""
    if x.dim() == 0 or coefficients.dim() != 2:
        raise ValueError(
            f"basis_projection: x {list(x.shape)} and coefficients {list(coefficients.shape)}: "
            "expected [*, E] and [F, E - size]"
        )
    rest = coefficients.shape[1]
    check_basis(x, coefficients.shape[0], rest, order, bias, start, size, slots)
    if coefficients.dtype != x.dtype:
        raise ValueError(
            f"basis_projection: coefficients are {coefficients.dtype}, expected x's {x.dtype}"
        )


def check_basis(
    x: Tensor,
    out_features: int,
    rest: int,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
) -> None:
    """What does not depend on how the coefficients are stored; ``rest`` is how many columns."""
    in_features = x.shape[-1]
    if size < 0 or rest != in_features - size:
        raise ValueError(
            f"basis_projection: {rest} columns of coefficients for a basis of {size} out of "
            f"{in_features} features: expected {in_features - size}"
        )
    if order is None and not 0 <= start <= in_features - size:
        raise ValueError(
            f"basis_projection: the window {start} … {start + size} is not within the "
            f"{in_features} features of x"
        )
    if order is not None and (order.dtype != torch.int64 or order.shape != (in_features,)):
        raise ValueError(
            f"basis_projection: order is {order.dtype} {list(order.shape)}, expected "
            f"torch.int64 [{in_features}]: the basis features, then the others"
        )
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(
            f"basis_projection: bias is {bias.dtype} {list(bias.shape)}, expected {x.dtype} "
            f"[{out_features}]"
        )
    if not slots or out_features % len(slots) or not all(-1 <= slot < size for slot in slots):
        raise ValueError(
            f"basis_projection: slots {list(slots)}: expected numbers from -1 to {size - 1}, as "
            f"many as divide the {out_features} output features"
        )


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The pattern cut into stretches [begin, end) of rising slots, or of none."""
    begin = 0
    for end in range(1, len(slots) + 1):
        step = 0 if slots[begin] < 0 else end - begin
        if end == len(slots) or slots[end] != slots[begin] + step:
            yield begin, end
            begin = end


def _spread(basis: Tensor, slots: Sequence[int]) -> Tensor:
    """x_B [*, r] where the outputs of one group take it: [*, width]."""
    parts = [
        basis[..., slots[a] : slots[a] + b - a]
        if slots[a] >= 0
        else basis.new_zeros((*basis.shape[:-1], b - a))
        for a, b in _runs(slots)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _gather_back(group: Tensor, slots: Sequence[int], size: int) -> Tensor:
    """The adjoint of :func:`_spread`: [*, width] → [*, r]."""
    total = group.new_zeros((*group.shape[:-1], size))
    for a, b in _runs(slots):
        if slots[a] >= 0:
            total = total + F.pad(group[..., a:b], (slots[a], size - slots[a] - b + a))
    return total


library.impl("basis_projection", project_in_aten, "CompositeExplicitAutograd")


@torch.library.register_fake("bda_fx::basis_projection", lib=library)
def _fake(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
) -> Tensor:
    check_arguments(x, coefficients, order, bias, start, size, slots)
    return x.new_empty((*x.shape[:-1], coefficients.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, coefficients, order, bias, start, size, slots = inputs
    ctx.save_for_backward(x, coefficients, order)
    ctx.start, ctx.size, ctx.slots, ctx.has_bias = start, size, slots, bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """∂x_R = g C, ∂x_B = Σ_groups spreadᵀ(g), ∂C = gᵀ x_R, ∂b = Σ_tokens g."""
    x, coefficients, order = ctx.saved_tensors
    start, size, slots = ctx.start, ctx.size, ctx.slots
    grad_x = grad_coefficients = grad_bias = None
    rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
    if ctx.needs_input_grad[0]:
        rest = grad @ coefficients
        basis = _gather_back(grad.unflatten(-1, (-1, len(slots))).sum(-2), slots, size)
        if order is None:
            grad_x = torch.cat([rest[..., :start], basis, rest[..., start:]], -1)
        else:
            grad_x = torch.cat([basis, rest], -1).index_select(-1, order.argsort())
    if ctx.needs_input_grad[1]:
        tokens = x.reshape(rows.shape[0], x.shape[-1])
        grad_coefficients = rows.mT @ split_features(tokens, order, start, size)[1]
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0)
    return grad_x, grad_coefficients, None, grad_bias, None, None, None


torch.library.register_autograd(
    "bda_fx::basis_projection", _backward, setup_context=_setup_context, lib=library
)

basis_projection = torch.ops.bda_fx.basis_projection
"""The operator itself."""

DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {basis_projection.default: project_in_aten}
"""For ``ExportedProgram.run_decompositions`` and ``make_fx``: a program without the operator."""
