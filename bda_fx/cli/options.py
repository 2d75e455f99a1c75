"""Options and arguments of ``bda-fx``: their types, names and help. Several commands share them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """How weights are loaded; "auto" is as they are stored."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Cache(StrEnum):
    """Key-value caches; "none" exports with use_cache=False, the others with caches returned."""

    none = "none"
    skip = "skip"
    opaque = "opaque"


class Target(StrEnum):
    """What ``export`` writes."""

    onnx = "onnx"
    tensorrt = "tensorrt"
    aoti = "aoti"


class Side(StrEnum):
    """Which side of a product is decomposed."""

    auto = "auto"
    kv = "kv"
    qo = "qo"


class Compiler(StrEnum):
    """What ``bench`` runs both models under."""

    inductor = "inductor"
    eager = "eager"


MODEL_HELP = (
    "A Hugging Face directory, a .pt2 or .onnx file, timm:NAME with --weights, or "
    "package.module:function."
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Task = Annotated[
    str | None,
    typer.Option(help="Task of a Hugging Face model [default: the class that saved it]."),
]
AsDtype = Annotated[Dtype, typer.Option("--dtype", help="Dtype to load weights in.")]
Dynamic = Annotated[
    bool, typer.Option("--dynamic/--static", help="Leave batch and length open, or fix them.")
]
KvCache = Annotated[
    Cache,
    typer.Option(
        help="Key-value caches: none returned, skip (returned as they are), or opaque (they hold "
        "the new basis: your word that only this model reads them)."
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--noise-budget",
        min=1.0,
        help="How noisy the result may be, × the model's own noise [default: 1.25 in half "
        "precision, else 1.4].",
    ),
]
ProofBudget = Annotated[
    float,
    typer.Option(min=1.0, help="Largest error that passes, × the original's own against float64."),
]
ExportBudget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        min=1.0,
        help="Largest error in the runtime that passes, × the original's own "
        "[default: the noise budget; bases shrink until it holds].",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="A text file: its first lines tell which layers are loud (needs a tokenizer)."
    ),
]
InputFile = Annotated[
    Path | None,
    typer.Option("--inputs", help="Example inputs: a safetensors file, names as in forward()."),
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights for timm:NAME (safetensors, or a tensor-only .pth).")
]
Batch = Annotated[int, typer.Option(min=2, help="Batch of the example.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of made-up examples.")]
Unsafe = Annotated[
    bool, typer.Option("--unsafe", help="Load pickles, which may run any code in them.")
]
NoMemoryCheck = Annotated[
    bool, typer.Option("--no-memory-check", help="Try although memory will not do.")
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an output that exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
WhichSide = Annotated[Side, typer.Option("--side", help="Side of a product to decompose.")]
GraphFile = Annotated[
    Path | None,
    typer.Option(
        "--graph", help="Draw a site before and after into this file: .svg, or .dot for Graphviz."
    ),
]
DrawnSite = Annotated[
    str | None,
    typer.Option("--site", help="Weight of the site to draw [default: the first one rewritten]."),
]
