"""Choose the basis rows: r input features, shared by all heads of a projection.

K' = [x_B | 0] + x_R C is exact for any rows that span the heads, but rounding errors grow with C
and with S. How much is a matter of angles. Let Y_g be the head's weights with orthonormalised
columns, and let both factors be isotropic there. Then the noise² of the product after the change
of basis, relative to that before, is the head's *obliqueness*

    J_g = ( k - r + Σ_{j in B} 1 / sin² θ_gj ) / k ,      k = rank of head g  (usually D)

where θ_gj is the angle between row j of Y_g and the span of the other basis rows (feature j of K'
has energy ω_j² = [(Y_B Y_Bᵀ)⁻¹]_jj, feature j of Q' has ‖y_j‖², and ω_j² ‖y_j‖² = 1 / sin² θ_j; the
k - r features from the null space are orthogonal to all). J = 1 is noise-free, and scaling a row
changes nothing, as rounding is relative. The site's figure is Σ_g J_g: its noisiest heads count.

Strategies (any r ≤ min(D, E)):

* ``first``: rows 0 … r-1 (the paper's First-r);
* ``residual-min``: the first or the last r rows, whichever reconstructs the weights better in
  float32 (the paper's Residual-min);
* ``window``: the contiguous window of r rows with the least Σ_g J_g;
* ``pivot``: rows picked greedily by Σ_g log of the volume that their directions span, then
  exchanged one by one while Σ_g J_g falls.

Why not volume throughout (Σ_g log vol(Y_B), strong rank-revealing QR)? It also rewards long rows,
which are no less noisy. Predicted noise of K at r = D, geometric mean over the layers of MiniLM-L6
(worst head of any layer in brackets): pivot 5.1 (13) by volume, 4.1 (7) by obliqueness; window 24
(140) by volume, 9 (17) by obliqueness.

Heads that lack rank: a zero head takes no part. A head of rank k < r always has dependent rows, so
it counts by the volume of what its rows span, J_g = (r / E) det(Y_Bᵀ Y_B)^(-1/k), which is 1 where
the rows share the weights evenly and grows as the basis comes to miss a direction.

Shapes: G heads, E input features, D features per head, r basis size. All float64.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bda_fx.passes.change_basis import change_basis
from bda_fx.passes.orthonormal_heads import Heads, orthonormal_heads
from bda_fx.passes.pick_rows import REGULARISER, pick_rows

STRATEGIES = ("pivot", "window", "residual-min", "first")

MIN_GAIN = 1e-3
"""Exchanges stop when the best one lowers Σ_g J_g by less than this share (noise by half of it)."""
MAX_EXCHANGES = 100
"""A bound on time; greedy starts settle within 5 to 15."""
COARSE_LIMIT = 1e3
"""Worst J up to which scores in float32 are right to 1e-4 of themselves: the rounding error of an
inverse Gram matrix is about J × 1e-7 relative. Beyond, they are good enough to begin with."""
SCORED_AT_ONCE = 1 << 20
"""Heads × E × r scored per batch: the working set stays in the processor's cache."""
REFRESH_EVERY = 8
"""Windows are updated by rank two from their neighbour this often, then inverted from scratch."""
NEARLY_SINGULAR = 1e5
"""Worst J beyond which the next basis is inverted from scratch: an update would keep the rounding
error of so large an inverse, about J² × 1e-16 relative to the next one."""


def choose_basis(heads: Tensor, size: int, strategy: str) -> Tensor:
    """Basis rows [size], ascending int64 on the CPU, for ``heads`` [G, E, D] (``y = x W``).

    Deterministic. Cost: O(G E D r) for the greedy pass, O(G r² (E + r)) for each exchange, and
    O(G E r²) for all windows. For several sizes of one projection use :class:`BasisSearch`.

    Raises:
        ValueError: an unknown strategy, a size that is not in 1 … min(D, E), inf or nan weights.
    """
    return BasisSearch(heads, strategy).rows(size)


class BasisSearch:
    """Bases of several sizes for one projection; what they have in common is computed once.

    ``rows(size)`` is ``choose_basis(heads, size, strategy)``, ``first_rows(size)`` what it starts
    from: the same but for ``pivot``, where it is the greedy choice before any exchange.
    """

    def __init__(self, heads: Tensor, strategy: str) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(
                f"unknown basis strategy {strategy!r}: choose one of {list(STRATEGIES)}"
            )
        finite = heads.abs().amax((1, 2)).isfinite()
        if not finite.all():
            raise ValueError(
                f"weights of head {int((~finite).nonzero()[0])} hold inf or nan: "
                "a basis needs finite weights, leave this projection as it is"
            )
        self.heads, self.strategy = heads, strategy
        self._greedy_rows: dict[tuple[bool, ...], Tensor] = {}
        self._obliqueness: dict[int, float] = {}

    @functools.cached_property
    def _search(self) -> Heads:
        return orthonormal_heads(self.heads)

    def release(self) -> None:
        """Let go of the orthonormalised heads, three times the memory of float32 weights; they are
        made again where rows, or the obliqueness of another size, are asked for."""
        self.__dict__.pop("_search", None)

    def rows(self, size: int) -> Tensor:
        """Basis rows [size], ascending int64 on the CPU."""
        rows = self.first_rows(size)
        if not self._pivots(size):
            return rows
        return _exchange(self._search, rows.to(self._search.y.device)).cpu()

    def first_rows(self, size: int) -> Tensor:
        """What ``rows`` starts from, at a fraction of its cost, [size]."""
        _, e, d = self.heads.shape
        if not 1 <= size <= min(d, e):
            raise ValueError(
                f"basis size {size} for heads with {e} inputs and {d} features: "
                f"choose between 1 and {min(d, e)}"
            )
        if self.strategy == "first" or size == e:
            return torch.arange(size)
        if self.strategy == "residual-min":
            return _residual_min(self.heads.double(), size)
        if not len(self._search.y):
            return torch.arange(size)
        if self.strategy == "window":
            return _best_window(self._search, size)
        return self._greedy(size).cpu()

    def obliqueness(self, size: int) -> float:
        """Mean J over the heads for ``first_rows(size)``: the site's noise², roughly."""
        if size not in self._obliqueness:
            if size == self.heads.shape[1] or not len(self._search.y):
                self._obliqueness[size] = 1.0
            else:
                rows = self.first_rows(size).to(self._search.y.device)
                judged = _judge(self._search, rows, *_invert(self._search, rows))
                self._obliqueness[size] = float(judged.mean())
        return self._obliqueness[size]

    def judged(self, size: int) -> bool:
        """Whether the obliqueness of ``size`` is known."""
        return size in self._obliqueness

    def _pivots(self, size: int) -> bool:
        few = size == self.heads.shape[1] or self.strategy != "pivot"
        return not few and len(self._search.y) > 0

    def _greedy(self, size: int) -> Tensor:
        """A smaller choice is the beginning of a larger one, as long as the same heads lack rank
        for it."""
        key = tuple((self._search.rank >= size).tolist())
        known = self._greedy_rows.get(key)
        if known is None or len(known) < size:
            known = self._greedy_rows[key] = pick_rows(self._search, size)
        return known[:size]


def obliqueness(heads: Tensor, rows: Tensor) -> Tensor:
    """J_g of the module docstring for basis ``rows`` [r]: [heads of nonzero rank], float64.

    sqrt(J) estimates the noise of the head's product after the change of basis over that before.
    """
    search = orthonormal_heads(heads)
    return _judge(search, rows, *_invert(search, rows))


def _invert(search: Heads, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Y_B Y_Bᵀ + δ)⁻¹ [G, r, r] and log det(Y_B Y_Bᵀ + δ) [G]."""
    basis = search.y[:, rows]
    gram = basis @ basis.mT
    gram.diagonal(dim1=1, dim2=2).add_(REGULARISER)
    factor = torch.linalg.cholesky(gram)
    log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return torch.cholesky_inverse(factor), log_det


def _judge(search: Heads, rows: Tensor, inverse: Tensor, log_det: Tensor) -> Tensor:
    """J_g [G] of the basis, from what ``_invert`` returns."""
    r, rank = len(rows), search.rank
    spread = (inverse.diagonal(dim1=1, dim2=2) * search.sizes[:, rows]).sum(1)
    spanned = log_det - (r - rank) * math.log(REGULARISER)
    by_volume = r / search.y.shape[1] * (-spanned / rank).exp()
    return torch.where(rank < r, by_volume, (rank - r + spread) / rank)


def _residual_min(heads: Tensor, size: int) -> Tensor:
    """First or last rows: the lower residual ‖C S - W_R‖ / ‖W‖ of the worst head in float32."""
    e = heads.shape[1]
    candidates = (torch.arange(size), torch.arange(e - size, e))
    norms = heads.norm(dim=(1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    residuals = []
    for rows in candidates:
        change = change_basis(heads, rows)
        rebuilt = change.coefficients.float() @ change.s.float()
        missing = (rebuilt.double() - heads[:, change.rest]).norm(dim=(1, 2)) / norms
        residuals.append(float(missing.nan_to_num(torch.inf).max()))
    return candidates[residuals.index(min(residuals))]


def _exchange(search: Heads, rows: Tensor) -> Tensor:
    """Exchange a basis row for another while that lowers Σ_g J_g. Returns the rows, ascending.

    The candidates are scored in float32; in float64 where the best of these does not help and the
    basis is too oblique for float32. What an exchange gains is computed in float64 before it is
    made.
    """
    inverse, log_det = _invert(search, rows)
    noise = _judge(search, rows, inverse, log_det)
    coarse = search.single
    products = coarse.y @ coarse.y[:, rows].mT
    exactly = False
    for _ in range(MAX_EXCHANGES):
        oblique = bool(noise.max() > COARSE_LIMIT)
        if oblique and exactly:
            change = _changes(search, rows, noise, inverse)
        else:
            change = _changes(coarse, rows, noise.float(), inverse.float(), products)
        row, slot = divmod(int(change.argmin()), len(rows))
        trial = rows.clone()
        trial[slot] = row
        if noise.max() > NEARLY_SINGULAR:
            new_inverse, new_log_det = _invert(search, trial)
        else:
            new_inverse, growth = _replace(search, rows, inverse, row, slot)
            new_log_det = log_det + growth.log()
        after = _judge(search, trial, new_inverse, new_log_det)
        if after.sum() < (1 - MIN_GAIN) * noise.sum():
            rows, noise, inverse, log_det = trial, after, new_inverse, new_log_det
            products[:, :, slot] = (coarse.y @ coarse.y[:, row].unsqueeze(2)).squeeze(2)
        elif oblique and not exactly:
            exactly = True
        else:
            break
    return rows.sort().values


def _changes(
    search: Heads, rows: Tensor, noise: Tensor, inverse: Tensor, products: Tensor | None = None
) -> Tensor:
    """[E, r]: change of Σ_g J_g when row i takes the place of basis row j.

    With C = Y Y_Bᵀ X the coefficients of all rows in the basis rows, X = (Y_B Y_Bᵀ + δ)⁻¹ with
    diagonal ω², ρ_i the distance of row i from the span and n = ‖y‖²: the squared volume changes by
    γ_ij = C_ij² + ρ_i² ω_j² (Gu and Eisenstat 1996), X by rank two (``_replace``), and

        k γ_ij ΔJ = ω_j² (Σ_b n_b C_ib² + n_i) - ρ_i² Σ_b n_b X_bj² - 2 C_ij (C diag(n_B) X)_ij.

    ``products`` [G, E, r] are Y Y_Bᵀ, if known.
    """
    g, e, _ = search.y.shape
    r = len(rows)
    total = search.y.new_zeros(e, r)
    if products is None:
        products = search.y @ search.y[:, rows].mT
    for part in torch.arange(g).split(max(1, SCORED_AT_ONCE // (e * r))):
        span = slice(int(part[0]), int(part[-1]) + 1)
        sizes, x, rank = search.sizes[span], inverse[span], search.rank[span]
        c = products[span] @ x
        omega = x.diagonal(dim1=1, dim2=2)
        apart = search.energy[span] + REGULARISER - (c * products[span]).sum(-1)
        apart = apart.clamp_min(REGULARISER).unsqueeze(2)
        basis_sizes = sizes[:, rows].unsqueeze(2)
        weighted = basis_sizes * x / rank[:, None, None]
        growth = c.square()
        of_row = torch.cat([growth @ basis_sizes + sizes.unsqueeze(2), -apart], 2)
        of_slot = torch.stack([omega / rank[:, None], (x * weighted).sum(1)], 1)
        growth.addcmul_(apart, omega.unsqueeze(1))
        delta = (of_row @ of_slot).addcmul_(c, c @ weighted, value=-2).div_(growth)
        for head in (rank < r).nonzero().flatten().tolist():
            by_volume = growth[head].pow(-1 / float(rank[head])) - 1
            delta[head] = noise[span][head] * by_volume
        total += delta.sum(0)
    total[rows] = torch.inf
    return total


def _best_window(search: Heads, size: int) -> Tensor:
    """Slide the window by one row at a time; judge the best few once more from scratch."""
    e = search.y.shape[1]
    totals: list[float] = []
    updates, worst = REFRESH_EVERY, 0.0
    for start in range(e - size + 1):
        if updates == REFRESH_EVERY or worst > NEARLY_SINGULAR:
            updates = 0
            rows = torch.arange(start, start + size)
            inverse, log_det = _invert(search, rows)
        else:
            slot = updates % size
            inverse, growth = _replace(search, rows, inverse, start + size - 1, slot)
            log_det = log_det + growth.log()
            rows[slot] = start + size - 1
            updates += 1
        judged = _judge(search, rows, inverse, log_det)
        totals.append(float(judged.sum()))
        worst = float(judged.max())
    best = torch.tensor(totals).argsort(stable=True)[:REFRESH_EVERY].tolist()
    windows = [torch.arange(start, start + size) for start in best]
    exact = [float(_judge(search, rows, *_invert(search, rows)).sum()) for rows in windows]
    return windows[exact.index(min(exact))]


def _replace(
    search: Heads, rows: Tensor, inverse: Tensor, row: int, slot: int
) -> tuple[Tensor, Tensor]:
    """The inverse Gram matrix [G, r, r] with ``row`` in the place of ``rows[slot]``, and γ [G].

    With c = y_i Y_Bᵀ X, c̃ = c - e_j, m = X[:, j]:
    X' = X - [ ρ² m mᵀ + c_j (c̃ mᵀ + m c̃ᵀ) - ω_j² c̃ c̃ᵀ ] / γ.
    """
    y = search.y[:, row].unsqueeze(2)
    product = search.y[:, rows] @ y
    c = inverse @ product
    apart = y.square().sum(1, keepdim=True) + REGULARISER - (c * product).sum(1, keepdim=True)
    apart = apart.clamp_min(REGULARISER)
    m = inverse[:, :, slot, None]
    omega, at_slot = m[:, slot, None], c[:, slot, None].clone()
    growth = at_slot.square() + apart * omega
    c[:, slot] -= 1
    left = torch.cat([m, c], 2)
    right = torch.cat([apart * m + at_slot * c, at_slot * m - omega * c], 2) / growth
    return torch.baddbmm(inverse, left, right.mT, alpha=-1), growth.flatten()
