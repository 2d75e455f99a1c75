"""Run torch code on polynomials: a float64 tensor holds their ids.

Moving an id moves the polynomial, so indexing, views, writes into views, concatenation and padding
by zero run as they are. Arithmetic is done in the table of ``Polynomials``; every op on or to
floats that is neither is refused, so nothing computes on ids by mistake. Ops on integers and
booleans alone (indices, masks) are left to torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.symbolic.polynomials import ONE, ZERO, Polynomials

MOVES = {
    "alias", "as_strided", "cat", "clone", "constant_pad_nd", "copy_", "detach", "empty",
    "empty_like", "empty_strided", "expand", "eye", "flip", "gather", "index", "index_put",
    "index_put_", "index_select", "lift_fresh", "lift_fresh_copy", "new_empty", "new_zeros",
    "ones", "permute", "repeat", "reshape", "roll", "select", "slice", "split",
    "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unfold", "unsqueeze",
    "view", "zeros", "zeros_like", "_reshape_alias", "_to_copy", "_unsafe_view",
}  # fmt: skip
"""Ops that move numbers, or make zeros and ones (whose ids are 0 and 1)."""
ELEMENTWISE = {"exp", "gelu", "rsqrt", "sigmoid", "silu", "sqrt", "tanh"}
ROWWISE = {"_softmax", "_safe_softmax"}
"""Functions that are not interpreted: of one number, or of a row of them."""


class Symbolically(TorchDispatchMode):
    """Within it, float64 tensors are tensors of ids of ``algebra``."""

    def __init__(self, algebra: Polynomials) -> None:
        super().__init__()
        self.algebra = algebra
        self.plain_attention = contextlib.ExitStack()

    def __enter__(self) -> Symbolically:
        self.plain_attention.enter_context(sdpa_kernel(SDPBackend.MATH))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.plain_attention.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        floats = _has_floats((args, kwargs))
        compute = getattr(self, f"compute_{name}", None)
        if compute is not None and floats:
            return compute(*args, **kwargs)
        if name in ELEMENTWISE and len(args) == 1 and not kwargs:
            return self.each(lambda a: self.algebra.apply(name, [a])[0], args[0])
        if name in ROWWISE:
            return self.rows(name, *args[:2])
        result = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        numbers = any(isinstance(a, float) and a not in (ZERO, ONE) for a in leaves)
        cast = not floats and any(isinstance(a, Tensor) for a in leaves)
        moved = name in MOVES and not numbers and not cast
        if not moved and (floats or _has_floats(result)):
            raise NotImplementedError(f"{func} on polynomials: add it to tests/symbolic/execute.py")
        return result

    # -- tensors of ids -----------------------------------------------------------------------

    def symbols(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of new symbols, ``name`` and its indices."""
        indices = torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape))
        names = [f"{name}_{'_'.join(map(str, index))}" for index in indices.tolist()]
        return _ids(self.algebra.symbols(names), shape)

    def invert(self, matrices: Tensor) -> Tensor:
        """Inverses of matrices [n, D, D]."""
        lists = matrices.long().tolist()
        return _ids([self.algebra.inverse(matrix) for matrix in lists], matrices.shape)

    def each(self, compute: Callable[..., int], *tensors: Any) -> Tensor:
        """``compute`` on ids, element by element, with broadcasting; scalars are numbers."""
        ids = [self.operand(t) for t in tensors]
        ids = list(torch.broadcast_tensors(*ids))
        columns = [t.reshape(-1).long().tolist() for t in ids]
        return _ids([compute(*row) for row in zip(*columns, strict=True)], ids[0].shape)

    def operand(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.tensor(float(self.algebra.number(value)), dtype=torch.float64)
        if value.is_floating_point():
            return value
        numbers = [self.algebra.number(n) for n in value.reshape(-1).tolist()]
        return _ids(numbers, value.shape)

    def rows(self, name: str, x: Tensor, dim: int) -> Tensor:
        last = x.movedim(dim, -1)
        width = last.shape[-1]
        rows = last.reshape(-1, width).long().tolist()
        results = [self.algebra.apply(name, row, width) for row in rows]
        return _ids(results, last.shape).movedim(-1, dim)

    # -- arithmetic ---------------------------------------------------------------------------

    def compute_equal(self, a: Tensor, b: Tensor) -> bool:
        """Ids are equal exactly if the polynomials are."""
        return torch.equal(a, b)

    def compute_add(self, a: Any, b: Any, *, alpha: int = 1) -> Tensor:
        return self.each(lambda i, j: self.algebra.add(i, j, alpha), a, b)

    def compute_sub(self, a: Any, b: Any, *, alpha: int = 1) -> Tensor:
        return self.each(lambda i, j: self.algebra.add(i, j, -alpha), a, b)

    def compute_neg(self, a: Tensor) -> Tensor:
        return self.compute_sub(0, a)

    def compute_mul(self, a: Any, b: Any) -> Tensor:
        return self.each(self.algebra.multiply, a, b)

    def compute_div(self, a: Tensor, b: float) -> Tensor:
        return self.compute_mul(a, 1 / Fraction(b))

    def compute_pow(self, a: Tensor, exponent: int) -> Tensor:
        power = a
        for _ in range(exponent - 1):
            power = self.compute_mul(power, a)
        return power

    def compute_sum(
        self, a: Tensor, dims: list[int] | None = None, keepdim: bool = False
    ) -> Tensor:
        axes = sorted(d % a.dim() for d in dims or range(a.dim()))
        kept = [d for d in range(a.dim()) if d not in axes]
        rows = a.permute(*kept, *axes).reshape(*(a.shape[d] for d in kept), -1)
        totals = [self.algebra.total(row) for row in rows.flatten(0, -2).long().tolist()]
        shape = [1 if d in axes else n for d, n in enumerate(a.shape) if keepdim or d not in axes]
        return _ids(totals, shape)

    def compute_mean(self, a: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
        total = self.compute_sum(a, dims, keepdim)
        return self.compute_mul(total, Fraction(total.numel(), a.numel()))

    def compute_mm(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = a.long().tolist(), b.T.long().tolist()
        products = [[self.algebra.dot(row, column) for column in right] for row in left]
        return _ids(products, (a.shape[0], b.shape[1]))

    def compute_bmm(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([self.compute_mm(x, y) for x, y in zip(a, b, strict=True)])

    def compute_addmm(self, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.compute_add(self.compute_mm(a, b), bias)


def _ids(values: Any, shape: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(tuple(shape))


def _has_floats(values: Any) -> bool:
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return any(t.is_floating_point() for t in tensors)
