"""Run one command: its results on stdout, all else on stderr, its errors as one line and a code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import typer

from bda_fx.cli.errors import CliError, ExitCode, Terminated, explain
from bda_fx.cli.progress import Stages

TRACEBACK = "BDA_FX_TRACEBACK"
"""Environment variable that ``--traceback`` sets."""


@dataclass(frozen=True)
class Result:
    """What a command found: ``data`` for machines, ``text`` for people (what rich can print)."""

    data: dict[str, Any]
    text: Any
    code: ExitCode = ExitCode.DONE


@dataclass(frozen=True)
class Output:
    """How a command talks."""

    as_json: bool = False
    quiet: bool = False


def run_command(work: Callable[[Stages], Result], output: Output) -> None:
    """Do ``work`` and print its result.

    Raises:
        typer.Exit: with the exit code.
    """
    try:
        with _hushed():
            result = work(Stages(output.quiet))
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        raise typer.Exit(_report(explain(error), output)) from None
    if output.as_json:
        print(json.dumps(result.data, indent=2, default=str))
    elif isinstance(result.text, str):
        print(result.text)
    else:
        _print_rich(result.text)
    raise typer.Exit(result.code)


def note(text: str) -> None:
    """Something that a user should know, on stderr."""
    print(f"note: {text}", file=sys.stderr)


def _report(error: CliError, output: Output) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    print(f"       {error.remedy}", file=sys.stderr)
    if output.as_json:
        found = {"error": error.message, "remedy": error.remedy, "exit_code": int(error.code)}
        print(json.dumps(found, indent=2))
    return int(error.code)


def _print_rich(text: Any) -> None:
    from rich.console import Console

    # A file or a pipe has no width: lines are as long as they are.
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(text)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """What libraries print goes to stderr, their warnings nowhere unless asked for."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not os.environ.get(TRACEBACK):
            warnings.simplefilter("ignore")
            before = logging.root.manager.disable
            logging.disable(logging.WARNING)
            try:
                yield
            finally:
                logging.disable(before)
        else:
            yield
