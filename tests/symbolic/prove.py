"""Prove that a rewrite changes nothing: run a program and its rewrite on polynomials and compare.

The plan, the graph and the transformed weights are the passes' own, computed as for any user. Only
``change_basis``, whose numerics (QR, LU, SVD) mean nothing to a symbol, is replaced by the formula
that it computes,

    S = [ W_B ; M ],   C = W_R S⁻¹,   b' = b S⁻¹

with free symbols M where it takes an orthonormal null space. So what is proved holds for every
completion that makes S invertible. ``test_numbers`` ties the formula to the numbers that the real
function gives.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from bda_fx.options import Options
from bda_fx.passes import transform_weights as transforming
from bda_fx.passes.canonicalize import canonicalize_module
from bda_fx.passes.change_basis import ChangeOfBasis
from bda_fx.passes.predict_noise import Noise
from bda_fx.pipeline import transform
from tests.symbolic.execute import Symbolically
from tests.symbolic.polynomials import Polynomials

ChangeBasis = Callable[..., ChangeOfBasis]
Turn = Callable[..., Tensor]


@dataclass(frozen=True)
class Proof:
    """Outputs of a program and of its rewrite as ids of one table: equal ids, equal functions."""

    expected: list[Tensor]
    got: list[Tensor]
    symbols: int

    @property
    def holds(self) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.got, self.expected, strict=True))

    @property
    def differing(self) -> int:
        """Numbers of the output that the rewrite changes."""
        pairs = zip(self.got, self.expected, strict=True)
        return sum(int((a != b).sum()) for a, b in pairs)

    @property
    def numbers(self) -> int:
        """Numbers of the output: identities that the proof is about."""
        return sum(t.numel() for t in self.expected)


class Prover:
    """Symbols for one program's inputs and constants, and both ways to compute its outputs."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Tensor, ...],
        options: Mapping[str, Any],
        *,
        fixed_rows: bool = True,
    ) -> None:
        model = copy.deepcopy(model).double()
        args = tuple(a.double() for a in args)
        program = canonicalize_module(model, args)
        self.original = replace(program, module=copy.deepcopy(program.module))
        self.outcome = transform(program, Options.of(options), fixed_rows=fixed_rows)
        self.mode = Symbolically(Polynomials())
        self.inputs: dict[str, Tensor] = {}
        with self.mode:
            for node in self.original.graph.find_nodes(op="placeholder"):
                self.inputs[node.name] = self._symbols_of(node)
        self.changes: list[ChangeOfBasis] = []

    def _symbols_of(self, node: fx.Node) -> Tensor:
        """Symbols for a float tensor; index tensors are themselves."""
        value = self.original.tensors.get(node.name, node.meta["val"])
        if value.is_floating_point():
            return self.mode.symbols(node.name, tuple(value.shape))
        return self.original.tensors[node.name]

    def prove(
        self,
        *,
        change: ChangeBasis | None = None,
        turn: Turn | None = None,
        spoil: Callable[[fx.Graph], None] | None = None,
    ) -> Proof:
        """Both programs on symbols.

        ``change`` and ``turn`` take the place of the formulas for S and for its use on vectors, and
        ``spoil`` alters the rewritten graph: what tests use to show that a proof can fail.
        """
        expected = self.run_original()
        derived = self.derive(change, turn)
        got = self.run_rewritten(derived, self.inputs, spoil)
        return Proof(expected, got, self.mode.algebra.ring.ngens)

    def run_original(self) -> list[Tensor]:
        """Outputs of the original."""
        return self._run(self.original.module, self.inputs)

    def derive(
        self, change: ChangeBasis | None = None, turn: Turn | None = None
    ) -> dict[str, Tensor]:
        """The tensors of ``transform_weights`` as polynomials in the original weights."""
        assert self.outcome.constants is not None, "nothing was rewritten"
        changing, turning = change or self.complete_freely, turn or transforming.turn_vectors
        with self.mode, formulas(changing, turning):
            values = self.outcome.constants.evaluate(self.inputs)
            plan = self.outcome.plan
            return transforming.transform_weights(plan, values, use_planned_rows=True).tensors

    def run_rewritten(
        self,
        derived: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        spoil: Callable[[fx.Graph], None] | None = None,
    ) -> list[Tensor]:
        """Outputs of the rewritten graph, on derived tensors in place of weights."""
        module = copy.deepcopy(self.outcome.program.module)
        if spoil is not None:
            spoil(module.graph)
            module.recompile()
        known = {**self.outcome.tensors, **derived}
        read = {name: known[key] for key, name in self.outcome.inputs.items()}
        return self._run(module, {**inputs, **read})

    def complete_freely(
        self, heads: Tensor, rows: Tensor, bias: Tensor | None = None, moments: object = None
    ) -> ChangeOfBasis:
        """``change_basis`` with S = [W_B ; M] for free M: same arguments, same shapes."""
        size, width = len(rows), heads.shape[2]
        keep = torch.ones(heads.shape[1], dtype=torch.bool)
        keep[rows] = False
        rest = keep.nonzero().flatten()
        s = heads[:, rows]
        if size < width:
            name = f"m{len(self.changes)}"
            free = self.mode.symbols(name, (len(heads), width - size, width))
            s = torch.cat([s, free], 1)
        s_inv = self.mode.invert(s)
        turned = None if bias is None else (bias.unsqueeze(1) @ s_inv).squeeze(1)
        change = ChangeOfBasis(rows, rest, s, s_inv, heads[:, rest] @ s_inv, turned, 1.0, 0.0)
        self.changes.append(change)
        return change

    def _run(self, module: fx.GraphModule, values: Mapping[str, Tensor]) -> list[Tensor]:
        names = [node.name for node in module.graph.find_nodes(op="placeholder")]
        with self.mode:
            outputs = fx.Interpreter(module).run(*(values[name] for name in names))
        return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]


@contextlib.contextmanager
def formulas(change: ChangeBasis, turn: Turn) -> Iterator[None]:
    """``transform_weights`` with other formulas; the noise of symbols is not predicted."""
    with (
        mock.patch.object(transforming, "change_basis", change),
        mock.patch.object(transforming, "turn_vectors", turn),
        mock.patch.object(transforming, "moments_of"),
        mock.patch.object(transforming, "predict_noise", return_value=Noise(1.0, 1.0)),
        mock.patch.object(transforming, "keeps_range", return_value=True),
    ):
        yield
