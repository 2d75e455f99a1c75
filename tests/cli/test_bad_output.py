"""Bad places for an output: one line, a remedy, the right exit code, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
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

from bda_fx.cli.errors import ExitCode
from tests.cli.conftest import Cli, assert_refused, files, without_progress

ROOT = Path(__file__).parents[2]
RELU = "tests.cli.conftest:relu"


def test_an_existing_output(cli: Cli, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    out.write_text("precious")
    ran = cli("rewrite", bert, "-o", out)
    assert_refused(ran, ExitCode.CANNOT_WRITE, "exists already", "--force")
    assert files(tmp_path) == {"model.pt2"}
    assert out.read_text() == "precious"


def test_a_suffix_that_says_something_else(cli: Cli, bert: Path, tmp_path: Path) -> None:
    ran = cli("rewrite", bert, "-o", tmp_path / "model.safetensors")
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


SLOW = {
    "rewrite": """
import torch
def save(program, file):
    file.write(b"half")
    wait()
torch.export.save = save
""",
    "export": """
import onnx_ir
def save(model, path, **_):
    path.write_bytes(b"half")
    wait()
onnx_ir.save = save
""",
}
"""Writers that stop half-way and wait for a signal."""


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("rewrite", signal.SIGINT, ExitCode.INTERRUPTED),
        ("rewrite", signal.SIGTERM, ExitCode.TERMINATED),
        ("export", signal.SIGINT, ExitCode.INTERRUPTED),
    ],
)
def test_a_signal_while_it_is_written(
    out: Path, command: str, number: signal.Signals, code: ExitCode
) -> None:
    arguments = []
    if command == "export":
        pytest.importorskip("onnxscript")
        out, arguments = out.with_suffix(".onnx"), ["--to", "onnx"]
    slow = (
        "import signal, sys, time\n"
        "import bda_fx.cli.app as app\n"
        # A shell starts what runs in its background with interrupts ignored: these tests, perhaps.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait():\n"
        "    print('half is written', flush=True, file=sys.__stderr__)\n"
        "    time.sleep(60)\n"
        f"{SLOW[command]}"
        "app.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, command, RELU, *arguments, "-o", str(out)],
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
    assert any(path.suffix == out.suffix for path in out.parent.rglob("*"))  # half of it
    time.sleep(0.1)
    process.send_signal(number)
    rest = without_progress(process.communicate(timeout=60)[1])
    assert process.returncode == code
    assert rest[0].startswith("error: "), rest
    assert "nothing was left behind" in rest[1]
    assert len(rest) == 2


@pytest.mark.parametrize(("target", "suffix"), [("onnx", ".onnx"), ("aoti", ".pt2")])
def test_no_space_while_an_export_is_written(
    cli: Cli, bert: Path, out: Path, target: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writers of both formats are cut off as by a full disk."""
    pytest.importorskip("onnxscript")
    import onnx_ir

    def full(*_: object, **__: object) -> None:
        next(out.parent.glob(".*")).joinpath("part").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_ir, "save", full)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", full)
    name = RELU
    ran = cli("export", name, "--to", target, "-o", out.with_suffix(suffix), "--no-measure")
    assert_refused(ran, ExitCode.CANNOT_WRITE, "no space", "nothing was left behind")


@pytest.mark.parametrize(("target", "suffix"), [("onnx", ".onnx"), ("tensorrt", ".engine")])
def test_an_existing_output_of_an_export(
    cli: Cli, bert: Path, tmp_path: Path, target: str, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("precious")
    ran = cli("export", bert, "--to", target, "-o", path)
    assert_refused(ran, ExitCode.CANNOT_WRITE, "exists already", "--force")
    assert files(tmp_path) == {path.name}
    assert path.read_text() == "precious"


def test_an_exporter_that_is_not_installed(
    cli: Cli, bert: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # importing it raises
    ran = cli("export", bert, "--to", "onnx", "-o", out.with_suffix(".onnx"))
    assert_refused(ran, ExitCode.NOT_INSTALLED, "needs onnxscript", "pip install 'bda-fx[onnx]'")
