"""Write what a benchmark measured: a table, the numbers with where they come from, and a plot.

``results/NAME.md`` is for readers, ``NAME.json`` for programs, ``NAME.svg`` is drawn from what the
JSON holds. A quick run goes the same way and leaves no file.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bda_fx.circumstances import has_amx

RESULTS = Path(__file__).resolve().parent / "results"


def provenance(seed: int | None = None, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Where figures come from: machine, threads, versions (torch's always) and the seed."""
    capability = torch.backends.cpu.get_cpu_capability() + (", AMX" if has_amx() else "")
    record: dict[str, Any] = {
        "device": f"cpu ({platform.machine()}, {os.cpu_count()} cores, {capability})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", *packages)},
    }
    return record if seed is None else {**record, "seed": seed}


def of_this_cpu(name: str) -> str:
    """Name of a table of which there is one for each kind of CPU: with and without such a unit."""
    return f"{name}_amx" if has_amx() else name


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def heading(script: str, origin: dict[str, Any]) -> str:
    """The line that opens a results page."""
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    seed = f", seed {origin['seed']}" if "seed" in origin else ""
    threads = f"{origin['threads']} thread{'s' if origin['threads'] > 1 else ''}"
    return f"Written by `benchmarks/{script}`: {origin['device']}, {threads}, {versions}{seed}."


def write(
    name: str,
    text: str,
    record: dict[str, Any],
    draw: Callable[[Any], None] | None = None,
    *,
    quick: bool = False,
) -> None:
    """Print ``text`` and write it, ``record`` and what ``draw`` puts on a matplotlib ``Figure``."""
    print(text, flush=True)
    numbers = json.dumps(_plain(record), indent=1, allow_nan=False) + "\n"
    picture = None if draw is None else svg(draw)
    if quick:
        return
    RESULTS.mkdir(exist_ok=True)
    if picture is not None:
        (RESULTS / f"{name}.svg").write_text(picture)
        text += f"\n![{name}]({name}.svg)\n"
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(numbers)


def svg(draw: Callable[[Any], None]) -> str:
    """The drawing as SVG, the same text for the same numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "bda-fx", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(layout="constrained")
    draw(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def label_loglog(ax: Any, sizes: Sequence[int], x: str, y: str) -> None:
    """Labels of a log-log plot over ``sizes``, each of which is a tick."""
    ax.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    ax.minorticks_off()
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _plain(value: Any) -> Any:
    """JSON has no inf and no nan: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
