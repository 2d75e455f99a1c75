"""How long a basis projection takes on a GPU, by a roofline of its tiles. Imports torch alone.

    y = x_R Cᵀ + spread(x_B)      x [M, E], C [F, E - r], y [M, F]

A tile of the output, m tokens × f features, keeps a streaming multiprocessor (SM) busy for the
longest of what its units need, each working at the rate of the data sheet and all at the same time:

    arithmetic     2 m f K / (peak / SMs)                   K = E - r, in whole steps of the tile
    L2             (m (K + min(r, s f)) + f K) b / 64 B     s: share of outputs with a basis feature

in clock cycles (but the first), b bytes per number. 64 bytes per clock is what an SM reads from L2;
a basis feature that enters several heads of the tile is in L1 by then. Gathered features cost no
more of any unit: the load units take 32 addresses per clock, as many half-precision numbers as L2
sends. What they cost is registers, and so smaller tiles. The tiles run in ⌈tiles / SMs⌉ waves:

    seconds = launch + max(waves · max(arithmetic, L2), bytes / bandwidth)

where bytes counts x, C and y once. An original projection is the case r = 0, so that

    speed-up = seconds(r = 0) / seconds(r) ≤ 1 / (1 - r/E)

with either at its own best tile. What the model leaves out: latencies, how far units overlap,
clocks below the data sheet's under load. These fall on both sides alike as long as the bound is the
same; a prediction is therefore good for ratios and for choosing what to measure, not for absolute
times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch

L2_BYTES_PER_CLOCK = 64.0
"""What an SM reads from L2 each clock: its port, from A100 on (NVIDIA A100 whitepaper)."""

LAUNCH_SECONDS = 2e-6
"""From one kernel's end to the next one's work: about what a CUDA graph leaves of a launch."""

KIB = 1024


@dataclass(frozen=True)
class Device:
    """A GPU as its data sheet has it: dense rates, without sparsity, at boost clock."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float  # Hz
    half: float  # FLOP/s of tensor cores on float16 and bfloat16, accumulated in float32
    tf32: float  # FLOP/s
    float32: float  # FLOP/s of the ordinary units
    bandwidth: float  # bytes/s of device memory
    shared_memory: int  # bytes that one thread block may have

    def peak(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """FLOP/s of a matrix product of this dtype, accumulated in float32."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.half
        if dtype == torch.float32:
            return self.tf32 if tf32 else self.float32
        raise ValueError(f"no peak is known for {dtype}: expected float16, bfloat16 or float32")


DATA_SHEETS = (
    Device("A100", (8, 0), 108, 1.41e9, 312e12, 156e12, 19.5e12, 2.039e12, 163 * KIB),
    Device("H100", (9, 0), 132, 1.83e9, 989.4e12, 494.7e12, 66.9e12, 3.35e12, 227 * KIB),
    Device("H200", (9, 0), 132, 1.83e9, 989.4e12, 494.7e12, 66.9e12, 4.8e12, 227 * KIB),
    Device("B200", (10, 0), 148, 1.85e9, 2250e12, 1100e12, 80e12, 8.0e12, 227 * KIB),
    Device("RTX 5090", (12, 0), 170, 2.41e9, 209.5e12, 104.8e12, 104.8e12, 1.792e12, 99 * KIB),
)
"""SXM modules with 80 GB of A100 and H100; the consumer card stands for its generation."""


def data_sheet(name: str) -> Device:
    """The device of ``DATA_SHEETS`` that ``name``, as the driver spells it, belongs to."""
    for device in DATA_SHEETS:
        if device.name in name:
            return device
    known = ", ".join(device.name for device in DATA_SHEETS)
    raise ValueError(f"no data sheet for {name!r}; there are those of {known}")


@cache
def cuda_device(index: int) -> Device:
    """The CUDA device of that index: by its data sheet, or else scaled from its generation's.

    Rates scale with SMs and clock, bandwidth is what the driver says of the memory.
    """
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    try:
        known = data_sheet(properties.name)
    except ValueError:
        older = [device for device in DATA_SHEETS if device.capability <= capability]
        known = older[-1] if older else DATA_SHEETS[0]
    clock = 1e3 * getattr(properties, "clock_rate", 0) or known.clock
    if known.name in properties.name and known.multiprocessors == properties.multi_processor_count:
        return known
    scale = properties.multi_processor_count * clock / (known.multiprocessors * known.clock)
    # Two transfers a clock, bits to bytes; the clock is in kHz.
    bandwidth = properties.memory_clock_rate * 1e3 * 2 * properties.memory_bus_width / 8
    shared = getattr(properties, "shared_memory_per_block_optin", known.shared_memory)
    return replace(
        known,
        name=properties.name,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
        clock=clock,
        half=known.half * scale,
        tf32=known.tf32 * scale,
        float32=known.float32 * scale,
        bandwidth=bandwidth or known.bandwidth,
        shared_memory=shared,
    )


@dataclass(frozen=True)
class Projection:
    """One basis projection: x [tokens, in_features] onto ``features`` outputs.

    ``basis_size`` 0 is an original projection. ``spread`` is the share of output features that a
    basis feature enters; ``scattered`` a basis that is no window, whose features are gathered.
    """

    tokens: int
    in_features: int
    features: int
    basis_size: int
    dtype: torch.dtype
    spread: float = 1.0
    scattered: bool = False
    tf32: bool = False

    @property
    def residual(self) -> int:
        return self.in_features - self.basis_size

    @property
    def gathers(self) -> bool:
        return self.scattered and self.basis_size > 0

    @property
    def original(self) -> Projection:
        return replace(self, basis_size=0, scattered=False)

    @property
    def limit(self) -> float:
        """What the speed-up cannot exceed: the ratio of multiplications."""
        return self.in_features / self.residual if self.residual else math.inf


@dataclass(frozen=True)
class Tile:
    """How one thread block works: its share of the output, and steps of ``residual`` features.

    ``splits`` thread blocks share one tile of the output, each with its part of the features.
    """

    tokens: int
    features: int
    residual: int
    stages: int
    warps: int
    splits: int = 1

    def shared_memory(self, itemsize: int) -> int:
        """Bytes: ``stages`` steps of both operands are on their way at once."""
        return self.stages * (self.tokens + self.features) * self.residual * itemsize

    def held(self, scattered: bool) -> float:
        """Numbers that a thread holds in registers: sums, and features that it gathers ahead."""
        ahead = self.tokens * self.residual if scattered else 0
        return (self.tokens * self.features + ahead) / (32 * self.warps)


TENSOR_CORE_TILES = (
    Tile(128, 256, 64, 3, 8),
    Tile(256, 128, 64, 3, 8),
    Tile(128, 256, 32, 3, 8),
    Tile(128, 128, 64, 3, 8),
    Tile(128, 128, 64, 3, 4),
    Tile(128, 128, 32, 4, 8),
    Tile(128, 128, 32, 4, 4),
    Tile(128, 64, 64, 3, 4),
    Tile(128, 64, 32, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 128, 32, 4, 4),
    Tile(64, 256, 32, 4, 8),
    Tile(64, 64, 32, 5, 4),
    Tile(64, 32, 64, 5, 4),
    Tile(32, 128, 64, 4, 4),
    Tile(32, 64, 64, 5, 4),
    Tile(16, 128, 64, 5, 4),
    Tile(16, 64, 128, 4, 4),
    Tile(16, 32, 128, 5, 2),
)
"""For float16 and bfloat16."""

ORDINARY_TILES = (
    Tile(128, 64, 16, 3, 8),
    Tile(64, 128, 16, 3, 8),
    Tile(64, 64, 16, 3, 4),
    Tile(64, 64, 32, 2, 8),
    Tile(32, 64, 32, 3, 4),
    Tile(32, 32, 32, 3, 4),
    Tile(16, 64, 32, 3, 4),
    Tile(16, 32, 64, 3, 2),
)
"""For float32 without tf32: the operands pass through registers, which bounds the tile."""

TF32_TILES = tuple(replace(tile, residual=tile.residual // 2) for tile in TENSOR_CORE_TILES)
"""The same with half the step, as the operands are twice the size."""

SPLITS = (1, 2, 4, 8)
ALL_TILES = tuple(
    replace(tile, splits=splits)
    for tile in dict.fromkeys(TENSOR_CORE_TILES + TF32_TILES + ORDINARY_TILES)
    for splits in SPLITS
)
SPLIT_TOKENS = 256
"""Most tokens with which a sum is split: beyond, the tiles of one wave fill any device."""


HELD, HELD_WIDE, HELD_APART = 128, 80, 64
"""Most numbers that a thread may hold of its 255 registers: the second where it gathers (their
addresses take two registers each) or multiplies float32 (operands take twice the registers); the
third where sums lie apart and come all at once, from tensor memory (capability 10) or, of the other
splits, from L2. With more the compiler spills; with these it does not (``make compile-gpu``)."""


def tiles(projection: Projection, device: Device) -> tuple[Tile, ...]:
    """Tiles to choose from: those that fit the device, split where a wave would be half empty."""
    itemsize = projection.dtype.itemsize
    shapes: tuple[Tile, ...] = TENSOR_CORE_TILES if itemsize == 2 else ORDINARY_TILES
    if projection.tf32 and itemsize == 4:
        shapes = TF32_TILES
    held = HELD_WIDE if projection.gathers or itemsize > 2 else HELD
    sums = HELD_APART if device.capability[0] == 10 else HELD
    shapes = tuple(
        tile
        for tile in shapes
        if tile.shared_memory(itemsize) <= device.shared_memory
        and tile.held(projection.gathers) <= held
        and tile.held(False) <= sums
    )
    return tuple(
        replace(tile, splits=splits)
        for tile in shapes
        for splits in SPLITS
        if splits == 1
        or (
            projection.tokens <= SPLIT_TOKENS
            and 2 * _count(projection, tile) <= device.multiprocessors
            and splits * tile.residual <= projection.residual
            and tile.held(projection.gathers) <= HELD_APART
        )
    )


@dataclass(frozen=True)
class Prediction:
    seconds: float
    work: float  # seconds of all units one after the other
    bound: str  # "arithmetic", "L2" or "memory"
    tile: Tile


def predict_tile(projection: Projection, device: Device, tile: Tile) -> Prediction:
    """The time with this tile, and what bounds it."""
    p, itemsize = projection, projection.dtype.itemsize
    spread = p.spread if p.basis_size else 0.0
    steps = math.ceil(math.ceil(p.residual / tile.residual) / tile.splits)
    residual = steps * tile.residual
    outputs = tile.tokens * tile.features
    flops_per_clock = device.peak(p.dtype, p.tf32) / device.multiprocessors / device.clock
    partial_bytes = 4 * outputs if tile.splits > 1 else 0  # float32, read by the last block
    entering = min(p.basis_size, spread * tile.features) / tile.splits
    moved = tile.tokens * (residual + entering) + tile.features * residual
    clocks = {
        "arithmetic": 2 * outputs * residual / flops_per_clock,
        "L2": (moved * itemsize + partial_bytes) / L2_BYTES_PER_CLOCK,
    }
    waves = math.ceil(_count(p, tile) * tile.splits / device.multiprocessors)
    moved_once = p.tokens * (p.in_features + p.features) + p.features * p.residual
    seconds = {name: waves * count / device.clock for name, count in clocks.items()}
    seconds["memory"] = moved_once * itemsize / device.bandwidth
    bound = max(seconds, key=lambda name: seconds[name])
    return Prediction(LAUNCH_SECONDS + seconds[bound], sum(seconds.values()), bound, tile)


def rank(projection: Projection, device: Device) -> list[Prediction]:
    """All tiles to choose from, fastest first; of equals, the one that leaves units idle."""
    predictions = (predict_tile(projection, device, tile) for tile in tiles(projection, device))
    return sorted(predictions, key=lambda prediction: (prediction.seconds, prediction.work))


def predict(projection: Projection, device: Device) -> Prediction:
    """The time with the best tile: what ``profitability="model"`` compares.

    An original projection is ``projection.original``. Nothing is measured or compiled.
    """
    return rank(projection, device)[0]


def predict_speedup(projection: Projection, device: Device) -> float:
    """Time of the original projection over that of the basis projection, each at its best tile."""
    return predict(projection.original, device).seconds / predict(projection, device).seconds


def _count(projection: Projection, tile: Tile) -> int:
    return math.ceil(projection.tokens / tile.tokens) * math.ceil(
        projection.features / tile.features
    )
