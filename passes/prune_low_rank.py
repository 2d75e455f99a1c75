"""Low-rank pruning with basis decomposition: a product of rank r in r (m + n - r) numbers.

    W ≈ P = A Aᵀ W,  A [m, r] the leading left singular vectors of W M^½,  M = E[x xᵀ]
    P = C_full P_B,  P_B = P[B, :] [r, n],  C = A_R A_B⁻¹  [m - r, r],  C_full = C on R, I on B
    y_B = P_B x,     y_R = C y_B

A low-rank matrix is fixed by r of its rows and by what the others are of them, so the r² numbers
that two factors A (AᵀW) hold to spare are not stored. In exact arithmetic every choice of
independent rows B gives the same P; in a working dtype C must be small, which is the choice that
``choose_basis`` makes for heads: A is one head, [1, m, r].

P minimises E‖(W - P) x‖² over all matrices of rank r (Eckart–Young for W M^½; P = A Aᵀ W needs no
inverse of M, so M may be singular). Without M it is the truncated SVD of W.

Sources: "Accelerating Attention with Basis Decomposition" (arXiv 2510.01718), BD of a product;
"Pivoting Factorization" (arXiv 2501.19090), which picks the rows by QR with pivoting. Shapes: W
[m, n] acts as y = W x, as PyTorch stores it. Everything is float64; callers round once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bda_fx.passes.choose_basis import choose_basis


@dataclass(frozen=True)
class PrunedWeight:
    """A weight [m, n] pruned to rank r, as basis and coefficients. Float64 or int64."""

    rows: Tensor
    """[r] output features that are the basis, ascending."""
    rest: Tensor
    """[m - r] the other output features, ascending."""
    basis: Tensor
    """[r, n] P_B: ``y[rows] = basis @ x``."""
    coefficients: Tensor
    """[m - r, r] C: ``y[rest] = coefficients @ y[rows]``."""
    error: float
    """‖(W - P) M^½‖ / ‖W M^½‖ (Frobenius): what pruning costs; the decomposition adds nothing."""
    condition: float
    """2-norm condition of A_B."""

    @property
    def numbers(self) -> int:
        """Numbers stored, r (m + n - r), beside the m row indices."""
        return self.basis.numel() + self.coefficients.numel()

    def dense(self) -> Tensor:
        """P [m, n]."""
        product = self.basis.new_empty(len(self.rows) + len(self.rest), self.basis.shape[1])
        product[self.rows] = self.basis
        product[self.rest] = self.coefficients @ self.basis
        return product


def prune_low_rank(
    weight: Tensor, rank: int, strategy: str = "pivot", second_moment: Tensor | None = None
) -> PrunedWeight:
    """The best approximation of ``weight`` [m, n] of this ``rank``, in r (m + n - r) numbers.

    ``second_moment`` [n, n] is E[x xᵀ] of the inputs, up to a factor; without it they count as
    white. ``strategy`` is one of ``choose_basis``. Cost O(m n min(m, n) + m r²), and O(n³) with a
    second moment.

    Raises:
        ValueError: a rank that is not in 1 … min(m, n) or above that of the weight (seen through
            the second moment); a second moment of another shape or with negative eigenvalues; inf
            or nan; rows that are dependent, as "first" and "residual-min" may choose them.
    """
    weight = weight.double()
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} for a weight [{m}, {n}]: choose between 1 and {min(m, n)}")
    if not weight.isfinite().all():
        raise ValueError("the weight holds inf or nan: expected finite values, leave it as it is")
    seen = weight if second_moment is None else weight @ _square_root(second_moment, n)
    left, sizes, _ = torch.linalg.svd(seen, full_matrices=False)
    largest = max(m, n) * torch.finfo(torch.float64).eps * float(sizes[0])
    full = int((sizes > largest).sum())
    if rank > full:
        raise ValueError(f"rank {rank} for a weight of rank {full}: choose between 1 and {full}")
    a = left[:, :rank].contiguous()
    rows = choose_basis(a.unsqueeze(0), rank, strategy)
    basis, coefficients = decompose_product_rows(a, a.T @ weight, rows)
    keep = torch.ones(m, dtype=torch.bool)
    keep[rows] = False
    rest = keep.nonzero().flatten()
    return PrunedWeight(
        rows=rows,
        rest=rest,
        basis=basis,
        coefficients=coefficients[rest],
        error=float(sizes[rank:].norm() / sizes.norm()),
        condition=float(torch.linalg.cond(a[rows])),
    )


def decompose_product_rows(a: Tensor, b: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """P = A B recovered from r of its rows: P = C P_B, with P_B = A_B B [r, n] and C [m, r].

    ``a`` [m, r], ``b`` [r, n], ``rows`` [r]; C is the identity on ``rows``. Returns (P_B, C), both
    float64. The paper's row-based BD identity (arXiv 2510.01718): r (m + n - r) numbers hold what
    the factors hold in r (m + n).

    Raises:
        ValueError: the rows of ``a`` are linearly dependent or not r in number.
    """
    a, b = a.double(), b.double()
    if len(rows) != a.shape[1]:
        raise ValueError(
            f"{len(rows)} rows for a product of inner size {a.shape[1]}: expected as many rows"
        )
    coefficients, info = torch.linalg.solve_ex(a[rows], a, left=False)
    if info:
        raise ValueError(
            f"rows {rows.tolist()} of the product are linearly dependent: choose others "
            "(choose_basis with strategy 'pivot')"
        )
    coefficients[rows] = torch.eye(len(rows), dtype=a.dtype, device=a.device)
    return a[rows] @ b, coefficients


def decompose_product_columns(a: Tensor, b: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """P = A B recovered from r of its columns: P = P_B C, with P_B = A B_B [m, r] and C [r, n].

    The column-based counterpart of ``decompose_product_rows``; the same shapes and errors.
    """
    basis, coefficients = decompose_product_rows(b.T, a.T, columns)
    return basis.T, coefficients.T


def _square_root(second_moment: Tensor, n: int) -> Tensor:
    """M^½ [n, n] up to a rotation from the right, which no singular value or left vector sees."""
    moment = second_moment.double()
    if moment.shape != (n, n):
        raise ValueError(
            f"second moment {list(moment.shape)} for inputs of size {n}: expected [{n}, {n}]"
        )
    if not moment.isfinite().all():
        raise ValueError("the second moment holds inf or nan: expected finite values")
    values, axes = torch.linalg.eigh((moment + moment.T) / 2)
    rounding = n * torch.finfo(torch.float64).eps * float(values.abs().max())
    if float(values[0]) < -max(rounding, torch.finfo(second_moment.dtype).eps * float(values[-1])):
        raise ValueError(
            f"second moment with eigenvalue {float(values[0]):.1e}: expected E[x xᵀ], which has "
            "none below zero"
        )
    return axes * values.clamp_min(0).sqrt()
