"""``bda_fx::packed_projection``: the operator on the CPU, with coefficients packed beforehand.

    basis_projection(x, C, order, bias, start, size, slots)
        = packed_projection(x, pack(C), order, bias, start, size, slots, F)

Packing pays once where weights are used often, so a compiled graph reads packed coefficients, which
are derived weights like others: computed from the parameters and recomputed when these change. The
operator on plain coefficients packs them at each call.

Packed, C [F, K] is cut into panels of W outputs, filled up with zeros: [F / W, K, W], or in pairs
of K for the 16-bit dot products of the CPU, [F / W, K / 2, W, 2], K filled up to a multiple of 32
where it has a unit for matrices. W is what suits the CPU's vectors, 16 to 64; the kernel reads any
of these. Types that the CPU cannot multiply are packed in float32, which multiplies them exactly.

    packed_projection_by_tokens(…, dense, ranges)
        = packed_projection(…)          where ranges = [first, last, first, last, …] hold the tokens
        = linear(x, dense, bias)        elsewhere

computes the same in one of two forms, chosen at each call by the number of tokens: ``dense``
[F, E] is ``dense_weight(C, …)``, the projection in the same basis as one plain product.

Inference only: it refuses inputs that require a gradient. Without the compiled kernel it unpacks
and decomposes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bda_fx.kernels.basis_projection import (
    TAGS,
    check_arguments,
    check_basis,
    library,
    project_in_aten,
)
from bda_fx.kernels.build_kernel import kernel_loaded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernel computes."""
MOST_FILLED = 32
"""Panels are filled up to multiples of so many K at most: the depth of a unit for matrices."""

library.define(
    "packed_projection(Tensor x, Tensor packed, Tensor? order, Tensor? bias, SymInt start, "
    "SymInt size, int[] slots, SymInt out_features) -> Tensor",
    tags=TAGS,
)


library.define(
    "packed_projection_by_tokens(Tensor x, Tensor packed, Tensor? order, Tensor? bias, "
    "SymInt start, SymInt size, int[] slots, SymInt out_features, Tensor dense, "
    "int[] ranges) -> Tensor",
    tags=TAGS,
)


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel computes this; builds it at the first question that depends on it."""
    return device.type == "cpu" and dtype in DTYPES and kernel_loaded()


def pack(coefficients: Tensor) -> Tensor:
    """Coefficients [F, K] on the CPU as the kernel reads them."""
    depth = torch.ops.bda_fx.panel_depth(coefficients.dtype)
    pairs = depth > 1
    dtype = coefficients.dtype if pairs else torch.float32
    out_features, inner = coefficients.shape
    width = torch.ops.bda_fx.panel_width()
    more = -inner % depth
    filled = F.pad(coefficients.to(dtype), (0, more, 0, -out_features % width))
    panels = filled.view(len(filled) // width, width, inner + more)
    if not pairs:
        return panels.mT.contiguous()
    return panels.unflatten(-1, ((inner + more) // 2, 2)).transpose(1, 2).contiguous()


def unpack(packed: Tensor, out_features: int, inner: int, dtype: torch.dtype) -> Tensor:
    """The coefficients [F, K] that were packed."""
    panels = packed.mT if packed.dim() == 3 else packed.transpose(1, 2).flatten(-2)
    return panels.flatten(0, 1)[:out_features, :inner].to(dtype)


def _project_unpacked(
    x: Tensor,
    packed: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
    out_features: int,
) -> Tensor:
    coefficients = unpack(packed, out_features, x.shape[-1] - size, x.dtype)
    return project_in_aten(x, coefficients, order, bias, start, size, slots)


library.impl("packed_projection", _project_unpacked, "CompositeExplicitAutograd")


@torch.library.register_fake("bda_fx::packed_projection", lib=library)
def _fake(
    x: Tensor,
    packed: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
    out_features: int,
) -> Tensor:
    rest = x.shape[-1] - size
    inner = packed.shape[1:].numel() // packed.shape[2]
    if packed.dim() == 4 and 0 <= inner - rest < MOST_FILLED:
        inner = rest
    check_basis(x, out_features, inner, order, bias, start, size, slots)
    return x.new_empty((*x.shape[:-1], out_features))


def _project_by_tokens(
    x: Tensor,
    packed: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
    out_features: int,
    dense: Tensor,
    ranges: Sequence[int],
) -> Tensor:
    tokens = x.shape[:-1].numel()
    if any(first <= tokens <= last for first, last in zip(ranges[::2], ranges[1::2], strict=True)):
        return _project_unpacked(x, packed, order, bias, start, size, slots, out_features)
    return F.linear(x, dense, bias).contiguous()


library.impl("packed_projection_by_tokens", _project_by_tokens, "CompositeExplicitAutograd")


@torch.library.register_fake("bda_fx::packed_projection_by_tokens", lib=library)
def _fake_by_tokens(
    x: Tensor,
    packed: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
    out_features: int,
    dense: Tensor,
    ranges: Sequence[int],
) -> Tensor:
    if dense.shape != (out_features, x.shape[-1]) or dense.dtype != x.dtype:
        raise ValueError(
            f"packed_projection_by_tokens: dense is {dense.dtype} {list(dense.shape)}, expected "
            f"{x.dtype} {[out_features, x.shape[-1]]}"
        )
    if len(ranges) % 2:
        raise ValueError(
            f"packed_projection_by_tokens: ranges {list(ranges)}: expected pairs of the first and "
            "the last number of tokens"
        )
    return _fake(x, packed, order, bias, start, size, slots, out_features)


packed_projection_by_tokens = torch.ops.bda_fx.packed_projection_by_tokens
"""The operator that chooses its form by the number of tokens."""

packed_projection = torch.ops.bda_fx.packed_projection
"""The operator itself."""


def _project_on_cpu(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
) -> Tensor:
    """``basis_projection`` on the CPU: pack and project, or decompose where no kernel serves."""
    if not serves(x.device, x.dtype):
        return project_in_aten(x, coefficients, order, bias, start, size, slots)
    check_arguments(x, coefficients, order, bias, start, size, slots)
    out_features = coefficients.shape[0]
    return packed_projection(x, pack(coefficients), order, bias, start, size, slots, out_features)


library.impl("basis_projection", _project_on_cpu, "CPU")
