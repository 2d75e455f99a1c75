"""The operator on a GPU: right in every form, under CUDA graphs, under Inductor, ahead of time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bda_fx.kernels import basis_projection_cuda
from bda_fx.kernels.basis_projection import basis_projection, project_in_aten
from tests.kernels.forms import FORMS, Form, by_definition, head
from tests.tolerances import float32_sum

V2_LITE = Form("", 512, 128, head(128, 128), 32, start=0, lead=(2, 100))
LARGE = {
    "window": V2_LITE,
    "window in the middle": replace(V2_LITE, start=200),
    "scattered": replace(V2_LITE, start=None),
    "smaller than the head": replace(V2_LITE, size=112, slots=head(112, 128), start=None),
    "one token": replace(V2_LITE, lead=(1,)),
    "odd": Form("", 333, 77, head(77, 81), 5, start=None, lead=(301,)),
    "a table of slots": Form(
        "", 64, 16, (5, 3, 1, -1, 15, 0, 2, 7, 9, 11, 13, 4, 2), 8, lead=(33,)
    ),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
larges = pytest.mark.parametrize("form", LARGE.values(), ids=LARGE)


def on_gpu(form: Form, dtype: torch.dtype) -> list[Any]:
    return [
        argument.cuda() if isinstance(argument, Tensor) else argument
        for argument in form.arguments(dtype)
    ]


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm()) if exact.norm() else 0.0


def assert_near(got: Tensor, arguments: list[Any]) -> None:
    """At least as near to float64 as the ATen form on the device, but for chance in float32."""
    exact = by_definition(*arguments)
    assert got.shape == exact.shape
    chance = float32_sum(arguments[1].shape[1]) if got.dtype == torch.float32 else 0.0
    assert relative(got, exact) <= max(relative(project_in_aten(*arguments), exact), chance)


@pytest.fixture(autouse=True)
def _served() -> None:
    assert basis_projection_cuda.serves(torch.device("cuda"), torch.bfloat16)


@dtypes
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form(form: Form, dtype: torch.dtype) -> None:
    arguments = on_gpu(form, dtype)
    assert_near(basis_projection(*arguments), arguments)


@dtypes
@larges
def test_large(form: Form, dtype: torch.dtype) -> None:
    arguments = on_gpu(form, dtype)
    assert_near(basis_projection(*arguments), arguments)


def test_float64_is_the_aten_form() -> None:
    arguments = on_gpu(FORMS[0], torch.float64)
    assert torch.equal(basis_projection(*arguments), project_in_aten(*arguments))


def test_tf32_only_where_the_user_allows_it() -> None:
    arguments = on_gpu(V2_LITE, torch.float32)
    exact = by_definition(*arguments)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        errors = {}
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = relative(basis_projection(*arguments), exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] <= float32_sum(384) < errors["tf32"]


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_split_sums_are_the_same_each_time(tokens: int) -> None:
    from bda_fx.kernels.basis_projection_triton import project
    from bda_fx.kernels.roofline import Tile

    arguments = on_gpu(replace(V2_LITE, lead=(tokens,)), torch.bfloat16)
    for splits in (2, 4, 8):
        tile = Tile(16, 64, 32, 3, 4, splits)
        first = project(*arguments, tile=tile)
        assert_near(first, arguments)
        for _ in range(50):
            assert torch.equal(project(*arguments, tile=tile), first)


def test_offsets_beyond_32_bits() -> None:
    """An output of more than 2³¹ numbers, of which rows on either side are compared."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free device memory")
    form = Form("", 64, 16, head(16, 16), 1024, lead=(2**17 + 64,))
    arguments = on_gpu(form, torch.float16)
    got = basis_projection(*arguments)
    assert got.numel() > 2**31
    x, *others = arguments
    for rows in (slice(0, 64), slice(2**17 - 32, 2**17 + 64)):
        assert_near(got[rows], [x[rows], *others])


@larges
def test_cuda_graph(form: Form) -> None:
    x, *others = on_gpu(form, torch.bfloat16)
    basis_projection(x, *others)  # tunes
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        basis_projection(x, *others)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = basis_projection(x, *others)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(got, basis_projection(x, *others))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("dynamic", [False, True])
@larges
def test_compiled(form: Form, mode: str, dynamic: bool) -> None:
    basis_projection_cuda.offer_to_inductor()
    torch._dynamo.reset()
    x, coefficients, *others = on_gpu(form, torch.bfloat16)
    weight = torch.nn.Parameter(coefficients, requires_grad=False)

    def project(x: Tensor) -> Tensor:
        return basis_projection(x * 1.0, weight, *others)

    compiled = torch.compile(project, mode=mode, dynamic=dynamic, fullgraph=True)
    for tokens in (form.lead[-1], form.lead[-1] + 1) if dynamic else (form.lead[-1],):
        x = torch.randn(*form.lead[:-1], tokens, form.in_features, device="cuda").bfloat16()
        for _ in range(3):  # warm-up, recording and replay under CUDA graphs
            assert_near(compiled(x).clone(), [x, weight, *others])


def test_max_autotune_weighs_the_kernel_against_the_aten_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import select_algorithm

    offered: list[str] = []
    choose = select_algorithm.autotune_select_algorithm

    def watch(name: str, choices: list[Any], *rest: Any, **more: Any) -> Any:
        if name == "bda_fx_basis_projection":
            offered.extend(choice.name for choice in choices)
        return choose(name, choices, *rest, **more)

    monkeypatch.setattr(select_algorithm, "autotune_select_algorithm", watch)
    basis_projection_cuda.offer_to_inductor()
    torch._dynamo.reset()
    x, *others = on_gpu(V2_LITE, torch.float16)
    torch.compile(lambda x: basis_projection(x, *others), mode="max-autotune")(x)
    assert any("project_in_aten" in name for name in offered)
    assert any("project_in_triton" in name for name in offered)


def test_aot_inductor(tmp_path: Path) -> None:
    basis_projection_cuda.offer_to_inductor()

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            _, coefficients, *_ = on_gpu(V2_LITE, torch.float16)
            self.weight = torch.nn.Parameter(coefficients, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            slots = list(V2_LITE.slots)
            return basis_projection(x, self.weight, None, None, 0, 128, slots)

    module, x = Module(), torch.randn(64, 512, device="cuda").half()
    program = torch.export.export(module, (x,), strict=False)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "projection.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    assert_near(loaded(x), [x, module.weight, None, None, 0, 128, list(V2_LITE.slots)])
