"""Errors of the command line: one line that says what is wrong, a remedy, and an exit code.

Every exception that a command can end in is turned into a :class:`CliError` by :func:`explain`, in
one place, so that the same cause has the same exit code whichever command meets it.
"""

from __future__ import annotations

import errno
import re
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of ``bda-fx``. 2 is also what a wrong option gives."""

    DONE = 0
    DIFFERENT = 1
    USAGE = 2
    CANNOT_OPEN = 3
    CANNOT_CONVERT = 4
    CANNOT_WRITE = 5
    NO_MEMORY = 6
    NOT_INSTALLED = 7
    INTERNAL = 70
    INTERRUPTED = 130
    TERMINATED = 143


MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.DIFFERENT: "verify: the models differ by more than the budget",
    ExitCode.USAGE: "wrong usage: an option, a task or an option's value",
    ExitCode.CANNOT_OPEN: "the model cannot be opened: missing, corrupt, of another kind, not safe",
    ExitCode.CANNOT_CONVERT: "the model cannot be converted: its architecture, its export, a proof",
    ExitCode.CANNOT_WRITE: "the output cannot be written: it exists, no space, no permission",
    ExitCode.NO_MEMORY: "not enough memory",
    ExitCode.NOT_INSTALLED: "a package that the command needs is not installed",
    ExitCode.INTERNAL: "an error inside bda-fx: please report it",
    ExitCode.INTERRUPTED: "interrupted (128 + SIGINT)",
    ExitCode.TERMINATED: "terminated (128 + SIGTERM)",
}

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}

# What PyTorch and ONNX Runtime say of failed allocations, which are RuntimeErrors on the CPU.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Failed to allocate memory")

_LAST_PART = re.compile(r"(.*?)(?:([:;]) ([^:;]*))?$")


class CliError(Exception):
    """What a user is told: ``message`` and ``remedy`` are one line each."""

    def __init__(self, message: str, remedy: str, code: ExitCode) -> None:
        super().__init__(message)
        self.message, self.remedy, self.code = message, remedy, code


class Terminated(BaseException):
    """SIGTERM, as an exception: what was begun is cleaned up as for Ctrl-C."""


def first_line(error: BaseException) -> str:
    """The first line of an error that says something; its type where none does."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def explain(error: BaseException) -> CliError:
    """The :class:`CliError` for any exception."""
    if isinstance(error, CliError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return CliError("interrupted", "nothing was left behind", ExitCode.INTERRUPTED)
    if isinstance(error, Terminated):
        return CliError("terminated", "nothing was left behind", ExitCode.TERMINATED)
    known = _cause(error, OSError)
    if isinstance(known, OSError) and known.errno in _NO_ROOM | _NO_PERMISSION:
        return _cannot_write(known)
    text = first_line(error)
    if isinstance(error, MemoryError) or any(part in str(error) for part in _OUT_OF_MEMORY):
        return CliError(
            f"out of memory: {text}",
            "free some memory, use a smaller --batch and --length, or --dtype float16",
            ExitCode.NO_MEMORY,
        )
    return _by_type(error, text)


def _by_type(error: BaseException, text: str) -> CliError:
    # By name: to import what defines them would take seconds that most errors are not worth.
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OptionError" in names:
        return CliError(text, "bda-fx COMMAND --help lists the values", ExitCode.USAGE)
    if "ExportError" in names:  # "what is wrong: what to do", or with a semicolon
        message, _, remedy = _LAST_PART.match(text).groups()  # type: ignore[union-attr]
        missing = _cause(error, ImportError) is not None
        code = ExitCode.NOT_INSTALLED if missing else ExitCode.CANNOT_CONVERT
        if "PlaceError" in names:
            code = ExitCode.CANNOT_WRITE
        return CliError(message, remedy or "bda-fx inspect MODEL shows what was found", code)
    if isinstance(error, ImportError):
        package = error.name or "a package"
        return CliError(
            f"{package} is not installed or cannot be imported: {text}",
            "bda-fx doctor says what to install for what",
            ExitCode.NOT_INSTALLED,
        )
    if isinstance(error, ValueError | TypeError) or "StepError" in names:
        return CliError(
            text,
            "bda-fx --traceback COMMAND … shows where; pass other inputs with --inputs, or a "
            "factory package.module:function that returns (model, args, kwargs)",
            ExitCode.CANNOT_CONVERT,
        )
    return CliError(
        f"{type(error).__name__}: {text}",
        "this is an error inside bda-fx: please report it with the output of "
        "bda-fx --traceback COMMAND … and bda-fx doctor",
        ExitCode.INTERNAL,
    )


def _cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """``error`` or the nearest exception behind it that is of ``kind``."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _cannot_write(error: OSError) -> CliError:
    where = f" {error.filename}" if error.filename else ""
    if error.errno in _NO_ROOM:
        return CliError(
            f"no space to write{where}: {error.strerror}",
            "free some space or choose another place with -o; nothing was left behind",
            ExitCode.CANNOT_WRITE,
        )
    return CliError(
        f"no permission for{where}: {error.strerror}",
        "choose another place with -o, or change the permissions",
        ExitCode.CANNOT_WRITE,
    )
