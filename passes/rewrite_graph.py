"""Rewrite the graph: linears that take part read derived weights and add basis features.

    y = linear(x, W, b)        →     x_B = x[rows],  x_R = x[rest]
                                     y = linear(x_R, C, b') + [x_B | 0 | x_B | 0 …]   per head

    y = linear(x, W, b)        →     y = linear(x, W', b')        for queries and output weights

    y = linear(z, O, b)        →     y_B = Σ_h z_h[:r] + b_B,  y_R = linear(z, C, b_R)
                                     y = [y_B | y_R][order]       for outputs that are decomposed

    op(c)                      →     op(c')                       for constants that turn along

Requires: a plan for this graph. Leaves: the same outputs for transformed weights, in plain ATen
(slice or index_select, linear, view, pad, add, cat) or, where the caller wants that, by one
operator for each decomposed piece (``emit_projection``); derived weights as new placeholders in
front, in the order of the returned names; placeholders that nobody reads any more are left for
the caller to remove.
Dimensions that were symbolic stay symbolic.

Pieces of one linear are joined in the order of its features only for a reader that needs them all
(``read_parts``). Where the rows are known and contiguous, x_B and x_R are slices; else they are
gathered with index tensors, which are inputs too, so that one graph can serve layers with different
rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.kernels.slot_pattern import period_of
from bda_fx.passes.canonicalize import Program
from bda_fx.passes.derived_inputs import Computed, DerivedInputs, device_of
from bda_fx.passes.emit_node import EMITTED, emit
from bda_fx.passes.emit_projection import (
    ChooseSpelling,
    Recipe,
    Spelling,
    always_aten,
    emit_projection,
    join_features,
    join_weights,
    weight_keys,
)
from bda_fx.passes.forms import (
    Form,
    Piece,
    arrangement_of,
    basis_key,
    bias_key,
    constant_key,
    forms_of,
    weight_key,
)
from bda_fx.passes.read_parts import read_parts
from bda_fx.passes.sites import Constant, Plan

aten = torch.ops.aten


@dataclass
class Rewritten:
    """Derived inputs of the new graph, in order: key of the tensor → placeholder name.

    The tensors are those of ``Transformed``, ``constants`` for the keys that depend on the plan
    alone (index tensors of irregular layouts), and ``computed`` from other derived tensors.
    """

    inputs: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    computed: dict[str, Computed] = field(default_factory=dict)


def rewrite_graph(
    program: Program,
    plan: Plan,
    derived: Mapping[str, Tensor],
    *,
    fixed_rows: bool,
    spelling: ChooseSpelling = always_aten,
) -> Rewritten:
    """Rewrite ``program`` in place. ``derived`` gives shapes and types of the derived tensors.

    With ``fixed_rows`` the plan's rows are part of the graph (an exported program); without, they
    are inputs (a compiled graph that serves many layers). ``spelling`` chooses, for each decomposed
    piece, between plain ATen and the operator.
    """
    rewriter = _Rewriter(program.graph, derived, plan, fixed_rows, spelling)
    nodes = {node.name: node for node in program.graph.nodes}
    for form in forms_of(plan):
        for name in form.linear.nodes:
            rewriter.rewrite(nodes[name], form)
    for item in plan.sites:
        for constant in item.site.constants:
            rewriter.give_own_copy(constant, nodes)
    for fold in plan.folds:
        for name, key in fold.constants:
            nodes[name].replace_all_uses_with(rewriter.input(key))
    program.module.recompile()
    return Rewritten(rewriter.inputs, rewriter.constants, rewriter.made)


def rewrite_linear(
    graph: fx.Graph,
    node: fx.Node,
    form: Form,
    plan: Plan,
    derived: Mapping[str, Tensor],
    *,
    fixed_rows: bool,
    spelling: ChooseSpelling,
) -> Rewritten:
    """The same for a single linear ``node``, which takes ``form``: to see what that costs."""
    rewriter = _Rewriter(graph, derived, plan, fixed_rows, spelling)
    rewriter.rewrite(node, form)
    return Rewritten(rewriter.inputs, rewriter.constants, rewriter.made)


class _Rewriter(DerivedInputs):
    def __init__(
        self,
        graph: fx.Graph,
        derived: Mapping[str, Tensor],
        plan: Plan,
        fixed_rows: bool,
        spelling: ChooseSpelling,
    ) -> None:
        super().__init__(graph, derived)
        self.spelling = spelling
        self.rows = {item.basis: item.rows for item in plan.sites} if fixed_rows else {}
        # Where x comes in basis order, the basis is its first features, whatever the weights.
        sizes = {item.basis: item.size for item in plan.sites}
        self.rows.update({fold.basis: tuple(range(sizes[fold.basis])) for fold in plan.folds})
        self.gathered: dict[tuple[fx.Node, str], tuple[fx.Node, fx.Node | None]] = {}

    def rewrite(self, node: fx.Node, form: Form) -> None:
        x, bias = node.args[0], (*node.args, None)[2]
        with self.graph.inserting_before(node):
            results = self.results(node, x, bias, form)
            reads = read_parts(node, form) if len(results) > 1 else None
            if reads is None:
                results = [self.assemble(node, results, form)]
        for result in results:
            result.meta.update(
                {k: v for k, v in node.meta.items() if k not in ("val", "spelled_as")}
            )
        if reads is None:
            node.replace_all_uses_with(results[0])
        else:
            reads.redirect(self.graph, results)
        self.graph.erase_node(node)

    def results(self, node: fx.Node, x: Any, bias: Any, form: Form) -> list[fx.Node]:
        """What the linear gives, or its pieces."""
        if form.heads:
            return [self.outputs(node, x, bias, form)]
        spelled: list[Spelling] = [
            "aten" if piece.basis is None else self.spelling(x.meta["val"], form, at)
            for at, piece in enumerate(form.pieces)
        ]
        if "dense" in spelled:
            return [self.in_one(node, x, bias, form)]
        return [
            self.piece(node, x, bias, form, at, spelling) for at, spelling in enumerate(spelled)
        ]

    def in_one(self, node: fx.Node, x: Any, bias: Any, form: Form) -> fx.Node:
        """All pieces as one linear of the original's shape, in the new basis."""
        recipes: list[Recipe] = []
        keys: list[str] = []
        for at, piece in enumerate(form.pieces):
            window = None if piece.basis is None else self.window(piece.basis, piece.size)
            recipes.append(Recipe(piece.features, piece.size, piece.slots, window))
            keys += weight_keys(form, at, window)
        name = f"{form.linear.name}_in_one"
        arguments = [self.computed(name, partial(join_weights, recipes), keys)]
        if bias is not None:
            parts = [bias_key(form, at, bias.name) for at in range(len(form.pieces))]
            features = [piece.features for piece in form.pieces]
            which = form.linear.biases.index(bias.name)
            join = partial(join_features, features)
            arguments.append(self.computed(f"{name}_bias{which or ''}", join, parts))
        return emit(self.graph, aten.linear.default, x, *arguments, like=node)

    def piece(
        self, node: fx.Node, x: Any, bias: Any, form: Form, at: int, spelling: Spelling
    ) -> fx.Node:
        piece = form.pieces[at]
        bias = None if bias is None else self.input(bias_key(form, at, bias.name))
        extra = [] if bias is None else [bias]
        if piece.basis is None:
            weight = self.input(weight_key(form, at))
            return emit(self.graph, aten.linear.default, x, weight, *extra, like=node)
        if spelling != "aten":
            window, width = self.window(piece.basis, piece.size), period_of(piece.slots)
            return emit_projection(self, node, form, at, bias, window, width, spelling)
        basis, rest = self.gather(node, x, piece, form.linear.in_features)
        identity, groups, width = self.spread(node, basis, piece)
        if rest is None:
            whole = self.repeat(node, identity, groups, width)
            return emit(self.graph, aten.add.Tensor, whole, *extra, like=node) if extra else whole
        weight = self.input(weight_key(form, at))
        y = emit(self.graph, aten.linear.default, rest, weight, *extra, like=node)
        if groups == 1:
            return emit(self.graph, aten.add.Tensor, y, identity, like=node)
        grouped = self.split_last(node, y, (groups, width))
        total = emit(self.graph, aten.add.Tensor, grouped, identity, like=node)
        return self.split_last(node, total, (groups * width,), drop=2)

    def outputs(self, node: fx.Node, z: Any, bias: Any, form: Form) -> fx.Node:
        """A decomposed output projection: r outputs are sums over heads, others have weights."""
        (piece,) = form.pieces
        size, total, basis = piece.size, form.linear.out_features, piece.basis or ""
        axis = node.meta["val"].dim() - 1
        leading = emit(self.graph, aten.slice.Tensor, self.heads(node, z, form), axis + 1, 0, size,
                       like=node)  # fmt: skip
        total_b = emit(self.graph, aten.sum.dim_IntList, leading, [axis], like=node)
        key = "" if bias is None else bias_key(form, 0, bias.name)
        if bias is not None:
            total_b = emit(
                self.graph, aten.add.Tensor, total_b, self.input(f"{key}_basis"), like=node
            )
        if size == total:
            return total_b
        extra = [] if bias is None else [self.input(f"{key}_rest")]
        weight = self.input(weight_key(form, 0))
        others = emit(self.graph, aten.linear.default, z, weight, *extra, like=node)
        start = self.window(basis, size)
        if start is not None:
            parts = [total_b]
            if start > 0:
                parts.insert(0, self.cut(node, others, 0, start))
            if start < total - size:
                parts.append(self.cut(node, others, start, total - size))
            return emit(self.graph, aten.cat.default, parts, axis, like=node)
        joined = emit(self.graph, aten.cat.default, [total_b, others], axis, like=node)
        order = self.input(basis_key(basis, "order"))
        return emit(self.graph, aten.index_select.default, joined, axis, order, like=node)

    def window(self, basis: str, size: int) -> int | None:
        """The first row of a basis that is known to be contiguous."""
        rows = self.rows.get(basis)
        return rows[0] if rows is not None and rows[-1] - rows[0] == size - 1 else None

    def cut(self, node: fx.Node, x: fx.Node, start: int, end: int) -> fx.Node:
        axis = x.meta["val"].dim() - 1
        return emit(self.graph, aten.slice.Tensor, x, axis, start, end, like=node)

    def heads(self, node: fx.Node, z: fx.Node, form: Form) -> fx.Node:
        """z [*, F] as [*, heads, D]."""
        flat = tuple(column for head in form.heads for column in head)
        if flat != tuple(range(len(flat))):
            index = torch.tensor(flat, device=device_of(z))
            order = self.constant(f"{form.linear.name}_heads", index)
            axis = z.meta["val"].dim() - 1
            z = emit(self.graph, aten.index_select.default, z, axis, order, like=node)
        return self.split_last(node, z, (len(form.heads), len(form.heads[0])))

    def give_own_copy(self, constant: Constant, nodes: Mapping[str, fx.Node]) -> None:
        """One use of a constant reads the turned copy, through the same moves."""
        user, root = nodes[constant.user], nodes[constant.node]
        copies = {root: self.input(constant_key(constant))}
        last = root
        with self.graph.inserting_before(user):
            for name in constant.path:
                last = nodes[name]
                copies[last] = self.graph.node_copy(last, lambda n: copies.get(n, n))
                copies[last].meta[EMITTED] = True
        user.replace_input_with(last, copies[last])

    # -- the basis features -------------------------------------------------------------------

    def gather(
        self, node: fx.Node, x: fx.Node, piece: Piece, in_features: int
    ) -> tuple[fx.Node, fx.Node | None]:
        """x_B and x_R (None where r = E), once for every reader of x on this basis."""
        assert piece.basis is not None
        key = (x, piece.basis)
        if key not in self.gathered:
            self.gathered[key] = self.gather_after(node, x, piece, in_features)
        return self.gathered[key]

    def gather_after(
        self, node: fx.Node, x: fx.Node, piece: Piece, in_features: int
    ) -> tuple[fx.Node, fx.Node | None]:
        """Placed right after x, so that every reader of x can share it."""
        axis, size = x.meta["val"].dim() - 1, piece.size
        if size == in_features:
            return x, None
        basis = piece.basis or ""
        start = self.window(basis, size)
        if start is not None:
            anchor = _Anchor(self.graph, x if x.op != "placeholder" else self.last_input, node)
            end = start + size
            window = anchor.emit(aten.slice.Tensor, x, axis, start, end)
            ends = [(0, start), (end, in_features)]
            sides = [anchor.emit(aten.slice.Tensor, x, axis, a, b) for a, b in ends if a < b]
            rest = sides[0] if len(sides) == 1 else anchor.emit(aten.cat.default, sides, axis)
            return window, rest
        index = [self.input(basis_key(basis, part)) for part in ("rows", "rest")]
        anchor = _Anchor(self.graph, x if x.op != "placeholder" else self.last_input, node)
        gathered = [anchor.emit(aten.index_select.default, x, axis, i) for i in index]
        return gathered[0], gathered[1]

    def spread(self, node: fx.Node, basis: fx.Node, piece: Piece) -> tuple[fx.Node, int, int]:
        """The identity part for every head: (…, groups or 1, width), groups, width.

        The slots of a piece repeat with a period of ``width`` features: [x_B | 0] once for each
        product that shares the basis. It is built once and broadcast over the groups.
        """
        slots, width = piece.slots, period_of(piece.slots)
        groups = len(slots) // width
        axis = basis.meta["val"].dim() - 1
        runs: list[fx.Node] = []
        at = 0
        while at < width:
            end = at + 1
            if slots[at] < 0:
                while end < width and slots[end] < 0:
                    end += 1
                runs[-1:] = [self.pad(node, runs[-1], end - at)] if runs else []
                if not runs:
                    return self.spread_by_index(node, basis, piece)
            else:
                while end < width and slots[end] == slots[end - 1] + 1:
                    end += 1
                first, last = slots[at], slots[end - 1] + 1
                run = basis
                if (first, last) != (0, piece.size):
                    run = emit(self.graph, aten.slice.Tensor, basis, axis, first, last, like=node)
                runs.append(run)
            at = end
            if len(runs) > 4:
                return self.spread_by_index(node, basis, piece)
        whole = runs[0]
        if len(runs) > 1:
            whole = emit(self.graph, aten.cat.default, runs, axis, like=node)
        if groups > 1:
            whole = emit(self.graph, aten.unsqueeze.default, whole, axis, like=node)
        return whole, groups, width

    def spread_by_index(
        self, node: fx.Node, basis: fx.Node, piece: Piece
    ) -> tuple[fx.Node, int, int]:
        """Any order of slots: pick each feature's basis feature, or an appended zero."""
        axis, width = basis.meta["val"].dim() - 1, len(piece.slots)
        picks = [piece.size if slot < 0 else slot for slot in piece.slots]
        order = self.constant(f"{piece.basis}_slots", torch.tensor(picks, device=device_of(basis)))
        padded = self.pad(node, basis, 1)
        return emit(self.graph, aten.index_select.default, padded, axis, order, like=node), 1, width

    # -- putting the output together ----------------------------------------------------------

    def assemble(self, node: fx.Node, parts: list[fx.Node], form: Form) -> fx.Node:
        """Pieces back in the order of the original output features."""
        if len(parts) == 1:
            return parts[0]
        axis, arranged = node.meta["val"].dim() - 1, arrangement_of(form)
        total = form.linear.out_features
        if arranged is not None and arranged.groups == 1:
            ordered = [parts[at] for at in arranged.order]
            return emit(self.graph, aten.cat.default, ordered, axis, like=node)
        if arranged is not None:
            split = [
                self.split_last(node, parts[at], (arranged.groups, width))
                for at, width in zip(arranged.order, arranged.widths, strict=True)
            ]
            joined = emit(self.graph, aten.cat.default, split, axis + 1, like=node)
            return self.split_last(node, joined, (total,), drop=2)
        joined = emit(self.graph, aten.cat.default, parts, axis, like=node)
        placed = [feature for piece in form.pieces for feature in piece.features]
        where = [0] * total
        for at, feature in enumerate(placed):
            where[feature] = at
        order_tensor = torch.tensor(where, device=device_of(joined))
        index = self.constant(f"{form.linear.name}_order", order_tensor)
        return emit(self.graph, aten.index_select.default, joined, axis, index, like=node)


class _Anchor:
    """Emits nodes one after the other behind a given node."""

    def __init__(self, graph: fx.Graph, after: fx.Node, like: fx.Node) -> None:
        self.graph, self.after, self.like = graph, after, like

    def emit(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_after(self.after):
            self.after = emit(self.graph, target, *args, like=self.like)
        return self.after
