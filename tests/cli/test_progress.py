"""What a command says on stderr while it works, and what a shell completes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bda_fx.cli import progress
from bda_fx.cli.progress import Stages

PATIENCE = progress.PATIENCE
ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.05)


def test_what_is_quick_is_not_mentioned() -> None:
    heard = io.StringIO()
    with Stages(stream=heard).stage("quick"):
        pass
    time.sleep(0.1)
    assert heard.getvalue() == ""


def test_two_seconds_are_the_default() -> None:
    assert PATIENCE == 2.0


def test_what_takes_longer_is_named_in_a_line() -> None:
    heard = io.StringIO()
    with Stages(stream=heard).stage("slow", 2) as stage:
        time.sleep(0.2)
        stage.advance()
    assert heard.getvalue() == "bda-fx: slow …\n"


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    heard = Terminal()
    with Stages(stream=heard).stage("slow", 2) as stage:
        time.sleep(0.2)
        stage.advance("second half")
        time.sleep(0.3)
        shown = heard.getvalue()
    assert "slow: second half" in shown
    assert "━" in shown
    assert "\x1b[2K" in heard.getvalue()[len(shown) :]  # the line is cleared


def test_quiet_is_quiet() -> None:
    heard = io.StringIO()
    with Stages(quiet=True, stream=heard).stage("slow"):
        time.sleep(0.2)
    assert heard.getvalue() == ""


def test_each_counts_its_items() -> None:
    assert list(Stages(stream=io.StringIO()).each("counting", iter("ab"), 2)) == ["a", "b"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("bda-fx ", "ins"), {"inspect"}),
        (("bda-fx export model ", "--noise"), {"--noise-budget"}),
        (("bda-fx export model --to ", ""), {"onnx", "tensorrt", "aoti"}),
        (("bda-fx inspect model --dtype ", "b"), {"bfloat16"}),
    ],
)
def test_a_shell_completes(typed: tuple[str, str], offered: set[str]) -> None:
    """As bash asks for it; ``--install-completion`` puts that into the user's start-up file."""
    line = "".join(typed)
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'bda-fx'; "
         "from bda_fx.cli.app import main; main()"],
        env={
            **os.environ, "_BDA_FX_COMPLETE": "complete_bash", "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1), "PYTHONPATH": str(ROOT),
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert set(done.stdout.split()) == offered, done.stderr
