"""The Triton kernel as compiled for GPUs that are not here: what the tuner would measure first."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from bda_fx.kernels.roofline import Device, Projection, Tile, rank
from tests.kernels.compile_triton import (
    REGISTERS,
    TARGETS,
    TENSOR_MEMORY,
    Compiled,
    compile_for,
)

V2_LITE = Projection(4096, 512, 4096, 128, torch.bfloat16)
PRODUCT = {"A100": "mma.sync", "H100": "wgmma.mma_async", "B200": "tcgen05.mma"}
targets = pytest.mark.parametrize("device", TARGETS, ids=lambda device: device.name)


def compiled(device: Device, projection: Projection, **more: Any) -> Compiled:
    return compile_for(device, projection, rank(projection, device)[0].tile, **more)


def assert_within_limits(kernel: Compiled, projection: Projection, device: Device) -> None:
    assert kernel.stack == 0  # nothing is spilled
    assert kernel.registers <= REGISTERS
    assert kernel.registers * 32 * kernel.tile.warps <= 65536
    assert kernel.shared_memory <= device.shared_memory
    # The model of shared memory by which tiles are left out is not below what they take, but for
    # the barriers of tensor memory.
    modelled = kernel.tile.shared_memory(projection.dtype.itemsize)
    assert kernel.shared_memory <= max(modelled, 4 * kernel.tile.tokens * kernel.tile.features) + 64
    assert kernel.tensor_memory <= TENSOR_MEMORY


@targets
@pytest.mark.parametrize(
    "projection",
    [V2_LITE, replace(V2_LITE, scattered=True), replace(V2_LITE, dtype=torch.float32, tf32=True)],
    ids=["window", "scattered", "tf32"],
)
def test_tensor_cores_and_no_spills(device: Device, projection: Projection) -> None:
    kernel = compiled(device, projection)
    assert kernel.products == {PRODUCT[device.name]}
    assert_within_limits(kernel, projection, device)
    # Coefficients come asynchronously, 16 bytes at a time, as does x where the basis is a window.
    assert kernel.count(r"cp\.async\.cg\.shared\.global") > 0
    narrow = kernel.count(r"ld\.global\.b16")
    assert (narrow > kernel.tile.tokens * kernel.tile.residual / (32 * kernel.tile.warps)) == (
        projection.scattered
    )
    if projection.dtype == torch.bfloat16:
        assert kernel.count(r"cvt\.rn\.bf16") > 0  # rounded to nearest
        assert kernel.count(r"st\.global\.v4\.b32") > 0


@targets
def test_split_sums_are_in_order(device: Device) -> None:
    """Partial sums, barrier, arrival (release and acquire), barrier, partial sums from L2."""
    projection = replace(V2_LITE, tokens=16, dtype=torch.float16)
    tile = next(p.tile for p in rank(projection, device) if p.tile.splits == 4)
    kernel = compile_for(device, projection, tile)
    assert_within_limits(kernel, projection, device)
    assert kernel.products
    arrival = re.search(r"atom\.global\.gpu\.acq_rel\.add\.u32", kernel.ptx)
    assert arrival, re.findall(r"atom\.\S+", kernel.ptx)
    before, after = kernel.ptx[: arrival.start()], kernel.ptx[arrival.end() :]
    written = before.rindex("st.global")
    assert "bar.sync" in before[written:]
    read = after.index("ld.global.cg")
    assert "bar.sync" in after[:read]


@targets
def test_float32_is_not_rounded_to_tf32(device: Device) -> None:
    projection = replace(V2_LITE, dtype=torch.float32)
    kernel = compiled(device, projection)
    assert not kernel.products
    assert "tf32" not in re.sub(r"//.*", "", kernel.ptx)
    assert_within_limits(kernel, projection, device)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
def test_nothing_aligned_and_sizes_of_one(scattered: bool, table: bool) -> None:
    """Arguments that are 1 are constants to the compiler, and no tensors."""
    projection = replace(V2_LITE, scattered=scattered)
    tile = Tile(16, 32, 64, 3, 2, splits=1 + table)
    ones = ("inner", "features", "residual", "size", "x_outer", "x_inner", "c_feature")
    if not scattered:  # where it is, ``start`` is 0
        ones += ("start",)
    kernel = compile_for(TARGETS[0], projection, tile, ones=ones, aligned=False, table=table)
    assert kernel.products
    assert_within_limits(kernel, projection, TARGETS[0])
