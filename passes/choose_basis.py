"""Choose the basis rows: r input features, shared by all heads of a projection.

K' = [x_B | 0] + x_R C is exact for any rows that span the heads, but rounding errors grow with C
and with S. What keeps both small is the volume of the chosen rows: by Cramer's rule |C_g[i, j]| is
the factor by which vol(W_g[B]) changes when row i takes the place of basis row j, so at a maximum
of Σ_g log vol no entry of C can be large in all heads.

Strategies (any r ≤ min(D, E)):

* ``first``: rows 0 … r-1 (the paper's First-r);
* ``residual-min``: first or last r rows, whichever reconstructs the weights better in float32 (the
  paper's Residual-min);
* ``window``: the contiguous window of r rows with the largest Σ_g log vol;
* ``pivot``: rows picked greedily by Σ_g log vol, then exchanged while it grows (strong
  rank-revealing QR, Gu and Eisenstat 1996, on all heads at once).

Volumes are taken on the heads' orthonormalised weights, so that each head counts alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bda_fx.passes.change_basis import change_basis

STRATEGIES = ("pivot", "window", "residual-min", "first")

MAX_ROUNDS = 40
EXCHANGES_PER_ROUND = 8
MIN_GAIN = 0.01
"""Exchanges stop when the best one would raise the mean log-volume of a head by less than this."""
REGULARISER = 1e-8
"""Added to Gram matrices of unit-scale rows: a head that lacks rank counts by what it spans."""
EXACT_WINDOWS = 2.0e10
"""Up to this many operations every window is looked at; beyond, every eighth and its neighbours."""


def choose_basis(heads: Tensor, size: int, strategy: str) -> Tensor:
    """Basis rows [size], ascending int64, for ``heads`` [G, E, D] (``y = x W``).

    Deterministic. Cost: O(G E D r) for the greedy pass and as much for each round of exchanges.

    Raises:
        ValueError: an unknown strategy, or a size that is not in 1 … min(D, E).
    """
    _, e, d = heads.shape
    if not 1 <= size <= min(d, e):
        raise ValueError(
            f"basis size {size} for heads with {e} inputs and {d} features: "
            f"choose between 1 and {min(d, e)}"
        )
    if strategy == "first" or size == e:
        return torch.arange(size)
    if strategy == "residual-min":
        return _residual_min(heads.double(), size)
    if strategy == "window":
        return _best_window(orthonormalise(heads), size)
    if strategy == "pivot":
        q = orthonormalise(heads)
        return _exchange(q, _greedy(q, size))
    raise ValueError(f"unknown basis strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")


def log_volume(heads: Tensor, rows: Tensor) -> float:
    """Σ_g log vol of the rows of the orthonormalised heads (regularised, so never -inf)."""
    return float(_log_volumes(orthonormalise(heads)[:, rows]).sum())


def orthonormalise(heads: Tensor) -> Tensor:
    """Each head's columns replaced by an orthonormal basis of their span, [G, E, min(D, E)].

    Directions that a rank-deficient head lacks are zero, so that they carry no weight.
    """
    heads = heads.double()
    q, r = torch.linalg.qr(heads)
    pivots = r.diagonal(dim1=1, dim2=2).abs()
    deficient = pivots.amin(-1) <= 1e-7 * pivots.amax(-1)
    for head in deficient.nonzero().flatten().tolist():
        u, sizes, _ = torch.linalg.svd(heads[head], full_matrices=False)
        q[head] = torch.where(sizes > 1e-12 * sizes[0], u, 0.0) if sizes[0] > 0 else 0.0
    return q


def _residual_min(heads: Tensor, size: int) -> Tensor:
    e = heads.shape[1]
    candidates = (torch.arange(size), torch.arange(e - size, e))
    residuals = []
    for rows in candidates:
        change = change_basis(heads, rows)
        s, below = change.s.float(), heads[:, change.rest].float()
        coefficients = change.coefficients.float()
        residuals.append(float((coefficients @ s - below).norm()))
    return candidates[residuals.index(min(residuals))]


def _best_window(q: Tensor, size: int) -> Tensor:
    g, e, d = q.shape
    starts = torch.arange(e - size + 1)
    if len(starts) * g * size * size * (d + size) > EXACT_WINDOWS:
        coarse = starts[::8]
        best = coarse[_window_volumes(q, coarse, size).topk(min(4, len(coarse))).indices]
        near = best[:, None] + torch.arange(-7, 8)
        starts = near.flatten().clamp(0, e - size).unique()
    start = int(starts[_window_volumes(q, starts, size).argmax()])
    return torch.arange(start, start + size)


def _window_volumes(q: Tensor, starts: Tensor, size: int) -> Tensor:
    return torch.stack([_log_volumes(q[:, s : s + size]).sum() for s in starts.tolist()])


def _log_volumes(rows: Tensor) -> Tensor:
    """log vol of [..., r, D] rows, [...]."""
    rows = rows.double()
    gram = rows @ rows.transpose(-1, -2)
    gram.diagonal(dim1=-2, dim2=-1).add_(REGULARISER)
    return torch.linalg.slogdet(gram).logabsdet / 2


def _greedy(q: Tensor, size: int) -> Tensor:
    """Rows that raise Σ_g log vol most, one after the other (Gram-Schmidt kept as coefficients)."""
    g, e, d = q.shape
    q = q.float()
    left = q.square().sum(-1)
    directions = q.new_zeros(g, size, d)
    coefficients = q.new_zeros(g, e, size)
    free = torch.ones(e, dtype=torch.bool)
    rows = []
    for step in range(size):
        score = left.clamp_min(REGULARISER).log().sum(0)
        row = int(torch.where(free, score, -torch.inf).argmax())
        rows.append(row)
        free[row] = False
        used = coefficients[:, row, None, :step] @ directions[:, :step]
        direction = q[:, row] - used.squeeze(1)
        length = direction.norm(dim=-1, keepdim=True)
        direction = torch.where(length > REGULARISER, direction / length, 0.0)
        directions[:, step] = direction
        along = torch.bmm(q, direction.unsqueeze(-1)).squeeze(-1)
        coefficients[:, :, step] = along
        left = (left - along.square()).clamp_min(0.0)
    return torch.tensor(sorted(rows))


def _exchange(q: Tensor, rows: Tensor) -> Tensor:
    """Exchange basis rows for others while Σ_g log vol grows."""
    volume = float(_log_volumes(q[:, rows]).sum())
    for _ in range(MAX_ROUNDS):
        gains = _gains(q, rows)
        gains[rows] = -torch.inf
        pairs = _disjoint_best(gains, MIN_GAIN * len(q))
        if not pairs:
            break
        for count in dict.fromkeys((len(pairs), 1)):
            trial = rows.clone()
            for row, slot in pairs[:count]:
                trial[slot] = row
            grown = float(_log_volumes(q[:, trial]).sum())
            if grown > volume:
                break
        else:
            break
        rows, volume = trial, grown
    return rows.sort().values


def _gains(q: Tensor, rows: Tensor) -> Tensor:
    """[E, r]: change of Σ_g log vol when row i takes the place of basis row j.

    vol² changes by C_ij² + ρ_i² ω_j²: C the coefficients of row i in the basis rows, ρ_i its
    distance from their span, ω_j² the diagonal of the inverse Gram matrix.
    """
    basis = q[:, rows]
    gram = basis @ basis.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(REGULARISER)
    inverse = torch.linalg.inv(gram)
    dual = (inverse @ basis).float()
    q, basis = q.float(), basis.float()
    coefficients = q @ dual.transpose(1, 2)
    change = coefficients.square()
    if len(rows) < q.shape[-1]:
        apart = q.square().sum(-1) - (coefficients * (q @ basis.transpose(1, 2))).sum(-1)
        omega = inverse.diagonal(dim1=1, dim2=2).float()
        change += apart.clamp_min(0.0).unsqueeze(-1) * omega.unsqueeze(1)
    return change.clamp_min_(REGULARISER**2).log_().sum(0) / 2


def _disjoint_best(gains: Tensor, least: float) -> list[tuple[int, int]]:
    """The best exchanges (row, slot) that share neither row nor slot."""
    size = gains.shape[1]
    best = gains.flatten().topk(min(16 * EXCHANGES_PER_ROUND, gains.numel()))
    pairs: list[tuple[int, int]] = []
    for gain, at in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        row, slot = divmod(at, size)
        fresh = all(row != r and slot != s for r, s in pairs)
        if gain > least and fresh and len(pairs) < EXCHANGES_PER_ROUND:
            pairs.append((row, slot))
    return pairs
