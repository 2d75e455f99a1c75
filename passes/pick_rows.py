"""Pick rows of the heads one by one, each the farthest from the span of those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from bda_fx.passes.orthonormal_heads import Heads

REGULARISER = 1e-12
"""δ, added to Gram matrices of Y's rows (‖y‖ ≤ 1): keeps the volume of dependent rows off zero,
and is 10⁴ times the rounding error of a Gram matrix in float64."""
TIE = 0.005
"""What a row's own length counts for. At first all directions are equally far from nothing: without
this, rounding errors would pick the first row, and so all others."""
FEW = 8
"""One in so many of the directions that are left: so many rows are picked at once, if they are far
from each other. The noise after exchanges is the same within the few per cent by which it varies
with any change of the start."""
CROWDED = -0.15
"""Mean log of the distance² that the rows before it leave of a row's, for it to be picked with them
at once: -0.13 is what one in eight directions takes from it on average."""
COARSE_DISTANCE = 1e-4
"""Share of a row's energy that must be left when it is picked for float32 to do: what was
subtracted by then is wrong by some 1e-6 of the energy, so the distance² is right to 1 %."""


def pick_rows(search: Heads, size: int) -> Tensor:
    """Rows that raise Σ_g log of the spanned volume most, one after the other, [size].

    The volume is that of the rows' directions; of the rows themselves in heads of rank < r, where
    a row that adds nothing must not gain by being short. In float32, which is half as much to read
    at each step, until a row lies too near the span of the others for that.
    """
    rows: list[int] = []
    if (search.rank >= size).all():
        rows = _pick(search.single, rows, size, COARSE_DISTANCE)
    return torch.tensor(_pick(search, rows, size, 0.0), device=search.y.device)


def _pick(search: Heads, rows: list[int], size: int, floor: float) -> list[int]:
    """``rows`` and those that ``pick_rows`` picks after them: ``size``, or up to the first that has
    less than ``floor`` of its energy left in some head.

    Several are picked at once where those before leave each of them nearly all that it had: the
    first few of many directions hardly meet.
    """
    if len(rows) == size:
        return rows
    rows = list(rows)
    length = (1 - TIE) * search.sizes.log()[search.rank >= size].sum(0)
    span = _Span(search, size)
    if rows:
        picked = torch.tensor(rows, device=search.y.device)
        span.add(*span.beyond(picked))
    while len(rows) < size:
        score = span.apart.log().sum(0) - length
        score[rows] = -torch.inf
        count = max(1, (search.y.shape[2] - len(rows)) // FEW)
        best = score.topk(min(count, size - len(rows))).indices
        away, factor = span.beyond(best)
        best = best[: factor.shape[1]]
        left = factor.diagonal(dim1=1, dim2=2).square()
        kept = (left / span.apart[:, best]).log().mean(0) >= CROWDED
        kept[0] = True  # by definition, but for rounding
        kept &= (left / search.sizes[:, best]).amin(0) >= floor
        few = int(kept.cumprod(0).sum())
        if not few:
            break
        span.add(away[:, :few], factor[:, :few, :few])
        rows += best[:few].tolist()
    return rows


class _Span:
    """What rows that are picked span, and how far all others are from it.

    With P = δ (δ + Y_Bᵀ Y_B)⁻¹ the distance² of a row is y P yᵀ + δ (``apart`` [G, E]), and
    P = 1 - AᵀA, where A grows by L⁻¹ Y P for new rows Y, L Lᵀ = Y P Yᵀ + δ (Sherman, Morrison,
    Woodbury).
    """

    def __init__(self, search: Heads, size: int) -> None:
        self.y = search.y
        self.by_feature = self.y.mT.contiguous()  # in this order few vectors a head read it fast
        self.apart = search.energy + REGULARISER
        self.directions = self.y.new_empty(self.y.shape[0], size, self.y.shape[2])
        self.count = 0

    def beyond(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Y P [G, n, D] and L [G, n, n] of ``rows``; of the first alone if rounding leaves no L."""
        here, earlier = self.y[:, rows], self.directions[:, : self.count]
        away = here - here @ earlier.mT @ earlier
        gram = away @ here.mT
        gram.diagonal(dim1=1, dim2=2).add_(REGULARISER)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed.any():
            return away[:, :1], self.apart[:, rows[:1], None].sqrt()
        return away, factor

    def add(self, away: Tensor, factor: Tensor) -> None:
        """Rows that ``beyond`` was asked for."""
        new = torch.linalg.solve_triangular(factor, away, upper=False)
        self.directions[:, self.count : self.count + new.shape[1]] = new
        self.count += new.shape[1]
        nearer = torch.bmm(new, self.by_feature).square_().sum(1)
        self.apart = (self.apart - nearer).clamp_min_(REGULARISER)
