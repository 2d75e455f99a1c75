"""What results that outlive a process depend on: device, versions and sources."""

from __future__ import annotations

import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bda_fx.kernels.source_key import hash_sources, kernel_source_key


def circumstances(device: torch.device) -> tuple[object, ...]:
    """What a time depends on besides the shape: the device and what it can do, threads, the
    versions of torch and bda_fx, the kernels' sources."""
    try:
        own = version("bda-fx")
    except PackageNotFoundError:
        own = ""
    if device.type == "cuda":
        name: object = torch.cuda.get_device_properties(device)
    else:
        capabilities = sorted(torch.cpu.get_capabilities().items())
        name = (platform.machine(), _processor(), repr(capabilities), os.cpu_count())
    return (
        device.type,
        str(name),
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled if hasattr(torch.backends.mkldnn, "enabled") else None,
        torch.__version__,
        own,
        kernel_source_key(),
    )


def has_amx() -> bool:
    """Whether the CPU has a unit for matrices of bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@functools.cache
def package_source_key() -> str:
    """Changes with any source file of the package: of an installation that is being worked on, the
    version says little."""
    return hash_sources(Path(__file__).parent)


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())
