"""Run a program in float64, casts and all: the truth that errors are measured against.

``module.double()`` is not enough: many models cast to float32 inside (norms, softmax, rotary
tables), which would leave float32 noise in the reference. Here every floating-point tensor is
float64 and every floating-point ``dtype`` argument is read as float64. Weights are widened where
they are read, one at a time, so a float64 run needs little more memory than its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

Observer = Callable[[fx.Node, Any], None]
"""Called with every node and its value, in the order of execution."""

_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


def evaluate_float64(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> list[Tensor]:
    """Flat tensor outputs of ``program`` on the given inputs, computed in float64 throughout."""
    return evaluate(Wide(program.graph_module, torch.float64), program, args, kwargs)


def evaluate(
    interpreter: fx.Interpreter,
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Flat tensor outputs that ``interpreter`` gives of the graph of ``program``."""
    values = program._graph_module_flat_inputs(tuple(args), dict(kwargs or {}))
    with torch.no_grad():
        results = interpreter.run(*values)
    outputs = pytree.tree_leaves(user_outputs(program, results))
    return [v for v in outputs if isinstance(v, Tensor)]


def user_outputs(program: ExportedProgram, results: Sequence[Any]) -> Sequence[Any]:
    """What a caller sees of what the graph of ``program`` returns: new values of inputs and buffers
    come first."""
    signature = program.graph_signature
    return results[len(signature.buffers_to_mutate) + len(signature.user_inputs_to_mutate) :]


def float64_peak_bytes(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> int | None:
    """Most bytes that ``evaluate_float64`` will allocate at a time, from shapes alone.

    The graph runs on fake tensors of the inputs' sizes. None where it cannot, because a size
    depends on values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = program._graph_module_flat_inputs(tuple(args), dict(kwargs or {}))
    meter = _Meter(program.graph_module, torch.float64)
    try:
        fakes = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values]
        with mode, torch.no_grad():
            meter.run(*fakes)
    except Exception:  # whatever an op's shape rule raises: the real run may still be possible
        return None
    return meter.peak


class Wide(fx.Interpreter):
    """Runs a graph with every floating-point tensor at least as wide as ``dtype``."""

    def __init__(
        self, module: fx.GraphModule, dtype: torch.dtype, observe: Observer | None = None
    ) -> None:
        super().__init__(module)
        self.dtype = dtype
        self.observe = observe
        self.written = _written(module.graph)
        narrow = [torch.float16, torch.bfloat16, torch.float32]
        self.wider = {
            **dict.fromkeys(narrow, dtype),
            **dict.fromkeys((torch.complex32, torch.complex64), _COMPLEX[dtype]),
        }

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.observe is not None:
            self.observe(n, value)
        return value

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        if target not in self.written or not isinstance(value, Tensor):
            return value
        # Later reads must see what is written, and the caller's own tensor must not change.
        return self.widen(value.clone())

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        args, kwargs = pytree.tree_map(self.widen, (args, kwargs))
        if target is torch.ops.aten.full.default and isinstance(args[1], float):
            kwargs = {"dtype": self.dtype, **kwargs}
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        # Bodies of higher-order ops (autocast and grad-mode regions) run wide too.
        return type(self)(value, self.dtype).run if isinstance(value, fx.GraphModule) else value

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map(self.widen, super().output(target, args, kwargs))

    def widen(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self.wider.get(value, value)
        if isinstance(value, Tensor) and value.dtype in self.wider:
            return value.detach().to(self.wider[value.dtype])
        return value


def _written(graph: fx.Graph) -> set[str]:
    """Placeholders that an in-place op writes to, or to a view of: what its first operand is made
    of, first operand by first operand, which may be too many."""
    found = set()
    for node in graph.nodes:
        if not writes(node.target):
            continue
        while node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        if node.op == "placeholder":
            found.add(str(node.target))
    return found


def writes(target: Any) -> bool:
    """Whether an op writes to an operand."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


class _Meter(Wide):
    """Counts what is allocated: results that are alive, and the widened copies that an op reads."""

    peak = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        live: dict[Any, int] = {}
        for node, value in self.env.items():
            if node.op != "placeholder" or node.target in self.written:
                live.update(_storages(value))
        live.update(_storages(result))
        copies = sum(
            value.numel() * self.wider[value.dtype].itemsize
            for value in pytree.tree_leaves((args, kwargs))
            if isinstance(value, Tensor) and self.wider.get(value.dtype, value.dtype) != value.dtype
        )
        self.peak = max(self.peak, sum(live.values()) + copies)
        return result


def _storages(value: Any) -> Iterator[tuple[Any, int]]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            yield storage._cdata, storage.nbytes()
