"""``verify``: how equal the outputs of two models are, measured against float64.

The error of a model is its relative RMS distance to a float64 run of the reference,

    error(y) = ‖y − y*‖ / ‖y*‖,

and what matters is the ratio of the candidate's error to the reference's own error in the same
dtype: a ratio of 1 is as good as the original, whatever the dtype. No absolute tolerance is used
but for unit roundoff: below it no result in that dtype can be told from a right one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bda_fx.evaluate_float64 import evaluate_float64
from bda_fx.passes.canonicalize import composite_attention

FLOAT64_FLOOR = 1e-12
"""In float64 the reference is the truth itself, so its own error is no yardstick: a candidate
passes below this, which leaves room for float64 roundoff (1.1e-16) times a condition of 10⁴."""


@dataclass(frozen=True)
class OutputFidelity:
    """One tensor output. Errors are relative RMS against float64; ``max_abs`` is the largest
    absolute difference between reference and candidate; ``top1_agreement`` is the share of equal
    argmaxes over the last dimension, for outputs that look like logits (None for others)."""

    name: str
    dtype: str
    error_reference: float
    error_candidate: float
    noise_ratio: float
    max_abs: float
    top1_agreement: float | None
    passed: bool


@dataclass(frozen=True)
class Fidelity:
    """All outputs, and whether each is within ``budget`` times the reference's own error."""

    outputs: tuple[OutputFidelity, ...]
    budget: float

    @property
    def passed(self) -> bool:
        return all(o.passed for o in self.outputs)

    @property
    def noise_ratio(self) -> float:
        """The largest ratio over the outputs."""
        return max((o.noise_ratio for o in self.outputs), default=1.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "budget": self.budget,
            "noise_ratio": self.noise_ratio,
            "outputs": [asdict(o) for o in self.outputs],
        }

    def __str__(self) -> str:
        lines = [f"{'equivalent' if self.passed else 'NOT EQUIVALENT'} (budget {self.budget:g})"]
        for o in self.outputs:
            line = (
                f"  {o.name} {o.dtype}: error {o.error_candidate:.2e}, "
                f"reference {o.error_reference:.2e}, ratio {o.noise_ratio:.2f}, "
                f"max |difference| {o.max_abs:.2e}"
            )
            if o.top1_agreement is not None:
                line += f", top-1 agreement {100 * o.top1_agreement:.1f} %"
            lines.append(line + ("" if o.passed else "  ← fails"))
        return "\n".join(lines)


def verify(
    reference: nn.Module | ExportedProgram,
    candidate: Callable[..., Any] | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    budget: float = 4.0,
) -> Fidelity:
    """Run ``reference`` and ``candidate`` on the same inputs and compare both with float64.

    Args:
        reference: the original, a module or an exported program. It is exported once more to be
            run in float64; nothing of it is changed.
        candidate: what should equal it: a module, a compiled module, an exported program.
        args, kwargs: inputs for both.
        budget: largest ratio of the candidate's error to the reference's own error that passes.

    Raises:
        ValueError: the outputs differ in number, shape or dtype, or there is no floating output.
    """
    kwargs = dict(kwargs or {})
    exact = _exact(reference, tuple(args), kwargs)
    ours = _run(reference, args, kwargs)
    theirs = _run(candidate, args, kwargs)
    if len(ours) != len(theirs) or len(ours) != len(exact):
        raise ValueError(
            f"the reference has {len(ours)} tensor outputs, the candidate {len(theirs)}"
        )
    outputs = []
    for index, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        if mine.shape != other.shape or mine.dtype != other.dtype:
            raise ValueError(
                f"output {index}: the reference gives {_kind(mine)}, the candidate {_kind(other)}"
            )
        if mine.is_floating_point():
            outputs.append(_compare(f"output {index}", mine, other, truth, budget))
    if not outputs:
        raise ValueError("no output is a floating-point tensor: there is nothing to compare")
    return Fidelity(tuple(outputs), budget)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64; inf where value is not finite and truth is."""
    value, truth = value.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    if not value[finite].isfinite().all():
        return float("inf")
    scale = float(truth[finite].norm())
    distance = float((value[finite] - truth[finite]).norm())
    return distance / scale if scale > 0 else distance


def _compare(
    name: str, mine: Tensor, other: Tensor, truth: Tensor, budget: float
) -> OutputFidelity:
    error_reference, error_candidate = relative_error(mine, truth), relative_error(other, truth)
    exact_type = mine.dtype == torch.float64
    floor = FLOAT64_FLOOR if exact_type else torch.finfo(mine.dtype).eps / 2
    ratio = error_candidate / error_reference if error_reference > 0 else float("inf")
    if error_candidate == error_reference:
        ratio = 1.0
    limit = FLOAT64_FLOOR if exact_type else max(budget * error_reference, floor)
    agreement = None
    if mine.dim() >= 2 and mine.shape[-1] >= 256:
        agreement = float((mine.argmax(-1) == other.argmax(-1)).double().mean())
    return OutputFidelity(
        name=name,
        dtype=str(mine.dtype).removeprefix("torch."),
        error_reference=error_reference,
        error_candidate=error_candidate,
        noise_ratio=ratio,
        max_abs=float((mine.double() - other.double()).abs().max()) if mine.numel() else 0.0,
        top1_agreement=agreement,
        passed=error_candidate <= limit,
    )


def _exact(
    reference: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    if not isinstance(reference, ExportedProgram):
        if not isinstance(reference, nn.Module):
            raise TypeError(
                f"reference is an nn.Module or an ExportedProgram, got {type(reference).__name__}"
            )
        with composite_attention(), torch.no_grad():
            reference = torch.export.export(reference, args, kwargs, strict=False)
    return evaluate_float64(reference, args, kwargs)


def _run(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    if isinstance(model, ExportedProgram):
        model = model.module()
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
