"""Time single sites in ONNX Runtime: the original projection against its rewritten form.

    original     y = x W + b                                            x [n, E], y [n, F]
    rewritten    x_B, x_R = split(x),  y = x_R C + b + concat(x_B, …, x_B)        per head
    outputs      y = concat(Σ_h z_h[:r], z C) + b                     O, on its own side

with x of as many axes as in the program: ONNX Runtime fuses product and bias of matrices, but not
of batches of them with open sizes, so that a site timed flat would look slower than it is.

Random values: what a matrix product costs does not depend on them. A site that is not faster than
what it replaces is better left as it is: it would save bytes and cost time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper
from torch import SymInt, Tensor
from torch.export import ExportedProgram

from bda_fx.exporters.exported import Timing
from bda_fx.exporters.time_pairs import time_pairs
from bda_fx.report import Report, SiteReport

SECONDS = 0.2
"""For each kind of site: some dozens of calls."""


@dataclass(frozen=True)
class Kind:
    """What the cost of a site depends on. ``leading`` are the sizes of x at the example's, but for
    its features."""

    leading: tuple[int, ...]
    in_features: int
    out_features: int
    heads: int
    basis_size: int
    outputs: bool
    dtype: int


def time_sites(program: ExportedProgram, report: Report, threads: int = 0) -> tuple[Timing, ...]:
    """A timing for each rewritten site of ``report``, under the name of its weight.

    Sites of one kind are timed once. Cost: a fraction of a second for each kind.
    """
    measured: dict[Kind, Timing] = {}
    timings = []
    for site in report.rewritten:
        kind = _kind(program, site)
        if kind is None:
            continue
        if kind not in measured:
            measured[kind] = _time(kind, threads)
        timings.append(replace(measured[kind], name=f"{site.name} ({site.product})"))
    return tuple(timings)


def slower(report: Report, timings: tuple[Timing, ...]) -> list[str]:
    """Weights that have a site which is slower rewritten than it was."""
    speed = {timing.name: timing.speedup for timing in timings}
    names = [s.name for s in report.rewritten if speed.get(f"{s.name} ({s.product})", 1.0) < 1.0]
    return list(dict.fromkeys(names))


def _kind(program: ExportedProgram, site: SiteReport) -> Kind | None:
    """None where the program does not show what the projection reads."""
    weight = program.state_dict.get(site.name)
    leading = leading_sizes(program, site.name)
    known = (site.kv_heads, site.decomposed, site.in_features, site.basis_size)
    if not isinstance(weight, Tensor) or leading is None or None in known:
        return None
    heads, decomposed, basis_features, size = (int(n) for n in known if n is not None)
    outputs = site.side == "qo" and "vo" in site.product
    heads = int(site.heads or heads) if site.side == "qo" else heads
    dtype = TensorProto.FLOAT16 if weight.dtype.itemsize == 2 else TensorProto.FLOAT
    features = heads * decomposed
    ends = (features, basis_features) if outputs else (basis_features, features)
    return Kind(leading, *ends, heads, size, outputs, dtype)


def leading_sizes(program: ExportedProgram, weight: str) -> tuple[int, ...] | None:
    """Sizes of what the linear of a weight reads, but for its features, at the example."""
    names = program.graph_signature.inputs_to_parameters
    holders = [n for n in program.graph.find_nodes(op="placeholder") if names.get(n.name) == weight]
    if not holders:
        return None
    node = holders[0]
    while node.users:  # through transposes and other moves of the weight
        user = next(iter(node.users))
        others = [a for a in user.all_input_nodes if a is not node and "val" in a.meta]
        shapes = [a.meta["val"].shape for a in others if isinstance(a.meta["val"], Tensor)]
        if shapes and len(shapes[0]) >= 2:
            return tuple(_example_size(size) for size in shapes[0][:-1])
        node = user
    return None


def _example_size(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, SymInt) else int(size)


def _time(kind: Kind, threads: int) -> Timing:
    random = np.random.default_rng(0)
    x = random.standard_normal((*kind.leading, kind.in_features))
    feeds = {"x": x.astype(onnx.helper.tensor_dtype_to_np_dtype(kind.dtype))}
    both = [_session(text, shapes, kind, threads) for text, shapes in (_original(kind), _new(kind))]
    original, rewritten = (lambda s=s: s.run(None, feeds) for s in both)
    return time_pairs("", original, rewritten, SECONDS)


def _original(kind: Kind) -> tuple[str, dict[str, tuple[int, ...]]]:
    shapes = {"W": (kind.in_features, kind.out_features), "b": (kind.out_features,)}
    return "product = MatMul(x, W) y = Add(product, b)", shapes


def _new(kind: Kind) -> tuple[str, dict[str, tuple[int, ...]]]:
    e, f, r, heads = kind.in_features, kind.out_features, kind.basis_size, kind.heads
    axes = len(kind.leading)
    if kind.outputs:
        d = e // heads
        body = (
            f"shape = Constant<value_ints = {[0] * axes + [heads, d]}>() z = Reshape(x, shape)"
            f"zero = Constant<value_ints = [0]>() r = Constant<value_ints = [{r}]>()"
            f"last = Constant<value_ints = [{axes + 1}]>() head = Constant<value_ints = [{axes}]>()"
            "leading = Slice(z, zero, r, last) basis = ReduceSum<keepdims = 0>(leading, head)"
            "rest = MatMul(x, C) joined = Concat<axis = -1>(basis, rest) y = Add(joined, b)"
        )
        return body, {"C": (e, f - r), "b": (f,)}
    d = f // heads
    copies = ", ".join(["basis"] * heads)
    pad = (
        f"pads = Constant<value_ints = {[0] * (2 * axes + 1) + [d - r]}>() "
        "basis = Pad(window, pads)"
        if d > r
        else "basis = Identity(window)"
    )
    if r == e:
        return f"window = Identity(x) {pad} all = Concat<axis = -1>({copies}) y = Add(all, b)", {
            "b": (f,)
        }
    body = (
        f"parts = Constant<value_ints = [{r}, {e - r}]>()"
        f"window, others = Split<axis = -1>(x, parts) {pad}"
        f"all = Concat<axis = -1>({copies}) product = MatMul(others, C)"
        "biased = Add(product, b) y = Add(biased, all)"
    )
    return body, {"C": (e - r, f), "b": (f,)}


def _session(
    body: str, shapes: dict[str, tuple[int, ...]], kind: Kind, threads: int
) -> onnxruntime.InferenceSession:
    """A session of one projection, written in ONNX's text format."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.dtype)
    name = "float16" if kind.dtype == TensorProto.FLOAT16 else "float"
    leading = "".join(f"n{axis}, " for axis in range(len(kind.leading)))
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]>'
        f"site ({name}[{leading}{kind.in_features}] x)"
        f" => ({name}[{leading}{kind.out_features}] y) {{{body}}}"
    )
    random = np.random.default_rng(1)
    for key, shape in shapes.items():
        value = (random.standard_normal(shape) / shape[0] ** 0.5).astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(value, key))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
