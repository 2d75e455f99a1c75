"""Make an ``ExportedProgram`` of a rewritten graph: signature, state and constants that fit it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)

from bda_fx.outcome import Outcome

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def assemble_program(outcome: Outcome) -> ExportedProgram:
    """The program of ``outcome``: derived tensors in, weights that nobody reads any more out."""
    exported = outcome.program.exported
    assert exported is not None
    graph = outcome.program.graph
    signature = exported.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    kept = set(signature.buffers_to_mutate.values())
    for node in graph.find_nodes(op="placeholder"):
        spec = specs.get(node.name)
        if spec and spec.kind in _STATE and not node.users and spec.target not in kept:
            graph.erase_node(node)
    taken = {spec.target for n in graph.find_nodes(op="placeholder") if (spec := specs.get(n.name))}
    state: dict[str, Any] = {}
    added: dict[str, InputSpec] = {}
    for key, placeholder in outcome.inputs.items():
        name = key if key not in taken else f"{key}_bda"
        tensor = outcome.tensors[key]
        floating = tensor.is_floating_point()
        kind = InputKind.PARAMETER if floating else InputKind.BUFFER
        argument = TensorArgument(name=placeholder)
        added[placeholder] = InputSpec(kind, argument, name, None if floating else True)
        state[name] = nn.Parameter(tensor, requires_grad=False) if floating else tensor
    inputs = []
    constants = dict(exported.constants)
    for node in graph.find_nodes(op="placeholder"):
        spec = added.get(node.name) or specs[node.name]
        inputs.append(spec)
        target = spec.target
        if node.name not in added and target is not None and target in exported.state_dict:
            state[target] = exported.state_dict[target]
    used = {spec.target for spec in inputs}
    constants = {name: value for name, value in constants.items() if name in used}
    return ExportedProgram(
        root=outcome.program.module,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, _outputs(graph, signature)),
        state_dict=state,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=constants,
        verifiers=exported.verifiers,
    )


def _outputs(graph: fx.Graph, signature: ExportGraphSignature) -> list[OutputSpec]:
    """The output specs, with the names of the nodes that are outputs now."""
    values = graph.output_node().args[0]
    assert isinstance(values, tuple | list)
    return [
        replace(spec, arg=replace(spec.arg, name=value.name))
        if isinstance(value, fx.Node) and not isinstance(spec.arg, ConstantArgument)
        else spec
        for spec, value in zip(signature.output_specs, values, strict=True)
    ]


def constant_bytes(program: ExportedProgram | None) -> int:
    """Bytes of the parameters, buffers and constants that a program reads, shared storage counted
    once. What no node reads is in no artefact either, nor in a rewritten program."""
    if program is None:
        return 0
    read = {node.name for node in program.graph.find_nodes(op="placeholder") if node.users}
    seen: dict[Any, int] = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is None or spec.arg.name not in read:
            continue
        value = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if isinstance(value, Tensor):
            key = id(value) if value.device.type == "meta" else (value.data_ptr(), value.numel())
            seen[key] = value.numel() * value.element_size()
    return sum(seen.values())
