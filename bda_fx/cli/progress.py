"""Say on stderr what is being done, once it takes longer than two seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 2.0
"""Seconds that a stage may take in silence."""

Item = TypeVar("Item")


class Stages:
    """Named stages of a command. On a terminal a bar with the time taken, which goes away at the
    end; elsewhere a line for each stage that takes longer than :data:`PATIENCE`."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream

    def note(self, text: str) -> None:
        """Something that a user should know."""
        print(f"note: {text}", file=self.stream)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Run a block as the stage ``name`` of ``total`` parts, or of unknown length."""
        current = Stage(self, name, total)
        if self.quiet:
            yield current
            return
        timer = threading.Timer(PATIENCE, current.show)
        timer.daemon = True
        timer.start()
        try:
            yield current
        finally:
            timer.cancel()
            current.finish()

    def each(self, name: str, items: Iterable[Item], total: int) -> Iterator[Item]:
        """The items, one part of the stage ``name`` each."""
        with self.stage(name, total) as current:
            for item in items:
                yield item
                current.advance()


class Stage:
    """One stage; ``advance`` after each of its parts."""

    def __init__(self, stages: Stages, name: str, total: int | None) -> None:
        self.stages, self.name, self.total, self.done = stages, name, total, 0
        self.started = time.monotonic()
        self.task: TaskID | None = None
        self.progress: Progress | None = None
        self.over = False
        self.lock = threading.Lock()

    def show(self) -> None:
        """Called by the timer, in its thread."""
        with self.lock:
            if self.over:
                return
            stream = self.stages.stream
            if not stream.isatty():
                print(f"bda-fx: {self.name} …", file=stream, flush=True)
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TimeElapsedColumn

            self.progress = Progress(
                SpinnerColumn(),
                "{task.description}",
                BarColumn(),
                TimeElapsedColumn(),
                console=Console(file=stream),
                transient=True,
            )
            self.progress.start()
            self.task = self.progress.add_task(self.name, total=self.total, completed=self.done)

    def advance(self, name: str | None = None) -> None:
        """One part more is done; ``name`` says what comes next."""
        with self.lock:
            self.done += 1
            if self.progress is not None and self.task is not None:
                text = self.name if name is None else f"{self.name}: {name}"
                self.progress.update(self.task, completed=self.done, description=text)

    def finish(self) -> None:
        with self.lock:
            self.over = True
            if self.progress is not None:
                self.progress.stop()
