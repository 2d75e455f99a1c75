"""Run ONNX models in ONNX Runtime, and look at what its optimiser makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bda_fx.exporters.exported import ExportError, root_cause
from bda_fx.generate_inputs import Inputs

LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
"""Optimisation levels by the name that ONNX Runtime's documentation gives them."""

PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")


def open_session(
    path: Path,
    *,
    level: str = "all",
    threads: int = 0,
    providers: Sequence[str] | None = None,
    save_optimized: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Load ``path``; ``threads`` 0 is as many as there are cores.

    Raises:
        ExportError: ONNX Runtime cannot load the model; with its reason.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is raised
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    known = onnxruntime.get_available_providers()
    chosen = [p for p in providers or PREFERRED if p in known]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=chosen)
    except Exception as error:  # its classes share no base but Exception
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} does not load the model: "
            f"{root_cause(error)}; export in float32 or float16, or pass check=False if it is "
            "meant for another runtime"
        ) from error


class Session:
    """A model in ONNX Runtime, called with the inputs of the program that it was made from."""

    def __init__(
        self,
        path: Path,
        program: ExportedProgram,
        *,
        level: str = "all",
        threads: int = 0,
        providers: Sequence[str] | None = None,
        save_optimized: Path | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """As :func:`open_session`. ``names``: input of the file → input of the program, where
        they differ."""
        self.session = open_session(
            path, level=level, threads=threads, providers=providers, save_optimized=save_optimized
        )
        self.program = program
        self.aliases = dict(names or {})
        self.names = [value.name for value in self.session.get_inputs()]

    def feeds(self, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays by input name."""
        args, kwargs = inputs
        values = self.program._graph_module_flat_inputs(tuple(args), dict(kwargs))
        specs = self.program.graph_signature.input_specs
        given = {
            spec.arg.name: array_of(value)
            for spec, value in zip(specs, values, strict=True)
            if spec.kind is InputKind.USER_INPUT
        }
        return {name: given[self.aliases.get(name, name)] for name in self.names}

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """Tensor outputs for inputs (args, kwargs)."""
        return [torch.from_numpy(np.asarray(v)) for v in self.run(self.feeds(inputs))]

    def run(self, feeds: dict[str, np.ndarray[Any, Any]]) -> list[Any]:
        """Outputs for prepared feeds: what is timed.

        Raises:
            ExportError: the model fails in ONNX Runtime; with its reason.
        """
        try:
            return self.session.run(None, feeds)
        except Exception as error:
            raise ExportError(
                f"the model fails in ONNX Runtime {onnxruntime.__version__}: "
                f"{root_cause(error)}; pass inputs= that it takes, or check=False if it is meant "
                "for another runtime"
            ) from error


def array_of(value: Any) -> np.ndarray[Any, Any]:
    """An input as ONNX Runtime takes it.

    Raises:
        ExportError: it is a bfloat16 tensor, which numpy has no type for.
    """
    if isinstance(value, Tensor):
        if value.dtype == torch.bfloat16:
            raise ExportError(
                "ONNX Runtime takes no bfloat16 from Python: export in float16 or float32 to have "
                "the model checked, or pass check=False"
            )
        return value.detach().cpu().contiguous().numpy()
    return np.asarray(value)
