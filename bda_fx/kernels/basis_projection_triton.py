"""The basis projection as one Triton kernel for NVIDIA GPUs. Importing this module imports triton.

    y = x_R Cᵀ + spread(x_B) + b       x [M, E], C [F, E - r], y [M, F]; see basis_projection.py

A program computes one tile of y, BLOCK_TOKENS × BLOCK_FEATURES, in float32, and rounds it once:

* The residual x_R is never built. Where the basis is a window, the residual is the features before
  it and those after it: the sum runs over steps of BLOCK_RESIDUAL features that lie in one or in
  the other, so that a step is contiguous in x and loads are as wide as for an ordinary product.
  Where the basis is scattered, a step loads its feature numbers and then x by them, a step ahead.
* The basis features are read once more when the sum is done, where each enters: ``slots`` repeats
  over the outputs, and is known when the kernel is compiled as the few runs it consists of
  (slot_pattern.py); a pattern of many runs is read from a table.
* Programs that run at the same time share tiles of x: GROUP tiles of tokens go through all features
  before the next ones do, so that x and C come from L2 for all but the first head.
* Few tokens leave most of a device idle. Then SPLITS programs share a tile of y, each with its part
  of the steps. Each writes its float32 sum to a place of its own; the one that arrives last adds
  these up in their order, which is always the same, and finishes the tile. No result depends on who
  is last: split sums are deterministic, and one launch does it all.

Tiles, stages, warps and splits are chosen by ``triton.autotune``, by measurement, from what the
roofline model leaves: the ``CANDIDATES`` that it predicts fastest for these shapes on this device,
all of which fit its shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from bda_fx.kernels import roofline
from bda_fx.kernels.slot_pattern import pattern_of

CANDIDATES = 10
"""Most tiles to measure: some seconds, once per shape."""

GROUP = 8
"""Tiles of tokens that go through all features together."""


@triton.jit
def _slots_of(  # type: ignore[no-untyped-def]
    columns, table, WIDTH: tl.constexpr, RUNS: tl.constexpr, TABLE: tl.constexpr
):
    """The basis feature that enters each output feature, and whether one does.

    A run shifts by one number, so that the compiler sees slots that rise by one, and loads of basis
    features as wide as the run allows. Slots where none enters are anything.
    """
    position = columns % WIDTH
    if TABLE:
        slots = tl.load(table + position)
        enters = slots >= 0
    else:
        shifts = tl.zeros(columns.shape, tl.int32)
        enters = tl.zeros(columns.shape, tl.int1)
        for run in tl.static_range(len(RUNS)):
            inside = (position >= RUNS[run][0]) & (position < RUNS[run][1])
            shifts = tl.where(inside, RUNS[run][2] - RUNS[run][0], shifts)
            enters |= inside
        slots = position + shifts
    return slots, enters


@triton.jit
def _load_residual(  # type: ignore[no-untyped-def]
    x_rows, x_feature, order, size, begin, end, shift, rows_inside,
    SCATTERED: tl.constexpr, BLOCK_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Residual features begin … begin + BLOCK_RESIDUAL of the tile's tokens, 0 from ``end`` on."""
    k = begin + tl.arange(0, BLOCK_RESIDUAL)
    inside = k < end
    if SCATTERED:
        source = tl.load(order + size + k, mask=inside, other=0)
    else:
        source = (k + shift).to(tl.int64)
    return tl.load(
        x_rows[:, None] + (source * x_feature)[None, :],
        mask=rows_inside[:, None] & inside[None, :],
        other=0.0,
    )


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    sums, x_rows, x_feature, order, start, bias, table, out_rows, rows_inside, columns, features,
    WIDTH: tl.constexpr, RUNS: tl.constexpr, TABLE: tl.constexpr,
    SCATTERED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add basis features and bias to the sums, in float32, and write them."""
    columns_inside = columns < features
    slots, enters = _slots_of(columns, table, WIDTH, RUNS, TABLE)
    enters &= columns_inside
    if SCATTERED:
        basis = tl.load(order + slots, mask=enters, other=0)
    else:
        basis = (start + slots).to(tl.int64)
    sums += tl.load(
        x_rows[:, None] + (basis * x_feature)[None, :],
        mask=rows_inside[:, None] & enters[None, :],
        other=0.0,
    ).to(tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_rows[:, None] + columns[None, :],
        sums.to(out_rows.dtype.element_ty),
        mask=rows_inside[:, None] & columns_inside[None, :],
    )


# Token counts change from call to call: one kernel serves all.
@triton.jit(do_not_specialize=["tokens", "bucket"])
def _basis_projection(  # type: ignore[no-untyped-def]
    x,  # [tokens, E] by its strides: token t lies at x_outer · (t // inner) + x_inner · (t % inner)
    coefficients,  # [features, residual]
    order,  # int64 [E], where SCATTERED
    bias,  # [features], where HAS_BIAS
    table,  # int32 [WIDTH], where TABLE
    out,  # [tokens, features], contiguous
    partials,  # float32 [SPLITS, tokens, features], where SPLITS > 1
    arrivals,  # int32, a zero for each tile, where SPLITS > 1; zeros again at the end
    tokens, inner, features, residual, size, start,
    bucket,  # of tokens, for the tuner alone
    x_outer, x_inner, x_feature, c_feature, c_residual,
    WIDTH: tl.constexpr, RUNS: tl.constexpr, TABLE: tl.constexpr,
    SCATTERED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_FEATURES: tl.constexpr, BLOCK_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    in_group = GROUP * tl.cdiv(features, BLOCK_FEATURES)
    first = tile // in_group * GROUP
    group = tl.minimum(token_tiles - first, GROUP)
    token_tile = first + tile % in_group % group
    feature_tile = tile % in_group // group

    rows = token_tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = feature_tile * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    rows_inside, columns_inside = rows < tokens, columns < features
    # tokens × features may exceed 2³¹, and so may a stride times a number of either.
    outer_rows, inner_rows = (rows // inner).to(tl.int64), (rows % inner).to(tl.int64)
    x_rows = x + outer_rows * x_outer + inner_rows * x_inner
    c_rows = coefficients + columns.to(tl.int64) * c_feature

    # Steps before the window, and from there on those after it.
    steps_before = tl.cdiv(start, BLOCK_RESIDUAL) if not SCATTERED else 0
    steps = steps_before + tl.cdiv(residual - start, BLOCK_RESIDUAL)
    steps_each = tl.cdiv(steps, SPLITS)
    first_step, end_step = split * steps_each, tl.minimum((split + 1) * steps_each, steps)
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_FEATURES), tl.float32)
    if SCATTERED:
        # Single features are too narrow to be copied asynchronously, as the compiler does it with
        # the rest: what the next step needs is on its way, in registers, while this one multiplies.
        ahead = _load_residual(
            x_rows, x_feature, order, size, first_step * BLOCK_RESIDUAL, residual, 0, rows_inside,
            SCATTERED, BLOCK_RESIDUAL,
        )  # fmt: skip
    for step in range(first_step, end_step):
        if SCATTERED:
            begin, end = step * BLOCK_RESIDUAL, residual
            x_tile = ahead
            ahead = _load_residual(
                x_rows, x_feature, order, size, begin + BLOCK_RESIDUAL, residual, 0, rows_inside,
                SCATTERED, BLOCK_RESIDUAL,
            )  # fmt: skip
        else:
            after = step >= steps_before
            begin = tl.where(
                after, start + (step - steps_before) * BLOCK_RESIDUAL, step * BLOCK_RESIDUAL
            )
            end = tl.where(after, residual, start)
            x_tile = _load_residual(
                x_rows, x_feature, order, size, begin, end, tl.where(after, size, 0), rows_inside,
                SCATTERED, BLOCK_RESIDUAL,
            )  # fmt: skip
        k = begin + tl.arange(0, BLOCK_RESIDUAL)
        c_tile = tl.load(
            c_rows[None, :] + (k.to(tl.int64) * c_residual)[:, None],
            mask=(k < end)[:, None] & columns_inside[None, :],
            other=0.0,
        )
        sums = tl.dot(x_tile, c_tile, sums, input_precision=PRECISION)

    out_rows = out + rows.to(tl.int64) * features
    if SPLITS == 1:
        _finish(
            sums, x_rows, x_feature, order, start, bias, table, out_rows, rows_inside, columns,
            features, WIDTH, RUNS, TABLE, SCATTERED, HAS_BIAS,
        )  # fmt: skip
    else:
        inside = rows_inside[:, None] & columns_inside[None, :]
        places = partials + (rows.to(tl.int64) * features)[:, None] + columns[None, :]
        stride = tokens.to(tl.int64) * features
        tl.store(places + split * stride, sums, mask=inside)
        # All threads have written before one of them says so (release), and the threads of the last
        # program read only after it was told so (acquire).
        tl.debug_barrier()
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrivals + tile, 0)
            sums = tl.zeros((BLOCK_TOKENS, BLOCK_FEATURES), tl.float32)
            for other in range(SPLITS):
                # .cg: from L2, where the others' sums are.
                sums += tl.load(
                    places + other * stride, mask=inside, other=0.0, cache_modifier=".cg"
                )
            _finish(
                sums, x_rows, x_feature, order, start, bias, table, out_rows, rows_inside, columns,
                features, WIDTH, RUNS, TABLE, SCATTERED, HAS_BIAS,
            )  # fmt: skip


def _config(tile: roofline.Tile) -> triton.Config:
    kwargs = {
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_FEATURES": tile.features,
        "BLOCK_RESIDUAL": tile.residual,
        "SPLITS": tile.splits,
        "GROUP": GROUP,
    }
    return triton.Config(kwargs, num_warps=tile.warps, num_stages=tile.stages)


def _prune(configs: list[Any], named: dict[str, Any], **more: Any) -> list[Any]:
    """Leave of the configurations what the roofline predicts fastest for these arguments."""
    return [_config(tile) for tile in _choices({**named, **more})]


def _choices(arguments: dict[str, Any]) -> tuple[roofline.Tile, ...]:
    """The tiles to measure for a launch with these arguments."""
    x, runs, width = arguments["x"], arguments["RUNS"], arguments["WIDTH"]
    projection = roofline.Projection(
        tokens=arguments["bucket"],
        in_features=arguments["residual"] + arguments["size"],
        features=arguments["features"],
        basis_size=arguments["size"],
        dtype=x.dtype,
        spread=1.0 if arguments["TABLE"] else sum(end - begin for begin, end, _ in runs) / width,
        scattered=arguments["SCATTERED"],
        tf32=arguments["PRECISION"] == "tf32",
    )
    split = isinstance(arguments["tokens"], int)
    return candidates(projection, roofline.cuda_device(x.device.index), split)


@lru_cache(maxsize=4096)
def candidates(
    projection: roofline.Projection, device: roofline.Device, split: bool
) -> tuple[roofline.Tile, ...]:
    """The ``CANDIDATES`` tiles predicted fastest, best first; ``split``: sums may be split.

    A graph for any number of tokens does not split: what splitting takes, SPLITS float32 outputs,
    is little for the few tokens that it is meant for, and the graph might be called with many.
    """
    tiles = (prediction.tile for prediction in roofline.rank(projection, device))
    return tuple(tile for tile in tiles if split or tile.splits == 1)[:CANDIDATES]


_tuned = triton.autotune(
    configs=[_config(tile) for tile in roofline.ALL_TILES],
    key=["bucket", "features", "residual", "size", "SCATTERED", "PRECISION"],
    prune_configs_by={"early_config_prune": _prune},
    cache_results=True,
)(_basis_projection)


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, Any, Any, Any]:
    """x and how its tokens lie: token t at outer · (t // inner) + inner stride · (t % inner).

    Returns (x, outer stride, inner stride, inner size). Leading dimensions that are one run are
    taken together; two may be left, as in a slice of a padded sequence. x is copied where it has
    more.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true as known

    dims: list[tuple[Any, Any]] = []  # size, stride
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if known(size == 1):
            continue
        if dims and known(dims[-1][1] == size * stride):
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        x = x.contiguous()
        return x, 0, x.shape[-1], math.prod(x.shape[:-1])
    (_, outer), (inner, stride) = [(1, 0), (1, 0), *dims][-2:]
    return x, outer, stride, inner


def float32_precision() -> str:
    """What a float32 product may be computed in, by ``torch.backends.cuda.matmul``."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def bucket_of(tokens: int) -> int:
    """Token counts up to the next power of two are tuned together."""
    return 1 << max(tokens - 1, 0).bit_length()


@lru_cache(maxsize=256)
def _table(slots: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int32, device=device)


def project(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
    *,
    tile: roofline.Tile | None = None,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> torch.Tensor:
    """``bda_fx::basis_projection`` for float16, bfloat16 and float32, by the kernel above.

    Shapes and arguments are the operator's (basis_projection.py), and are not checked again.

    Args:
        tile: how to work; None measures the best one at the first call with like shapes (seconds,
            and not while a CUDA graph is being captured), and remembers it on disk.
        wrap: what makes of the kernel something to launch; ``torch.library.wrap_triton`` puts it
            into a graph that is being traced.
    """
    from torch.fx.experimental.symbolic_shapes import optimization_hint

    tokens = math.prod(x.shape[:-1])
    features, residual = coefficients.shape
    out = x.new_empty((*x.shape[:-1], features))
    if isinstance(tokens, int) and tokens * features == 0:  # a symbolic size is at least 2
        return out
    x, outer, stride, inner = rows_of(x)
    pattern = pattern_of(tuple(slots))
    arguments: dict[str, Any] = {
        "x": x,
        "coefficients": coefficients,
        "order": x if order is None else order.contiguous(),
        "bias": x if bias is None else bias.contiguous(),
        "table": _table(pattern.period, x.device) if pattern.by_table else x,
        "out": out,
        "tokens": tokens,
        "inner": inner,
        "features": features,
        "residual": residual,
        "size": size,
        "start": start if order is None else 0,
        "bucket": bucket_of(optimization_hint(tokens)),
        "x_outer": outer,
        "x_inner": stride,
        "x_feature": x.stride(-1),
        "c_feature": coefficients.stride(0),
        "c_residual": coefficients.stride(1),
        "WIDTH": len(pattern.period),
        "RUNS": () if pattern.by_table else pattern.runs,
        "TABLE": pattern.by_table,
        "SCATTERED": order is not None,
        "HAS_BIAS": bias is not None,
        "PRECISION": float32_precision() if x.dtype == torch.float32 else "ieee",
    }
    choices = _choices(arguments) if tile is None else (tile,)
    partials = arrivals = out
    splits = max(choice.splits for choice in choices)
    if splits > 1:
        partials = x.new_empty((splits, tokens, features), dtype=torch.float32)
        tiles = max(
            triton.cdiv(tokens, choice.tokens) * triton.cdiv(features, choice.features)
            for choice in choices
            if choice.splits > 1
        )
        arrivals = x.new_zeros((tiles,), dtype=torch.int32)

    def grid(meta: dict[str, Any]) -> tuple[Any, int]:
        tiles = triton.cdiv(tokens, meta["BLOCK_TOKENS"])
        return tiles * triton.cdiv(features, meta["BLOCK_FEATURES"]), meta["SPLITS"]

    kernel = wrap(_tuned if tile is None else _basis_projection)
    config = {} if tile is None else _config(tile).all_kwargs()
    kernel[grid](**arguments, partials=partials, arrivals=arrivals, **config)
    return out
