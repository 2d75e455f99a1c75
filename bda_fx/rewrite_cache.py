"""Rewritten graphs that outlive a process: one file for each graph, its weights and the options.

    TORCHINDUCTOR_CACHE_DIR / bda_fx / rewrites / KEY.pt

KEY is that of ``hash_graph``, which covers every element of the weights: a file is never of others.
It holds the rewritten graph, its derived weights and how to compute them of other weights, so that
a second process neither plans nor transforms anything. Inductor's own caches hold what it compiled.

As these, files are read by whoever owns the cache directory. They are written beside their final
name and moved there in one step; one that cannot be read or written is as none. All of them
together take at most ``MOST_BYTES``: the ones not used for longest go first. Inductor's switches
``fx_graph_cache`` and ``force_disable_caches`` hold for them, too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode, tracing

from bda_fx.hash_graph import guards_of, hash_graph, values_of
from bda_fx.kernels.packed_projection import packed_projection, packed_projection_by_tokens, serves
from bda_fx.options import Options
from bda_fx.passes.canonicalize import Program
from bda_fx.pipeline import Outcome

log = logging.getLogger("bda_fx")
MOST_BYTES = 4 << 30
"""Of all files. One of more than half of it is not written."""
_PACKED = (packed_projection.default, packed_projection_by_tokens.default)


class RewriteCache:
    """The file of one Dynamo graph. ``restore`` what it holds, or ``store`` what was made."""

    def __init__(self, module: fx.GraphModule, example_inputs: Sequence[Any], key: str) -> None:
        self.module, self.example_inputs = module, example_inputs
        self.guards = guards_of(values_of(module, example_inputs))
        self.path = _directory() / f"{key}.pt"

    @classmethod
    def of(
        cls,
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        patches: Mapping[str, Any],
    ) -> RewriteCache | None:
        """None where nothing may be kept of this graph: its inner compiler keeps nothing, or there
        is something in it that cannot be recognised in another process. ``patches`` of Inductor."""
        if options.inner != "inductor" or not _switched_on(patches):
            return None
        weights = [x for x in example_inputs if isinstance(x, nn.Parameter)]
        if sum(map(_nbytes, weights)) > 1.5 * MOST_BYTES:
            return None  # usually a third of the weights is derived anew: too much to be kept
        key = hash_graph(module, example_inputs, (options, sorted(map(str, patches.items()))))
        return None if key is None else cls(module, example_inputs, key)

    def restore(self) -> tuple[Outcome, list[str]] | None:
        """What a process made of the same graph, and the names of the graph's inputs."""
        if not self.path.exists():
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                with tracing(None):  # while Dynamo traces, tensors are loaded as fake ones
                    held = torch.load(self.path, weights_only=True)
                kept = pickle.loads(held["outcome"])
                program = self._program(kept, held["tensors"])
                outcome = Outcome(program, tensors=held["tensors"], **kept["outcome"])
            if len(kept["names"]) != len(self.example_inputs):
                raise ValueError(f"{len(kept['names'])} inputs")
        except Exception as error:  # whatever reading a damaged file raises
            log.debug("bda_fx: %s is ignored: %r", self.path, error)
            return None
        with contextlib.suppress(OSError):  # a directory of others may be read only
            os.utime(self.path)
        if any(node.target in _PACKED for node in outcome.program.graph.nodes):
            tensors = outcome.tensors.values()
            if not all(serves(t.device, t.dtype) for t in tensors if t.is_floating_point()):
                return None
        return outcome, kept["names"]

    def store(self, outcome: Outcome, names: Sequence[str]) -> Outcome:
        """Keep ``outcome``; returns it as another process will find it, which is what to compile:
        then both come to the same entries of Inductor's caches."""
        if guards_of(values_of(self.module, self.example_inputs)) != self.guards:
            return outcome  # it holds for some sizes only, and nobody would check these
        try:
            kept = {
                "outcome": {
                    "plan": outcome.plan,
                    "inputs": outcome.inputs,
                    "fixed": outcome.fixed,
                    "constants": outcome.constants,
                    "computed": outcome.computed,
                    "roots": outcome.roots,
                    "fit": outcome.fit,
                },
                "nodes": _nodes(outcome.program.graph) if outcome.plan.sites else [],
                "names": list(names),
            }
            text = _dumps(kept)
            program = self._program(pickle.loads(text), outcome.tensors)
            tensors = {key: _compact(tensor) for key, tensor in outcome.tensors.items()}
            self._write({"outcome": text, "tensors": tensors})
        except Exception as error:  # what cannot be pickled raises anything
            log.debug("bda_fx: this rewrite is not kept: %r", error)
            return outcome
        if outcome.plan.sites:
            outcome.program = program
        return outcome

    def _program(self, kept: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Program:
        """The graph; its placeholders stand for what those of Dynamo's graph do, fake as these."""
        graph = _graph(kept["nodes"])
        values = values_of(self.module, self.example_inputs)
        mode = detect_fake_mode(values)
        derived = [tensors[key] for key in kept["outcome"]["inputs"]]
        if mode is not None:
            with mode:
                derived = [
                    torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                    for t in derived
                ]
        if kept["nodes"]:
            placeholders = graph.find_nodes(op="placeholder")
            for node, value in zip(placeholders, [*derived, *values], strict=True):
                node.meta["val"] = value
        return Program(fx.GraphModule(nn.Module(), graph), {})

    def _write(self, held: Mapping[str, Any]) -> None:
        needed = sum(map(_nbytes, held["tensors"].values()))
        if needed > MOST_BYTES // 2:
            raise ValueError(f"{needed} bytes are too many")
        beside = self.path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        make_room(self.path.parent, needed)
        try:
            torch.save(held, beside)
            os.replace(beside, self.path)
        finally:
            beside.unlink(missing_ok=True)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor with no more memory behind it than it needs, as all of that would be written."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() > _nbytes(tensor) else tensor


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def make_room(directory: Path, needed: int) -> None:
    """Remove the files not used for longest until ``needed`` bytes more are within the limit."""
    files = []
    for path in directory.iterdir():  # what a process left that died while it wrote, too
        with contextlib.suppress(OSError):  # another process may have removed it
            known = path.stat()
            files.append((known.st_mtime, known.st_size, path))
    held = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if held + needed <= MOST_BYTES:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        held -= size


def _directory() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "bda_fx" / "rewrites"


def _switched_on(patches: Mapping[str, Any]) -> bool:
    from torch._inductor import config

    def of(name: str) -> bool:
        return bool(patches.get(name, getattr(config, name)))

    return of("fx_graph_cache") and not of("force_disable_caches")


# -- graphs as plain data -----------------------------------------------------------------------


class _Ref(int):
    """The number of a node that is an argument."""


def _nodes(graph: fx.Graph) -> list[tuple[Any, ...]]:
    numbers = {node: _Ref(number) for number, node in enumerate(graph.nodes)}
    nodes = []
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            raise TypeError(f"{node.op} of {node.target}")
        arguments = fx.map_arg((node.args, dict(node.kwargs)), numbers.__getitem__)
        trace = node.meta.get("stack_trace")
        nodes.append((node.op, node.name, node.target, *_plain(arguments), trace))
    return nodes


def _plain(value: Any) -> Any:
    """FX's immutable lists and dicts as plain ones; nodes were replaced before."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, list):
        return list(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*map(_plain, (value.start, value.stop, value.step)))
    return value


def _graph(nodes: Sequence[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    made: list[fx.Node] = []

    def argument(value: Any) -> Any:
        if isinstance(value, _Ref):
            return made[value]
        if isinstance(value, tuple):
            return tuple(map(argument, value))
        if isinstance(value, list):
            return list(map(argument, value))
        if isinstance(value, dict):
            return {key: argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*map(argument, (value.start, value.stop, value.step)))
        return value

    for op, name, target, args, kwargs, trace in nodes:
        node = graph.create_node(op, target, argument(args), argument(kwargs), name)
        node.name = name  # a graph renames what shadows a builtin, "input" for one
        if trace is not None:
            node.meta["stack_trace"] = trace
        made.append(node)
    return graph


class _Pickler(pickle.Pickler):
    """Ops by their names; whatever else has none of its own is refused."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch._ops.OpOverload):
            return _op, (value.namespace, *str(value).split(".")[1:])
        if isinstance(value, Tensor | fx.Node | fx.Graph | torch.SymInt):
            raise TypeError(f"a {type(value).__name__} is no plain data")
        return NotImplemented


def _op(namespace: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()
