"""The truth that errors are measured against: a float64 run, or a float32 run with an error bar.

Float64 is the truth wherever it runs and fits in memory; its own error, some 1e-13, is nothing
beside that of any model in float32 or less. Where it does not, a float32 run can stand in for it
for a model in float16 or bfloat16, whose roundings are 2¹³ or 2¹⁶ times as coarse. How far the
float32 run is from the truth is then measured too, by a second run with the rounding errors of
another order of summation, put in by hand:

    truth_error = ‖y₃₂' − y₃₂‖ / ‖y₃₂‖

where in the run for y₃₂' every operand of an op that computes is multiplied by 1 + u √n ξ, with ξ
uniform in (−√3, √3) (variance one), u = 2⁻²⁴, and n the number of terms that the op adds up (one
for elementwise ops). This is Monte Carlo arithmetic (Parker, 1997) with the size of the
perturbation from the probabilistic bound √n u on a sum of n terms (Higham and Mary, 2019). Real
kernels sum in blocks and err less, so the estimate lies above the truth's own error; it is an
estimate all the same, no proof.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bda_fx.evaluate_float64 import Wide, evaluate, float64_peak_bytes, writes
from bda_fx.passes import op_rules

TruthName = Literal["auto", "float64", "float32"]

_MARGIN = 0.8
"""Share of the free memory that a float64 run may be foreseen to take; allocators waste some."""

# Their results are elements of their operands: they round nothing.
_EXACT = (
    op_rules.MOVES
    | op_rules.KEEPS
    | op_rules.METADATA
    | op_rules.overloads("embedding", "gather", "where", "masked_fill", "neg", "relu")
)


@dataclass(frozen=True)
class Truth:
    """In which dtype the truth is computed, and why not in float64 where it is not."""

    dtype: torch.dtype
    reason: str | None = None

    def outputs(
        self, program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Outputs, and in float32 those of the perturbed run (module docstring)."""
        if self.dtype == torch.float64:
            return evaluate(Wide(program.graph_module, self.dtype), program, args, kwargs), None
        with _true_float32():
            exact = evaluate(Wide(program.graph_module, self.dtype), program, args, kwargs)
            shaken = evaluate(_Perturbed(program.graph_module, self.dtype), program, args, kwargs)
        return exact, shaken


def choose_truth(
    asked: TruthName, program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Truth, list[Tensor], list[Tensor] | None]:
    """The truth for a model, with its outputs on the first inputs.

    Raises:
        ValueError: float32 for a model that computes in float32 itself, or float64 that does not
            fit or does not run.
    """
    if asked not in ("auto", "float64", "float32"):
        raise ValueError(f"truth is 'auto', 'float64' or 'float32', got {asked!r}")
    reason: str | None = "as asked"
    if asked != "float32":
        reason = _too_large(program, args, kwargs) if asked == "auto" else None
        if reason is None:
            truth = Truth(torch.float64)
            try:
                return truth, *truth.outputs(program, args, kwargs)
            except (RuntimeError, TypeError, NotImplementedError) as error:  # also out of memory
                reason = f"the reference does not run in float64 ({_first_line(error)})"
                if asked == "float64":
                    raise ValueError(f"{reason}: pass truth='float32' for a half-precision model") \
                        from error  # fmt: skip
    if not computes_in_half(program):
        cause = "" if asked == "float32" else f"{reason}, and "
        raise ValueError(
            f"{cause}a float32 run is no truth for a model that computes in float32: it has the "
            "same rounding errors. Verify with smaller inputs or where there is more memory, or "
            "pass truth='float64' to try regardless"
        )
    truth = Truth(torch.float32, reason)
    return truth, *truth.outputs(program, args, kwargs)


def computes_in_half(program: ExportedProgram) -> bool:
    """Whether a float16, bfloat16 or narrower tensor is computed anywhere in the program."""
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "call_function")
    return any(
        isinstance(v, Tensor) and v.is_floating_point() and v.dtype.itemsize <= 2 for v in values
    )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = [_meminfo("MemAvailable"), _control_group()]
    known = [value for value in free if value is not None]
    return min(known) if known else None


def _too_large(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str | None:
    """Why float64 does not fit, or None where it does or nobody can tell."""
    needed = float64_peak_bytes(program, args, kwargs)
    tensors = [v for v in program.state_dict.values() if isinstance(v, Tensor)]
    free = available_bytes(tensors[0].device if tensors else torch.device("cpu"))
    if needed is None or free is None or needed <= _MARGIN * free:
        return None
    return f"a float64 run needs {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free"


def _meminfo(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _control_group() -> int | None:
    """What a container may still take, under cgroup v2."""
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return max(0, int(limit) - int(used))  # "max" where there is no limit: a ValueError
    return None


class _Perturbed(Wide):
    """Multiplies operands by 1 + u √n ξ, from a fixed seed."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(module, dtype)
        self.noise = torch.Generator().manual_seed(0)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        rounds = isinstance(target, torch._ops.OpOverload) and target not in _EXACT
        if rounds and not writes(target):
            size = torch.finfo(self.dtype).eps / 2 * _summands(target, args) ** 0.5
            args = pytree.tree_map(lambda v: self.perturb(v, size), args)
        return super().call_function(target, args, kwargs)

    def perturb(self, value: Any, size: float) -> Any:
        value = self.widen(value)
        if not isinstance(value, Tensor) or value.dtype != self.dtype:
            return value
        uniform = torch.rand(value.shape, generator=self.noise, dtype=value.dtype)
        factor = (2 * uniform.to(value.device) - 1) * (3**0.5 * size)
        # Integers are exact: positions, counts, zeros and ones of masks, what they are filled with.
        return torch.where(value == value.trunc(), value, value + value * factor)


def _summands(target: torch._ops.OpOverload, args: Any) -> int:
    """How many terms an op adds up for one element, or more."""
    if torch.Tag.pointwise in target.tags:
        return 1
    tensors = [v for v in pytree.tree_leaves(args) if isinstance(v, Tensor)]
    if target in op_rules.CONVOLUTIONS:
        return max(1, args[1][0].numel())
    axes = 2 if target in op_rules.ATTENTION else 1  # features, and tokens
    return max((n for v in tensors if v.dim() >= 2 for n in v.shape[-axes:]), default=1)


@contextlib.contextmanager
def _true_float32() -> Iterator[None]:
    """Float32 products in float32: no TF32 or bfloat16 shortcuts."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
