"""Compare the outputs of a reference and a candidate with the truth, input after input.

Squared distances are summed over all inputs, so errors and ratios are pooled: an input counts by
the energy of its output. A value counts where the mask lets it, the truth is finite, and the
reference is: what has overflowed in the original is no fault of the candidate's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bda_fx.fidelity_report import OutputFidelity
from bda_fx.noise_interval import noise_interval

FLOAT64_FLOOR = 1e-12
"""In float64 the reference is the truth itself, so its own error is no yardstick: a candidate
passes below this, which leaves room for float64 roundoff (1.1e-16) times a condition of 10⁴."""

LOGITS_FROM = 256
"""Outputs with so many features are taken for logits where the caller does not say."""


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64; inf where value is not finite and truth is."""
    value, truth = value.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    if not value[finite].isfinite().all():
        return math.inf
    return _relative(float((value[finite] - truth[finite]).norm()), float(truth[finite].norm()))


def within_budget(
    error_candidate: float, error_reference: float, dtype: torch.dtype, budget: float
) -> bool:
    """Whether a candidate's error passes: within the budget, or not to be told from rounding."""
    if dtype == torch.float64:
        return error_candidate <= FLOAT64_FLOOR
    floor = torch.finfo(dtype).eps / 2
    return error_candidate < math.inf and error_candidate <= max(budget * error_reference, floor)


def ratio_of(error_candidate: float, error_reference: float) -> float:
    """Their quotient; 1 where both are equal, as for two exact results."""
    if error_candidate == error_reference < math.inf:
        return 1.0
    return error_candidate / error_reference if error_reference > 0 else math.inf


@dataclass
class OutputTally:
    """Sums over inputs for one output.

    ``task`` is "logits", "embedding" or None: then outputs with 256 features and more count as
    logits, and cosines are taken of all.
    """

    name: str
    task: str | None = None
    dtype: torch.dtype = torch.float32
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Squared distances from the truth, candidate's and reference's, per row of each input [B]."""
    scale: float = 0.0
    truth_distance: float | None = None
    max_abs: float = 0.0
    counted: int = 0
    not_finite: int = 0
    agreements: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)

    def add(
        self,
        mine: Tensor,
        other: Tensor,
        truth: Tensor,
        shaken: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> float:
        """Count one input; the ratio of the two models' errors on it.

        Args:
            mine, other, truth: outputs of reference, candidate, and of the reference without
                rounding, of one shape.
            shaken: the truth with rounding errors, where it has such.
            mask: True where a value counts; its shape is the output's, or the front of it.

        Raises:
            ValueError: the reference itself is nan, or nothing finite is left to compare.
        """
        self.dtype = mine.dtype
        mine, other, truth = (t.detach().to(truth.device).double() for t in (mine, other, truth))
        keep = _expanded(mask, truth)
        undefined = int((truth.isnan() & keep).sum())
        if undefined:
            raise ValueError(
                f"{self.name}: the reference is nan at {undefined} of {int(keep.sum())} values, in "
                "exact arithmetic too: pass other inputs, or mask= to leave out these positions"
            )
        finite = mine.isfinite() & truth.isfinite()
        self.not_finite += int((keep & ~finite).sum())
        counts = keep & finite
        if not counts.any() and counts.numel():
            raise ValueError(
                f"{self.name}: no value of the reference is finite where mask= lets it count"
                if keep.any()
                else f"{self.name}: the mask leaves nothing to compare"
            )
        unlike = keep & truth.isinf() & (mine == truth) & (other != truth)  # −inf in a mask, say
        broken = (counts & ~other.isfinite()) | unlike
        own = (mine - truth).where(counts, 0.0).square()
        distance = (other - truth).where(counts, 0.0).square().masked_fill(broken, math.inf)
        self.rows.append((_by_row(distance), _by_row(own)))
        self.scale += float(truth.where(counts, 0.0).square().sum())
        self.counted += int(counts.sum())
        if shaken is not None:
            apart = (shaken.to(truth.device).double() - truth).where(counts, 0.0)
            self.truth_distance = (self.truth_distance or 0.0) + float(apart.square().sum())
        gap = (other - mine).where(counts, 0.0).abs().masked_fill(broken, math.inf)
        self.max_abs = max(self.max_abs, float(gap.max()) if gap.numel() else 0.0)
        self._add_vectors(mine, other, keep)
        candidate, reference = (float(t.sum()) for t in self.rows[-1])
        return ratio_of(math.sqrt(candidate), math.sqrt(reference))

    def _add_vectors(self, mine: Tensor, other: Tensor, keep: Tensor) -> None:
        """What is judged vector by vector, along the last dimension."""
        if mine.dim() < 2:
            return
        whole = keep.all(-1)
        ours, theirs = mine[whole], other[whole]  # [vectors, features]
        if self.task == "logits" or (self.task is None and mine.shape[-1] >= LOGITS_FROM):
            self.agreements.append(ours.argmax(-1) == theirs.argmax(-1))
            p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
            terms = (p.exp() * (p - q)).where(p.exp() > 0, 0.0)
            self.divergences.append(terms.sum(-1).nan_to_num(math.inf))
        if self.task != "logits":
            norms = ours.norm(dim=-1) * theirs.norm(dim=-1)
            cosine = (ours * theirs).sum(-1) / norms
            same = (ours == theirs).all(-1)  # also two vectors of zeros
            finite = ours.isfinite().all(-1)
            self.cosines.append(cosine.nan_to_num(0.0).where(~same, 1.0)[finite])

    def result(self, budget: float) -> OutputFidelity:
        """Pooled figures. With a float32 truth the interval allows for the truth's own error."""
        scale = math.sqrt(self.scale)
        candidate, reference = (
            _relative(math.sqrt(sum(float(t.sum()) for t in side)), scale)
            for side in zip(*self.rows, strict=True)
        )
        off = None if self.truth_distance is None else math.sqrt(self.truth_distance)
        truth_error = None if off is None else _relative(off, scale)
        interval = noise_interval(*self._samples())
        if interval is not None and truth_error:
            # The triangle inequality: each error is known within ± truth_error.
            near, far = truth_error / candidate, truth_error / reference
            low = interval[0] * max(0.0, 1 - near) / (1 + far)
            interval = low, interval[1] * (1 + near) / (1 - far) if far < 1 else math.inf
        cosines = torch.cat(self.cosines) if self.cosines else torch.empty(0)
        return OutputFidelity(
            name=self.name,
            dtype=str(self.dtype).removeprefix("torch."),
            error_reference=reference,
            error_candidate=candidate,
            noise_ratio=ratio_of(candidate, reference),
            max_abs=self.max_abs,
            top1_agreement=_mean(self.agreements),
            passed=within_budget(candidate, reference, self.dtype, budget),
            noise_interval=interval,
            truth_error=truth_error,
            kl_divergence=_mean(self.divergences),
            cosine_mean=_mean(self.cosines),
            cosine_worst=float(cosines.min()) if cosines.numel() else None,
            not_finite=self.not_finite,
        )

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Independent samples: the inputs if there are several, else the rows of the only batch."""
        if len(self.rows) == 1:
            return self.rows[0]
        candidate, reference = zip(*((c.sum(), r.sum()) for c, r in self.rows), strict=True)
        return torch.stack(candidate), torch.stack(reference)


def _expanded(mask: Tensor | None, value: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(value, dtype=torch.bool)
    mask = mask.to(value.device).bool()
    return mask.reshape(*mask.shape, *(1,) * (value.dim() - mask.dim())).expand(value.shape)


def _by_row(squares: Tensor) -> Tensor:
    """Sums over all but the first dimension; a vector is one sample."""
    return squares.flatten(1).sum(1) if squares.dim() >= 2 else squares.sum().reshape(1)


def _relative(distance: float, scale: float) -> float:
    return distance / scale if scale > 0 else distance


def _mean(parts: list[Tensor]) -> float | None:
    values = torch.cat(parts).double() if parts else torch.empty(0)
    return float(values.mean()) if values.numel() else None
