"""The kernel is offered to Inductor beside the ATen form: shown without a GPU, so without timing.

Tracing runs on fake tensors of a CUDA device. The lowering runs on the CPU with a spelling in ATen
in the kernel's place: what it has to get right is the same, arguments, views, dynamic shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from bda_fx.kernels import basis_projection_cuda as on_cuda
from bda_fx.kernels import roofline
from bda_fx.kernels.basis_projection import basis_projection, project_in_aten
from bda_fx.kernels.slot_pattern import pattern_of
from tests.kernels.forms import head

H100 = roofline.data_sheet("H100")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The kernel's node in the graph of a projection of V2-Lite's width on an H100."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    monkeypatch.setattr(roofline, "cuda_device", lambda _: H100)

    def trace(batch: int, tokens: int, *, dynamic: bool) -> Any:
        environment = ShapeEnv()
        template = torch.empty(batch, tokens, 512, dtype=torch.bfloat16, device="meta")
        with FakeTensorMode(shape_env=environment) as mode:
            coefficients = torch.empty(4096, 384, dtype=torch.bfloat16, device="cuda:0")
            if dynamic:
                kinds = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
                context = StatelessSymbolicContext(kinds)
                template = mode.from_tensor(
                    template, symbolic_context=context, source=ConstantSource("x")
                )
            x = torch.empty(template.shape, dtype=torch.bfloat16, device="cuda:0")

            def project(x: Tensor, coefficients: Tensor) -> Tensor:
                slots = head(128, 128) * 2
                return on_cuda.project_in_triton(x, coefficients, None, None, 0, 128, slots)

            graph = make_fx(project)(x, coefficients)
        assert not environment.guards
        return graph.graph

    return trace


def kernel_of(graph: Any) -> tuple[Any, list[Any]]:
    """The launch in the graph, and the configurations that are left for Inductor to measure."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    (launch,) = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    return launch, kernel_side_table.get_kernel(launch.kwargs["kernel_idx"]).configs


def test_traced_with_the_tiles_that_the_roofline_leaves(traced: Callable[..., Any]) -> None:
    launch, configs = kernel_of(traced(2, 1024, dynamic=False))
    assert 1 < len(configs) <= 10
    projection = roofline.Projection(2048, 512, 4096, 128, torch.bfloat16)
    best = roofline.rank(projection, H100)[0].tile
    assert configs[0].kwargs["BLOCK_FEATURES"] == best.features
    grids = [
        -(-2048 // config.kwargs["BLOCK_TOKENS"]) * -(-4096 // config.kwargs["BLOCK_FEATURES"])
        for config in configs
    ]
    assert [tuple(grid) for grid in launch.kwargs["grid"]] == [(grid, 1, 1) for grid in grids]


def test_few_tokens_may_be_split_and_take_a_workspace(traced: Callable[..., Any]) -> None:
    graph = traced(1, 8, dynamic=False)
    launch, configs = kernel_of(graph)
    splits = max(config.kwargs["SPLITS"] for config in configs)
    assert splits > 1
    workspace = launch.kwargs["kwargs"]["partials"].meta["val"]
    assert workspace.dtype == torch.float32
    assert workspace.shape == (splits, 8, 4096)
    arrivals = launch.kwargs["kwargs"]["arrivals"]
    assert arrivals.target == torch.ops.aten.new_zeros.default
    assert arrivals.meta["val"].numel() >= max(
        grid[0]
        for grid, config in zip(launch.kwargs["grid"], configs, strict=True)
        if config.kwargs["SPLITS"] > 1
    )


def test_any_number_of_tokens_is_not_split(traced: Callable[..., Any]) -> None:
    graph = traced(1, 8, dynamic=True)
    launch, configs = kernel_of(graph)
    assert isinstance(launch.kwargs["kwargs"]["out"].meta["val"].shape[1], torch.SymInt)
    assert {config.kwargs["SPLITS"] for config in configs} == {1}
    assert not any(node.target == torch.ops.aten.new_zeros.default for node in graph.nodes)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The lowering on the CPU; what the stand-in for the kernel was traced with."""
    from torch._inductor.lowering import user_lowerings
    from torch._inductor.utils import fresh_cache

    calls: list[Tensor] = []

    def project(x: Tensor, *others: Any, **named: Any) -> Tensor:
        calls.append(x)
        return project_in_aten(x, *others, **named) * 1.0

    monkeypatch.setattr(on_cuda, "serves", lambda device, dtype: True)
    monkeypatch.setattr(on_cuda, "project_in_triton", project)
    torch._dynamo.reset()
    on_cuda.offer_to_inductor()
    with fresh_cache():  # a graph that is found compiled is not lowered
        yield calls
    del user_lowerings[basis_projection.default]
    torch._dynamo.reset()


CALLS: dict[str, tuple[bool, bool, bool, bool]] = {
    # max-autotune, dynamic, order, x is a view
    "the kernel alone, scattered": (False, False, True, False),
    "a choice, bias but no order, dynamic": (True, True, False, True),
}


@pytest.mark.parametrize(("tuned", "dynamic", "scattered", "view"), CALLS.values(), ids=CALLS)
def test_lowering(
    stand_in: list[Tensor], tuned: bool, dynamic: bool, scattered: bool, view: bool
) -> None:
    coefficients, bias = torch.nn.Parameter(torch.randn(18, 16)), torch.randn(18)
    order = torch.randperm(24) if scattered else None
    slots: Sequence[int] = head(8, 9)

    def project(x: Tensor) -> Tensor:
        source = x.transpose(0, 1) if view else x.relu()
        return basis_projection(source, coefficients, order, bias, 4, 8, slots).sigmoid()

    compiled = torch.compile(
        project, dynamic=dynamic, fullgraph=True, options={"max_autotune": tuned}
    )
    with torch.no_grad():
        for tokens in (5, 7) if dynamic else (5,):
            x = torch.randn(3, tokens, 24)
            torch.testing.assert_close(compiled(x), project(x))
    assert stand_in


def test_slots_that_need_a_table_take_the_aten_form(stand_in: list[Tensor]) -> None:
    """The table would be copied to the device in each call, which CUDA graphs do not take."""
    slots = [5, 3, 1, -1, 15, 0, 2, 7, 9, 11, 13, 4]
    assert pattern_of(tuple(slots)).by_table
    coefficients, x = torch.nn.Parameter(torch.randn(24, 8)), torch.randn(5, 24)

    def project(x: Tensor) -> Tensor:
        return basis_projection(x, coefficients, None, None, 4, 16, slots)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(project)(x), project(x))
    assert not stand_in


def test_pattern() -> None:
    pattern = pattern_of((-1, 3, 4, 0, -1, 3, 4, 0))
    assert pattern == ((-1, 3, 4, 0), ((1, 3, 3), (3, 4, 0)))
    assert (pattern.spread, pattern.by_table) == (0.75, False)
    assert pattern_of(head(3, 3) * 2 + (-1,)).runs == ((0, 3, 0), (3, 6, 0))
    assert pattern_of((-1,) * 4) == ((-1,), ())


def test_a_device_that_the_kernel_does_not_serve_is_left_to_inductor() -> None:
    assert on_cuda._lower(
        _Box(torch.device("cpu"), torch.float32), _Box(torch.device("cpu"), torch.float32),
        None, None, 0, 8, [0],
    ) is None  # fmt: skip


class _Box:
    """As much of Inductor's TensorBox as is asked before the lowering declines."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.get_device, self.get_dtype = lambda: device, lambda: dtype
        self.get_size = lambda: [4, 4]
