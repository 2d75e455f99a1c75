"""Run ONNX files: as they are in ONNX Runtime, and in float64 for the truth.

    truth    every float tensor of the model becomes float64 (weights, constants, casts, types of
             inputs) and onnx's reference implementation runs it in numpy, node by node

so that two files can be compared where there is no PyTorch model to go back to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bda_fx.cli.errors import CliError, ExitCode, first_line
from bda_fx.exporters.exported import ExportError

_FLOATS = {1, 10, 16}
"""FLOAT, FLOAT16 and BFLOAT16 of onnx.TensorProto.DataType."""
_DOUBLE = 11
_TYPED = {"dtype", "output_dtype", "to"}
"""Attributes that name a type, and are widened where it is a floating one."""


class OnnxModel:
    """An ONNX file that is called like a module; outputs are tensors on the CPU.

    Keyword inputs go by name, if all inputs of the file are among them; else inputs go by place.
    """

    def __init__(self, path: Path) -> None:
        from bda_fx.exporters.run_onnx import array_of, open_session

        self.path = path
        self._array = array_of
        self._check()
        try:
            self.session = open_session(path, providers=["CPUExecutionProvider"])
        except ExportError as error:
            raise CliError(
                f"ONNX Runtime cannot load {path}: {first_line(error.__cause__ or error)}",
                "export it once more; bda-fx --traceback verify … shows all of the message",
                ExitCode.CANNOT_OPEN,
            ) from error
        self.inputs: list[str] = [i.name for i in self.session.get_inputs()]
        self.outputs: list[str] = [o.name for o in self.session.get_outputs()]
        self._wide: Any = None

    @property
    def weight_bytes(self) -> int:
        """The file, with its external data."""
        beside = [self.path, *self.path.parent.glob(f"{self.path.name}.data*")]
        return sum(file.stat().st_size for file in beside)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        feed = {name: self._array(value) for name, value in self.feed(args, kwargs).items()}
        return [torch.as_tensor(value) for value in self.session.run(self.outputs, feed)]

    def truth(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Outputs in float64 throughout; where onnx's implementation lacks an op (those of ONNX
        Runtime's optimiser), of the program that ``import_onnx`` reads."""
        given = self.feed(args, kwargs)
        if self._wide is None:
            self._wide = self._float64_run()
        return [torch.as_tensor(value) for value in self._wide(given)]

    def _float64_run(self) -> Callable[[dict[str, Tensor]], list[Any]]:
        from onnx.reference import ReferenceEvaluator

        try:
            evaluator = ReferenceEvaluator(_widened(self.path), new_ops=_float64_ops())
        except NotImplementedError:
            from bda_fx.evaluate_float64 import evaluate_float64
            from bda_fx.importers.import_onnx import import_onnx

            program = import_onnx(self.path)
            names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
            return lambda given: evaluate_float64(
                program,
                (),
                {ours: given[name] for ours, name in zip(names, self.inputs, strict=True)},
            )

        def run(given: dict[str, Tensor]) -> list[Any]:
            feed = {
                name: (value.double() if value.is_floating_point() else value).cpu().numpy()
                for name, value in given.items()
            }
            return list(evaluator.run(None, feed))

        return run

    def feed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Inputs by the file's names."""
        if not args and set(self.inputs) <= set(kwargs):
            return {name: kwargs[name] for name in self.inputs}
        leaves = [v for v in pytree.tree_leaves((tuple(args), kwargs)) if isinstance(v, Tensor)]
        if len(leaves) != len(self.inputs):
            raise CliError(
                f"{self.path} takes {', '.join(self.inputs)}, and {len(leaves)} inputs are given",
                "pass inputs of these names with --inputs FILE.safetensors",
                ExitCode.USAGE,
            )
        return dict(zip(self.inputs, leaves, strict=True))

    def _check(self) -> None:
        import onnx

        try:
            onnx.checker.check_model(str(self.path))
        except Exception as error:  # protobuf's, onnx's and the system's own
            if "No Op registered" in str(error):
                return  # one of ONNX Runtime's own, which it saves among the standard's
            raise CliError(
                f"{self.path} is no ONNX model, or damaged: {first_line(error)}",
                "export it once more",
                ExitCode.CANNOT_OPEN,
            ) from error


def signature_inputs(path: Path, count: int) -> list[tuple[tuple[Any, ...], dict[str, Tensor]]]:
    """``count`` inputs made from the file's signature, as ``generate_inputs`` does for programs:
    numbers are normal, indices of a table below its size, other integers 1."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path), load_external_data=False)
    rows = _rows_indexed(model.graph, numpy_helper)
    weights = {tensor.name for tensor in model.graph.initializer}
    batches = []
    for seed in range(count):
        random = torch.Generator().manual_seed(seed)
        sizes: dict[str, int] = {}
        batch = {}
        for value in model.graph.input:
            if value.name in weights:
                continue
            tensor = value.type.tensor_type
            shape = []
            for at, axis in enumerate(tensor.shape.dim):
                name = axis.dim_param or f"{value.name} {at}"
                drawn = int(torch.randint(2, 34, (), generator=random))
                shape.append(axis.dim_value or sizes.setdefault(name, drawn))
            dtype = torch.as_tensor(helper.tensor_dtype_to_np_dtype(tensor.elem_type).type(0)).dtype
            if dtype.is_floating_point:
                made = torch.randn(shape, generator=random)
            elif rows.get(value.name) and dtype != torch.bool:
                made = torch.randint(rows[value.name], shape, generator=random)
            else:
                made = torch.ones(shape)
            batch[value.name] = made.to(dtype)
        batches.append(((), batch))
    return batches


def _rows_indexed(graph: Any, numpy_helper: Any) -> dict[str, int]:
    """Rows of the table that an input is an index of, moved or cast at most."""
    tables = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    origin = {value.name: value.name for value in graph.input}
    found: dict[str, int] = {}
    moves = {
        "Cast",
        "Expand",
        "Flatten",
        "Identity",
        "Reshape",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
    for node in graph.node:  # in topological order, as the standard has it
        if node.op_type in moves and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] in origin:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            name, rows = origin[node.input[1]], tables[node.input[0]][axis]
            found[name] = min(rows, found.get(name, rows))
    return found


# -- float64 ----------------------------------------------------------------------------------


def _float64_ops() -> list[Any]:
    """Ops that onnx's reference implementation computes in float32 whatever they are given: its
    Erf, and Gelu, which is spelled with that and with constants of float32; and GatherElements,
    which reads one column of the indices of a matrix."""
    from onnx.reference.op_run import OpRun

    class Erf(OpRun):
        op_domain = ""

        def _run(self, x: Any) -> tuple[Any]:
            return (torch.erf(torch.as_tensor(x)).numpy(),)

    class Gelu(OpRun):
        op_domain = ""

        def _run(self, x: Any, approximate: str = "none") -> tuple[Any]:
            value = torch.nn.functional.gelu(torch.as_tensor(x), approximate=approximate)
            return (value.numpy(),)

    class GatherElements(OpRun):
        op_domain = ""

        def _run(self, x: Any, indices: Any, axis: int = 0) -> tuple[Any]:
            import numpy

            within = numpy.where(indices < 0, indices + x.shape[axis], indices)
            value = torch.gather(torch.as_tensor(x), axis, torch.as_tensor(within).long())
            return (value.numpy(),)

    return [Erf, Gelu, GatherElements]


def _widened(path: Path) -> Any:
    """The model with every floating-point tensor in float64."""
    import onnx

    model = onnx.load(str(path))
    _widen_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            _widen_node(node)
    return model


def _widen_graph(graph: Any) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type in _FLOATS:
            kind.elem_type = _DOUBLE
    del graph.value_info[:]
    for node in graph.node:
        _widen_node(node)


def _widen_node(node: Any) -> None:
    from onnx import numpy_helper

    for attribute in node.attribute:
        if attribute.name in _TYPED and attribute.i in _FLOATS:
            attribute.i = _DOUBLE
        if attribute.HasField("t"):
            _widen_tensor(attribute.t)
        if attribute.HasField("g"):
            _widen_graph(attribute.g)
        for graph in attribute.graphs:
            _widen_graph(graph)
        scalar = node.op_type == "Constant" and attribute.name in ("value_float", "value_floats")
        if scalar:
            import numpy

            value = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            wide = numpy_helper.from_array(numpy.asarray(value, dtype=numpy.float64))
            attribute.Clear()
            attribute.name, attribute.type = "value", attribute.TENSOR
            attribute.t.CopyFrom(wide)


def _widen_tensor(tensor: Any) -> None:
    from onnx import numpy_helper

    if tensor.data_type in _FLOATS:
        wide = numpy_helper.to_array(tensor).astype("float64")
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
