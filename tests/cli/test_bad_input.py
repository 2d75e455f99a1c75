"""Bad input: one line, a remedy, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bda_fx import choose_truth
from bda_fx.cli.errors import ExitCode
from tests.cli.conftest import Cli, Relu, assert_refused, change_config, save_bert


def copy_of(bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "model"))


# -- the model ----------------------------------------------------------------------------------


def test_a_missing_path(cli: Cli, out: Path) -> None:
    ran = cli("rewrite", "no/such/model", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "no file or directory no/such/model", "download")


def test_a_file_of_the_wrong_type(cli: Cli, tmp_path: Path, out: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    ran = cli("rewrite", tmp_path / "notes.txt", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "wrong type of file", "Hugging Face directory")


def test_weights_alone(cli: Cli, bert: Path, out: Path) -> None:
    ran = cli("rewrite", bert / "model.safetensors", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "wrong type of file", "config.json")


def test_a_directory_of_something_else(cli: Cli, tmp_path: Path, out: Path) -> None:
    ran = cli("rewrite", tmp_path, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "has no config.json", "save_pretrained")


@pytest.mark.parametrize("keep", [100, 20_000])
def test_corrupt_safetensors(cli: Cli, bert: Path, tmp_path: Path, out: Path, keep: int) -> None:
    model = copy_of(bert, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert_refused(
        cli("rewrite", model, "-o", out), ExitCode.CANNOT_OPEN, "is damaged", "once more"
    )


def test_a_config_that_is_no_json(cli: Cli, bert: Path, tmp_path: Path, out: Path) -> None:
    model = copy_of(bert, tmp_path)
    (model / "config.json").write_text("{")
    ran = cli("rewrite", model, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "cannot be read", "JSON")


def test_a_directory_without_weights(cli: Cli, bert: Path, tmp_path: Path, out: Path) -> None:
    model = copy_of(bert, tmp_path)
    (model / "model.safetensors").unlink()
    ran = cli("rewrite", model, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "has no weights", "inspect")


def test_a_truncated_onnx_file(cli: Cli, bert: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    shape = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph(
        [node], "g", [shape("x", 1, ["n"])], [shape("y", 1, ["n"])], doc_string="d" * 1000
    )
    data = onnx.helper.make_model(graph).SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: len(data) // 2])
    ran = cli("verify", path, bert)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "no ONNX model, or damaged", "once more")


def test_a_truncated_program(cli: Cli, rewritten: Path, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(rewritten.read_bytes()[:5000])
    ran = cli("rewrite", path, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "is damaged", "torch.export.save")


def test_an_unknown_task(cli: Cli, bert: Path, out: Path) -> None:
    ran = cli("rewrite", bert, "-o", out, "--task", "chess")
    assert_refused(ran, ExitCode.USAGE, "unknown task 'chess'", "fill-mask")


def test_a_task_that_the_architecture_has_no_model_for(cli: Cli, bert: Path, out: Path) -> None:
    ran = cli("rewrite", bert, "-o", out, "--task", "object-detection")
    assert_refused(ran, ExitCode.CANNOT_CONVERT, "no model of type bert", "another --task")


def test_an_unsupported_architecture(cli: Cli, bert: Path, tmp_path: Path, out: Path) -> None:
    model = copy_of(bert, tmp_path)
    change_config(model, model_type="quantum_bert", architectures=["QuantumBert"])
    ran = cli("rewrite", model, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_CONVERT, "does not know", "package.module:factory")


def test_a_factory_that_is_not_there(cli: Cli, out: Path) -> None:
    ran = cli("rewrite", "no_such_module:make", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "no module no_such_module", "PYTHONPATH")
    ran = cli("rewrite", "tests.tolerances:make", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "has no 'make'", "function")


class Stubborn(nn.Module):
    """Does not export: what it computes depends on a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def stubborn() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Stubborn(), (torch.ones(2, 3),)


def test_a_model_that_does_not_export(cli: Cli, out: Path) -> None:
    ran = cli("rewrite", f"{__name__}:stubborn", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_CONVERT, "does not export", "--static")


# -- what would run code ------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, where no bomb must have gone off."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_a_pickle_checkpoint(cli: Cli, here: Path, out: Path, suffix: str) -> None:
    torch.save(Bomb(), here / f"model{suffix}")
    ran = cli("rewrite", f"model{suffix}", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "pickle checkpoint", "--unsafe")


def test_a_pickle_under_the_name_of_a_program(cli: Cli, here: Path, out: Path) -> None:
    torch.save(Bomb(), here / "model.pt2")
    ran = cli("rewrite", "model.pt2", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "pickle checkpoint", "torch.export.save")


def test_pickled_objects_beside_weights(cli: Cli, bert: Path, here: Path, out: Path) -> None:
    model = copy_of(bert, here)
    (model / "model.safetensors").unlink()
    torch.save({"embeddings": Bomb()}, model / "pytorch_model.bin")
    ran = cli("rewrite", model, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "pickled objects", "safetensors")


def test_a_config_that_asks_for_remote_code(cli: Cli, bert: Path, here: Path, out: Path) -> None:
    model = copy_of(bert, here)
    (model / "own.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    change_config(
        model,
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    )
    ran = cli("rewrite", model, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "auto_map", "package.module:factory")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.ops.aten.relu.default", "torch.ops.load_library"),
        ("torch.ops.aten.relu.default", "torch.serialization.os.system"),
        ("torch.ops.aten.relu.default", "_operator.__call__"),
    ],
)
def test_a_program_whose_nodes_are_no_operators(
    cli: Cli, here: Path, out: Path, old: str, new: str
) -> None:
    change_program(here / "model.pt2", old, new)
    ran = cli("rewrite", "model.pt2", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "no operator", "--unsafe")


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('x')",
        "(lambda: 1)()",
        "sympify('x.y()')",
        "a.__class__",
        "[i for i in a]",
    ],
)
def test_a_program_whose_sizes_are_code(cli: Cli, here: Path, out: Path, expression: str) -> None:
    change_program(here / "model.pt2", None, expression)
    ran = cli("rewrite", "model.pt2", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "no expression of sizes", "--unsafe")


def change_program(path: Path, old: str | None, new: str) -> None:
    """A program with something else in its graph; for ``old`` None in its size expressions."""
    import zipfile

    open_size = {"x": {0: torch.export.Dim("n")}}
    program = torch.export.export(Relu(), (torch.ones(3, 2),), dynamic_shapes=open_size)
    whole = path.with_name("whole.pt2")
    torch.export.save(program, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("models/model.json"):
                text = data.decode()
                if old is None:
                    graph = json.loads(text)
                    swapped = swap_expressions(graph, new)
                    assert swapped
                    text = json.dumps(graph)
                else:
                    assert old in text
                    text = text.replace(old, new)
                data = text.encode()
            target.writestr(info, data)
    whole.unlink()


def swap_expressions(value: object, new: str) -> int:
    if isinstance(value, dict):
        found = sum(swap_expressions(item, new) for item in value.values())
        if "expr_str" in value:
            value["expr_str"] = new
            found += 1
        return found
    return sum(swap_expressions(item, new) for item in value) if isinstance(value, list) else 0


def test_no_memory_is_foreseen(
    cli: Cli, bert: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_truth, "available_bytes", lambda _: 1000)
    ran = cli("rewrite", bert, "-o", out)
    assert_refused(ran, ExitCode.NO_MEMORY, "not enough memory", "--no-memory-check")


# -- notes and JSON ----------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_weights_is_said(cli: Cli, tmp_path: Path, out: Path) -> None:
    model = save_bert(tmp_path / "model", architectures=["BertForSequenceClassification"])
    ran = cli("inspect", model, "--json")
    assert ran.code == 0
    assert "note: the checkpoint has no weights for classifier" in ran.err


def test_an_error_is_json_where_results_are(cli: Cli) -> None:
    ran = cli("inspect", "no/such/model", "--json")
    assert ran.code == ExitCode.CANNOT_OPEN
    assert ran.data["exit_code"] == ExitCode.CANNOT_OPEN
    assert "no/such/model" in ran.data["error"]
    assert ran.data["remedy"]
