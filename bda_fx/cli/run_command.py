"""Run one command: its results on stdout, all else on stderr, its errors as one line and a code."""

from __future__ import annotations

import contextlib
import io
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
        stages = Stages(output.quiet, sys.stderr)
        with _hushed():
            result = work(stages)
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        raise typer.Exit(_report(explain(error), output)) from None
    if output.as_json:
        print(json.dumps(result.data, indent=2, default=str))
    elif isinstance(result.text, str):
        print(result.text)
    else:
        _print_rich(result.text)
    raise typer.Exit(result.code)


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
    """What libraries print, log and warn of goes nowhere, or to stderr if it is asked for."""
    if os.environ.get(TRACEBACK):
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    before = logging.root.manager.disable
    nowhere = io.StringIO()
    with (
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
