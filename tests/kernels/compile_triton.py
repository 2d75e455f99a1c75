"""Compile the Triton kernel for GPUs that are not here, and read what came out.

    python -m tests.kernels.compile_triton

compiles every tile that the tuner may choose, in each form and dtype, for each target (some six
minutes), and writes benchmarks/results/compiled_kernels.{md,json}; ``make compile-gpu`` does it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from bda_fx.kernels import basis_projection_triton as kernel
from bda_fx.kernels.roofline import DATA_SHEETS, Device, Projection, Tile, data_sheet, tiles

TARGETS = [data_sheet(name) for name in ("A100", "H100", "B200")]
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
POINTEES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
REGISTERS = 255
"""Most that an instruction can name, on every target."""

TENSOR_MEMORY = 512
"""Columns of tensor memory of a multiprocessor of capability 10."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of the kernel: figures from the cubin, text of its PTX."""

    target: str
    tile: Tile
    registers: int
    stack: int  # bytes per thread; where there is no array, these are spilled registers
    shared_memory: int  # bytes
    tensor_memory: int  # columns
    ptx: str

    @property
    def products(self) -> set[str]:
        """Names of the matrix instructions: mma.sync, wgmma.mma_async, tcgen05.mma."""
        return set(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", self.ptx))

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.ptx))


def compile_for(
    device: Device,
    projection: Projection,
    tile: Tile,
    *,
    width: int = 128,
    ones: tuple[str, ...] = ("x_feature", "c_residual"),
    aligned: bool = True,
    table: bool = False,
) -> Compiled:
    """The kernel for heads of ``width`` features.

    ``ones`` are the arguments that are 1, which the compiler is told; ``aligned``: all others but
    counts of tokens are multiples of 16. By default tensors are contiguous.
    """
    pointee = POINTEES[projection.dtype]
    pointers = {
        **dict.fromkeys(("x", "coefficients", "bias", "out"), pointee),
        "order": "i64", "table": "i32", "partials": "fp32", "arrivals": "i32",
    }  # fmt: skip
    tf32 = projection.tf32 and projection.dtype == torch.float32
    constants: dict[str, Any] = {
        "WIDTH": width, "RUNS": ((0, projection.basis_size, 0),), "TABLE": table,
        "SCATTERED": projection.scattered, "HAS_BIAS": True,
        "PRECISION": "tf32" if tf32 else "ieee",
        "BLOCK_TOKENS": tile.tokens, "BLOCK_FEATURES": tile.features,
        "BLOCK_RESIDUAL": tile.residual, "SPLITS": tile.splits, "GROUP": kernel.GROUP,
        **dict.fromkeys(ones, 1),
    }  # fmt: skip
    signature, divisible = {}, {}
    for place, name in enumerate(kernel._basis_projection.arg_names):
        kind = f"*{pointers[name]}" if name in pointers else "i32"
        signature[name] = "constexpr" if name in constants else kind
        if aligned and name not in constants and name not in ("tokens", "bucket"):
            divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel._basis_projection, signature, constants, divisible)
    capability = 10 * device.capability[0] + device.capability[1]
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def used(what: str) -> int:
        (number,) = set(re.findall(rf"\b{what}:(\d+)", usage))
        return int(number)

    return Compiled(
        target=f"sm_{capability}",
        tile=tile,
        registers=used("REG"),
        stack=used("STACK") + used("LOCAL"),
        shared_memory=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size,
        ptx=compiled.asm["ptx"],
    )


def main() -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from record import markdown_table, provenance, write

    rows, records = [], []
    for device in TARGETS:
        for dtype, tf32 in (
            (torch.bfloat16, False), (torch.float16, False),
            (torch.float32, True), (torch.float32, False),
        ):  # fmt: skip
            for scattered in (False, True):
                projection = Projection(4096, 512, 4096, 128, dtype, 1.0, scattered, tf32)
                chosen = tiles(projection, device)
                if dtype != torch.float16:  # the same code as bfloat16's but for the names
                    few = tiles(replace(projection, tokens=16), device)
                    chosen += tuple(tile for tile in few if tile.splits == 4)
                for tile in chosen if dtype != torch.float16 else chosen[:1]:
                    c = compile_for(device, projection, tile)
                    records.append(
                        {
                            "target": c.target, "dtype": str(dtype), "tf32": tf32,
                            "scattered": scattered, "tile": asdict(tile),
                            "registers": c.registers, "stack": c.stack,
                            "shared_memory": c.shared_memory, "tensor_memory": c.tensor_memory,
                            "products": sorted(c.products),
                        }
                    )  # fmt: skip
                    print(records[-1], flush=True)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        name = "tf32" if record["tf32"] else record["dtype"].removeprefix("torch.")
        form = "scattered" if record["scattered"] else "window"
        groups.setdefault((record["target"], name, form), []).append(record)
    for (target, name, form), group in groups.items():
        products = {product for record in group for product in record["products"]}
        rows.append(
            [
                target, name, form, str(len(group)), ", ".join(sorted(products)) or "fma",
                str(max(record["registers"] for record in group)),
                str(sum(record["stack"] > 0 for record in group)),
                f"{max(record['shared_memory'] for record in group) / 1024:.0f} KiB",
            ]
        )  # fmt: skip
    origin = provenance(packages=("triton",))
    limits = ", ".join(
        f"{device.name} {device.shared_memory // 1024} KiB"
        for device in DATA_SHEETS
        if device in TARGETS
    )
    columns = [
        "target", "dtype", "basis", "tiles", "matrix instructions", "most registers",
        "tiles that spill", "most shared memory",
    ]  # fmt: skip
    text = (
        f"Written by `python -m tests.kernels.compile_triton`: triton "
        f"{origin['versions']['triton']}, torch {origin['versions']['torch']}; no GPU. Every tile "
        f"that the tuner may choose, compiled for each target and read from the cubin. A thread "
        f"may use {REGISTERS} registers, a block as much shared memory as: {limits}.\n\n"
        f"{markdown_table(columns, rows)}\n"
    )
    write("compiled_kernels", text, {**origin, "kernels": records})


if __name__ == "__main__":
    main()
