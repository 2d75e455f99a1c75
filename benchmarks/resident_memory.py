"""Memory of this process that is resident (Linux)."""

from __future__ import annotations

from pathlib import Path


def forget_peak() -> None:
    """The peak begins at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mib(kind: str) -> float:
    """Resident now ("VmRSS") or at most ("VmHWM"). Not ``ru_maxrss``: that of a child begins at
    what its parent has."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) / 2**10
