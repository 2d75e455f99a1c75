"""Canonicalize: any program becomes one functional, pre-dispatch ATen graph with named weights.

Requires: an ``nn.Module`` with example inputs, an ``ExportedProgram``, or a Dynamo graph.
Leaves:   a :class:`Program` whose graph mutates nothing (input mutations are ``copy_`` nodes at the
          end, as AOTAutograd leaves them), whose composite contractions (einsum, tensordot, inner)
          are spelled with ``bmm``, and whose weights are placeholders with fully qualified names.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from bda_fx.passes import op_rules

# Composite contractions; decomposed so that the finder sees movements around a bmm.
COMPOSITES = ("einsum", "tensordot", "inner", "addbmm", "chain_matmul", "linalg_multi_dot")

# Ops that write to running statistics, which their schemas do not say.
_HIDDEN_WRITES = ("batch_norm", "instance_norm")
# Aliasing composites with rules of their own; others are decomposed to what has rules.
_FOLLOWED = op_rules.MOVES | op_rules.KEEPS | op_rules.METADATA | op_rules.MATMULS


@dataclass(frozen=True)
class Spelling:
    """A node that ``normalize_linears`` spelled anew, by names."""

    replacement: str
    original: str
    linear: str
    """The linear node inside of the replacement."""


@dataclass
class Program:
    """A canonical graph and its weights, keyed by placeholder name."""

    module: fx.GraphModule
    names: dict[str, str]
    """Placeholder → fully qualified name, for every constant (parameter or unmutated buffer)."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Placeholder → value, where there is one."""
    exported: ExportedProgram | None = None
    spellings: list[Spelling] = field(default_factory=list)
    """What ``normalize_linears`` replaced, until ``restore_spellings``."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph


def canonicalize_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """Export ``model`` (in the training mode that it is in) and canonicalize the program."""
    with composite_attention(), torch.no_grad():
        exported = torch.export.export(
            model, tuple(args), kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    return canonicalize_exported(exported)


def canonicalize_exported(exported: ExportedProgram) -> Program:
    """Functionalise an exported program and name its weights; ``exported`` stays as it is."""
    if is_canonical(exported.graph):
        functional = _copied(exported)
    else:
        with composite_attention(), torch.no_grad():
            functional = _decomposed(exported)
    _copy_exchanged_buffers(functional)
    mutated = set(functional.graph_signature.buffers_to_mutate.values())
    names, tensors = {}, {}
    for spec in functional.graph_signature.input_specs:
        kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        if spec.kind not in kinds or spec.target is None or spec.target in mutated:
            continue
        names[spec.arg.name] = spec.target
        value = functional.state_dict.get(spec.target, functional.constants.get(spec.target))
        if isinstance(value, Tensor):
            tensors[spec.arg.name] = value
    program = Program(functional.graph_module, names, tensors, functional)
    merge_tied_weights(program)
    merge_equal_constants(program)
    return program


def is_canonical(graph: fx.Graph) -> bool:
    """Whether every op of an exported graph is functional and needs no decomposition."""
    plain: dict[Any, bool] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op != "call_function":
            return False
        if node.target not in plain:
            plain[node.target] = _is_canonical_op(node.target)
        if not plain[node.target]:
            return False
    return True


def _is_canonical_op(target: Any) -> bool:
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", None) in ("_operator", "math", "torch._sym_ops")
    name = target._schema.name.partition("::")[2]
    if target._schema.is_mutable or name in COMPOSITES:
        return False
    if any(hidden in name for hidden in _HIDDEN_WRITES):
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), torch._C.DispatchKey.CompositeImplicitAutograd
    )
    return not composite or not _aliases(target) or target in _FOLLOWED


def _aliases(target: torch._ops.OpOverload) -> bool:
    return any(value.alias_info for value in (*target._schema.arguments, *target._schema.returns))


def _decomposed(exported: ExportedProgram) -> ExportedProgram:
    """The program, functional. It is traced with a flat output: putting together what it returns
    may compute, as a DynamicCache does, and is no part of it."""
    flat = copy.copy(exported)
    entry, *others = exported.module_call_graph
    signature = entry.signature
    assert signature is not None
    leaves = pytree.tree_structure([0] * signature.out_spec.num_leaves)
    entry = replace(entry, signature=replace(signature, out_spec=leaves))
    flat._module_call_graph = [entry, *others]
    functional = flat.run_decompositions(_decompositions())
    traced = functional.module_call_graph[0].signature
    assert traced is not None
    traced.out_spec = signature.out_spec
    return functional


def _copied(exported: ExportedProgram) -> ExportedProgram:
    """The same program with a graph of its own."""
    graph = copy.deepcopy(exported.graph)
    for node, original in zip(graph.nodes, exported.graph.nodes, strict=True):
        node.name = original.name  # a copy renames what shadows a builtin, "input" for one
    graph.eliminate_dead_code()
    return ExportedProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=exported.graph_signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def _copy_exchanged_buffers(exported: ExportedProgram) -> None:
    """A buffer that becomes another one's new value is copied before it is overwritten itself."""
    graph, signature = exported.graph, exported.graph_signature
    output = graph.output_node()
    values = list(output.args[0])
    for at, spec in enumerate(signature.output_specs):
        value = values[at]
        if spec.kind is OutputKind.BUFFER_MUTATION and value.op == "placeholder":
            with graph.inserting_before(output):
                values[at] = graph.call_function(torch.ops.aten.clone.default, (value,))
            values[at].meta = dict(value.meta)
            spec.arg = TensorArgument(values[at].name)
    output.args = (tuple(values),)
    exported.graph_module.recompile()


def canonicalize_dynamo(module: fx.GraphModule, example_inputs: list[Any]) -> Program:
    """Trace a Dynamo graph to functional ATen; placeholders keep their order and their number."""
    placeholders = module.graph.find_nodes(op="placeholder")
    fakes = [
        p.meta.get("example_value", x) for p, x in zip(placeholders, example_inputs, strict=True)
    ]

    def run(*values: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return fx.Interpreter(module).run(*values)

    with composite_attention(), torch.no_grad(), _fake_factories(fakes):
        traced = make_fx(
            _functionalized(run),
            decomposition_table=_decompositions(),
            tracing_mode="real",
            pre_dispatch=True,
        )(*fakes)
    _drop_grad_mode_calls(traced.graph)
    names, tensors = {}, {}
    inputs = traced.graph.find_nodes(op="placeholder")
    written = {n.args[0] for n in traced.graph.nodes if n.target is torch.ops.aten.copy_.default}
    for node, original, value in zip(inputs, placeholders, example_inputs, strict=True):
        node.meta.setdefault("val", original.meta.get("example_value", value))
        name = name_of(original, value)
        if name is not None and node not in written:
            names[node.name] = name
            tensors[node.name] = value
    traced.recompile()
    program = Program(traced, names, tensors)
    merge_equal_constants(program)
    return program


def merge_tied_weights(program: Program) -> None:
    """Two names of one tensor become one placeholder: a reader of either is a reader of both."""
    first: dict[Any, fx.Node] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        tensor = program.tensors.get(node.name)
        if tensor is None or tensor.device.type == "meta" or tensor.numel() == 0:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        owner = first.setdefault(key, node)
        if owner is not node:
            node.replace_all_uses_with(owner)


def merge_equal_constants(program: Program) -> None:
    """Equal expressions of weights (the same transpose, the same slice) become one node."""
    constants = constant_nodes(program)
    known: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.name not in constants:
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        owner = known.setdefault(key, node)
        if owner is not node:
            node.replace_all_uses_with(owner)
            program.graph.erase_node(node)


def constant_nodes(program: Program) -> dict[str, fx.Node]:
    """Weights and everything computed from weights alone (lists of parts too), by node name.

    What a linear makes of a learned input (latent queries, position embeddings) is not a constant:
    the linear is a projection like any other.
    """
    found: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.names:
            found[node.name] = node
        elif (
            node.op == "call_function"
            and node.all_input_nodes
            and node.target not in op_rules.LINEAR
        ):
            part = node.target is operator.getitem
            pure = isinstance(node.target, torch._ops.OpOverload) and not node.is_impure()
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            known = all(n.name in found for n in node.all_input_nodes)
            value = node.meta.get("val")
            if known and (part or pure) and not random and isinstance(value, Tensor | list | tuple):
                found[node.name] = node
    return found


def roots_of(node: fx.Node) -> list[fx.Node]:
    """The placeholders that a constant expression is made of."""
    if node.op == "placeholder":
        return [node]
    found: dict[fx.Node, None] = {}
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            found[current] = None
        stack.extend(current.all_input_nodes)
    return list(found)


@contextlib.contextmanager
def composite_attention() -> Iterator[None]:
    """Keep ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` off their fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _decompositions() -> dict[Any, Any]:
    known = torch.export.default_decompositions()
    # The dict in it, where it is one that looks for ops of all other namespaces when it is read.
    table: dict[Any, Any] = getattr(known, "decomp_table", known)
    picked = {}
    for name in COMPOSITES:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if op in table:
                picked[op] = table[op]
    return picked


def _functionalized(run: Any) -> Any:
    """``run`` without in-place ops; what it did to its inputs is written back at the end."""
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    def plain(value: Any) -> Any:
        if not isinstance(value, FunctionalTensor):
            return value
        torch._sync(value)
        return torch._from_functional_tensor(value.elem)

    def wrapped(*values: Any) -> Any:
        mode = FunctionalTensorMode(pre_dispatch=True, export=True)
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        guard = torch._C._ExcludeDispatchKeyGuard(keys)
        with guard, mode:
            inputs = [
                FunctionalTensor.to_functional(v) if isinstance(v, Tensor) else v for v in values
            ]
            outputs = pytree.tree_map(plain, run(*inputs))
            changed = [
                (before, plain(after))
                for before, after in zip(values, inputs, strict=True)
                if isinstance(after, FunctionalTensor)
                and torch._functionalize_has_data_mutation(after.elem)  # type: ignore[attr-defined]
            ]
        for before, after in changed:
            torch.ops.aten.copy_.default(before, after)
        return outputs

    return wrapped


@contextlib.contextmanager
def _fake_factories(values: list[Any]) -> Iterator[None]:
    """Tensors that the graph makes (``arange``, masks) or holds are fake, as its inputs are."""
    modes = [v.fake_mode for v in values if isinstance(v, FakeTensor)]
    if not modes:
        yield
        return
    before = modes[0].allow_non_fake_inputs
    modes[0].allow_non_fake_inputs = True
    try:
        with modes[0]:
            yield
    finally:
        modes[0].allow_non_fake_inputs = before


def _drop_grad_mode_calls(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            graph.erase_node(node)


_ATTRIBUTE = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")


def name_of(placeholder: fx.Node, value: Any) -> str | None:
    """Fully qualified name of a parameter or buffer that Dynamo lifted to an input, else None."""
    source = getattr(placeholder, "_dynamo_source", None)
    text = "" if source is None else source.name if isinstance(source.name, str) else source.name()
    if not isinstance(value, Tensor):
        return None
    if isinstance(value, nn.Parameter) or "_buffers[" in text:
        return ".".join(_ATTRIBUTE.findall(text)) or placeholder.name
    return None


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    return value if isinstance(value, fx.Node) else (type(value).__name__, str(value))
