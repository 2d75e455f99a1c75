"""``export_onnx``: files that are valid, smaller by what the report says, and the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="ONNX is not installed: pip install 'bda-fx[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'bda-fx[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'bda-fx[onnx]'")

import bda_fx  # noqa: E402
from bda_fx.api import export_module  # noqa: E402
from bda_fx.exporters import export_onnx as exporter  # noqa: E402
from bda_fx.exporters import time_sites as timing_of_sites  # noqa: E402
from bda_fx.exporters.exported import Timing  # noqa: E402
from bda_fx.exporters.measure_onnx import weight_bytes  # noqa: E402
from bda_fx.exporters.run_onnx import LEVELS  # noqa: E402
from bda_fx.exporters.time_sites import slower, time_sites  # noqa: E402
from bda_fx.exporters.translate_onnx import axis_names, output_names  # noqa: E402
from tests import models  # noqa: E402
from tests.exporters.deployed import BATCH, LENGTH, MODELS, Deployed  # noqa: E402
from tests.programs import Attention, FusedAttention, example  # noqa: E402

FULL = {"basis_size": "full"}
CASES = [
    ("bert", torch.float32),
    ("deepseek_v2", torch.float32),
    ("vit", torch.float16),
    ("whisper_encoder", torch.float16),
]


def export(model: Deployed, path: Path, **arguments: Any) -> bda_fx.Exported:
    return bda_fx.export_onnx(
        model.model, path, (), model.kwargs, dynamic_shapes=model.dynamic_shapes, **arguments
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{str(c[1])[6:]}")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name, dtype = request.param
    model = MODELS[name]().to(dtype)
    path = tmp_path_factory.mktemp(name) / "model.onnx"
    return model, export(model, path, options=FULL, measure=False)


def test_smaller_by_what_the_report_says(exported: Any) -> None:
    _, result = exported
    report = result.report
    assert len(report.rewritten) == 4
    promised = report.bytes_before - report.bytes_after
    assert result.bytes_saved == promised > 0
    assert result.path.stat().st_size == result.file_bytes > result.bytes_after


def test_the_optimiser_does_not_multiply_out(exported: Any) -> None:
    """What ONNX Runtime saves at every level is smaller by as much as the file is."""
    _, result = exported
    sizes = result.details["optimized_weight_bytes"]
    assert set(sizes) == set(LEVELS)
    for level in sizes.values():
        assert level["original"] - level["rewritten"] >= 0.95 * result.bytes_saved


def test_names_axes_and_ops(exported: Any) -> None:
    model, result = exported
    loaded = onnx.load(result.path)
    axes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in loaded.graph.input
    }
    for name, value in model.kwargs.items():
        if isinstance(value, Tensor):
            names = {axis: dim.__name__ for axis, dim in model.dynamic_shapes[name].items()}
            assert axes[name] == [names.get(a, size) for a, size in enumerate(value.shape)]
    assert loaded.graph.output[0].name == "last_hidden_state"
    assert {node.domain for node in loaded.graph.node} == {""}
    assert [(o.domain, o.version) for o in loaded.opset_import] == [("", 23)]
    assert not any(node.metadata_props or node.doc_string for node in loaded.graph.node)
    assert len({node.name for node in loaded.graph.node}) == len(loaded.graph.node)


def test_evidence_lies_beside_it(exported: Any) -> None:
    _, result = exported
    name = result.path.name
    assert sorted(f.name for f in result.path.parent.iterdir()) == [
        name, f"{name}.bda.json", f"{name}.bda.md",
    ]  # fmt: skip
    assert sorted(f.name for f in result.files) == sorted(
        f.name for f in result.path.parent.iterdir()
    )
    data = json.loads((result.path.parent / f"{name}.bda.json").read_text())
    assert data["artefact"] == name
    assert data["noise_ratio"] == pytest.approx(result.fidelity.noise_ratio)
    assert data["report"]["rewritten"] == 4
    assert len(data["identity"]["weights_sha256"]) == 64
    assert data["identity"]["command"].startswith("bda_fx.export_onnx(model, 'model.onnx'")
    text = (result.path.parent / f"{name}.bda.md").read_text()
    assert data["identity"]["weights_sha256"] in text
    stored = {p.key: p.value for p in onnx.load(result.path).metadata_props}
    assert json.loads(stored["bda_fx.identity"]) == data["identity"]
    assert json.loads(stored["bda_fx.report"])["bytes_after"] == result.report.bytes_after


def test_it_runs_at_other_sizes(exported: Any) -> None:
    """On sizes that nothing was exported or proved with, against the program."""
    model, result = exported
    session = onnxruntime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    inputs = {}
    for name, value in model.kwargs.items():
        if not isinstance(value, Tensor):
            continue
        sizes = list(value.shape)
        for axis, dim in model.dynamic_shapes[name].items():
            sizes[axis] = {"batch": 5, "length": 11}[dim.__name__]
        if value.is_floating_point():
            inputs[name] = torch.randn(sizes, dtype=value.dtype)
        else:
            inputs[name] = torch.ones(sizes, dtype=value.dtype)
    outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = model.model(**{**model.kwargs, **inputs})[0]
    error = (torch.from_numpy(outputs[0]) - expected).double().norm() / expected.double().norm()
    assert float(error) <= 2 * 4.0 * result.fidelity.outputs[0].error_reference


# -- one real model -----------------------------------------------------------------------------


def test_trained_weights(tmp_path: Path) -> None:
    """Three layers of rxnfp with 7/8 of D: 56 of 256 inputs need no coefficients."""
    model = models.rxnfp()
    model.encoder.layer = model.encoder.layer[:3]  # type: ignore[union-attr, index]
    kwargs = {
        "input_ids": torch.randint(13, 400, (2, 12)),
        "attention_mask": torch.ones(2, 12).long(),
    }
    shapes = {name: {0: BATCH, 1: LENGTH} for name in kwargs}
    result = export(
        Deployed(model, kwargs, shapes), tmp_path / "rxnfp.onnx",
        options={"basis_size": 7 / 8}, measure=False, budget=2.0,
    )  # fmt: skip
    assert len(result.report.rewritten) == 6
    print(f"rxnfp in ONNX Runtime: {result.fidelity}, {result.bytes_saved} bytes less")
    assert result.bytes_saved == 6 * 56 * 256 * 4


# -- options ------------------------------------------------------------------------------------


def small(**kwargs: Any) -> Deployed:
    return Deployed(Attention(**kwargs), {"x": example()}, {"x": {0: BATCH, 1: LENGTH}})


def test_external_data(tmp_path: Path) -> None:
    result = export(small(), tmp_path / "a.onnx", options=FULL, external_data=True, measure=False)
    assert "a.onnx.data" in [file.name for file in result.files]
    assert result.files[-3].name == "a.onnx"
    whole = (tmp_path / "a.onnx.data").stat().st_size + result.path.stat().st_size
    assert result.file_bytes == whole
    assert (tmp_path / "a.onnx.data").stat().st_size > result.path.stat().st_size / 2
    onnxruntime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])


def test_an_older_opset_spells_attention_out(tmp_path: Path) -> None:
    result = export(small(), tmp_path / "a.onnx", options=FULL, opset=18, measure=False)
    assert result.details["opset"] == 18
    assert "Softmax" in result.details["ops"]


def test_a_program_and_a_module_give_the_same_file(tmp_path: Path) -> None:
    model = small()
    program = export_module(model.model, (), model.kwargs, model.dynamic_shapes)
    first = export(model, tmp_path / "a.onnx", options=FULL, check=False)
    second = bda_fx.export_onnx(program, tmp_path / "b.onnx", options=FULL, check=False,
                                dynamic_shapes=model.dynamic_shapes)  # fmt: skip
    assert first.identity["weights_sha256"] == second.identity["weights_sha256"]
    assert first.bytes_after == second.bytes_after
    assert first.fidelity is None
    assert first.fidelity_reason == "check=False"


def test_a_slower_site_keeps_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings are what they are told to be: K is slower rewritten, V is faster."""

    def told(program: Any, report: bda_fx.Report, threads: int) -> tuple[Timing, ...]:
        speed = {"qk": 0.9, "vo": 1.1}
        return tuple(
            Timing(f"{s.name} ({s.product})", 1.0, 1.0, speed[s.product], (0.9, 1.1), 9)
            for s in report.rewritten
        )

    monkeypatch.setattr(timing_of_sites, "time_sites", told)
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "_time", lambda *_: ())  # a model so small may be any speed
        result = export(small(), tmp_path / "a.onnx", options=FULL)
    assert [s.product for s in result.report.rewritten] == ["vo"]
    assert [s.reason for s in result.report.skipped if s.product == "qk"] == [
        "left out by the options (at p_k_weight): keep='k.weight'"
    ]
    assert {t.name: t.speedup for t in result.site_timings} == {
        "k.weight (qk)": 0.9, "v.weight (vo)": 1.1,
    }  # fmt: skip
    assert "keep" in result.identity["command"]
    rewritten = export(small(), tmp_path / "b.onnx", options=FULL, keep_slower=True)
    assert len(rewritten.report.rewritten) == 2
    assert [t.pairs >= 9 for t in rewritten.timings] == [True, True]


@pytest.mark.parametrize(("slow_with", "left"), [(2, ["vo"]), (1, []), (3, ["qk", "vo"])])
def test_a_slower_model_gives_sites_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_with: int, left: list[str]
) -> None:
    """Each site is faster by itself, V more than K; the model is slow with ``slow_with`` sites or
    more, so K goes first."""
    speeds = {"qk": 1.1, "vo": 1.2}

    def of_sites(program: Any, report: bda_fx.Report, threads: int) -> tuple[Timing, ...]:
        return tuple(
            Timing(f"{s.name} ({s.product})", 1.0, 1.0, speeds[s.product], (1.0, 1.3), 9)
            for s in report.rewritten
        )

    def of_model(before: Any, after: Any, batches: Any) -> tuple[Timing, ...]:
        sites = (weight_bytes(written[0]) - weight_bytes(written[-1])) // (24 * 6 * 4)
        high = 0.99 if sites >= slow_with else 1.01
        return (Timing("x", 1.0, 1.0, high - 0.01, (high - 0.02, high), 9),)

    written: list[Path] = []
    write = exporter.write_onnx

    def noted(program: Any, path: Path, *rest: Any, **named: Any) -> Any:
        written.append(path)
        return write(program, path, *rest, **named)

    monkeypatch.setattr(timing_of_sites, "time_sites", of_sites)
    monkeypatch.setattr(exporter, "write_onnx", noted)
    monkeypatch.setattr(exporter, "_time", of_model)
    result = export(small(), tmp_path / "a.onnx", options=FULL)
    assert [s.product for s in result.report.rewritten] == left
    assert not left or not exporter.is_slower(result.timings[0])
    assert result.bytes_saved == result.report.bytes_before - result.report.bytes_after  # type: ignore[operator]


def test_sites_are_timed(tmp_path: Path) -> None:
    """Large enough for a clear case: K of 256 features in 4 heads is a quarter smaller."""
    model = Attention(4, 4, 64, 256)
    program = export_module(model, (torch.randn(4, 64, 256),))
    report = bda_fx.analyze(program, options={"basis": "window", "basis_size": "full"})
    timings = time_sites(program, report, threads=1)
    assert [t.name for t in timings] == ["k.weight (qk)", "v.weight (vo)"]
    assert timings[0] == timing_with_name(timings[1], "k.weight (qk)")  # of one kind: timed once
    print(f"rxnfp's shape: {timings[0].speedup:.2f} {timings[0].interval}")
    assert 0.1 < timings[0].speedup < 10
    assert slower(report, (timing_with_name(timings[0], "k.weight (qk)", 0.5),)) == ["k.weight"]


@pytest.mark.parametrize("side", ["kv", "qo"])
def test_a_site_is_timed_as_the_program_has_it(side: str) -> None:
    """Batches of matrices, and the timed form computes something of the right shape."""
    program = export_module(Attention(4, 4, 6, 24), (torch.randn(2, 5, 24),))
    options = {"basis": "window", "basis_size": 2 / 3, "side": side, "products": ("vo",)}
    report = bda_fx.analyze(program, options=options)
    (site,) = report.rewritten
    kind = timing_of_sites._kind(program, site)
    assert kind is not None
    assert kind.leading == (2, 5)
    x = np.ones((2, 5, kind.in_features), np.float32)
    for body, shapes in (timing_of_sites._original(kind), timing_of_sites._new(kind)):
        session = timing_of_sites._session(body, shapes, kind, 1)
        assert session.run(None, {"x": x})[0].shape == (2, 5, kind.out_features)


def timing_with_name(timing: Timing, name: str, speedup: float | None = None) -> Timing:
    from dataclasses import replace

    return replace(timing, name=name, speedup=speedup or timing.speedup)


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_failed_proof_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(bda_fx.ExportError, match=r"the proof failed: .* budget 0\.5") as error:
        export(small(), tmp_path / "a.onnx", options=FULL, budget=0.5, measure=False)
    assert error.value.fidelity is not None
    assert not error.value.fidelity.passed
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("mine")
    with pytest.raises(bda_fx.ExportError, match="exists already: replace it with overwrite=True"):
        bda_fx.export_onnx(nn.Identity(), path, ("not looked at",))
    assert path.read_text() == "mine"


def test_an_op_without_translation(tmp_path: Path) -> None:
    class Complex(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.linalg.eigvals(x)).sum()

    with pytest.raises(bda_fx.ExportError, match=r"does not translate the program: .*eig"):
        bda_fx.export_onnx(Complex(), tmp_path / "a.onnx", (torch.eye(3),))
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_says_what_to_do(tmp_path: Path) -> None:
    model = small().to(torch.bfloat16)
    with pytest.raises(
        bda_fx.ExportError, match=r"export in float32 or float16, or pass check=False"
    ):
        export(model, tmp_path / "a.onnx", options=FULL)
    assert list(tmp_path.iterdir()) == []
    result = export(model, tmp_path / "a.onnx", options=FULL, check=False)
    assert result.bytes_saved == result.report.bytes_before - result.report.bytes_after


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        bda_fx.ExportError, match=r"needs onnxscript .*pip install 'bda-fx\[onnx\]'"
    ):
        export(small(), tmp_path / "a.onnx")


# -- names --------------------------------------------------------------------------------------


class Outputs(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(x + 1)


@pytest.mark.parametrize(
    ("give", "names"),
    [
        (lambda x: x, ["output"]),
        (lambda x: (x, x * 2), ["output_0", "output_1"]),
        (lambda x: {"a": x, "b": {"c": x * 2}}, ["a", "b.c"]),
        (lambda x: {"hidden": (x, x * 2)}, ["hidden_0", "hidden_1"]),
        (lambda x: (x, None, x * 2), ["output_0", "output_2"]),
    ],
)
def test_output_names(give: Callable[[Tensor], Any], names: list[str]) -> None:
    assert output_names(export_module(Outputs(give), (torch.ones(3),))) == names


def test_axis_names() -> None:
    """Of the Dim; without one, of the first input that has the axis."""
    model = FusedAttention()
    named = export_module(model, (example(),), dynamic_shapes={"x": {0: BATCH, 1: LENGTH}})
    assert sorted(axis_names(named, {"x": {0: BATCH, 1: LENGTH}}).values()) == ["batch", "length"]
    assert sorted(axis_names(named).values()) == ["x_axis0", "x_axis1"]
    assert sorted(axis_names(named, ({0: BATCH, 1: LENGTH},)).values()) == ["batch", "length"]
    auto = torch.export.Dim.AUTO
    open_axes = export_module(model, (example(),), dynamic_shapes={"x": {0: auto, 1: LENGTH}})
    assert sorted(axis_names(open_axes, {"x": {0: auto, 1: LENGTH}}).values()) == [
        "length", "x_axis0",
    ]  # fmt: skip


def test_the_hash_is_of_the_weights() -> None:
    from bda_fx.exporters.identify_model import hash_weights

    program, same = (export_module(Attention(), (example(),)) for _ in range(2))
    assert hash_weights(program) == hash_weights(same)
    with torch.no_grad():
        same.state_dict["k.weight"][0, 0] += np.spacing(np.float32(1.0))
    assert hash_weights(program) != hash_weights(same)
