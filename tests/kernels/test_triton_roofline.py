"""The roofline model: its limits, what it leaves to choose from, and what it promises."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bda_fx.kernels import roofline
from bda_fx.kernels.roofline import (
    DATA_SHEETS,
    LAUNCH_SECONDS,
    Device,
    Projection,
    data_sheet,
    predict,
    predict_speedup,
    predict_tile,
    rank,
    tiles,
)

A100, H100 = data_sheet("A100"), data_sheet("H100")
V2_LITE = Projection(4096, 512, 4096, 128, torch.bfloat16)
SHAPES = {
    "DeepSeek-V2-Lite": (512, 4096, 128),
    "DeepSeek-V3": (512, 32768, 128),
    "GLM, K": (512, 64 * 192, 192),
    "GLM, V": (512, 64 * 256, 256),
    "MiniCPM3": (256, 5120, 64),
}
devices = pytest.mark.parametrize("device", DATA_SHEETS, ids=lambda device: device.name)


def test_data_sheets() -> None:
    """Peaks are SMs × clock × a power of two per clock, as the data sheets derive them."""
    for device in DATA_SHEETS:
        per_clock = device.half / device.multiprocessors / device.clock
        assert math.log2(per_clock) == pytest.approx(round(math.log2(per_clock)), abs=0.02)
    assert data_sheet("NVIDIA H100 80GB HBM3") is H100
    with pytest.raises(ValueError, match=r"no data sheet for 'Voodoo 2'.*A100, H100"):
        data_sheet("Voodoo 2")
    with pytest.raises(ValueError, match=r"no peak is known for torch.float64: expected float16"):
        H100.peak(torch.float64)


@pytest.mark.parametrize("tokens", [4096, 16384])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_close_to_the_limit_where_memory_does_not_bound(
    shape: tuple[int, int, int], tokens: int
) -> None:
    """Whole kernels, launch and waves and all, on an A100: 95 % of 1 / (1 - r/E)."""
    projection = Projection(tokens, *shape, torch.bfloat16)
    assert predict(projection.original, A100).bound != "memory"
    speedup = predict_speedup(projection, A100)
    assert 0.95 * projection.limit <= speedup <= projection.limit


@devices
@pytest.mark.parametrize("tokens", [1, 16, 256, 4096])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nothing_beats_the_units(shape: tuple[int, int, int], tokens: int, device: Device) -> None:
    projection = Projection(tokens, *shape, torch.bfloat16)
    in_features, features, _ = shape
    flops = 2 * tokens * projection.residual * features
    moved = 2 * (tokens * (in_features + features) + features * projection.residual)
    seconds = predict(projection, device).seconds
    assert seconds >= LAUNCH_SECONDS + flops / device.half
    assert seconds >= LAUNCH_SECONDS + moved / device.bandwidth
    assert predict_speedup(projection, device) <= projection.limit


def test_a_wave_is_whole() -> None:
    slow = replace(V2_LITE, dtype=torch.float32)
    tile = tiles(slow, A100)[0]
    full = replace(slow, tokens=tile.tokens, features=A100.multiprocessors * tile.features)
    more = replace(full, features=full.features + 1)
    once, twice = (predict_tile(p, A100, tile).seconds - LAUNCH_SECONDS for p in (full, more))
    assert twice == pytest.approx(2 * once)


@devices
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [(torch.float16, False), (torch.float32, True), (torch.float32, False)],
)
def test_tiles_fit(device: Device, scattered: bool, dtype: torch.dtype, tf32: bool) -> None:
    for tokens in (1, 4096):
        projection = replace(V2_LITE, tokens=tokens, dtype=dtype, scattered=scattered, tf32=tf32)
        choices = tiles(projection, device)
        assert set(choices) <= set(roofline.ALL_TILES)
        assert all(tile.shared_memory(dtype.itemsize) <= device.shared_memory for tile in choices)
        assert (max(tile.splits for tile in choices) > 1) == (tokens == 1)


def test_what_bounds() -> None:
    assert predict(V2_LITE, A100).bound == "arithmetic"
    assert predict(replace(V2_LITE, tokens=1), A100).bound == "memory"
    assert predict_tile(V2_LITE, H100, roofline.Tile(64, 64, 32, 5, 4)).bound == "L2"
    scattered = replace(V2_LITE, scattered=True)  # smaller tiles: more of L2
    assert predict(scattered, H100).seconds > predict(V2_LITE, H100).seconds
    assert rank(V2_LITE, A100)[0] == predict(V2_LITE, A100)


def test_no_projection_left_is_a_copy() -> None:
    whole = Projection(4096, 128, 128, 128, torch.bfloat16)
    assert whole.limit == math.inf
    moved = 2 * 4096 * 256
    assert predict(whole, A100).seconds == pytest.approx(
        LAUNCH_SECONDS + moved / A100.bandwidth, rel=0.01
    )


def test_float32_needs_leave_for_tf32() -> None:
    slow = replace(V2_LITE, dtype=torch.float32)
    assert predict(slow, A100).seconds > 4 * predict(replace(slow, tf32=True), A100).seconds


def test_other_devices_are_scaled_from_their_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(**changes: object) -> SimpleNamespace:
        return SimpleNamespace(
            **{
                "name": "NVIDIA L4", "major": 8, "minor": 9, "multi_processor_count": 54,
                "clock_rate": 1_410_000, "memory_clock_rate": 6_251_000, "memory_bus_width": 192,
                "shared_memory_per_block_optin": 99 * 1024, **changes,
            }
        )  # fmt: skip

    known = {
        0: properties(),
        1: properties(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132),
    }
    monkeypatch.setattr(torch.cuda, "get_device_properties", known.__getitem__)
    roofline.cuda_device.cache_clear()
    try:
        device = roofline.cuda_device(0)
        assert device.half == pytest.approx(A100.half / 2)
        assert device.bandwidth == pytest.approx(300e9, rel=0.01)
        assert (device.name, device.shared_memory) == ("NVIDIA L4", 99 * 1024)
        assert roofline.cuda_device(1) is H100
    finally:
        roofline.cuda_device.cache_clear()
