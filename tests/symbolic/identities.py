"""The formulas of the design, for matrices of any size (sympy's matrix symbols).

A change of basis S has, by construction, for P = [I_r | 0],

    W_B = P S,   W_R = C S,   b = b' S,   F = F' S

for basis rows, other rows, bias and whatever turns along. That is all that the proofs use, so they
hold for any completion of W_B to S, for r < D as for r = D, and for an S without inverse as long as
its rows span the head's (pruned heads). Heads are independent: what is said of one holds for each,
and for every query head of a group, which all meet the S of their key head.

E input features, D features of a head, r basis size; s query tokens, t key tokens; F outputs of the
output projection, of which z are left where r are the basis; p rotated features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sympy import BlockMatrix, Identity, MatrixExpr, MatrixSymbol, ZeroMatrix, expand, symbols
from sympy.matrices.expressions.blockmatrix import block_collapse

E, D, R, F, Z, P_ROT, S_TOKENS, T_TOKENS = symbols("E D r F z p s t", integer=True, positive=True)

Turn = Callable[[MatrixExpr], MatrixExpr]


@dataclass(frozen=True)
class Claim:
    """``before`` and ``after`` are the same matrix; ``says`` writes the claim in one line."""

    name: str
    says: str
    before: MatrixExpr
    after: MatrixExpr

    @property
    def holds(self) -> bool:
        return is_zero(self.before - self.after)


def is_zero(expression: MatrixExpr) -> bool:
    """Whether a polynomial in matrices is 0 whatever these are: all of its products cancel."""
    return expand(block_collapse(expression.doit()).doit()).is_ZeroMatrix is True


def matrix(name: str, rows: object, columns: object) -> MatrixSymbol:
    return MatrixSymbol(name, rows, columns)


def transposed(s: MatrixExpr) -> MatrixExpr:
    return s.T


def claims(turn: Turn = transposed, sign: int = 1) -> list[Claim]:
    """All identities. Queries are multiplied by ``turn(S)`` and outputs by its transpose; ``sign``
    is that of C. Anything but Sᵀ and +1 must break every claim that has it."""
    s, p = matrix("S", D, D), matrix("P", R, D)
    turned = turn(s)

    x_b, x_r = matrix("x_B", T_TOKENS, R), matrix("x_R", T_TOKENS, E - R)
    c, bias, ones = matrix("C", E - R, D), matrix("b'", 1, D), matrix("1_t", T_TOKENS, 1)
    key = x_b * p * s + x_r * c * s + ones * bias * s
    key_after = x_b * p + sign * x_r * c + ones * bias

    y, u = matrix("y", S_TOKENS, E), matrix("U", E, D)
    a, ones = matrix("a", 1, D), matrix("1_s", S_TOKENS, 1)
    query = y * u + ones * a
    query_after = y * (u * turned) + ones * (a * turned)

    attention, out = matrix("A", S_TOKENS, T_TOKENS), matrix("O", D, F)
    value, others = matrix("V", T_TOKENS, D), matrix("C_O", D, Z)
    rotated_q, rotated_k = matrix("ρQ", S_TOKENS, P_ROT), matrix("ρK", T_TOKENS, P_ROT)
    along, constant = matrix("F'", T_TOKENS, D), matrix("u", S_TOKENS, D)

    basis_rows, completion = matrix("W_B", R, D), matrix("M", D - R, D)
    stacked = BlockMatrix([[basis_rows], [completion]])
    leading = BlockMatrix([[Identity(R), ZeroMatrix(R, D - R)]])
    return [
        Claim("completion", "[I|0] [W_B ; M] = W_B", basis_rows, leading * stacked),
        Claim("qk", "(Q Sᵀ) K'ᵀ = Q Kᵀ", query * key.T, query_after * key_after.T),
        Claim(
            "vo",
            "A V' (S O) = A V O",
            attention * key * out,
            attention * key_after * (turned.T * out),
        ),
        Claim("qk, other side", "Q' (K Sᵀ)ᵀ = Q Kᵀ", key * query.T, key_after * query_after.T),
        Claim(
            "vo, other side: outputs of the basis",
            "(V S)[:, :r] = V O_B,  O_B = S Pᵀ",
            value * s * p.T,
            (value * turned.T) * p.T,
        ),
        Claim(
            "vo, other side: other outputs",
            "(V S) C = V O_R,  O_R = S C",
            value * s * others,
            (value * turned.T) * (sign * others),
        ),
        Claim(
            "rotated features",
            "[Q Sᵀ | ρQ] [K' | ρK]ᵀ = [Q | ρQ] [K | ρK]ᵀ",
            query * key.T + rotated_q * rotated_k.T,
            BlockMatrix([[query_after, rotated_q]]) * BlockMatrix([[key_after, rotated_k]]).T,
        ),
        Claim(
            "what turns along",
            "(Q Sᵀ) F'ᵀ = Q Fᵀ,  F = F' S",
            query * (along * s).T,
            query_after * along.T,
        ),
        Claim(
            "constants",
            "(Q Sᵀ + u Sᵀ) K'ᵀ = (Q + u) Kᵀ",
            (query + constant) * key.T,
            (query_after + constant * turned) * key_after.T,
        ),
    ]
