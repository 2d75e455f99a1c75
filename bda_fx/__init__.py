"""BD Attention as a compiler pass: smaller K and V projections in any PyTorch model, losslessly.

    torch.compile(model, backend="bda")             # no import needed
    bda_fx.rewrite(model, args, kwargs)             # an ExportedProgram with smaller weights
    bda_fx.analyze(model, args, kwargs)             # what would be done, and why not elsewhere
    bda_fx.verify(reference, candidate, args)       # how equal the outputs are

Importing this module is cheap and initialises no device; the compiler is loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "analyze": "api",
    "rewrite": "api",
    "Rewrite": "api",
    "import_onnx": "importers.import_onnx",
    "OnnxFileError": "importers.op_table",
    "OnnxImportError": "importers.op_table",
    "export_onnx": "exporters.export_onnx",
    "export_tensorrt": "exporters.export_tensorrt",
    "export_aoti": "exporters.export_aoti",
    "Exported": "exporters.exported",
    "ExportError": "exporters.exported",
    "Timing": "exporters.exported",
    "verify": "fidelity",
    "Fidelity": "fidelity",
    "OutputFidelity": "fidelity",
    "Options": "options",
    "OptionError": "options",
    "Report": "report",
    "SiteReport": "report",
    "StepError": "outcome",
    "bda_backend": "backend",
    "CacheConflict": "cache_bases",
    "invalidate": "derived_weights",
    "register_attention": "attention_ops",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from bda_fx.api import Rewrite as Rewrite
    from bda_fx.api import analyze as analyze
    from bda_fx.api import rewrite as rewrite
    from bda_fx.attention_ops import register_attention as register_attention
    from bda_fx.backend import bda_backend as bda_backend
    from bda_fx.cache_bases import CacheConflict as CacheConflict
    from bda_fx.derived_weights import invalidate as invalidate
    from bda_fx.exporters.export_aoti import export_aoti as export_aoti
    from bda_fx.exporters.export_onnx import export_onnx as export_onnx
    from bda_fx.exporters.export_tensorrt import export_tensorrt as export_tensorrt
    from bda_fx.exporters.exported import Exported as Exported
    from bda_fx.exporters.exported import ExportError as ExportError
    from bda_fx.exporters.exported import Timing as Timing
    from bda_fx.fidelity import Fidelity as Fidelity
    from bda_fx.fidelity import OutputFidelity as OutputFidelity
    from bda_fx.fidelity import verify as verify
    from bda_fx.importers.import_onnx import import_onnx as import_onnx
    from bda_fx.importers.op_table import OnnxFileError as OnnxFileError
    from bda_fx.importers.op_table import OnnxImportError as OnnxImportError
    from bda_fx.options import OptionError as OptionError
    from bda_fx.options import Options as Options
    from bda_fx.outcome import StepError as StepError
    from bda_fx.report import Report as Report
    from bda_fx.report import SiteReport as SiteReport


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
