"""Compile the CPU kernel at first use, with the compiler that Inductor uses, and load it.

    TORCHINDUCTOR_CACHE_DIR / bda_fx / KEY.so

KEY is a hash of the sources, of the compiler's version and command line (which holds the flags and
where torch lies), of torch's version and of what this CPU can do, so that a home directory may be
shared by unlike machines. A library is written beside its final name and moved there in one step,
under a file lock that dies with its process: two processes never build it twice, and none ever sees
half a library.

Requires: a C++ compiler, as Inductor does. Without one the decomposition serves, said once.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from bda_fx.kept_files import kept_files
from bda_fx.prepare_inductor import wait_for_inductor

log = logging.getLogger("bda_fx")
SOURCE = Path(__file__).with_name("basis_projection.cpp")
_lock = threading.Lock()


def kernel_loaded() -> bool:
    """Whether the CPU kernel is there; builds and loads it at the first call (some 20 s, once).

    Safe from any thread and from several processes at once. Warns, once, where it cannot be had.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> bool:
    wait_for_inductor()
    try:
        torch.ops.load_library(build_kernel())
    except Exception as error:  # a missing compiler, a full disk, a read-only cache: all the same
        reason = str(error).strip().splitlines()[0:1] or [""]
        warnings.warn(
            f"bda_fx: the CPU kernel could not be built ({type(error).__name__}: {reason[0]}), so "
            "decomposed projections run as plain ATen ops, which are slower. It needs the C++ "
            "compiler that Inductor needs: install one, or name it in CXX.",
            stacklevel=3,
        )
        log.debug("bda_fx: the CPU kernel could not be built", exc_info=True)
        return False
    return True


def build_kernel(flags: Sequence[str] = ()) -> Path:
    """The library's path, compiled if it is not in the cache.

    ``flags`` are more flags for the compiler.

    Raises:
        RuntimeError, OSError: no compiler, or it failed; the message holds its output.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions, get_compiler_version_info
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch.utils._filelock import FileLock

    options = CppTorchOptions(
        vec_isa=pick_vec_isa(), include_pytorch=True, warning_all=False, extra_flags=flags
    )
    directory = kept_files()
    command = CppBuilder("kernel", str(SOURCE), options, str(directory)).get_command_line()
    command = command.replace(str(directory), "")  # the same kernel, wherever it is kept
    parts = (
        [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))],
        command,
        get_compiler_version_info(options.get_compiler()),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        sorted(torch.cpu.get_capabilities().items()),
    )
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    library = directory / f"{key}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(str(directory / f"{key}.lock")):
        if not library.exists():
            builder = CppBuilder(f"{key}.{os.getpid()}", str(SOURCE), options, str(directory))
            log.info("bda_fx: compiling the CPU kernel to %s", library)
            builder.build()
            os.replace(builder.get_target_file_path(), library)
    return library
