"""A tiny Hugging Face directory, and ``bda-fx`` in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bda_fx.cli.app import app
from bda_fx.cli.errors import ExitCode

HIDDEN, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 40
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "jumps", "over", "a", "dog"]


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run ``bda-fx`` with these arguments."""
    monkeypatch.delenv("BDA_FX_TRACEBACK", raising=False)

    def run(*arguments: object) -> Ran:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return Ran(done.exit_code, done.stdout, done.stderr)

    return run


def without_progress(text: str) -> list[str]:
    """The lines but for those that announce a stage, as any may last two seconds."""
    lines = text.splitlines()
    return [line for line in lines if not (line.startswith("bda-fx: ") and line.endswith(" …"))]


def assert_refused(ran: Ran, code: ExitCode, says: str, remedy: str) -> None:
    """One line that ``says`` what is wrong, one with the ``remedy``, and nothing on stdout."""
    assert ran.code == code, ran.err
    lines = without_progress(ran.err)
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


class Relu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def relu() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Relu(), (torch.ones(3, 2),)


def save_bert(path: Path, **settings: Any) -> Path:
    """A random BERT with a word-level tokenizer, as save_pretrained writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    change_config(path, **settings)
    return path


def change_config(path: Path, **settings: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def rewritten(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bda-fx rewrite`` of it."""
    out = tmp_path_factory.mktemp("rewritten") / "bert.pt2"
    done = CliRunner().invoke(app, ["rewrite", str(bert), "-o", str(out)])
    assert done.exit_code == 0, done.output
    return out


def files(folder: Path) -> set[str]:
    """Every path below ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
