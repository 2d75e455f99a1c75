"""A hash of a Dynamo graph and of all that a rewrite of it depends on, weights included.

Equal hashes mean that the same code would be asked to do the same: the nodes with their values'
shapes, types and strides; every element of parameters and buffers; symbolic sizes with their
examples, ranges and the guards that hold; options; versions, sources and device. Whatever cannot be
told for certain (code of the user's own, tensor subclasses, sizes that depend on data) has no hash.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bda_fx.circumstances import circumstances, package_source_key
from bda_fx.passes.canonicalize import name_of
from bda_fx.passes.op_rules import ATTENTION
from bda_fx.tensor_bytes import tensor_bytes

OWN = ("torch", "operator", "_operator", "math", "builtins", "_functools")
"""Modules whose functions are known by name and version."""
OPS = ("aten", "prims", "prim", "bda_fx")
"""Namespaces of ops that are."""


_SYMBOLIC = (SymInt, torch.SymFloat, torch.SymBool)


class NoHash(Exception):
    """There is something in the graph that a hash cannot stand for."""


def hash_graph(
    module: fx.GraphModule, example_inputs: Sequence[Any], settings: object
) -> str | None:
    """The hash, as hex digits; None where there is none. ``settings``: whatever else counts, with a
    ``repr`` that tells it all.

    Cost: reading all weights, at a gigabyte and more a second.
    """
    digest = hashlib.sha256()
    weights: list[Tensor] = []
    try:
        for part in _parts(module, example_inputs, settings, weights):
            digest.update(repr(part).encode() + b"\0")
        for content in _contents(weights):
            digest.update(content)
    except NoHash:
        return None
    return digest.hexdigest()


def guards_of(values: Iterable[Any]) -> tuple[str, ...]:
    """What is known of the symbolic sizes in ``values``: guards, replacements and ranges."""
    known: list[str] = []
    for env in _environments(values):
        known += [str(guard.expr) for guard in env.guards]
        known += sorted(f"{old} = {new}" for old, new in env.replacements.items())
        known += sorted(f"{symbol} in {range_}" for symbol, range_ in env.var_to_range.items())
        known += sorted(f"{part} = 0" for part in env.divisible)
        known.append(str(env.num_deferred_runtime_asserts))
    return tuple(known)


def values_of(module: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """Inputs as Dynamo traced them: fake where they are tensors."""
    placeholders = module.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, example_inputs, strict=True)
    return [node.meta.get("example_value", given) for node, given in pairs]


def _parts(
    module: fx.GraphModule, example_inputs: Sequence[Any], settings: object, weights: list[Tensor]
) -> Iterable[object]:
    values = values_of(module, example_inputs)
    yield package_source_key()
    yield settings
    yield torch.version.git_version, torch.get_default_dtype(), torch.is_inference_mode_enabled()
    yield sorted((str(op), repr(rule)) for op, rule in ATTENTION.items())
    devices = {value.device for value in values if isinstance(value, Tensor)}
    yield sorted(repr(circumstances(device)) for device in devices)
    yield guards_of(values)
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, value, given in zip(placeholders, values, example_inputs, strict=True):
        name = name_of(node, given)
        yield name, isinstance(given, nn.Parameter), _value(given), _value(value)
        if name is not None:
            weights.append(given)
    yield from _graph(module, weights)


def _graph(module: fx.GraphModule, weights: list[Tensor]) -> Iterable[object]:
    for node in module.graph.nodes:
        yield node.op, node.name, _argument(node.args), _argument(node.kwargs)
        if "example_value" in node.meta:
            yield _value(node.meta["example_value"])
        if node.op == "call_function":
            yield _function(node.target)
        else:
            yield str(node.target)
        if node.op == "call_module":
            raise NoHash(f"a module, {node.target}")
        if node.op != "get_attr":
            continue
        held: Any = module
        for step in str(node.target).split("."):
            held = getattr(held, step)
        if isinstance(held, fx.GraphModule):
            yield from _graph(held, weights)
        elif isinstance(held, Tensor):
            yield _value(held)
            weights.append(held)
        else:
            raise NoHash(f"an attribute, {type(held)}")


def _function(target: Any) -> object:
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = str(target)
        if name.split(".")[0] in OPS:
            return name
    elif isinstance(target, torch._ops.HigherOrderOperator):
        return target.name()
    else:
        owner = getattr(target, "__module__", None) or type(target).__module__
        if owner.split(".")[0] in OWN and inspect.isroutine(target):
            return owner, getattr(target, "__qualname__", ""), str(getattr(target, "__self__", ""))
    raise NoHash(f"a function, {target}")


def _argument(value: Any) -> object:
    """Arguments of a node, nodes by their names; with a ``repr`` that tells them apart."""
    if isinstance(value, fx.Node):
        return "node", value.name
    if value is None or isinstance(value, bool | int | float | complex | str):
        return value
    if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return value
    if value is Ellipsis:
        return value
    if isinstance(value, slice):
        return "slice", *map(_argument, (value.start, value.stop, value.step))
    if isinstance(value, tuple | list):
        return type(value).__name__, *map(_argument, value)
    if isinstance(value, Mapping):
        return "dict", *((str(key), _argument(item)) for key, item in value.items())
    raise NoHash(f"an argument, {type(value)}")


def _value(value: Any) -> object:
    """All that is known of a value but its elements."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer, FakeTensor):
            raise NoHash(f"a tensor of type {type(value)}")
        if value.layout is not torch.strided or value.is_quantized:
            raise NoHash("a tensor that is not strided")
        sizes = tuple(map(_size, value.shape)), tuple(map(_size, value.stride()))
        offset = _size(value.storage_offset())
        flags = value.requires_grad, value.is_conj(), value.is_neg(), value.is_inference()
        return "tensor", *sizes, offset, value.dtype, value.device, *flags
    if isinstance(value, _SYMBOLIC):
        return _size(value)
    if isinstance(value, tuple | list):
        return type(value).__name__, *map(_value, value)
    return _argument(value)


def _size(value: Any) -> object:
    if not isinstance(value, _SYMBOLIC):
        return value
    if value.node.has_hint():
        return str(value.node.expr), value.node.hint
    raise NoHash("a size that depends on data")


def _environments(values: Iterable[Any]) -> list[ShapeEnv]:
    found: dict[int, ShapeEnv] = {}
    for value in values:
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, SymInt):
                found[id(size.node.shape_env)] = size.node.shape_env
    return list(found.values())


def _contents(tensors: Sequence[Tensor]) -> list[bytes]:
    """A digest of the elements of each tensor."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashlib lets go of the interpreter
        return list(pool.map(_content, tensors))


def _content(tensor: Tensor) -> bytes:
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        raise NoHash("a tensor without values")
    with torch.inference_mode(False), torch.no_grad():
        return hashlib.sha256(tensor_bytes(tensor)).digest()
