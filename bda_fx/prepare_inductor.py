"""Let Inductor find out about this machine while a rewrite is worked out.

Before its first kernel Inductor compiles and loads a small library, to see which vector
instructions can be had (several seconds, once for each cache directory; half a second with a warm
cache), and for the keys of its caches it hashes all of PyTorch's sources. It keeps both for the
rest of the process, and waits meanwhile for other processes and for files more than it computes. So
a thread does it beside our own analysis.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Iterator

import torch

log = logging.getLogger("bda_fx")
_lock = threading.Lock()
_thread: threading.Thread | None = None


@contextlib.contextmanager
def inductor_prepared(wanted: bool) -> Iterator[None]:
    """Inductor is prepared by the end of the block, if ``wanted``: once a process."""
    if wanted:
        _begin()
    try:
        yield
    finally:
        wait_for_inductor()


def wait_for_inductor() -> None:
    """Wait until what was begun is done: who needs it meanwhile would do it once more."""
    thread = _thread
    if thread is not None:
        thread.join()


@contextlib.contextmanager
def beside_inductor() -> Iterator[None]:
    """While Inductor is prepared, operations have a thread less: that of the compiler needs a
    processor too, and what is shared between threads takes as long as the slowest of them."""
    threads = torch.get_num_threads()
    spare = threads > 1 and _thread is not None and _thread.is_alive()
    if spare:
        torch.set_num_threads(threads - 1)
    try:
        yield
    finally:
        if spare:
            torch.set_num_threads(threads)


def _begin() -> None:
    global _thread
    try:  # here: two threads must not import parts of one package at a time
        from torch._inductor.codecache import torch_key
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    except ImportError as error:
        log.debug("bda_fx: this Inductor is not prepared: %r", error)
        return

    def prepare() -> None:
        try:
            valid_vec_isa_list()
            torch_key()
        except Exception as error:  # it will fail once more where it is needed, which tells of it
            log.debug("bda_fx: Inductor was not prepared: %r", error)

    with _lock:
        if _thread is None:
            # Inductor's options are variables of a context: the thread sees those of its caller.
            within = contextvars.copy_context().run
            _thread = threading.Thread(
                target=within, args=(prepare,), name="bda_fx: Inductor", daemon=True
            )
            _thread.start()
