"""Open an ONNX file as a program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch.export import ExportedProgram

from bda_fx.cli.errors import CliError, ExitCode
from bda_fx.cli.example_inputs import load_inputs
from bda_fx.cli.open_model import Opened, Settings
from bda_fx.cli.open_saved import only_modules

if TYPE_CHECKING:
    from bda_fx.importers.read_onnx import Signature


def open_onnx(name: str, settings: Settings) -> Opened:
    """The program in an ONNX file; its open axes stay open, unless ``settings`` fix them.

    Raises:
        CliError: it is damaged, or external data is missing.
        OnnxImportError: an op is not supported.
    """
    from bda_fx.exporters.rewrite_pair import require
    from bda_fx.importers.import_onnx import import_onnx
    from bda_fx.importers.op_table import OnnxFileError
    from bda_fx.importers.read_onnx import file_bytes, read_signature

    only_modules("--dtype", settings.dtype != "auto", name)
    only_modules("--task", settings.task is not None, name)
    require("onnx", "'bda-fx[onnx]'", name)
    path = Path(name)
    settings.check_memory(path.stat().st_size)  # to look into a file is to load it
    try:
        bytes_of_file = file_bytes(path)
        settings.check_memory(bytes_of_file)
        signature = read_signature(path)
        sizes = _sizes(signature, settings)
        program = import_onnx(path, dynamic=settings.dynamic, sizes=sizes)
    except OnnxFileError as error:
        message, _, remedy = str(error).rpartition("; ")
        raise CliError(message, remedy, ExitCode.CANNOT_OPEN) from error
    opened = Opened(name, "onnx", program, weight_bytes=bytes_of_file, source=path)
    if settings.dynamic:
        opened.notes += _fixed(signature, program)
    return opened


def _sizes(signature: Signature, settings: Settings) -> dict[str, int]:
    """Sizes of the example: those of the inputs given, or the batch and length asked for."""
    given = {} if settings.inputs is None else load_inputs(settings.inputs)
    sizes = {}
    for value in signature.inputs:
        shape = given[value.name].shape if value.name in given else None
        for at, axis in enumerate(value.axes or ()):
            if axis.size is not None:
                continue
            if shape is not None and at < len(shape):
                sizes[f"{value.name} {at}"] = shape[at]
            elif not settings.dynamic and at < 2:
                sizes[f"{value.name} {at}"] = settings.batch if at == 0 else settings.length
    return sizes


def _fixed(signature: Signature, program: ExportedProgram) -> list[str]:
    """A note for each axis that the file leaves open and the graph does not."""
    from bda_fx.cli.convert_model import open_sizes

    notes = []
    for value, sizes in zip(signature.inputs, open_sizes(program).values(), strict=False):
        for at, (axis, size) in enumerate(zip(value.axes or (), sizes, strict=False)):
            if axis.size is None and str(size).isdigit():
                called = f" ({axis.name})" if axis.name else ""
                notes.append(f"axis {at}{called} of {value.name} is fixed to {size} by the graph")
    return notes
