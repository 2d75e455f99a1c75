"""Every block of code in the README and the guides runs, or it says here why it cannot.

Python blocks of a page share names, as they do for a reader; each starts in a directory of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "examples/guide.md", "examples/deploy_on_gpu.md")

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

NOT_RUN = {
    "make ": "CI's own steps",
    "pip install": "tests/integration/test_packaging.py installs the wheel",
    'runtime="tensorrt"': "TensorRT builds for and on a GPU",
    "torch_tensorrt": "Torch-TensorRT compiles for and on a GPU",
    "tensorrt_rtx --": "an engine runs on a GPU",
    "trtexec ": "TensorRT's own tool, on a GPU",
    "export_aoti(model.half().cuda()": "compiles for a GPU; the README's block does for the CPU",
}
"""What a block holds that is not run, and why."""

PRELUDE = """
import os, sys
import torch, transformers
torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    attn_implementation="sdpa", max_position_embeddings=512, use_cache=False,
)
model = transformers.BertModel(config, add_pooling_layer=False).eval()
ids = torch.randint(0, 50, (2, 9))
inputs = kwargs = batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
args = ()
axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=512)}
shapes = {name: axes for name in inputs}

@torch.library.custom_op("documented::attention", mutates_args=())
def my_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)
"""


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def reason(block: str) -> str | None:
    return next((why for part, why in NOT_RUN.items() if part in block), None)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page: str, tmp_path: Path) -> None:
    found = [block for block in blocks(page, "python") if reason(block) is None]
    assert found
    if find_spec("tensorrt_rtx_bindings") is None:
        found = [block for block in found if "export_tensorrt" not in block]
    parts = [PRELUDE]
    for at, block in enumerate(found):
        parts += [f"os.makedirs('{at}'); os.chdir('{at}')", block, "os.chdir('..')"]
        if "compiled = torch.compile" in block and "rewrite" in block:
            parts.append("with torch.no_grad(): compiled(**kwargs)")
    # Without a GPU what is said of it is left out: all else stands as it does in the page.
    script = "\n".join(parts).replace(".cuda()", "")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_commands(cli: Cli, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for block in blocks("README.md", "sh"):
        for line in block.splitlines():
            command = shlex.split(line.replace("MODEL", str(bert)), comments=True)
            if command[:1] == ["bda-fx"]:
                done = cli(*command[1:])
                assert done.code == 0, f"{line}: {done.err}"
                ran.append(command[1])
            elif command[:1] == ["make"]:
                assert f"\n{command[1]}:" in (ROOT / "Makefile").read_text()
            else:
                assert not command or reason(line) is not None, line
    assert {"doctor", "inspect", "rewrite", "export", "verify"} <= set(ran)


def test_nothing_is_left_out_by_mistake() -> None:
    """A reason that fits no block is out of date."""
    everything = [b for page in PAGES for lang in ("python", "sh") for b in blocks(page, lang)]
    for part in NOT_RUN:
        assert any(part in block for block in everything), part
