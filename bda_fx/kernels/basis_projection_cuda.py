"""What serves ``bda_fx::basis_projection`` on CUDA devices, eagerly and under Inductor.

Importing this module registers the Triton kernel (basis_projection_triton.py) as the operator's
CUDA implementation; triton itself is imported at the first call that it serves. Where it does not
serve (float64, a device before Ampere, no triton), the operator is its ATen form.

**Eager**: the implementation launches the kernel; autotuning at the first call with like shapes.

**Inductor** sees the operator as one node, and :func:`offer_to_inductor` gives it a lowering. With
max-autotune this is a choice between two forms, measured where they stand: the ATen form, whose
product is in turn what Inductor finds best (cuBLAS or its own templates) and whose gather and sum
fuse with what surrounds them, and the Triton kernel. Otherwise it is the kernel: the backend has
already decided for it. Either way the form chosen is traced into the graph (``wrap_triton``), so
that neither the dispatcher nor Python is called at run time. That is what AOTInductor needs (its
library holds the compiled kernel), and what CUDA graphs do well with: the kernel's workspace is an
ordinary buffer of the graph, there is no host sync, and nothing is left to be tuned at the first
replay.

A ``torch.library.triton_op`` would be traced as early as in AOTAutograd: a kernel is in the graph
then, opaque, before anything can be compared with cuBLAS. ``register_custom_op_autotuning`` would
measure at the same place as this lowering, but binds tensors by position, which goes wrong with a
bias and no order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bda_fx.kernels.basis_projection import (
    basis_projection,
    check_arguments,
    library,
    project_in_aten,
)
from bda_fx.kernels.slot_pattern import pattern_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CAPABILITY = (8, 0)
"""The first with tensor cores for bfloat16 and tf32, and with asynchronous copies."""


@cache
def _device_serves(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= CAPABILITY


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel takes inputs of this dtype on this device."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in DTYPES
        and find_spec("triton") is not None
        and _device_serves(torch.cuda.current_device() if device.index is None else device.index)
    )


def project_in_triton(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
) -> Tensor:
    """The operator by the Triton kernel, as an op that a tracer takes into its graph."""
    from bda_fx.kernels.basis_projection_triton import project

    wrap = torch.library.wrap_triton
    return project(x, coefficients, order, bias, start, size, slots, wrap=wrap)


def project_on_cuda(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    start: int,
    size: int,
    slots: Sequence[int],
) -> Tensor:
    """The CUDA implementation of the operator."""
    arguments = (x, coefficients, order, bias, start, size, slots)
    if not serves(x.device, x.dtype):
        return project_in_aten(*arguments)
    check_arguments(*arguments)
    from bda_fx.kernels.basis_projection_triton import project

    with torch.cuda.device(x.device):
        return project(*arguments)


library.impl("basis_projection", project_on_cuda, "CUDA")


def offer_to_inductor() -> None:
    """Give Inductor the lowering described above; again is no harm. Imports Inductor."""
    from torch._inductor.lowering import user_lowerings

    user_lowerings[basis_projection.default] = _lower


def _lower(
    x: Any,
    coefficients: Any,
    order: Any,
    bias: Any,
    start: Any,
    size: Any,
    slots: Sequence[int],
) -> Any:
    """The operator in Inductor's IR, or None: as Inductor takes any operator."""
    from torch._inductor import config, ir
    from torch._inductor.codegen.subgraph import SubgraphTemplate, inline_subgraph_to_ir_nodes
    from torch._inductor.select_algorithm import autotune_select_algorithm

    # Tokens may be dynamic; weights and what the kernel is compiled for may not.
    fixed = (start, size, *coefficients.get_size())
    if not all(getattr(number, "is_Integer", isinstance(number, int)) for number in fixed):
        return None
    if not serves(x.get_device(), x.get_dtype()):
        return None
    given = {"x": x, "coefficients": coefficients, "order": order, "bias": bias}
    tensors = {
        name: ir.TensorBox(ir.ExternKernel.realize_input(tensor))
        for name, tensor in given.items()
        if tensor is not None
    }

    def bound(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``form`` of the tensors there are, by position: so Inductor calls its choices."""

        def call(*values: Tensor) -> Tensor:
            every = {**dict.fromkeys(given), **dict(zip(tensors, values, strict=True))}
            return form(**every, start=start, size=size, slots=slots)

        call.__name__ = form.__name__
        return call

    forms: tuple[Callable[..., Tensor], ...] = (project_in_triton,)
    if config.max_autotune or config.max_autotune_gemm:
        forms = (project_in_aten, project_in_triton)
    if pattern_of(tuple(slots)).by_table:  # which would be copied to the device in each call
        forms = (project_in_aten,)
    name = "bda_fx_basis_projection"
    inputs: list[Any] = list(tensors.values())
    # Numbers drawn at random would be no features of x.
    generators = {
        place: lambda _: torch.randperm(
            size + int(coefficients.get_size()[1]), device=x.get_device()
        )
        for place, key in enumerate(tensors)
        if key == "order"
    }
    choices = SubgraphTemplate(name=name).generate_custom_op_choices(
        name=name,
        decompositions=[bound(form) for form in forms],
        input_nodes=inputs,
        non_tensor_args=[{} for _ in forms],
        input_gen_fns=generators or None,
    )
    if not choices:
        return None
    chosen = choices[0]
    if len(choices) > 1:
        _, chosen = autotune_select_algorithm(
            name, choices, inputs, choices[0].layout, input_gen_fns=generators or None
        )
    assert chosen.gm is not None  # every choice is a graph
    return inline_subgraph_to_ir_nodes(chosen.gm, inputs, name)
