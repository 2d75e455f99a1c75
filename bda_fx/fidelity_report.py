"""What ``verify`` found, as frozen data, text and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class OutputFidelity:
    """One tensor output, over all inputs and the positions that count.

    Attributes:
        name: "output" and its place among the tensor outputs.
        dtype: of the output.
        error_reference, error_candidate: relative RMS distance to the truth.
        noise_ratio: ``error_candidate / error_reference``.
        max_abs: largest absolute difference between reference and candidate.
        top1_agreement: share of equal argmaxes over the last dimension, for logits; else None.
        passed: the candidate's error is within the budget, or below unit roundoff.
        noise_interval: 95 % confidence interval of ``noise_ratio`` over inputs, or over the rows
            of a single batch, widened by ``truth_error``; None where there is one sample.
        truth_error: estimated relative RMS error of a float32 truth; None for a float64 truth.
        kl_divergence: mean KL(reference ‖ candidate) per position in nats, for logits; else None.
        cosine_mean, cosine_worst: cosine of reference and candidate along the last dimension, for
            outputs of two or more dimensions that are not said to be logits; else None.
        not_finite: values that are inf or nan in the reference. They are not compared.
    """

    name: str
    dtype: str
    error_reference: float
    error_candidate: float
    noise_ratio: float
    max_abs: float
    top1_agreement: float | None
    passed: bool
    noise_interval: tuple[float, float] | None = None
    truth_error: float | None = None
    kl_divergence: float | None = None
    cosine_mean: float | None = None
    cosine_worst: float | None = None
    not_finite: int = 0


@dataclass(frozen=True)
class LayerFidelity:
    """A tensor that leaves a module, in the order of execution; errors as in ``OutputFidelity``.

    ``module`` is the path of the innermost module that makes it ("" for the model itself), with
    "@1", "@2" … at later calls of the same module. ``products`` are the attention products that the
    tensor is the first to show: "qk" or "vo" and the name of a weight.
    """

    module: str
    error_reference: float
    error_candidate: float
    noise_ratio: float
    passed: bool
    products: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fidelity:
    """All outputs, and whether each is within ``budget`` times the reference's own error.

    Attributes:
        outputs: one entry per floating-point output.
        budget: largest noise ratio that passes.
        inputs: "given", or "generated" from the program's signature, which is weaker evidence.
        num_inputs: how many inputs (batches) the figures are pooled over.
        truth: dtype of the truth, "float64" or "float32".
        truth_reason: why not float64; else None.
        layers: where the noise arises, from the first module to the last; None where that was not
            looked into, and ``layers_reason`` says why.
    """

    outputs: tuple[OutputFidelity, ...]
    budget: float
    inputs: str = "given"
    num_inputs: int = 1
    truth: str = "float64"
    truth_reason: str | None = None
    layers: tuple[LayerFidelity, ...] | None = None
    layers_reason: str | None = None

    @property
    def passed(self) -> bool:
        return all(o.passed for o in self.outputs)

    @property
    def noise_ratio(self) -> float:
        """The largest ratio over the outputs."""
        return max((o.noise_ratio for o in self.outputs), default=1.0)

    @property
    def first_jump(self) -> LayerFidelity | None:
        """The first tensor between modules whose noise ratio is over the budget."""
        return next((layer for layer in self.layers or () if not layer.passed), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "passed": self.passed,
            "noise_ratio": self.noise_ratio,
            **asdict(self),
            "first_jump": asdict(self.first_jump) if self.first_jump else None,
        }

    def to_markdown(self) -> str:
        """A summary, a table of outputs, and one of layers where there is one."""
        header = ("output", "dtype", "error", "reference's own", "ratio", "95 % interval",
                  "max abs", "top-1", "KL", "worst cosine", "passed")  # fmt: skip
        rows = [
            (
                o.name,
                o.dtype,
                f"{o.error_candidate:.2e}",
                f"{o.error_reference:.2e}",
                f"{o.noise_ratio:.2f}",
                _interval(o.noise_interval),
                f"{o.max_abs:.2e}",
                "" if o.top1_agreement is None else f"{100 * o.top1_agreement:.2f} %",
                "" if o.kl_divergence is None else f"{o.kl_divergence:.1e}",
                "" if o.cosine_worst is None else f"{o.cosine_worst:.8f}",
                "yes" if o.passed else "**no**",
            )
            for o in self.outputs
        ]
        notes = [f"- {note}" for note in self._notes()]
        lines = [self._verdict(), *([""] if notes else []), *notes, "", *_table(header, rows)]
        if self.layers:
            layers = [
                (
                    f"`{layer.module}`" if layer.module else "the model",
                    f"{layer.error_candidate:.2e}",
                    f"{layer.error_reference:.2e}",
                    f"{layer.noise_ratio:.2f}" if layer.passed else f"**{layer.noise_ratio:.2f}**",
                    ", ".join(layer.products),
                )
                for layer in self.layers
            ]
            lines += ["", *_table(("module", "error", "reference's own", "ratio", "shows"), layers)]
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [self._verdict()]
        for o in self.outputs:
            line = (
                f"  {o.name} {o.dtype}: error {o.error_candidate:.2e}, "
                f"reference {o.error_reference:.2e}, ratio {o.noise_ratio:.2f}"
            )
            if o.noise_interval is not None:
                line += f" ({_interval(o.noise_interval)})"
            line += f", max |difference| {o.max_abs:.2e}"
            if o.top1_agreement is not None:
                line += f", top-1 agreement {100 * o.top1_agreement:.1f} %"
            if o.kl_divergence is not None:
                line += f", KL {o.kl_divergence:.1e}"
            if o.cosine_worst is not None:
                line += f", worst cosine {o.cosine_worst:.8f}"
            lines.append(line + ("" if o.passed else "  ← fails"))
        return "\n".join([*lines, *(f"  {note}" for note in self._notes())])

    def _verdict(self) -> str:
        return f"{'equivalent' if self.passed else 'NOT EQUIVALENT'} (budget {self.budget:g})"

    def _notes(self) -> list[str]:
        notes = []
        if self.inputs == "generated":
            notes.append(
                f"on {self.num_inputs} inputs generated from the signature: real ones tell more"
            )
        elif self.num_inputs > 1:
            notes.append(f"pooled over {self.num_inputs} inputs")
        if self.truth_reason is not None:
            worst = max((o.truth_error or 0.0 for o in self.outputs), default=0.0)
            notes.append(
                f"against {self.truth}, itself off by about {worst:.1e}: {self.truth_reason}"
            )
        notes += [
            f"{o.name}: {o.not_finite} values are not finite in the reference and not compared"
            for o in self.outputs
            if o.not_finite
        ]
        jump = self.first_jump
        if jump is not None:
            behind = f", behind {' and '.join(jump.products)}" if jump.products else ""
            notes.append(
                f"first beyond the budget: {jump.module or 'the model'} "
                f"(ratio {jump.noise_ratio:.2f}){behind}"
            )
        elif self.layers is None and not self.passed and self.layers_reason:
            notes.append(f"not localised: {self.layers_reason}")
        return notes


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} … {interval[1]:.2f}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]
