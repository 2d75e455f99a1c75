"""Run a program in float64, casts and all: the truth that errors are measured against.

``module.double()`` is not enough: many models cast to float32 inside (norms, softmax, rotary
tables), which would leave float32 noise in the reference. Here every floating-point tensor is
float64 and every floating-point ``dtype`` argument is read as float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree


def evaluate_float64(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> list[Tensor]:
    """Flat tensor outputs of ``program`` on the given inputs, computed in float64 throughout."""
    values = program._graph_module_flat_inputs(tuple(args), dict(kwargs or {}))
    with torch.no_grad():
        results = _Float64(program.graph_module).run(*(_wide(v) for v in values))
    mutated = len(program.graph_signature.buffers_to_mutate) + len(
        program.graph_signature.user_inputs_to_mutate
    )
    return [v for v in pytree.tree_leaves(results[mutated:]) if isinstance(v, Tensor)]


class _Float64(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        args, kwargs = pytree.tree_map(_wide, (args, kwargs))
        if target is torch.ops.aten.full.default and isinstance(args[1], float):
            kwargs = {"dtype": torch.float64, **kwargs}
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        # Bodies of higher-order ops (autocast and grad-mode regions) run in float64 too.
        return _Float64(value).run if isinstance(value, fx.GraphModule) else _wide(value)


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    if isinstance(value, Tensor) and value.dtype in _WIDE:
        return value.detach().to(_WIDE[value.dtype])
    return value


_WIDE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}
