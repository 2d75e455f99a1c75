"""Rewritten graphs that outlive a process: one file for each graph, its weights and the options.

    TORCHINDUCTOR_CACHE_DIR / bda_fx / rewrites / KEY.pt

KEY is that of ``hash_graph``, which covers every element of the weights: a file is never of others.
It holds the rewritten graph, its derived weights and how to compute them of other weights, so that
a second process neither plans nor transforms anything. Inductor's own caches hold what it compiled.

As these, files are read by whoever owns the cache directory. One that cannot be read or written is
as none. All of them together take at most ``MOST_BYTES``: the ones not used for longest go first.
Inductor's switches ``fx_graph_cache`` and ``force_disable_caches`` hold for them, too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode, tracing
from torch.fx.node import map_aggregate

from bda_fx.hash_graph import guards_of, hash_graph, values_of
from bda_fx.kept_files import kept_files, replacing
from bda_fx.kernels.packed_projection import packed_projection, packed_projection_by_tokens, serves
from bda_fx.options import Options
from bda_fx.outcome import Outcome
from bda_fx.passes.canonicalize import Program

log = logging.getLogger("bda_fx")
MOST_BYTES = 4 << 30
"""Of all files. One of more than half of it is not written."""
_PACKED = (packed_projection.default, packed_projection_by_tokens.default)
_PLAIN = [field.name for field in fields(Outcome) if field.name not in ("program", "tensors")]


class RewriteCache:
    """The file of one Dynamo graph. ``restore`` what it holds, or ``store`` what was made."""

    def __init__(self, module: fx.GraphModule, example_inputs: Sequence[Any], key: str) -> None:
        self.values = values_of(module, example_inputs)
        self.guards = guards_of(self.values)
        self.path = kept_files() / "rewrites" / f"{key}.pt"

    @classmethod
    def of(
        cls,
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        patches: Mapping[str, Any],
    ) -> RewriteCache | None:
        """The file for this graph under Inductor with ``patches``; None where nothing is kept: that
        is switched off, or something in the graph cannot be recognised in another process."""
        if not _switched_on(patches):
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
            if len(kept["names"]) != len(self.values):
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
        if guards_of(self.values) != self.guards:
            return outcome  # it holds for some sizes only, and nobody would check these
        try:
            kept = {
                "outcome": {name: getattr(outcome, name) for name in _PLAIN},
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
        mode = detect_fake_mode(self.values)
        derived = [tensors[key] for key in kept["outcome"]["inputs"]]
        if mode is not None:
            with mode:
                derived = [
                    torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                    for t in derived
                ]
        if kept["nodes"]:
            placeholders = graph.find_nodes(op="placeholder")
            for node, value in zip(placeholders, [*derived, *self.values], strict=True):
                node.meta["val"] = value
        return Program(fx.GraphModule(nn.Module(), graph), {})

    def _write(self, held: Mapping[str, Any]) -> None:
        needed = sum(map(_nbytes, held["tensors"].values()))
        if needed > MOST_BYTES // 2:
            raise ValueError(f"{needed} bytes are too many")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        make_room(self.path.parent, needed)
        with replacing(self.path) as beside:
            torch.save(held, beside)


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
        arguments = fx.map_arg((node.args, node.kwargs), numbers.__getitem__)
        trace = node.meta.get("stack_trace")
        nodes.append((node.op, node.name, node.target, *arguments, trace))
    return nodes


def _graph(nodes: Sequence[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    made: list[fx.Node] = []

    def argument(value: Any) -> Any:
        return made[value] if isinstance(value, _Ref) else value

    for op, name, target, args, kwargs, trace in nodes:
        node = graph.create_node(
            op, target, map_aggregate(args, argument), map_aggregate(kwargs, argument), name
        )
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
