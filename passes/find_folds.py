"""Find where the gather of x is free: the linear that makes x can put its features in basis order.

    x = norm(linear(h, A))  ──▶ readers        →     x[perm] = norm[perm](linear(h, A[perm]))

Between that linear and x only ops may stand that do the same to every feature: casts, elementwise
ops, reductions over all features, norms, views of the other axes; per-feature constants of theirs
are permuted along. Every reader of x must be a linear with a constant weight: it is on the one
basis, or has its columns permuted. Then x_B and x_R are slices. (MLA: ``kv_a_proj``, its norm and
``kv_b_proj``.)

Requires: ``find_sites``. Changes nothing.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from bda_fx.passes.canonicalize import Program, constant_nodes
from bda_fx.passes.find_linears import constant_linears, weight_name
from bda_fx.passes.label_features import live_nodes
from bda_fx.passes.op_rules import KEEPS, LINEAR, METADATA, overloads
from bda_fx.passes.sites import Fold, Found, Linear

_ELEMENTWISE = KEEPS | overloads(
    "mul", "add", "sub", "div.Tensor", "div.Scalar", "neg", "rsqrt", "sqrt", "pow", "square", "abs",
    "silu", "gelu", "relu", "sigmoid", "tanh",
)  # fmt: skip
_REDUCTIONS = overloads("mean.dim", "sum.dim_IntList", "var.correction")
_NORMS = overloads("layer_norm", "rms_norm")
_SPLITS = overloads("split.Tensor", "split_with_sizes", "chunk")
_UNSQUEEZE = overloads("unsqueeze")
_RESHAPES = _UNSQUEEZE | overloads("view.default", "_unsafe_view", "reshape", "expand")
_SLICES = overloads("slice.Tensor")


class _NoFold(Exception):
    """The gather of this x cannot be folded."""


def find_folds(program: Program, found: Found) -> dict[str, Fold]:
    """Folds by the weight of the K/V linear that they serve."""
    constants = constant_nodes(program)
    linears = constant_linears(program, constants)
    by_node = {node: linear for linear in linears.values() for node in linear.nodes}
    nodes = {node.name: node for node in program.graph.nodes}
    live = set(live_nodes(program.graph))
    folds: dict[str, Fold] = {}
    for weight in dict.fromkeys(site.linear.weight for site in found.sites):
        linear = linears[weight]
        if len(linear.nodes) != 1:
            continue
        x = nodes[linear.nodes[0]].args[0]
        try:
            folds[weight] = _Region(program, constants, by_node, live).fold(x, linear)
        except _NoFold:
            continue
    served = {site.linear.weight for site in found.sites}
    # Two projections on two bases cannot both have x in their order.
    return {w: f for w, f in folds.items() if not any(r.weight in served for r in f.readers)}


@dataclass
class _Region:
    program: Program
    constants: dict[str, fx.Node]
    linears: dict[str, Linear]
    live: set[fx.Node]
    features: set[fx.Node] = field(default_factory=set)
    invariant: set[fx.Node] = field(default_factory=set)
    permuted: dict[str, str] = field(default_factory=dict)
    producer: tuple[fx.Node, int] | None = None
    width: int = 0

    def fold(self, x: fx.Node, linear: Linear) -> Fold:
        self.width = linear.in_features
        self.visit(x)
        if self.producer is None:
            raise _NoFold
        made, first = self.producer
        readers = self.readers(x, linear)
        source = self.linears[made.name]
        if len(source.nodes) != 1 or any(len(r.nodes) != 1 for r in readers):
            raise _NoFold
        for name in self.permuted:
            inside = self.features | self.invariant
            if any(user in self.live and user not in inside for user in self.constants[name].users):
                raise _NoFold
        return Fold(source, first, self.width, tuple(self.permuted.items()), tuple(readers))

    def visit(self, node: Any) -> None:
        """``node`` has the features of x along its last axis, untouched in their order."""
        if node in self.features:
            return
        if getattr(node, "op", None) != "call_function":
            raise _NoFold
        if node.target in LINEAR:
            self.found_producer(node, node, 0)
            return
        self.features.add(node)
        if node.target is operator.getitem or node.target in _SLICES:
            self.visit_part(node)
        elif node.target in _NORMS:
            self.visit(node.args[0])
            if list(node.args[1]) != [self.width]:
                raise _NoFold
            for constant in node.args[2:4]:
                if isinstance(constant, fx.Node):
                    self.permute(constant)
        elif node.target in _ELEMENTWISE:
            self.visit_elementwise(node)
        elif node.target in _RESHAPES and self.keeps_last_axis(node):
            self.visit(node.args[0])
        else:
            raise _NoFold

    def keeps_last_axis(self, node: Any) -> bool:
        """A view whose rows of E features are the rows it was given."""
        before, after = node.args[0].meta["val"], node.meta["val"]
        if node.target in _UNSQUEEZE and node.args[1] in (-1, before.dim()):
            return False
        return before.shape[-1] == after.shape[-1] == self.width

    def visit_elementwise(self, node: fx.Node) -> None:
        for arg in node.all_input_nodes:
            value = arg.meta.get("val")
            if not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if arg.name in self.constants:
                self.permute(arg)
            elif value.shape[-1] == 1:
                self.visit_invariant(arg)
            else:
                self.visit(arg)

    def visit_invariant(self, node: Any) -> None:
        """``node`` does not depend on the order of the features."""
        if node in self.invariant:
            return
        self.invariant.add(node)
        if node.target in _REDUCTIONS:
            value = node.args[0].meta["val"]
            dims = node.args[1]
            if not isinstance(dims, list | tuple) or list(dims) not in ([-1], [value.dim() - 1]):
                raise _NoFold
            self.visit(node.args[0])
        elif node.target in _ELEMENTWISE:
            for arg in node.all_input_nodes:
                if isinstance(arg.meta.get("val"), Tensor) and arg.name not in self.constants:
                    self.visit_invariant(arg)
        else:
            raise _NoFold

    def visit_part(self, node: Any) -> None:
        """A split or slice of the producer's last axis."""
        whole: Any = node.args[0]
        first: Any = 0
        assert isinstance(whole, fx.Node)
        if node.target is operator.getitem:
            if whole.target not in _SPLITS:
                raise _NoFold
            parts = whole.meta["val"]
            axis = (*whole.args, 0)[2] if len(whole.args) > 2 else whole.kwargs.get("dim", 0)
            first = sum(int(part.shape[-1]) for part in parts[: node.args[1]])
            self.features.add(whole)
            source = whole.args[0]
        else:
            axis, first = (*node.args, 0, 0)[1:3]
            if (*node.args, 1)[4:5] not in ((), (1,)) or not isinstance(first, int) or first < 0:
                raise _NoFold
            source = whole
        if not isinstance(source, fx.Node) or source.target not in LINEAR:
            raise _NoFold
        if axis not in (-1, source.meta["val"].dim() - 1):
            raise _NoFold
        self.found_producer(source, node, first)

    def found_producer(self, linear: fx.Node, through: fx.Node, first: int) -> None:
        if linear.name not in self.linears or self.producer not in (None, (linear, first)):
            raise _NoFold
        self.producer = (linear, first)
        for user in linear.users:
            if user in self.live and user.target not in METADATA and user not in self.features:
                self.check_disjoint(user, linear, through, first)

    def check_disjoint(self, user: Any, linear: fx.Node, through: fx.Node, first: int) -> None:
        """Another reader of the producer must not see the permuted features."""
        if through is linear:
            return  # the whole output is x: its readers are checked with the region
        last = (-1, linear.meta["val"].dim() - 1)
        if user.target not in _SLICES or (*user.args, 0)[1] not in last:
            raise _NoFold
        start, size = (*user.args, 0)[2], user.meta["val"].shape[-1]
        if not isinstance(start, int) or start < 0:
            raise _NoFold
        if not (start + size <= first or start >= first + self.width):
            raise _NoFold

    def permute(self, constant: fx.Node) -> None:
        if tuple(constant.meta["val"].shape) != (self.width,):
            raise _NoFold
        self.permuted[constant.name] = weight_name(constant, self.program)

    def readers(self, x: fx.Node, linear: Linear) -> list[Linear]:
        """Linears that read x besides ``linear``; any other reader of the order is a refusal."""
        found: dict[str, Linear] = {}
        seen = set(self.features)
        made = self.producer[0] if self.producer is not None else None
        if made is not None and made.meta["val"].shape[-1] == self.width:
            seen.add(made)  # the whole output is permuted, for all of its readers
        for node in seen:
            for user in node.users:
                inside = user in self.features or user in self.invariant
                if user not in self.live or user.target in METADATA or inside:
                    continue
                if user.target is operator.getitem and node.target in _SPLITS:
                    continue  # another part of the split: not permuted
                reads_x = node is x and user.args[0] is x and user.name in self.linears
                if not reads_x or x in user.args[1:]:
                    raise _NoFold
                other = self.linears[user.name]
                if other.weight != linear.weight:
                    found[other.weight] = other
        return list(found.values())
