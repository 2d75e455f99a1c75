"""``export_tensorrt``: engines built on this machine, and what their builder says of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

pytest.importorskip("onnxscript", reason="pip install 'bda-fx[onnx]'")
pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'bda-fx[tensorrt]'")

import bda_fx
from bda_fx.api import export_module
from bda_fx.exporters import export_tensorrt as exporter
from bda_fx.exporters.build_engine import Layer, layers_with
from bda_fx.exporters.export_tensorrt import default_profiles
from tests.exporters.deployed import BATCH, LENGTH, MODELS, Deployed
from tests.programs import Attention, example

CASES = [("bert", torch.float16), ("deepseek_v2", torch.float32)]


def export(model: Deployed, path: Path, **arguments: Any) -> bda_fx.Exported:
    return bda_fx.export_tensorrt(
        model.model, path, (), model.kwargs, dynamic_shapes=model.dynamic_shapes, **arguments
    )


def small(dtype: torch.dtype = torch.float32) -> Deployed:
    """Sizes at which nothing is padded; 8,192 bytes of K and V are saved in float32."""
    x = torch.randn(2, 5, 96)
    return Deployed(Attention(4, 4, 16, 96), {"x": x}, {"x": {0: BATCH, 1: LENGTH}}).to(dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_saving_is_in_the_engine(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The builder's own figure of weight memory, for original and rewritten model."""
    model = MODELS[name]().to(dtype)
    result = export(model, tmp_path / "model.engine", options={"basis_size": "full"})
    promised = result.report.bytes_before - result.report.bytes_after  # type: ignore[operator]
    print(f"{name}: engine weights −{result.bytes_saved}, report −{promised}")
    assert result.bytes_saved is not None
    assert result.bytes_saved >= 0.95 * promised > 0
    assert result.fidelity is not None  # of the ONNX model
    listing = json.loads((tmp_path / "model.engine.layers.json").read_text())
    assert listing["original"]
    kinds = {layer["type"] for layer in listing["rewritten"]}
    assert kinds & {"gemm", "runtime_fusion"}
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f.name for f in result.files)


def test_basis_sums_are_fused(tmp_path: Path) -> None:
    """K and V: every addition of basis features is in a kernel that does more than add them."""
    result = export(small(torch.float16), tmp_path / "a.engine", options={"basis_size": "full"})
    assert result.details["basis_sums"] == 2
    fused = result.details["basis_sums_by_layer"]
    assert sum(len(sums) for sums in fused.values()) == 2
    listing = json.loads((tmp_path / "a.engine.layers.json").read_text())["rewritten"]
    for layer in listing:
        if layer["name"] in fused:
            assert len(layer["onnx"]) > len(fused[layer["name"]])


def test_bfloat16_is_built_and_not_proved(tmp_path: Path) -> None:
    result = export(small(torch.bfloat16), tmp_path / "a.engine", options={"basis_size": "full"})
    assert result.fidelity is None
    assert "does not run bfloat16" in str(result.fidelity_reason)
    assert result.bytes_saved is not None
    assert result.bytes_saved > 0


def test_a_saving_that_did_not_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that would multiply the factors out again: both engines have the same weights."""
    build = exporter.build_engine
    monkeypatch.setattr(
        exporter, "build_engine", lambda model, *a: build(model.with_name("before.onnx"), *a)
    )
    with pytest.raises(bda_fx.ExportError, match=r"TensorRT undoes the rewrite: of 8,192 bytes"):
        export(small(), tmp_path / "a.engine", options={"basis_size": "full"}, check=False)
    assert list(tmp_path.iterdir()) == []


def test_what_tensorrt_refuses(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(bda_fx.ExportError, match="unknown capabilities SM10; this runtime has SM"):
        export(model, tmp_path / "a.engine", check=False, capabilities=["SM10"])
    with pytest.raises(bda_fx.ExportError, match=r"runtime is one of 'rtx', 'tensorrt', got 'gpu'"):
        export(model, tmp_path / "a.engine", runtime="gpu")
    assert list(tmp_path.iterdir()) == []


def test_default_profiles() -> None:
    """The program's ranges with the example as the best; an open end is eight times that."""
    shapes = {"x": {0: BATCH, 1: Dim("length", min=2)}}
    program = export_module(Attention(), (example(),), dynamic_shapes=shapes)
    assert default_profiles(program) == {"x": ((1, 2, 20), (2, 5, 20), (8, 40, 20))}


def test_layers_with() -> None:
    layers = [Layer("a", "gemm", ("node_x", "node_y")), Layer("b", "kgen", ("node_z",))]
    assert layers_with(layers, ["node_y", "node_q"]) == {"a": ["node_y"]}


# -- where there is more than TensorRT-RTX ------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is None or not torch.cuda.is_available(),
    reason="TensorRT builds for and on a GPU: needs the package tensorrt and one",
)
def test_tensorrt_builds_the_same(tmp_path: Path) -> None:
    result = export(small(torch.float16), tmp_path / "a.engine", runtime="tensorrt",
                    options={"basis_size": "full"})  # fmt: skip
    assert result.bytes_saved is not None
    assert result.bytes_saved > 0


@pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is None or not torch.cuda.is_available(),
    reason="Torch-TensorRT compiles for and on a GPU: needs the package torch-tensorrt and one",
)
def test_torch_tensorrt_as_inner_compiler() -> None:
    model, x = Attention().half().cuda(), example(dtype=torch.float16).cuda()
    compiled = torch.compile(model, backend="bda", options={"inner": "torch_tensorrt"})
    with torch.no_grad():
        found = bda_fx.verify(model, compiled, (x,))
    assert found.passed, str(found)


@pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is not None, reason="Torch-TensorRT is installed"
)
def test_torch_tensorrt_is_missing() -> None:
    compiled = torch.compile(Attention(), backend="bda", options={"inner": "torch_tensorrt"})
    with torch.no_grad(), pytest.raises(Exception, match="pip install torch-tensorrt"):
        compiled(example())


def test_torch_tensorrt_gets_the_rewritten_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: the backend of its name is handed the graph and the options."""
    import sys
    import types

    from torch._dynamo.backends import registry

    seen: list[tuple[nn.Module, Any]] = []

    def stand_in(module: Any, inputs: Any, *, options: Any) -> Any:
        seen.append((module, options))
        return module.forward

    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
    monkeypatch.setitem(registry._BACKENDS, "torch_tensorrt", None)
    monkeypatch.setitem(registry._COMPILER_FNS, "torch_tensorrt", stand_in)
    torch._dynamo.reset()  # what other tests compiled of this class counts towards its limit
    model = Attention()
    compiled = torch.compile(
        model,
        backend="bda",
        options={
            "inner": "torch_tensorrt", "inner_options": {"enabled_precisions": {torch.half}},
            "basis_size": "full",
        },
    )  # fmt: skip
    with torch.no_grad():
        found = bda_fx.verify(model, compiled, (example(),))
    assert found.passed
    assert [options for _, options in seen] == [{"enabled_precisions": {torch.half}}]
    shapes = [n.meta["val"].shape for n in seen[0][0].graph.find_nodes(op="placeholder")]
    assert (24, 14) in [tuple(shape) for shape in shapes]  # coefficients: E − r = 20 − 6
