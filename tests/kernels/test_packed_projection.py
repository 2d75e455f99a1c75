"""The CPU kernel: every form and type against the formula in float64, any strides, any size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bda_fx.kernels.basis_projection import basis_projection, project_in_aten
from bda_fx.kernels.packed_projection import (
    DTYPES,
    pack,
    packed_projection,
    serves,
    unpack,
)
from tests.kernels.forms import FORMS, Form, by_definition, head
from tests.tolerances import KERNEL_TO_ATEN, kernel

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SCATTERED = next(form for form in FORMS if form.name == "scattered")
REAL = [
    Form("window", 192, 64, head(64, 64), 3, lead=(200,)),
    Form("window inside", 192, 64, head(64, 64), 3, start=37, lead=(200,)),
    Form("scattered", 384, 56, head(56, 64), 6, start=None, lead=(3, 67)),
    Form("scattered, odd", 257, 60, head(60, 64), 3, start=None, lead=(191,)),
    Form("key and value", 512, 96, head(96, 128) + head(96, 96), 2, start=None, lead=(130,)),
    Form("narrow", 96, 30, head(30, 32), 3, start=None, lead=(49,)),
    Form("wide", 2100, 128, head(128, 128), 2, start=None, lead=(33,)),
]


@pytest.fixture(autouse=True)
def _kernel() -> None:
    assert serves(torch.device("cpu"), torch.float32)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def packed(arguments: list[object]) -> Tensor:
    x, coefficients, *others = arguments
    assert isinstance(coefficients, Tensor)
    return packed_projection(x, pack(coefficients), *others, coefficients.shape[0])


@dtypes
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_is_the_formula(form: Form, dtype: torch.dtype) -> None:
    arguments = form.arguments(dtype)
    got, expected = packed(arguments), by_definition(*arguments)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert got.is_contiguous()
    if expected.numel():
        assert error(got, expected) <= kernel(dtype)


@dtypes
@pytest.mark.parametrize("form", REAL, ids=lambda form: form.name)
def test_as_near_to_float64_as_aten(form: Form, dtype: torch.dtype) -> None:
    arguments = form.arguments(dtype)
    expected = by_definition(*arguments)
    ours, aten = error(packed(arguments), expected), error(project_in_aten(*arguments), expected)
    assert ours <= KERNEL_TO_ATEN * aten


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "features apart": lambda x: torch.stack([x, x * 7], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "tokens swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows apart": lambda x: torch.cat([x, x * 7], -1)[..., : x.shape[-1]],
    "one token expanded": lambda x: x[:, :1].expand_as(x),
    "one row expanded": lambda x: x[:1, :1].expand_as(x),
    "overlapping": lambda x: x.flatten().as_strided((3, 70, 24), (24, 24, 1)),
    "off a boundary": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
}


@dtypes
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("start", [None, 0, 3])
def test_strides(view: Callable[[Tensor], Tensor], start: int | None, dtype: torch.dtype) -> None:
    arguments = replace(SCATTERED, start=start, lead=(3, 70)).arguments(dtype)
    arguments[0] = view(arguments[0])
    assert torch.equal(packed(arguments), packed([arguments[0].contiguous(), *arguments[1:]]))
    assert error(packed(arguments), by_definition(*arguments)) <= kernel(dtype)


@dtypes
@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 191, 192, 193, 577])
def test_token_counts(tokens: int, dtype: torch.dtype) -> None:
    arguments = replace(SCATTERED, lead=(tokens,)).arguments(dtype)
    whole = packed(arguments)
    rows = [packed([row, *arguments[1:]]) for row in arguments[0].split(64)]
    torch.testing.assert_close(whole, torch.cat(rows))
    assert error(whole, by_definition(*arguments)) <= kernel(dtype)


@dtypes
def test_threads_agree(dtype: torch.dtype) -> None:
    arguments = REAL[3].arguments(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed(arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_do_not_depend_on_their_number() -> None:
    x, *others = REAL[1].arguments(torch.float32)
    rows = [packed([x[first : first + 1], *others]) for first in range(len(x))]
    assert torch.equal(packed([x, *others]), torch.cat(rows))


@dtypes
@pytest.mark.parametrize("start", [None, 128])
def test_more_than_a_cache_holds(start: int | None, dtype: torch.dtype) -> None:
    """Blocks of tokens meet parts of the panels; which ones changes nothing."""
    form = Form("large", 512, 128, head(128, 256), 20, start=start, lead=(1500,))
    x, *others = form.arguments(dtype)
    assert torch.equal(packed([x, *others]), torch.cat([packed([y, *others]) for y in x.split(97)]))


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("form", REAL[:4], ids=lambda form: form.name)
def test_panels_of_other_machines(form: Form, width: int) -> None:
    x, coefficients, *others = form.arguments(torch.float32)
    outputs, inner = coefficients.shape
    filled = F.pad(coefficients, (0, 0, 0, -outputs % width))
    panels = filled.view(-1, width, inner).mT.contiguous()
    got = packed_projection(x, panels, *others, outputs)
    assert torch.equal(got, packed([x, coefficients, *others]))


def exercise(variant: str) -> None:
    """Every form by a kernel compiled for another CPU, in a process of its own."""
    code = f"from tests.kernels import sanitize as s; print(s.exercise(s.VARIANTS[{variant!r}]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100


@pytest.mark.slow
def test_a_unit_for_matrices() -> None:
    """bfloat16 by a unit for matrices, which plain loops stand in for."""
    exercise("emulated")


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="oneDNN multiplies no bfloat16 here"
)
def test_sixteen_bits_by_brgemm() -> None:
    exercise("brgemm")


@dtypes
@pytest.mark.parametrize("form", REAL[:4], ids=lambda form: form.name)
def test_without_onednn(form: Form, dtype: torch.dtype) -> None:
    """Coefficients packed for oneDNN are multiplied without it, as on a CPU that it lacks."""
    arguments = form.arguments(dtype)
    x, coefficients, *others = arguments
    panels = pack(coefficients)
    with torch.backends.mkldnn.flags(enabled=False):
        got = packed_projection(x, panels, *others, coefficients.shape[0])
    assert error(got, by_definition(*arguments)) <= kernel(dtype)


@dtypes
@pytest.mark.parametrize("shape", [(192, 128), (7, 5), (64, 0), (65, 1), (3, 2)])
def test_pack_and_unpack(shape: tuple[int, int], dtype: torch.dtype) -> None:
    coefficients = torch.randn(shape).to(dtype)
    panels = pack(coefficients)
    assert panels.shape[0] == -(-shape[0] // panels.shape[2])
    assert torch.equal(unpack(panels, *shape, dtype), coefficients)


def test_infinities_stay_where_they_are() -> None:
    """Padding must not turn them into nan: 0 · inf."""
    arguments = replace(SCATTERED, size=7, slots=head(7, 8), lead=(9,)).arguments(torch.bfloat16)
    arguments[1] = torch.ones_like(arguments[1])
    arguments[0][4] = float("inf")
    got = packed(arguments)
    assert got[4].eq(float("inf")).all()
    assert got[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("form", FORMS[:12:3], ids=lambda form: form.name)
def test_opcheck(form: Form) -> None:
    x, coefficients, *others = form.arguments(torch.float32)
    call = (x, pack(coefficients), *others, form.out_features)
    torch.library.opcheck(packed_projection.default, call)


def test_the_plain_operator_uses_the_kernel() -> None:
    arguments = REAL[2].arguments(torch.bfloat16)
    assert torch.equal(basis_projection(*arguments), packed(arguments))


def test_no_gradient() -> None:
    x, coefficients, *others = SCATTERED.arguments(torch.float32)
    call = (x.requires_grad_(), pack(coefficients), *others, 24)
    with pytest.raises(RuntimeError, match="basis_projection, on coefficients that are not"):
        packed_projection(*call)
    with torch.no_grad():
        assert not packed_projection(*call).requires_grad


def change(**new: object) -> list[object]:
    arguments: dict[str, object] = {
        "x": torch.zeros(5, 24),
        "packed": torch.zeros(1, 16, 64),
        "order": None,
        "bias": None,
        "start": 0,
        "size": 8,
        "slots": [*range(8)],
        "out_features": 24,
    }
    return list({**arguments, **new}.values())


BAD = {
    "panels": (change(out_features=65), "not those of 65 outputs"),
    "width": (change(packed=torch.zeros(1, 16, 24)), "not those of 24 outputs"),
    "inner": (change(size=7, slots=[0]), "of 17 features"),
    "window": (change(start=17), "not within"),
    "order": (change(order=torch.arange(23)), r"not int64 \[24\]"),
    "feature": (change(order=torch.arange(1, 25)), "order holds 24"),
    "bias": (change(bias=torch.zeros(23)), r"bias is not Float \[24\]"),
    "slot": (change(slots=[8]), "slot 8, expected -1 to 7"),
    "no slots": (change(slots=[]), "no slots"),
    "type": (change(packed=torch.zeros(1, 8, 64, 2, dtype=torch.bfloat16)), "packed for BFloat16"),
    "double": (change(x=torch.zeros(5, 24).double()), "no kernel for Double"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_errors(arguments: list[object], message: str) -> None:
    with pytest.raises((RuntimeError, IndexError), match=message):
        packed_projection(*arguments)


FAR = 2**31 + 64


@pytest.mark.skipif(os.name != "posix", reason="memory is taken only when it is written to")
@pytest.mark.parametrize("order", [None, torch.tensor([1, 4, 0, 2, 3, 5])])
def test_inputs_beyond_32_bits(order: Tensor | None) -> None:
    """Three tokens that lie 2³¹ elements apart, in memory of which three pages are ever written."""
    memory = torch.empty(2 * FAR + 6, dtype=torch.bfloat16)
    x = memory.as_strided((3, 6), (FAR, 1))
    x.copy_(torch.randn(3, 6))
    arguments = [x, torch.randn(4, 4).bfloat16(), order, None, 1, 2, [0, 1]]
    assert torch.equal(packed(arguments), packed([x.clone(), *arguments[1:]]))
    apart = memory.as_strided((2, 3, 2), (1, 2, FAR - 8)).transpose(1, 2)
    assert apart.stride() == (1, FAR - 8, 2)
    arguments = [apart.transpose(1, 2), torch.randn(4, 1).bfloat16(), None, None, 1, 1, [0]]
    assert torch.equal(
        packed(arguments).nan_to_num(), packed([arguments[0].clone(), *arguments[1:]]).nan_to_num()
    )


def free_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("BDA_FX_LARGE"), reason="5 GiB; make sanitize runs it")
def test_outputs_beyond_32_bits() -> None:
    if free_memory() < 6 * 2**30:
        pytest.skip("less than 6 GiB of memory are free")
    tokens = 2**25 + 3
    row = torch.randn(1, 2).bfloat16()
    x = row.expand(tokens, 2)
    arguments = [x, torch.randn(64, 1).bfloat16(), None, None, 1, 1, [0]]
    y = packed(arguments)
    assert y.numel() > 2**31
    expected = packed([row, *arguments[1:]])
    assert all(torch.equal(part, expected.expand_as(part)) for part in y.split(2**20))
