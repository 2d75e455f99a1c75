"""Names for the weights of an ONNX graph, as modules may have them.

Exporters fold the transpose of a linear's weight into it and lose its name on the way
("onnx::MatMul_1052", "val_67"). Where its bias has kept one, or the node that reads it tells of a
module, the weight gets its name back.
"""

from __future__ import annotations

import keyword
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from bda_fx.importers.op_table import Node
from bda_fx.importers.read_onnx import Graph, all_nodes

_ANONYMOUS = re.compile(r"onnx::.*|val_\d+|_val_\d+|t_\d+|\d+")
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
_TAKEN = ("forward", "graph", "known", "names", "run", "weights", "training")
"""What a module has of its own."""


def valid_names(names: Sequence[str]) -> list[str]:
    """Names for arguments: identifiers, all different."""
    made: list[str] = []
    for name in names:
        text = re.sub(r"\W", "_", name)
        if not text.isidentifier() or keyword.iskeyword(text) or text == "self":
            text = f"input_{text}"
        made.append(_unused(text, made))
    return made


def name_weights(graph: Graph, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """For each of ``weights`` its path in a module: its own name, or a better one."""
    readers: dict[str, list[Node]] = defaultdict(list)
    for node in all_nodes(graph):
        for name in node.inputs:
            if name is not None:
                readers[name].append(node)
    paths: dict[str, str] = {}
    # Names that are there come first, so that no made-up one takes their place.
    for name in sorted(weights, key=lambda name: bool(_ANONYMOUS.fullmatch(name))):
        told = _told_name(name, readers, weights) if _ANONYMOUS.fullmatch(name) else None
        path = _path(told or name)
        paths[name] = _apart(path, paths.values())
    return paths


def _told_name(
    name: str, readers: Mapping[str, Sequence[Node]], weights: Mapping[str, Tensor]
) -> str | None:
    """What the surroundings call a weight that has no name."""
    if len(readers[name]) != 1 or weights[name].dim() != 2:
        return None
    (node,) = readers[name]
    if node.op not in _PRODUCTS:
        return None
    added = [other for other in node.inputs[2:] if other]
    if node.outputs[0] is not None:
        for user in readers[node.outputs[0]]:
            added += [other for other in user.inputs if other and user.op == "Add"]
    for other in added:
        if other in weights and other.endswith(".bias"):
            return other.removesuffix("bias") + "weight"
    if "/" in node.name:
        return node.name.strip("/").rpartition("/")[0].replace("/", ".") + ".weight"
    return None


def _path(name: str) -> str:
    parts = [re.sub(r"\W", "_", part) for part in name.split(".")]
    parts = [part if part else "_" for part in parts]
    if parts[0] in _TAKEN:
        parts[0] += "_"
    return ".".join(parts)


def _apart(path: str, others: Iterable[str]) -> str:
    """``path``, changed until it is no other one's, nor a module on the way to one."""
    taken = list(others)
    while any(
        path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")
        for other in taken
    ):
        head, dot, tail = path.rpartition(".")
        path = f"{head}{dot}{tail}_" if not any(path.startswith(f"{o}.") for o in taken) else (
            path.replace(".", "_")
        )  # fmt: skip
    return path


def _unused(name: str, others: Sequence[str]) -> str:
    while name in others:
        name += "_"
    return name
