"""ONNX files as the MODEL of every command: what is written, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from bda_fx import choose_truth  # noqa: E402
from bda_fx.cli.errors import ExitCode  # noqa: E402
from tests.cli.conftest import LAYERS, Cli, assert_refused, files, without_progress  # noqa: E402
from tests.exporters.deployed import MODELS  # noqa: E402
from tests.importers.test_import_onnx import Way  # noqa: E402

HEAD = '<ir_version: 8, opset_import: ["" : 17, "org.example" : 1]>'


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as TorchScript's exporter leaves it. Not to be changed."""
    path = tmp_path_factory.mktemp("given") / "bert.onnx"
    Way(dynamo=False, opset=14).write(MODELS["bert"](), path)
    return path


def axes(path: Path) -> set[tuple[str | int, ...]]:
    """Sizes of the inputs, or names of the open ones."""
    return {
        tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in onnx.load(path).graph.input
    }


def test_inspect(cli: Cli, given: Path) -> None:
    ran = cli("inspect", given, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["rewritten"] == 2 * LAYERS
    assert all(site["name"].endswith(".weight") for site in ran.data["sites"])


def test_rewrite_writes_onnx(cli: Cli, given: Path, tmp_path: Path) -> None:
    """Where no suffix says otherwise; proved against the file that was given."""
    ran = cli("rewrite", given, "-o", tmp_path / "smaller", "--json")
    assert ran.code == 0, ran.err
    out = tmp_path / "smaller.onnx"
    assert files(tmp_path) == {out.name, f"{out.name}.bda.json", f"{out.name}.bda.md"}
    assert ran.data["fidelity"]["passed"]
    assert ran.data["details"]["source"]["name"] == given.name
    assert ran.data["details"]["source"]["noise_of_reading"] < 4
    assert ran.data["report"]["rewritten"] == 2 * LAYERS
    assert ran.data["bytes_after"] < ran.data["bytes_before"]
    assert ran.data["timings"] == []
    assert axes(out) == axes(given) == {("batch", "length")}
    ran = cli("verify", given, out, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["noise_ratio"] < 4


def test_rewrite_writes_a_program(cli: Cli, given: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller.pt2"
    ran = cli("rewrite", given, "-o", out, "--json")
    assert ran.code == 0, ran.err
    ids = torch.arange(27).view(3, 9) % 20
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        made = torch.export.load(out).module()(**inputs)["last_hidden_state"]
    session = onnxruntime.InferenceSession(str(given), providers=["CPUExecutionProvider"])
    (true,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(made, torch.from_numpy(true))
    ran = cli("verify", given, out, "--json")
    assert ran.code == 0, ran.err


def test_a_directory_as_onnx(cli: Cli, bert: Path, tmp_path: Path) -> None:
    """The suffix says so."""
    ran = cli("rewrite", bert, "-o", tmp_path / "bert.onnx", "--json")
    assert ran.code == 0, ran.err
    assert ran.data["target"] == "onnx"
    assert ran.data["fidelity"]["passed"]


def test_options_of_an_export(cli: Cli, given: Path, tmp_path: Path) -> None:
    """Sizes that are asked for, inputs that are given, an operator set."""
    from safetensors.torch import save_file

    ids, out = torch.arange(24).view(3, 8) % 20, tmp_path / "fixed.onnx"
    save_file(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "in.safetensors"
    )
    ran = cli(
        "export", given, "--to", "onnx", "-o", out, "--static", "--inputs",
        tmp_path / "in.safetensors", "--opset", 20, "--no-measure", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert axes(out) == {(3, 8)}
    assert onnx.load(out).opset_import[0].version == 20
    assert ran.data["fidelity"]["passed"]


def test_bench(cli: Cli, given: Path) -> None:
    ran = cli("bench", given, "--compiler", "eager", "--rounds", 3, "--length", 16, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["report"]["rewritten"] == 2 * LAYERS


def test_a_tensorrt_engine(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'bda-fx[tensorrt]'")
    path, out = tmp_path / "vit.onnx", tmp_path / "vit.engine"
    Way(dynamo=False, opset=17).write(MODELS["vit"](), path)
    ran = cli("export", path, "--to", "tensorrt", "-o", out, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["fidelity"]["passed"]


# -- what is refused ------------------------------------------------------------------------------


def test_a_truncated_file(cli: Cli, given: Path, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(given.read_bytes()[:20_000])
    for command in (("rewrite",), ("export", "--to", "onnx")):
        ran = cli(command[0], path, *command[1:], "-o", out.with_suffix(".onnx"))
        assert_refused(ran, ExitCode.CANNOT_OPEN, "no ONNX model, or damaged", "once more")


def test_an_empty_file(cli: Cli, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty.onnx").write_bytes(b"")
    ran = cli("rewrite", tmp_path / "empty.onnx", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "no ONNX model, or damaged", "once more")


def test_external_data_that_is_missing(cli: Cli, given: Path, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load(given), path, save_as_external_data=True, location="model.onnx.data")
    (tmp_path / "model.onnx.data").unlink()
    ran = cli("rewrite", path, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "weights in model.onnx.data", "put that file beside")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("y = org.example.Magic(x)", "the ONNX op org.example.Magic (opset 1) of node"),
        ("s = NonZero(x) f = Cast<to=1>(s) y = Add(f, f)", "the ONNX op NonZero (opset 17)"),
        ("i = Cast<to=7>(x) s = ReduceSum<keepdims=0>(i) k = Constant<value_ints=[-1]>() "
         "u = Unsqueeze(s, k) y = Expand(x, u)", "its sizes depend on values"),
    ],
    ids=["domain", "op", "values"],
)  # fmt: skip
def test_what_is_not_supported(cli: Cli, tmp_path: Path, out: Path, body: str, says: str) -> None:
    path = tmp_path / "model.onnx"
    text = f"{HEAD} g (float[n,4] x) => (float y) {{ {body} }}"
    onnx.save(onnx.parser.parse_model(text), path)
    for command in (("inspect",), ("rewrite", "-o", out), ("rewrite", "-o", out.with_suffix(""))):
        ran = cli(command[0], path, *command[1:])
        assert_refused(ran, ExitCode.CANNOT_CONVERT, says, "start from the PyTorch model")


def test_options_for_other_models(cli: Cli, given: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "text.txt").write_text("the fox\n")
    for option, value, says in (
        ("--dtype", "float16", "--dtype does not apply"),
        ("--task", "fill-mask", "--task does not apply"),
        ("--calibration", tmp_path / "text.txt", "--calibration needs a tokenizer"),
    ):
        ran = cli("rewrite", given, "-o", out, option, value)
        assert ran.code == ExitCode.USAGE
        assert says in ran.err


def test_too_little_memory(
    cli: Cli, given: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_truth, "available_bytes", lambda _: 1000)
    ran = cli("rewrite", given, "-o", out.with_suffix(".onnx"))
    assert_refused(ran, ExitCode.NO_MEMORY, "not enough memory", "--no-memory-check")


def test_an_axis_that_the_graph_fixes(cli: Cli, tmp_path: Path) -> None:
    """It is said, as the file promises more."""
    path = tmp_path / "model.onnx"
    text = f"""{HEAD} g (float[n,m] x) => (float y) {{
        w = Constant<value_floats=[1.0,2.0,3.0,4.0]>() y = Add(x, w) }}"""
    model = onnx.parser.parse_model(text)
    onnx.save(model, path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(4, 4)}, tmp_path / "in.safetensors")
    ran = cli("inspect", path, "--inputs", tmp_path / "in.safetensors")
    assert ran.code == 0, ran.err
    assert any("is fixed to 4 by the graph" in line for line in without_progress(ran.err))
