"""Timings that outlive a process, one JSON file for each device, thread count and version.

    TORCHINDUCTOR_CACHE_DIR / bda_fx / timings-KEY.json

KEY is a hash of what a time depends on besides the shape: the device and what it can do, threads,
the versions of torch and bda_fx, the kernels' sources. Processes share the file: it is
merged under a lock and replaced in one step. A file that cannot be read or written is as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from typing import Any

import torch

from bda_fx.circumstances import circumstances
from bda_fx.kept_files import kept_files, replacing

log = logging.getLogger("bda_fx")
FORMAT = 1


class TimingCache:
    """Seconds by name, under keys that describe a shape."""

    def __init__(self, device: torch.device) -> None:
        key = hashlib.sha256(repr((FORMAT, *circumstances(device))).encode()).hexdigest()[:32]
        self.path = kept_files() / f"timings-{key}.json"
        self.known = self._read()

    def get(self, key: str) -> dict[str, float] | None:
        return self.known.get(key)

    def put(self, key: str, seconds: dict[str, float]) -> None:
        """Keep this, unless another process was first: so that all of them come to one choice."""
        from torch.utils._filelock import FileLock

        self.known[key] = seconds
        names = set(seconds)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(str(self.path.with_suffix(".lock"))):
                held = self._read()
                if set(held.get(key, ())) != names:
                    held[key] = seconds
                self.known = {**self.known, **held}
                text = json.dumps({"format": FORMAT, "seconds": self.known}, indent=1)
                with replacing(self.path) as beside:
                    beside.write_text(text)
        except OSError as error:
            log.debug("bda_fx: timings are not kept: %s", error)

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            held: Any = json.loads(self.path.read_text())
            if held["format"] != FORMAT:
                return {}
            return {str(key): _checked(times) for key, times in held["seconds"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.debug("bda_fx: %s is ignored: %r", self.path, error)
            return {}


def _checked(times: Any) -> dict[str, float]:
    checked = {str(name): float(seconds) for name, seconds in times.items()}
    if not checked or not all(math.isfinite(t) and t > 0 for t in checked.values()):
        raise ValueError(f"no times: {times}")
    return checked
