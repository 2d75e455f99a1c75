"""Build a TensorRT engine from an ONNX file and read off what it holds.

TensorRT-RTX (``tensorrt_rtx_bindings``) builds without a GPU, for all GPUs from Ampere on, and
compiles the last mile where the engine is loaded; TensorRT (``tensorrt``) builds for the GPU of
this machine, with the same API. Networks are strongly typed: float16 stays float16, and TensorRT
chooses nothing.

Weight memory and layers are what the builder itself logs of the engine that it made, so that they
are there without a GPU, too; an ``EngineInspector`` would have to load the engine.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bda_fx.exporters.exported import ExportError
from bda_fx.exporters.rewrite_pair import require

RUNTIMES = {
    "rtx": ("tensorrt_rtx_bindings", "'bda-fx[tensorrt]'"),
    "tensorrt": ("tensorrt", "tensorrt"),
}

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape of an input."""

_LAYER = re.compile(
    r"^Name: (?P<name>\S+), LayerType: (?P<kind>\S+), .*?(Metadata: (?P<meta>.*))?$"
)
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")


@dataclass(frozen=True)
class Layer:
    """A layer of an engine; ``origins`` are the ONNX nodes that it computes."""

    name: str
    kind: str
    origins: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """What the builder made: ``plan`` is the serialised engine."""

    plan: bytes
    weight_bytes: int
    layers: tuple[Layer, ...]
    seconds: float
    version: str


def load_runtime(runtime: str, capabilities: Sequence[str] = ()) -> Any:
    """The Python module of a runtime.

    Raises:
        ExportError: there is no such runtime, it is not installed, or it knows no such GPU.
    """
    if runtime not in RUNTIMES:
        raise ExportError(f"runtime is one of {', '.join(map(repr, RUNTIMES))}, got {runtime!r}")
    trt = require(*RUNTIMES[runtime], "export_tensorrt")
    known = [n for n in dir(getattr(trt, "ComputeCapability", object)) if n.startswith("SM")]
    unknown = [name for name in capabilities if name not in known]
    if unknown:
        raise ExportError(
            f"unknown capabilities {', '.join(unknown)}; this runtime has "
            f"{', '.join(known) or 'none to choose from: it builds for the GPU of this machine'}"
        )
    return trt


def build_engine(
    model: Path,
    profiles: Mapping[str, Shapes],
    runtime: str = "rtx",
    capabilities: Sequence[str] = (),
) -> Engine:
    """Build ``model`` (an ONNX file) for inputs within ``profiles``.

    Args:
        profiles: for each input with open axes its shapes.
        runtime: "rtx" or "tensorrt".
        capabilities: with "rtx" the GPUs to build for ("SM86", …); none is all from Ampere on.

    Raises:
        ExportError: the package is missing, or TensorRT refuses the model; with its reason.
    """
    trt = load_runtime(runtime, capabilities)
    log = _log(trt)
    builder = trt.Builder(log)
    if builder is None or not hasattr(builder, "create_network"):
        raise ExportError(f"{trt.__name__} finds no usable GPU: runtime='rtx' builds without one")
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        reasons = "; ".join(str(parser.get_error(at)) for at in range(parser.num_errors))
        raise ExportError(f"TensorRT does not read the model: {reasons}; try another opset")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
    for at, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), at)
    profile = builder.create_optimization_profile()
    for at in range(network.num_inputs):
        tensor = network.get_input(at)
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *profiles[tensor.name])
    config.add_optimization_profile(profile)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise ExportError(
            f"TensorRT does not build the model: {log.reason()}; try another opset or dtype"
        )
    (weight_bytes,) = [int(m) for text in log.texts for m in _WEIGHTS.findall(text)][-1:] or [0]
    return Engine(bytes(plan), weight_bytes, _layers(log.texts), seconds, trt.__version__)


def layers_with(layers: Sequence[Layer], nodes: Sequence[str]) -> dict[str, list[str]]:
    """Layer of the engine → those of ``nodes`` that it computes, where it computes any.

    A layer's name tells what it does besides: ``__myl_AddReshAddTran_…`` adds bias and basis and
    transposes in one kernel.
    """
    wanted = set(nodes)
    found = {layer.name: sorted(wanted.intersection(layer.origins)) for layer in layers}
    return {name: origins for name, origins in found.items() if origins}


def _log(trt: Any) -> Any:
    """A logger that keeps what it is told."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.texts: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            self.texts.append(text)
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text)

        def reason(self) -> str:
            return (self.errors or ["no reason given"])[0].splitlines()[0]

    return Log()


def _layers(texts: Sequence[str]) -> tuple[Layer, ...]:
    """Layers of the engine, from the builder's log."""
    found = []
    for line in (line for text in texts for line in text.splitlines()):
        match = _LAYER.match(line.strip())
        if match:
            origins = tuple(_ORIGIN.findall(match["meta"] or ""))
            found.append(Layer(match["name"], match["kind"], origins))
    return tuple(found)
