"""The change of basis of one product.

    K = x W + b,  W [E, D] per head.   Basis rows B, the rest R.   S = [ W_B ; Nᵀ ]  [D, D]
    K' = K S⁻¹ = [x_B | 0] + x_R C + b S⁻¹,    C = W_R S⁻¹  [E - r, D]
    Q' = Q Sᵀ  (weights U Sᵀ, bias a Sᵀ)       ⇒  Q' K'ᵀ = Q Kᵀ
    O' = S O                                    ⇒  V' O' = V O

N spans the null space of W_B. Any D - r rows that make S invertible will do in its place. Where
the second moments of both factors are known they are chosen so that the product is least noisy:

    S = [ W_B ; X Nᵀ M ],   M = E[KᵀK]

With Nᵀ M the features that have a basis row have the least energy that they can have (K S⁻¹ has no
part in them that the others could carry), and X *balances* the others: it brings both factors of
them to one diagonal (so that Σ E[K'²] E[Q'²] is the sum of squares of the product's singular
values) and then rotates that to be level, which leaves (Σ σ)² / n of Σ σ². Else N is orthonormal.

Either is scaled to the mean singular value of W_B, which makes these features of Q' about as large
as the others. The scale is free: where it would leave one factor of them far larger than the other
(a key bias of hundreds does), it is moved, so that neither overflows nor vanishes.

Source: "Accelerating Attention with Basis Decomposition", arXiv 2510.01718, which has r = D;
smaller r and the completion are ours. Everything is float64 and batched over heads; callers round
once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-13
"""A singular value below this share of its matrix's largest (of the head's norm, for W_B) counts as
zero. The rounding of a product in float64 leaves eps × √n = 5e-15 at n = 512 where a zero should
be; anything larger is data, however badly conditioned, and ``residual`` shows what it costs."""

HALF = (torch.float16, torch.bfloat16)
WELL_CONDITIONED = 1e3
"""Condition of S up to which half-precision vectors are turned in float32: what cancels in a sum is
at most this share of it, and 1e3 × 1e-7 is a fifth of a float16 rounding at the very worst."""

FLATTEST = 1e-6
"""Directions in which a product has less than this share of its largest energy are not balanced any
further: what they carry is not heard, and S would be badly conditioned."""
ROOM = 16.0
"""The scale of free features is at most this far from the one that makes both factors of equal RMS
size, so one may be 256 times as large as the other: far less than the range of float16."""
FARTHEST = 1024.0
"""How far that may move the scale; the condition of S grows with it."""
SMALLEST = torch.finfo(torch.float64).tiny
"""A singular value below has no inverse in float64."""


@dataclass(frozen=True)
class ChangeOfBasis:
    """S and what follows from it, for the G heads of one projection. All float64 or int64."""

    rows: Tensor
    """[r] input features that are the basis."""
    rest: Tensor
    """[E - r] the other input features, ascending."""
    s: Tensor
    """[G, D, D] S_g."""
    s_inv: Tensor
    """[G, D, D] S_g⁻¹, the pseudo-inverse where S_g is singular."""
    coefficients: Tensor
    """[G, E - r, D] C_g."""
    bias: Tensor | None
    """[G, D] b_g S_g⁻¹."""
    condition: float
    """Largest 2-norm condition of any S_g, over its nonzero singular values."""
    residual: float
    """Worst head's relative error of [[I|0]; C; b'] S against [W_B; W_R; b] (Frobenius); inf where
    S⁻¹ overflows."""


def change_basis(
    heads: Tensor,
    rows: Tensor,
    bias: Tensor | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> ChangeOfBasis:
    """Change of basis for ``heads`` [G, E, D] on basis ``rows`` [r], with ``bias`` [G, D].

    ``moments``: E[KᵀK] and E[QᵀQ] [G, D, D], to balance the features that have no basis row.

    Exact while the rows of W_B (and the D - r directions of N) span each head's row space;
    otherwise ``residual`` says how far off it is and the caller must not use it. Rank-deficient and
    zero heads are allowed: C is W_R S⁺, and where r < D the spare directions of the null space go
    to what the other rows and the bias need. Rounding: ``residual`` is about eps × condition at
    most. The same input gives the same S, signs included. Cost O(G (E D² + D³)).

    Raises:
        ValueError: a weight or bias is inf or nan; rows are out of range or repeated.
    """
    heads = heads.double()
    bias = None if bias is None else bias.double()
    _check(heads, rows, bias)
    e = heads.shape[1]
    keep = torch.ones(e, dtype=torch.bool)
    keep[rows] = False
    rest = keep.nonzero().flatten()
    below = heads[:, rest]
    if bias is not None:
        below = torch.cat([below, bias.unsqueeze(1)], 1)
    s, sizes, _ = _complete(heads, rows, bias, moments)
    if len(rows) < s.shape[1]:
        sizes = torch.linalg.svdvals(s)
    floor = RANK_TOLERANCE * sizes[:, :1].clamp_min(SMALLEST)
    nonzero = sizes > floor
    smallest = torch.where(nonzero, sizes, torch.inf).amin(-1)
    condition = torch.where(nonzero.any(-1), sizes[:, 0] / smallest, 1.0)
    singular = ~nonzero.all(-1)
    invertible = torch.where(singular[:, None, None], torch.eye(s.shape[1], dtype=s.dtype), s)
    s_inv = torch.linalg.inv(invertible)
    solved = torch.linalg.solve(invertible, below, left=False)
    if singular.any():
        s_inv[singular] = torch.linalg.pinv(s[singular], rtol=RANK_TOLERANCE)
        solved[singular] = below[singular] @ s_inv[singular]
    missing = torch.baddbmm(below, solved, s, alpha=-1)
    residual = _relative_norms(missing, heads, bias)
    residual = torch.where(s_inv.isfinite().flatten(1).all(1), residual, torch.inf)
    return ChangeOfBasis(
        rows=rows,
        rest=rest,
        s=s,
        s_inv=s_inv,
        coefficients=solved[:, : len(rest)],
        bias=None if bias is None else solved[:, -1],
        condition=float(condition.max()),
        residual=float(residual.max()),
    )


def complete_basis(
    heads: Tensor,
    rows: Tensor,
    bias: Tensor | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, float]:
    """S [G, D, D] and its condition, as in ``change_basis`` but without C, at a tenth of its cost.

    The condition is inf where some head lacks rank on the rows; the change of basis may be exact
    even so, which ``change_basis`` tells.
    """
    wide = None if bias is None else bias.double()
    s, _, condition = _complete(heads.double(), rows, wide, moments)
    return s, condition


def turn_vectors(
    vectors: Tensor, change: ChangeOfBasis, groups: Tensor, *, against: bool
) -> Tensor:
    """``vectors`` [n, M, D] of the heads ``groups`` [n] in the new basis, float64; float32 where
    theirs is a half-precision dtype and S is well conditioned, so that rounding them to it hides
    how they were computed.

    ``against``: they meet the decomposed features (queries, outputs) and turn by Sᵀ, so that every
    product stays; otherwise they turn along with them, by S⁻¹.
    """
    turn = (change.s.mT if against else change.s_inv)[groups]
    short = vectors.dtype in HALF and change.condition <= WELL_CONDITIONED
    dtype = torch.float32 if short else torch.float64
    return vectors.to(dtype) @ turn.to(dtype)


def _relative_norms(error: Tensor, heads: Tensor, bias: Tensor | None) -> Tensor:
    """‖error‖ / ‖heads and bias‖ of each head, [G]; inf where the error is not a number.

    All are scaled by the head's largest element first, or squares of small ones would vanish.
    """
    parts = [heads] if bias is None else [heads, bias.unsqueeze(1)]
    largest = torch.stack([part.abs().amax((1, 2)) for part in parts]).amax(0).clamp_min(SMALLEST)
    unit = largest[:, None, None]
    whole = sum((part / unit).square().sum((1, 2)) for part in parts)
    assert isinstance(whole, Tensor)
    relative = (error / unit).norm(dim=(1, 2)) / whole.sqrt().clamp_min(SMALLEST)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _complete(
    heads: Tensor, rows: Tensor, bias: Tensor | None, moments: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, float]:
    """S [G, D, D]: the basis rows W_B and D - r scaled rows under them.

    Also the singular values [G, r] of every W_B, and the largest condition of any: inf where a head
    lacks rank on the rows.
    """
    top = heads[:, rows]
    r, d = top.shape[1:]
    sizes = torch.linalg.svdvals(top)
    largest = heads.norm(dim=(1, 2))
    lacking = sizes[:, -1] <= (RANK_TOLERANCE * largest).clamp_min(SMALLEST)
    condition = float(torch.where(lacking, torch.inf, sizes[:, 0] / sizes[:, -1]).max())
    if r == d:
        return top, sizes, condition
    q, _ = torch.linalg.qr(top.transpose(1, 2), mode="complete")
    null = q[:, :, r:].transpose(1, 2)
    scale = sizes.mean(-1)
    for head in lacking.nonzero().flatten().tolist():
        # W_B spans less than r directions: of the larger null space keep what the other rows need.
        _, values, basis = torch.linalg.svd(top[head])
        rank = int((values > RANK_TOLERANCE * largest[head]).sum())
        space = basis[rank:]
        others = heads[head] if bias is None else torch.cat([heads[head], bias[head, None]])
        _, _, needed = torch.linalg.svd(others @ space.T)
        null[head] = (needed @ space)[: d - r]
    scale = torch.where(scale > 0, scale, torch.where(largest > 0, largest, 1.0))
    null = _fix_signs(null)
    if moments is not None:
        null = torch.where(lacking[:, None, None], null, _balance(null, scale, *moments))
    return torch.cat([top, null * scale[:, None, None]], 1), sizes, condition


def _fix_signs(rows: Tensor) -> Tensor:
    """A direction's sign is free; fix it, so that equal weights always give equal results."""
    return rows * torch.gather(rows, 2, rows.abs().argmax(-1, keepdim=True)).sign()


def _balance(null: Tensor, scale: Tensor, key: Tensor, query: Tensor) -> Tensor:
    """X Nᵀ M of the module docstring; heads where that fails keep ``null``.

    In units of ``scale`` [G] rows are of RMS length 1, but for what keeps both factors in ``ROOM``.
    """
    met = null @ key
    energy, failed = torch.linalg.cholesky_ex(met @ null.mT)
    sound = (failed == 0)[:, None, None]
    eye = torch.eye(null.shape[1], dtype=null.dtype)
    inverse = torch.linalg.inv(torch.where(sound, energy, eye))
    turned = inverse @ met
    met_by = turned @ query @ turned.mT
    sound = sound & met_by.isfinite().all(2).all(1)[:, None, None]
    spectrum, axes = torch.linalg.eigh(torch.where(sound, met_by, eye))
    floor = FLATTEST * spectrum[:, -1:].clamp_min(SMALLEST)
    sizes = spectrum.maximum(floor).sqrt()
    rows = _level(_fix_signs(axes.mT) @ turned / sizes.sqrt().unsqueeze(2), sizes)
    length = rows.norm(dim=(1, 2), keepdim=True) / null.shape[1] ** 0.5
    level = length.flatten() / scale  # both factors are of one size at this length
    level = torch.where(spectrum[:, -1] > SMALLEST, level, 1.0)
    moved = torch.ones_like(level).clamp(level / ROOM, level * ROOM).clamp(1 / FARTHEST, FARTHEST)
    rows = rows * (moved[:, None, None] / length)
    return torch.where(sound & rows.isfinite().all(2).all(1)[:, None, None], rows, null)


def _level(rows: Tensor, sizes: Tensor) -> Tensor:
    """Rotate n ``rows`` [G, n, D] of independent energies ``sizes`` [G, n] until all have the mean.

    n - 1 plane rotations (Bendel and Mickey 1978): the largest and the smallest become the mean and
    what is left over.
    """
    rows, sizes, every = rows.clone(), sizes.clone(), torch.arange(len(rows))
    mean = sizes.mean(1)
    for _ in range(rows.shape[1] - 1):
        high, low = sizes.argmax(1), sizes.argmin(1)
        most, least = sizes[every, high], sizes[every, low]
        spread = most - least
        sine = torch.where(spread > 0, (most - mean) / spread, 0.0).clamp(0, 1).sqrt().unsqueeze(1)
        cosine = (1 - sine.square()).sqrt()
        first, second = rows[every, high], rows[every, low]
        rows[every, high] = cosine * first + sine * second
        rows[every, low] = torch.where(
            (high != low).unsqueeze(1), cosine * second - sine * first, rows[every, low]
        )
        sizes[every, low] = most + least - mean
        sizes[every, high] = mean
    return rows


def _check(heads: Tensor, rows: Tensor, bias: Tensor | None) -> None:
    e = heads.shape[1]
    if len(rows) == 0 or len(rows.unique()) != len(rows) or rows.min() < 0 or rows.max() >= e:
        raise ValueError(
            f"basis rows {rows.tolist()}: expected distinct input features in 0..{e - 1}; "
            "take them from choose_basis"
        )
    if len(rows) > min(heads.shape[1:]):
        raise ValueError(
            f"{len(rows)} basis rows for heads with {e} inputs and {heads.shape[2]} features: "
            f"expected at most {min(heads.shape[1:])}"
        )
    finite = heads.abs().amax((1, 2)).isfinite()
    if bias is not None:
        finite &= bias.isfinite().all(-1)
    if not finite.all():
        raise ValueError(
            f"weights or bias of head {int((~finite).nonzero()[0])} hold inf or nan: "
            "expected finite values, leave this projection as it is"
        )
