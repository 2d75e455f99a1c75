"""Open what the command line calls MODEL, whatever it is, without running code that came with it.

a directory with config.json        Hugging Face            open_huggingface.py
its config.json                     the same, without weights
model.pt2                           torch.export.save       open_saved.py
timm:NAME, weights by --weights     timm                    open_saved.py
package.module:function             a factory of your own   open_saved.py
model.pt, .pth, .bin, .ckpt         a pickle, with --unsafe open_saved.py
model.onnx                          ONNX                    open_onnx.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bda_fx.cli.errors import CliError, ExitCode

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from bda_fx.generate_inputs import Inputs

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class Settings:
    """How to open a model; the options of the command line."""

    task: str | None = None
    dtype: str = "auto"
    dynamic: bool = True
    kv_cache: str = "none"
    unsafe: bool = False
    weights: Path | None = None
    inputs: Path | None = None
    texts: tuple[str, ...] | None = None
    batch: int = 2
    length: int = 32
    config_only: bool = False
    check_memory: Callable[[int], None] = lambda _: None
    """Called with the bytes of the weights before these are read."""


@dataclass
class Opened:
    """A model with example inputs and what is known of it.

    ``more_inputs(n)`` are up to n further inputs, for verification and calibration; None where the
    example is all there is, or the program's signature has to do. ``dynamic_shapes`` as in
    ``torch.export.export``. ``real`` says whether inputs are real ones (of a tokenizer or a file).
    """

    name: str
    kind: str
    model: nn.Module | ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    more_inputs: Callable[[int], list[Inputs]] | None = None
    real: bool = False
    weight_bytes: int = 0
    source: Path | None = None
    """The ONNX file that a program was read from."""
    notes: list[str] = field(default_factory=list)


def kind_of(name: str) -> str:
    """Which kind of MODEL ``name`` is: "huggingface", "program", "onnx", "pickle", "timm" or
    "factory".

    Raises:
        CliError: it is none of them, or there is no such file.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return "huggingface"
        raise CliError(
            f"{name} has no config.json",
            "pass a directory that save_pretrained wrote, a .pt2 file, or package.module:factory",
            ExitCode.CANNOT_OPEN,
        )
    if path.is_file():
        return _kind_of_file(path)
    if name.startswith("timm:"):
        return "timm"
    head, colon, tail = name.partition(":")
    if colon and tail.isidentifier() and all(part.isidentifier() for part in head.split(".")):
        return "factory"
    remedy = "check the path"
    if "/" in name and not name.startswith((".", "/", "~")):
        remedy += "; nothing is fetched from a hub: download the model and pass its directory"
    raise CliError(f"there is no file or directory {name}", remedy, ExitCode.CANNOT_OPEN)


def _kind_of_file(path: Path) -> str:
    if path.name == "config.json":
        return "huggingface"
    suffix = path.suffix.lower()
    if suffix in (".pt2", ".onnx"):
        return "program" if suffix == ".pt2" else "onnx"
    if suffix in PICKLES:
        return "pickle"
    remedy = "pass a Hugging Face directory, a .pt2 or .onnx file, or package.module:factory"
    if suffix in (".safetensors", ".gguf"):
        remedy = "weights alone are no model: pass the directory that holds them with config.json"
    raise CliError(f"{path} is no model: wrong type of file", remedy, ExitCode.CANNOT_OPEN)


def open_model(name: str, settings: Settings) -> Opened:
    """The model called ``name``.

    Raises:
        CliError: it cannot be opened, and why.
    """
    kind = kind_of(name)
    if kind == "huggingface":
        from bda_fx.cli.open_huggingface import open_huggingface

        opened = open_huggingface(Path(name), settings)
    else:
        from bda_fx.cli import open_onnx, open_saved

        opener: Mapping[str, Callable[[str, Settings], Opened]] = {
            "program": open_saved.open_program,
            "pickle": open_saved.open_pickle,
            "timm": open_saved.open_timm,
            "factory": open_saved.open_factory,
            "onnx": open_onnx.open_onnx,
        }
        opened = opener[kind](name, settings)
        if settings.texts is not None:
            raise CliError(
                f"--calibration needs a tokenizer, which {name} does not come with",
                "pass tensors with --inputs, or a Hugging Face directory",
                ExitCode.USAGE,
            )
    if settings.inputs is not None:
        from bda_fx.cli.example_inputs import read_inputs

        read_inputs(opened, settings.inputs, dynamic=settings.dynamic)
    return opened
