"""The CPU kernel under a sanitizer.

    python -m tests.kernels.sanitize address|thread [--quick] [--variant emulated|brgemm]

Builds the kernel with ``-fsanitize=…``, starts itself anew with the sanitizer's runtime loaded
first, and there calls every form in every type with strides, token counts and thread counts. The
sanitizer ends the process with an error at what it finds. Python, torch and OpenMP are not built
with it: the address sanitizer sees the heap all the same; for the thread sanitizer the kernel
starts threads of its own, and what other libraries do is ignored. ``--variant emulated``: as on a
CPU with a unit for matrices, which plain loops stand in for, so that the sanitizer sees what it
loads; ``brgemm``: 16-bit matrices are left to oneDNN's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch

from bda_fx.kernels import packed_projection as packed
from bda_fx.kernels.build_kernel import build_kernel
from tests.kernels.forms import FORMS, Form, by_definition, head
from tests.tolerances import kernel

RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
FOUND = 66
"""Exit status of a sanitizer that found something."""
OPTIONS = {
    # Python leaves memory behind on purpose; libraries loaded before it allocate in other ways.
    "address": f"detect_leaks=0:alloc_dealloc_mismatch=0:exitcode={FOUND}",
    # What torch and OpenMP do is not compiled with the sanitizer, so it sees half of it.
    "thread": f"ignore_noninstrumented_modules=1:report_signal_unsafe=0:exitcode={FOUND}",
}
BIG = [
    Form("many tokens", 257, 60, head(60, 64), 3, start=None, lead=(577,)),
    Form("many panels", 130, 24, head(24, 40), 9, start=None, lead=(3, 67)),
    Form("in place", 128, 64, head(64, 64), 3, lead=(400,)),
]


VARIANTS = {"": (), "emulated": ("-DBDA_FX_EMULATE_TILES",), "brgemm": ("-DBDA_FX_BRGEMM",)}
"""Flags for ways through the kernel that depend on the CPU."""


def flags(sanitizer: str, variant: str) -> tuple[str, ...]:
    return (f"-fsanitize={sanitizer}", "-O1", "-g", *VARIANTS[variant])


def exercise(flags: tuple[str, ...], quick: bool = False) -> int:
    """Every form in every type, by one and by several threads; three callers at once; without
    oneDNN. Of the kernel compiled with ``flags``; returns the number of calls."""
    torch.ops.load_library(build_kernel(flags))
    forms = [*(FORMS[::4] if quick else FORMS), *BIG]
    calls = [(form.arguments(dtype), dtype) for form in forms for dtype in packed.DTYPES]
    calls += [
        ([torch.stack([x, x], -1)[..., 0], *others], dtype)
        for form in BIG
        for (x, *others), dtype in [(replace(form, start=1).arguments(t), t) for t in packed.DTYPES]
    ]

    panels = [packed.pack(coefficients) for (_, coefficients, *_), _ in calls]

    def run() -> None:
        for (arguments, dtype), each in zip(calls, panels, strict=True):
            x, coefficients, *others = arguments
            got = packed.packed_projection(x, each, *others, coefficients.shape[0])
            expected = by_definition(*arguments)
            error = (got.double() - expected).norm()
            assert not float(error) > kernel(dtype) * float(expected.norm())

    for threads in (1, 3):
        torch.set_num_threads(threads)
        run()
    callers = [threading.Thread(target=run) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    with torch.backends.mkldnn.flags(enabled=False):
        run()
    return len(calls)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("sanitizer", choices=RUNTIMES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, default="")
    chosen = parser.parse_args()
    chosen_flags = flags(chosen.sanitizer, chosen.variant)
    if os.environ.get("BDA_FX_SANITIZED") == chosen.sanitizer:
        calls = exercise(chosen_flags, chosen.quick)
        print(f"{chosen.sanitizer}: {calls} calls, by 1 and 3 threads and by 3 callers: clean")
        return 0
    build_kernel(chosen_flags)  # the compiler must not run under the sanitizer
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.run(
        [compiler, f"-print-file-name={RUNTIMES[chosen.sanitizer]}"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(runtime).resolve()),
        f"{chosen.sanitizer[0].upper()}SAN_OPTIONS": OPTIONS[chosen.sanitizer],
        "BDA_FX_SANITIZED": chosen.sanitizer,
    }
    command = [sys.executable, "-m", "tests.kernels.sanitize", *sys.argv[1:]]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
