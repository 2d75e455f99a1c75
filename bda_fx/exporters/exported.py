"""What an export returns, and the evidence that it writes beside the artefact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bda_fx.fidelity_report import Fidelity
from bda_fx.report import Report


class ExportError(RuntimeError):
    """An export that could not be made, or whose proof failed. No file is left behind.

    The text is one line: what is wrong and what to do. ``fidelity`` is the failed proof, if that
    is what failed.
    """

    def __init__(self, text: str, fidelity: Fidelity | None = None) -> None:
        super().__init__(text)
        self.fidelity = fidelity


def root_cause(error: BaseException) -> str:
    """The first line of the error that started it all: compilers wrap theirs several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Timing:
    """Latency of one call, original and rewritten model in turns.

    Attributes:
        name: what was timed: the shapes of the inputs, or the weight of a single site.
        original_ms, rewritten_ms: medians, in milliseconds.
        speedup: median over the pairs of original time / rewritten time: above 1 is faster.
        interval: 95 % confidence interval of that median.
        pairs: how many.
    """

    name: str
    original_ms: float
    rewritten_ms: float
    speedup: float
    interval: tuple[float, float]
    pairs: int


@dataclass(frozen=True)
class Exported:
    """An artefact, and what is known of it.

    Attributes:
        path: the artefact; ``files`` are all that was written: external data and the evidence too.
        target: "onnx", "tensorrt" or "aoti".
        report: of the rewrite, as ``bda_fx.rewrite`` gives it.
        fidelity: error of the artefact in units of the error that the original has in the same
            runtime; None where it was not or could not be run, and ``fidelity_reason`` says why.
        bytes_before, bytes_after: bytes of weights in the artefact of the original and of the
            rewritten model, as measured there; ``bytes_before`` is None where no artefact of the
            original was made.
        file_bytes: size of all files of the artefact (without the evidence).
        timings: latencies in the runtime, where they were measured.
        site_timings: those of single sites; who was slower keeps its original form.
        identity: hash of the weights, versions, options and the command: how to make it again.
        details: what else the exporter found out, by name.
    """

    path: Path
    files: tuple[Path, ...]
    target: str
    report: Report
    fidelity: Fidelity | None
    bytes_before: int | None
    bytes_after: int
    file_bytes: int
    fidelity_reason: str | None = None
    timings: tuple[Timing, ...] = ()
    site_timings: tuple[Timing, ...] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes_saved(self) -> int | None:
        return None if self.bytes_before is None else self.bytes_before - self.bytes_after

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``. Paths are names: the evidence lies beside them."""
        return {
            "artefact": self.path.name,
            "files": [file.name for file in self.files],
            "target": self.target,
            "identity": dict(self.identity),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_saved": self.bytes_saved,
            "file_bytes": self.file_bytes,
            "noise_ratio": None if self.fidelity is None else self.fidelity.noise_ratio,
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
            "fidelity_reason": self.fidelity_reason,
            "timings": [asdict(t) for t in self.timings],
            "site_timings": [asdict(t) for t in self.site_timings],
            "details": dict(self.details),
            "report": self.report.to_dict(),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, default=str) + "\n"

    def to_markdown(self) -> str:
        """Sizes, proof, latencies, the sites, and how to make the artefact again."""
        lines = [f"# {self.path.name}", "", self._sizes(), ""]
        if self.fidelity is not None:
            lines += ["## Noise", "", self.fidelity.to_markdown(), ""]
        else:
            lines += ["## Noise", "", f"Not measured: {self.fidelity_reason}.", ""]
        for title, timings in (("Latency", self.timings), ("Single sites", self.site_timings)):
            if timings:
                lines += [f"## {title}", "", *_timing_table(timings), ""]
        lines += ["## Rewrite", "", self.report.to_markdown(), "", "## Identity", ""]
        lines += [f"- {name}: {_text(value)}" for name, value in self.identity.items()]
        if self.details:
            lines += ["", "## Details", ""]
            lines += [f"- {name}: {_text(value)}" for name, value in self.details.items()]
        return "\n".join(lines) + "\n"

    def _sizes(self) -> str:
        text = f"{self.target}: {self.file_bytes:,} bytes, weights {self.bytes_after:,}"
        if self.bytes_before is not None and self.bytes_saved is not None:
            saved = 100 * self.bytes_saved / self.bytes_before if self.bytes_before else 0.0
            text += f" of {self.bytes_before:,} in the original ({self.bytes_saved:,}, {saved:.2f} % less)"  # noqa: E501
        return text + "."

    def __str__(self) -> str:
        lines = [f"{self.path}: {self._sizes()}", self.report.summary()]
        lines.append(str(self.fidelity) if self.fidelity else f"noise: {self.fidelity_reason}")
        for t in self.timings:
            low, high = t.interval
            lines.append(
                f"{t.name}: {t.original_ms:.3g} → {t.rewritten_ms:.3g} ms, "
                f"{t.speedup:.2f} × ({low:.2f} … {high:.2f})"
            )
        return "\n".join(lines)


def _timing_table(timings: tuple[Timing, ...]) -> list[str]:
    rows = ["| what | original ms | rewritten ms | speedup | 95 % interval |", "|---" * 5 + "|"]
    return rows + [
        f"| {t.name} | {t.original_ms:.3f} | {t.rewritten_ms:.3f} | {t.speedup:.2f} "
        f"| {t.interval[0]:.2f} … {t.interval[1]:.2f} |"
        for t in timings
    ]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return f"`{value}`" if isinstance(value, str) else str(value)
