"""Tests that need a GPU: skipped, with the reason, where there is none."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch


def reason_to_skip() -> str | None:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "no CUDA device is available" if built else "this torch is built without CUDA"
    if torch.version.hip is not None:
        return "the kernel is written for NVIDIA GPUs, and this is ROCm"
    if torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        return f"{name} is older than Ampere (capability 8.0), which the kernel is written for"
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'bda-fx[gpu]'"
    return None


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if reason := reason_to_skip():
        pytest.skip(reason)
