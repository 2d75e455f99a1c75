"""Each rule of the graph specification, broken once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bda_fx.passes.canonicalize import Program, canonicalize_module
from bda_fx.passes.check_graph import GraphError, check_graph
from bda_fx.passes.emit_node import emit
from tests.programs import Attention, example

aten = torch.ops.aten


def first_linear(program: Program) -> torch.fx.Node:
    return next(n for n in program.graph.nodes if n.target is aten.linear.default)


def dangling(program: Program) -> None:
    node = first_linear(program)
    with program.graph.inserting_after(node):
        emit(program.graph, aten.add.Tensor, node, node, like=node)


def wrong_shape(program: Program) -> None:
    node = first_linear(program)
    with program.graph.inserting_after(node):
        wrong = emit(program.graph, aten.clone.default, node, like=node)
    node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
    wrong.meta["val"] = wrong.meta["val"][..., :1]


def wrong_dtype(program: Program) -> None:
    wrong_shape(program)
    node = next(n for n in program.graph.nodes if n.target is aten.clone.default)
    node.meta["val"] = first_linear(program).meta["val"].double()


def does_not_run(program: Program) -> None:
    wrong_shape(program)
    node = next(n for n in program.graph.nodes if n.target is aten.clone.default)
    node.target = aten.view.default
    node.args = (node.args[0], [1, 1])


def no_value(program: Program) -> None:
    del first_linear(program).meta["val"]


def foreign_target(program: Program) -> None:
    first_linear(program).target = print


def late_placeholder(program: Program) -> None:
    with program.graph.inserting_after(first_linear(program)):
        program.graph.placeholder("late")


def out_of_order(program: Program) -> None:
    node = first_linear(program)
    user = next(iter(node.users))
    user.append(node)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (dangling, "nobody reads"),
        (wrong_shape, "meta says shape"),
        (wrong_dtype, "meta says dtype"),
        (does_not_run, "does not run"),
        (no_value, "no fake value"),
        (foreign_target, "unknown target"),
        (late_placeholder, "placeholders come first"),
        (out_of_order, "graph.lint"),
    ],
)
def test_a_broken_rule_is_named(spoil: Callable[[Program], None], rule: str) -> None:
    program = canonicalize_module(Attention(), (example(),))
    check_graph(program)
    spoil(program)
    with pytest.raises(GraphError, match=rule):
        check_graph(program)
