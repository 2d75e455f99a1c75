"""``export`` and ``verify`` with ONNX files: the whole way that the README shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import bda_fx
from bda_fx.cli.errors import ExitCode
from bda_fx.cli.run_onnx import OnnxModel
from bda_fx.evaluate_float64 import evaluate_float64
from bda_fx.exporters.exported import ExportError
from tests.cli.conftest import HIDDEN, LAYERS, Cli, Ran, files, without_progress
from tests.programs import assert_close, example, seeded
from tests.tolerances import FLOAT64_PIVOT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    """What ``export --to onnx`` said, and where it wrote."""
    from typer.testing import CliRunner

    from bda_fx.cli.app import app

    out = tmp_path_factory.mktemp("exported") / "bert.onnx"
    command = ["export", str(bert), "--to", "onnx", "-o", str(out), "--no-measure", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bda-fx", *command])  # as the command finds it in a shell
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return Ran(done.exit_code, done.stdout, done.stderr), out


def test_export_proves_itself(exported: tuple[Ran, Path]) -> None:
    ran, out = exported
    assert ran.data["report"]["rewritten"] == 2 * LAYERS
    assert ran.data["fidelity"]["passed"]
    assert ran.data["fidelity"]["inputs"] == "given"  # text through the tokenizer
    assert ran.data["bytes_after"] < ran.data["bytes_before"]
    assert files(out.parent) == {"bert.onnx", "bert.onnx.bda.json", "bert.onnx.bda.md"}
    evidence = json.loads((out.parent / "bert.onnx.bda.json").read_text())
    assert evidence["identity"]["command"].startswith("bda-fx export ")


def test_axes_are_open_and_named(exported: tuple[Ran, Path]) -> None:
    model = onnx.load(exported[1])
    shapes = {
        value.name: [axis.dim_param for axis in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert set(shapes) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(shape == ["batch", "length"] for shape in shapes.values())


@pytest.mark.parametrize("order", ["directory first", "file first"])
def test_verify_compares_a_directory_with_a_file(
    cli: Cli, bert: Path, exported: tuple[Ran, Path], order: str
) -> None:
    pair = (bert, exported[1]) if order == "directory first" else (exported[1], bert)
    ran = cli("verify", *pair, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["inputs_are_real"]
    assert ran.data["noise_ratio"] < 4


def test_verify_compares_two_files(cli: Cli, exported: tuple[Ran, Path], tmp_path: Path) -> None:
    """The truth is a float64 run of the first file, and one wrong weight shows."""
    path = exported[1]
    ran = cli("verify", path, path, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["noise_ratio"] == 1.0
    assert 0 < ran.data["outputs"][0]["error_reference"] < 1e-4
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.1 if values.ndim == 2 else 0
    weight.CopyFrom(onnx.numpy_helper.from_array(values * 1.001, weight.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    ran = cli("verify", path, tmp_path / "wrong.onnx")
    assert ran.code == ExitCode.DIFFERENT, ran.err
    assert "NOT EQUIVALENT" in ran.out


FORMS = ["directory", "program", "onnx"]


@pytest.mark.parametrize("a", FORMS)
@pytest.mark.parametrize("b", FORMS)
def test_verify_takes_any_two(
    cli: Cli, bert: Path, rewritten: Path, exported: tuple[Ran, Path], a: str, b: str
) -> None:
    """The same model in two forms, of either side; the very same is exactly as noisy as itself."""
    path = {"directory": bert, "program": rewritten, "onnx": exported[1]}
    ran = cli("verify", path[a], path[b], "--count", 2, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["num_inputs"] == 2 or not ran.data["inputs_are_real"]
    assert 0 < ran.data["noise_ratio"] < 4
    if a == b:
        assert ran.data["noise_ratio"] == 1.0


def test_every_option_of_an_export(cli: Cli, bert: Path, tmp_path: Path) -> None:
    """Each does what its name says, and the evidence tells of it."""
    text, out = tmp_path / "text.txt", tmp_path / "small.onnx"
    text.write_text("the fox jumps over a dog\nthe dog\na fox\nthe fox jumps\n")
    command = [
        "export", bert, "--to", "onnx", "-o", out, "--task", "fill-mask", "--dtype", "float16",
        "--static", "--batch", 3, "--length", 9, "--noise-budget", 3, "--calibration", text,
        "--opset", 20, "--budget", 5, "--side", "kv", "--no-measure", "--quiet", "--json",
    ]  # fmt: skip
    ran = cli(*command)
    assert ran.code == 0, ran.err
    assert all("random" in line for line in ran.err.splitlines())  # a note: the head has no weights
    model = onnx.load(out)
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert {shape[0] for shape in shapes.values()} == {3}  # --static --batch 3
    (logits,) = model.graph.output
    assert logits.name == "logits"  # --task fill-mask
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16  # --dtype
    assert model.opset_import[0].version == 20
    assert ran.data["identity"]["options"]["noise_budget"] == 3
    assert ran.data["identity"]["options"]["side"] == "kv"
    assert ran.data["details"]["proof"]["limit"] == 5
    assert ran.data["timings"] == []  # --no-measure
    assert ran.data["fidelity"]["inputs"] == "given"  # lines of the text


class Plain(nn.Module):
    """No attention, so that a file of it has the very weights; with a cast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 5)
        seeded(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.gelu(self.norm(self.first(x))) * 0.25
        return self.second(y.float()).softmax(-1)


def test_the_truth_of_a_file_is_that_of_its_program(tmp_path: Path) -> None:
    """onnx's reference implementation in float64 and PyTorch's operators agree to float64."""
    model, x = Plain(), example()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "plain.onnx")
    file = OnnxModel(tmp_path / "plain.onnx")
    exported = torch.export.export(model, (x,))
    (expected,), (got,) = evaluate_float64(exported, (x,)), file.truth((x,), {})
    assert got.dtype == torch.float64
    assert_close(got, expected, FLOAT64_PIVOT)
    own = file(x)[0].double()
    with pytest.raises(AssertionError):
        assert_close(own, expected, FLOAT64_PIVOT)  # what it gives in float32


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder / "model.onnx"
    assert files(folder) == set()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ExportError("the proof failed: noise ratio 9.00; lower the --noise-budget"), 4),
        (ExportError("no opset 99: pass another"), 4),
    ],
)
def test_what_an_exporter_refuses(
    cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch, error: ExportError, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(bda_fx, "export_onnx", refuse)
    ran = cli("export", "tests.cli.test_commands:attention", "--to", "onnx", "-o", out)
    assert ran.code == code == ExitCode.CANNOT_CONVERT
    message, remedy = without_progress(ran.err)
    text = str(error)
    assert text in (f"{message[7:]}: {remedy.strip()}", f"{message[7:]}; {remedy.strip()}")


def test_an_option_that_does_not_apply(cli: Cli, bert: Path, out: Path) -> None:
    ran = cli("export", bert, "--to", "aoti", "-o", out.with_suffix(".pt2"), "--opset", 18)
    assert ran.code == ExitCode.USAGE
    assert "--opset does not apply" in ran.err


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: c++")
def test_an_aotinductor_package(cli: Cli, bert: Path, tmp_path: Path) -> None:
    """It is proved, and runs at another size than that of the example."""
    out = tmp_path / "bert.pt2"
    ran = cli("export", bert, "--to", "aoti", "-o", out, "--no-measure", "--json")
    assert ran.code == 0, ran.err
    assert ran.data["fidelity"]["passed"]
    assert files(tmp_path) == {"bert.pt2", "bert.pt2.bda.json", "bert.pt2.bda.md"}
    ids = torch.arange(30).view(3, 10)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        package = torch._inductor.aoti_load_package(str(out))
        got = package(**inputs, token_type_ids=torch.zeros_like(ids))
    assert torch.utils._pytree.tree_leaves(got)[0].shape == (3, 10, HIDDEN)
    assert cli("inspect", out).code == ExitCode.CANNOT_OPEN  # compiled: said so, and how to go on


def test_a_tensorrt_engine(cli: Cli, bert: Path, tmp_path: Path) -> None:
    """Built here; what it is built from is proved in ONNX Runtime."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'bda-fx[tensorrt]'")
    out = tmp_path / "bert.engine"
    ran = cli("export", bert, "--to", "tensorrt", "-o", out, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["bytes_after"] < ran.data["bytes_before"]
    assert {"bert.engine", "bert.engine.bda.json", "bert.engine.bda.md"} <= files(tmp_path)
    assert ran.data["fidelity"]["passed"]
