"""Run the Triton kernel under Triton's interpreter: a process of its own, as the switch is global.

    TRITON_INTERPRET=1 python -m tests.kernels.interpret_triton

Prints one JSON line for each form and dtype: how far the kernel and the ATen form are from float64.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from bda_fx.kernels import basis_projection_triton as kernel
from bda_fx.kernels.basis_projection import project_in_aten
from bda_fx.kernels.roofline import Tile
from tests.kernels.forms import FORMS, Form, by_definition, head

TILE = Tile(tokens=16, features=16, residual=16, stages=2, warps=4)

MORE = [
    Form("many steps", 150, 22, head(22, 24), 2, start=50, lead=(35,)),
    Form("many steps, scattered", 150, 22, head(22, 24), 2, start=None, lead=(35,)),
    Form("table of slots", 40, 6, (0, 2, 1, -1, 5, 3, -1, 0, 0, 4, 1, 1, 3), 3, lead=(19,)),
    Form("groups of tokens", 24, 8, head(8, 8), 5, start=3, lead=(150,)),
]
# Two splits and five: one part of the steps each, and more parts than there are steps.
RUNS = [
    *((form, 1) for form in FORMS),
    *((form, 2) for form in FORMS[::4]),
    *((form, splits) for form in MORE for splits in (1, 2, 5)),
]


def mend_bfloat16() -> None:
    """The interpreter keeps bfloat16 as its bits. It multiplies these, and cuts float32 to them.

    Tensor cores multiply the numbers, and ``tl.store`` rounds to nearest (tests/kernels/
    test_triton_compiled.py sees it do so in PTX).
    """
    builder = interpreter.InterpreterBuilder
    create_dot, cast = builder.create_dot, builder.cast_impl

    def widen(operand: Any) -> Any:
        return cast(None, operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand

    def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *rest)

    def round_to_nearest(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, tl.bfloat16)

    builder.create_dot = dot_of_numbers
    for name in ("create_fp_trunc", "cast_impl"):
        setattr(builder, name, round_to_nearest)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm()) if exact.norm() else 0.0


def measure(form: Form, splits: int, dtype: torch.dtype) -> dict[str, Any]:
    arguments = form.arguments(dtype)
    exact = by_definition(*arguments)
    tile = replace(TILE, splits=splits)
    got = kernel.project(*arguments, tile=tile)
    return {
        "form": form.name,
        "splits": splits,
        "terms": form.in_features - form.size,
        "shape": got.shape == exact.shape and got.dtype == dtype,
        "again": splits == 1 or torch.equal(got, kernel.project(*arguments, tile=tile)),
        "kernel": relative(got, exact),
        "aten": relative(project_in_aten(*arguments), exact),
    }


def views(dtype: torch.dtype) -> list[dict[str, Any]]:
    """The same for x that is not contiguous, up to offsets beyond 2³¹."""
    form = Form("", 24, 8, head(8, 8), 3, start=5, lead=(3, 4))
    measured = []
    far = torch.empty(2**31 + 2**28, dtype=dtype)  # pages that nobody touches take no memory
    for name, view in {
        "transposed features": lambda x: x.mT.contiguous().mT,
        "every other feature": lambda x: torch.stack([x, x], -1)[..., 0],
        "transposed tokens": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "slice of a sequence": lambda x: torch.cat([x, x], 1)[:, :4],
        "expanded": lambda x: x[:1, :1].expand_as(x),
        "tokens beyond 2³¹": lambda x: far.as_strided(x.shape, (2**30, 2**20, 1)).copy_(x),
        "features beyond 2³¹": lambda x: far.as_strided(x.shape, (4, 1, 2**27 - 2**25)).copy_(x),
        "three strides": lambda x: x.view(3, 2, 2, 24).transpose(1, 2),
    }.items():  # fmt: skip
        for scattered in (False, True):
            x, *others = replace(form, start=None if scattered else 5).arguments(dtype)
            strided = view(x)
            exact = by_definition(strided, *others)
            got = kernel.project(strided, *others, tile=TILE)
            measured.append(
                {
                    "form": f"{name}{', scattered' * scattered}", "splits": 1, "terms": 16,
                    "shape": got.shape == exact.shape, "again": True,
                    "kernel": relative(got, exact),
                    "aten": relative(project_in_aten(strided, *others), exact),
                }
            )  # fmt: skip
    return measured


def outputs_beyond() -> dict[str, Any]:
    """The first tile of an output of 16 × 2²⁸: its last row begins beyond 2³¹."""
    tokens, features = 16, 2**28
    x = torch.randn(tokens, 1).half()
    out = torch.empty(tokens * features, dtype=torch.float16)
    kernel._basis_projection[(1, 1)](
        x, x, x, x, x, out, out, out, tokens, tokens, features, 0, 1, 0, tokens, 0, 1, 1, 0, 1,
        WIDTH=1, RUNS=((0, 1, 0),), TABLE=False, SCATTERED=False, HAS_BIAS=False, PRECISION="ieee",
        BLOCK_TOKENS=16, BLOCK_FEATURES=16, BLOCK_RESIDUAL=16, SPLITS=1, GROUP=8,
    )  # fmt: skip
    got = torch.stack([out[row * features : row * features + 16] for row in range(tokens)])
    return {
        "form": "outputs beyond 2³¹", "splits": 1, "terms": 0, "shape": True, "again": True,
        "kernel": relative(got, x.double().expand(-1, 16)), "aten": 0.0,
    }  # fmt: skip


def main() -> None:
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"
    mend_bfloat16()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        # Where numbers lie does not depend on their dtype.
        for form, splits in RUNS if dtype == torch.float16 else RUNS[:22] + RUNS[-8:]:
            print(json.dumps({"dtype": str(dtype), **measure(form, splits, dtype)}))
    for measured in (*views(torch.float16), outputs_beyond()):
        print(json.dumps({"dtype": "torch.float16", **measured}))


if __name__ == "__main__":
    main()
