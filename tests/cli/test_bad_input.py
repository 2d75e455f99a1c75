"""Bad input: one line, a remedy, the right exit code, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bda_fx import choose_truth
from bda_fx.cli.errors import ExitCode
from tests.cli.conftest import Cli, Ran, change_config, files, save_bert

ROOT = Path(__file__).parents[2]


def assert_refused(ran: Ran, code: ExitCode, says: str, remedy: str) -> None:
    """One line that ``says`` what is wrong, one with the ``remedy``, and nothing on stdout."""
    assert ran.code == code, ran.err
    lines = [line for line in ran.err.splitlines() if not line.endswith("…")]  # progress
    assert len(lines) == 2, ran.err
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert remedy in lines[1]
    assert ran.out == ""


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where to write; the folder must be empty after the test."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder / "model.pt2"
    assert files(folder) == set()


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


def test_an_onnx_file_where_only_verify_takes_one(cli: Cli, tmp_path: Path, out: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    ran = cli("rewrite", tmp_path / "model.onnx", "-o", out)
    assert_refused(ran, ExitCode.CANNOT_OPEN, "only verify takes those", ".pt2")


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


class Relu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def relu() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Relu(), (torch.ones(3, 2),)


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


# -- the output ---------------------------------------------------------------------------------


def test_an_existing_output(cli: Cli, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    out.write_text("precious")
    ran = cli("rewrite", bert, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_WRITE, "exists already", "--force")
    assert files(tmp_path) == {"model.pt2"}
    assert out.read_text() == "precious"


def test_a_suffix_that_says_something_else(cli: Cli, bert: Path, tmp_path: Path) -> None:
    ran = cli("rewrite", bert, "-o", tmp_path / "model.onnx")
    assert_refused(ran, ExitCode.USAGE, "wrong suffix", "model.pt2")


def test_a_folder_that_is_not_there(cli: Cli, bert: Path, tmp_path: Path) -> None:
    ran = cli("rewrite", bert, "-o", tmp_path / "new/model.pt2")
    assert_refused(ran, ExitCode.CANNOT_WRITE, "no directory", "mkdir -p")


def test_no_permission(cli: Cli, bert: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write everywhere
    ran = cli("rewrite", bert, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_WRITE, "no permission", "-o")


def test_no_space_is_foreseen(
    cli: Cli, bert: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(out.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    ran = cli("rewrite", bert, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_WRITE, "bytes are needed and 1,000 are free", "-o")


@contextlib.contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    """Writes beyond ``most`` bytes of a file fail with EFBIG, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_while_it_is_written(cli: Cli, rewritten: Path, out: Path) -> None:
    with file_size_limit(20_000):
        ran = cli("rewrite", rewritten, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_WRITE, "no space", "nothing was left behind")


def test_no_memory_is_foreseen(
    cli: Cli, bert: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_truth, "available_bytes", lambda _: 1000)
    ran = cli("rewrite", bert, "-o", out)
    assert_refused(ran, ExitCode.NO_MEMORY, "not enough memory", "--no-memory-check")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)],
)
def test_a_signal_while_it_is_written(out: Path, number: signal.Signals, code: ExitCode) -> None:
    slow = (
        "import signal, sys, time, torch\n"
        "import bda_fx.cli.app as app\n"
        # A shell starts what runs in its background with interrupts ignored: these tests, perhaps.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def save(program, file):\n"
        "    file.write(b'half')\n"
        "    print('half is written', flush=True, file=sys.__stderr__)\n"
        "    time.sleep(60)\n"
        "torch.export.save = save\n"
        "app.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "rewrite", f"{__name__}:relu", "-o", str(out)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    heard: list[str] = []
    for line in process.stderr:
        heard.append(line)
        if "half is written" in line:
            break
    assert process.poll() is None, "".join(heard)
    assert any(path.name == "model.pt2" for path in out.parent.rglob("*"))  # half of it
    time.sleep(0.1)
    process.send_signal(number)
    rest = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == code
    assert rest[0].startswith("error: "), rest
    assert "nothing was left behind" in rest[1]
    assert len(rest) == 2


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
