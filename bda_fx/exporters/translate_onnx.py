"""Translate a program to an ONNX model: standard ops, names that its users know, open axes.

``torch.onnx.export`` does the translation. Here inputs and outputs get their names, axes those of
the ``Dim`` they came from; ``drop_notes`` removes what the translator notes at every node (stack
traces with paths of this machine above all: more than a tenth of a small model's file).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from bda_fx.exporters.spell_complex import spell_complex

log = logging.getLogger("bda_fx")

OPSET = 23
"""The newest operator set that both torch's translator and ONNX Runtime release. From 23 on an
attention stays one op, ``Attention``, which ONNX Runtime runs 5 % faster (rxnfp, CPU)."""


def translate_onnx(
    program: ExportedProgram, dynamic_shapes: Any = None, opset: int | None = None
) -> ir.Model:
    """The program as a model of the standard operator set.

    ``dynamic_shapes``: as in ``torch.export.export``; names of its ``Dim`` become those of axes.
    """
    with _quiet(), _small_numbers_kept(), torch.no_grad():
        translated = torch.onnx.export(
            spell_complex(program),
            (),
            dynamo=True,
            verbose=False,
            opset_version=opset or OPSET,
            output_names=output_names(program),
        )
    assert translated is not None
    names = axis_names(program, dynamic_shapes)
    translated.rename_axes(dict(names.items()))
    return translated.model


def output_names(program: ExportedProgram) -> list[str]:
    """A name for each tensor output: its field or key, as the caller knows it.

    A model output class or a dict gives the names of its entries, nested ones joined with ".".
    Elsewhere an output is "output", or "output_0", "output_1", … if there are several.
    """
    spec = program.call_spec.out_spec
    assert spec is not None
    results = program.graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    values = list(results)[len(program.graph_signature.output_specs) - spec.num_leaves :]
    numbered = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = dict(_leaf_names(numbered, ""))
    tensors = [at for at, value in enumerate(values) if isinstance(value, torch.fx.Node)]
    if len(tensors) == 1 and names[tensors[0]] == "output_0":
        return ["output"]
    return [names[at] for at in tensors]


def _leaf_names(value: Any, prefix: str) -> Iterator[tuple[int, str]]:
    parts: list[tuple[str, Any]]
    if isinstance(value, int):
        yield value, prefix or "output_0"
        return
    if isinstance(value, Mapping):
        parts = [(str(key), item) for key, item in value.items()]
    elif dataclasses.is_dataclass(value):
        parts = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = list(zip(value._fields, value, strict=True))
    else:
        stem = prefix or "output"
        for at, item in enumerate(value):
            yield from _leaf_names(item, f"{stem}_{at}")
        return
    for name, item in parts:
        if item is not None:
            yield from _leaf_names(item, f"{prefix}.{name}" if prefix else name)


def axis_names(program: ExportedProgram, dynamic_shapes: Any = None) -> dict[str, str]:
    """Symbol of the program → name of the axis: the ``Dim``'s, else the first input's and axis'."""
    values = [node.meta["val"] for node in user_inputs(program)]
    asked = pytree.tree_leaves(dynamic_shapes, is_leaf=_describes_axes)
    names: dict[str, str] = {}
    for at, (node, value) in enumerate(zip(user_inputs(program), values, strict=True)):
        if not isinstance(value, Tensor):
            continue
        given = asked[at] if len(asked) == len(values) else None
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and str(size) not in names:
                names[str(size)] = _asked_name(given, axis) or f"{node.name}_axis{axis}"
    return names


def user_inputs(program: ExportedProgram) -> list[torch.fx.Node]:
    """Placeholders of the inputs that a caller passes, in order."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    specs = program.graph_signature.input_specs
    return [nodes[s.arg.name] for s in specs if s.kind is InputKind.USER_INPUT]


def _describes_axes(value: Any) -> bool:
    """Whether this part of ``dynamic_shapes`` is about one tensor."""
    if isinstance(value, Mapping):
        return all(isinstance(key, int) for key in value)
    return isinstance(value, tuple | list) and not any(
        isinstance(part, Mapping | tuple | list) for part in value
    )


def _asked_name(given: Any, axis: int) -> str | None:
    if isinstance(given, Mapping):
        dim = given.get(axis)
    else:
        dim = given[axis] if isinstance(given, tuple | list) and axis < len(given) else None
    if isinstance(dim, str):
        return dim
    return getattr(dim, "__name__", None) if isinstance(dim, torch.export.Dim) else None


def rename_inputs(model: ir.Model, names: Mapping[str, str]) -> None:
    """Give inputs the names that ``names`` has for theirs: name in the file → input of the program.

    What else has such a name gets another.
    """
    wanted = {ours: name for name, ours in names.items() if ours != name}
    if not wanted:
        return
    taken = set(wanted.values())
    inner = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (*model.graph.initializers.values(), *inner):
        if value.name in taken and not value.is_graph_output():
            value.name = f"{value.name}_inner"
    for value in model.graph.inputs:
        if value.name in wanted:
            value.name = wanted[value.name]


def drop_notes(model: ir.Model) -> None:
    """Drop what translator and rewrite rules note at nodes and values for their own debugging."""
    model.graph.metadata_props.clear()
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the translator's remarks about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _small_numbers_kept() -> Iterator[None]:
    """Without rules of the translator's optimiser that are no identities.

    It matches constants within 1e-8, or 1e-5 of their size (onnxscript 0.7): the epsilon 1e-12 of a
    norm that is spelled out counts as 0 and is dropped, and a factor of 1.000005 as 1.
    """
    try:
        from onnxscript import rewriter
        from onnxscript.rewriter.rules.common import _no_op

        rules = rewriter._DEFAULT_REWRITE_RULES
        exact = (_no_op.dropout_zero_rule, _no_op.dropout_inference_rule)
        inexact = {id(rule) for rule in _no_op.rules if rule not in exact}
    except (ImportError, AttributeError) as error:  # another version keeps them elsewhere
        log.warning("bda_fx: numbers below 1e-8 may be lost in translation (%s)", error)
        yield
        return
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if id(rule) not in inexact)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules
