"""What each ATen op does to the features of a projection: the table behind labelled execution.

An op that is in no row of the table is assumed to compute something: whatever labelled features it
reads are then touched, and its result carries no labels. So a missing row costs a site, never a
wrong rewrite.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bda_fx.passes.sites import Reason

if TYPE_CHECKING:
    from bda_fx.passes.labels import Labels


def overloads(*names: str) -> frozenset[torch._ops.OpOverload]:
    """Every overload of the named ATen ops (``view.dtype`` style names pick one overload)."""
    found = set()
    for name in names:
        packet, _, overload = name.partition(".")
        op = getattr(torch.ops.aten, packet)
        picked = [overload] if overload else op.overloads()
        found |= {getattr(op, o) for o in picked}
    return frozenset(found)


# Each output element is one input element (or a constant fill): run on the labels as it stands.
MOVES = overloads(
    "view.default", "_unsafe_view", "reshape", "view_as", "flatten.using_ints", "unflatten.int",
    "transpose.int", "t", "permute", "movedim", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint",
    "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "repeat", "tile",
    "repeat_interleave.self_int", "split", "split_with_sizes", "unsafe_split",
    "unsafe_split_with_sizes", "split_copy", "split_with_sizes_copy", "chunk", "unsafe_chunk",
    "tensor_split.sections", "tensor_split.indices", "unbind.int", "slice.Tensor", "select.int",
    "narrow.default", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "roll", "flip",
    "rot90",
    "slice_scatter", "select_scatter", "copy", "fill.Tensor", "constant_pad_nd", "pad", "diagonal",
    "unfold", "index_select", "index.Tensor", "pixel_shuffle", "pixel_unshuffle", "atleast_2d",
    "atleast_3d",
)  # fmt: skip

VIEWS = overloads("view.default", "_unsafe_view")  # moves that hold for some strides only

# Same values in another place, layout or floating-point type: the labels stay as they are.
KEEPS = overloads(
    "clone", "contiguous", "alias", "detach", "lift", "lift_fresh", "lift_fresh_copy", "to",
    "_to_copy", "type_as", "positive", "dropout", "feature_dropout", "alpha_dropout",
    "native_dropout",
)  # fmt: skip

# Multiplication by a factor: legal while the factor is the same for all features of a head.
SCALES = overloads("mul", "multiply", "div.Tensor", "div.Scalar", "divide.Tensor", "neg")

ADDS = overloads("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub", "subtract.Tensor")

# Sums of terms, as the arguments (term, its factor if it has one). A choice is one too: a m + b ¬m.
SUMS: dict[Any, tuple[tuple[str, str | None], ...]] = {
    **dict.fromkeys(ADDS, (("self", None), ("other", None))),
    **dict.fromkeys(overloads("lerp"), (("self", "weight"), ("end", "weight"))),
    **dict.fromkeys(
        overloads("where.self", "where.ScalarOther", "where.ScalarSelf"),
        (("self", "condition"), ("other", "condition")),
    ),
    **dict.fromkeys(overloads("masked_fill"), (("self", "mask"), ("value", "mask"))),
}

# Mixtures of the elements along some axes, with coefficients that depend on places along these
# alone: how many axes, the last ones, or the argument that names them.
MIXES: dict[Any, int | str] = {
    **dict.fromkeys(overloads("sum.dim_IntList", "mean.dim", "cumsum.default"), "dim"),
    **dict.fromkeys(overloads("avg_pool1d", "adaptive_avg_pool1d"), 1),
    **dict.fromkeys(overloads("avg_pool2d", "adaptive_avg_pool2d"), 2),
}

# What a factor is made by: every element of the result depends on elements in its place alone.
UNTAGGED_POINTWISE = overloads("__and__", "__or__", "__xor__")

# Ops that look at shapes and types only; an argument of theirs is not read.
METADATA = overloads(
    "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "size", "_assert_tensor_metadata",
    "_assert_scalar", "_assert_async", "new_empty", "new_empty_strided", "new_zeros", "new_ones",
    "new_full", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
    "fill.Scalar", "is_same_size",
)  # fmt: skip

ZEROS = overloads("zeros", "new_zeros", "zeros_like", "zero")
FULLS = overloads("full", "new_full", "full_like", "fill.Scalar", "scalar_tensor")
FILLS = ZEROS | FULLS | overloads("ones", "new_ones", "ones_like")  # equal elements

# Ops that write a tensor into another one at places given by an index or a slice.
INDEX_PUTS = overloads("index_put", "_unsafe_index_put")
WRITES = INDEX_PUTS | overloads("index_copy")
SCATTERS = overloads("slice_scatter", "select_scatter")
STORES = overloads("copy_")  # what a program writes into its inputs, a KV cache for one


@dataclass(frozen=True)
class AttentionRule:
    """How to read an op that computes scores q kᵀ head by head and mixes v over tokens by them.

    ``q``, ``k``, ``v`` name arguments of its schema. ``layout`` spells the axes that they and the
    (first) result have: h heads, t tokens, d features, b anything that is batched over. Fewer key
    heads than query heads are grouped queries.
    """

    q: str = "query"
    k: str = "key"
    v: str = "value"
    layout: str = "bhtd"

    @property
    def grouped(self) -> bool:
        """Whether there is an axis of heads, along which keys may be fewer than queries."""
        return "h" in self.layout

    def heads_first(self, x: Labels) -> Labels:
        """Labels as [*, h, t, d]."""
        return x.permuted(self._order)

    def laid_out(self, x: Labels) -> Labels:
        """From [*, h, t, d] to the op's own layout."""
        order = self._order
        return x.permuted([order.index(i) for i in range(len(order))])

    @property
    def _order(self) -> list[int]:
        lead = [i for i, axis in enumerate(self.layout) if axis == "b"]
        return lead + [self.layout.index(axis) for axis in "htd" if axis in self.layout]


def argument_names(target: Any) -> list[str]:
    """Names of an op's arguments; a higher-order op has no schema, but its call may name them."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return [argument.name for argument in schema.arguments]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(target.__call__).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in named]


def argument(node: fx.Node, name: str) -> Any:
    """The argument of a node that its op calls ``name``, or None."""
    if name in node.kwargs:
        return node.kwargs[name]
    at = argument_names(node.target).index(name)
    return node.args[at] if at < len(node.args) else None


def mixed_axes(node: fx.Node, rank: int) -> list[int]:
    """Axes, of ``rank`` many, along which an op of ``MIXES`` mixes."""
    rule = MIXES[node.target]
    if isinstance(rule, int):
        return list(range(rank - rule, rank))
    given = argument(node, rule)
    axes = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return sorted(int(axis) % rank for axis in axes) or list(range(rank))


ATTENTION: dict[Any, AttentionRule] = dict.fromkeys(
    overloads(
        "scaled_dot_product_attention", "_scaled_dot_product_attention_math",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    ),
    AttentionRule(),
)  # fmt: skip
"""Ops that hold a whole attention; ``bda_fx.register_attention`` adds to them."""
ATTENTION[torch.ops.higher_order.flex_attention] = AttentionRule()

DROPOUTS = overloads("dropout", "feature_dropout", "alpha_dropout", "native_dropout")


def is_random(node: fx.Node) -> bool:
    """Whether ``node`` is a dropout that drops."""
    return node.target in DROPOUTS and len(node.args) > 2 and bool(node.args[2])


MATMULS = overloads("matmul", "bmm", "baddbmm.default")
LINEAR = overloads("linear")

# Projections that are no linears: what they make is new, whatever became of what they read.
CONVOLUTIONS = overloads(
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d.input",
)  # fmt: skip

_NORMS = overloads(
    "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm",
    "native_group_norm", "batch_norm", "instance_norm", "norm", "linalg_vector_norm", "mean",
    "var", "var_mean", "std", "pow", "square", "rsqrt",
)  # fmt: skip
_ROTATIONS = overloads("view_as_complex", "complex", "polar", "view_as_real")


def reason_for(target: object) -> Reason:
    """Why features that ``target`` reads can no longer be rewritten."""
    if target in _NORMS:
        return Reason.NORMALISED
    if target in _ROTATIONS:
        return Reason.ROTATED
    if target in ADDS:
        return Reason.ADDED
    return Reason.COMPUTED
