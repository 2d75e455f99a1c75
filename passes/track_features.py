"""Keep account of features while a graph runs on labels: who touched which, and why."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bda_fx.passes import op_rules as rules
from bda_fx.passes.labels import (
    FIRST_CAUSE,
    PLAIN,
    SCORES,
    Cause,
    Labelling,
    Labels,
    Outer,
    Source,
    Sources,
    Value,
    distinct,
)
from bda_fx.passes.sites import ELEMENT, IN, OUT, Constant, Linear, Reason


@dataclass(frozen=True)
class Port:
    """A range of feature numbers: outputs or columns of a linear, or elements of a constant."""

    tensor: Linear | Constant
    axis: str
    first: int
    width: int

    @property
    def features(self) -> range:
        """The numbers of the port."""
        return range(self.first, self.first + self.width)

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the port from one run over the graph to the next."""
        if isinstance(self.tensor, Constant):
            return (self.tensor.node, self.tensor.user, self.axis)
        return (self.tensor.weight, "", self.axis)


class Ports:
    """One space of numbers for the features of all linears and constants of a program."""

    def __init__(self, linears: Mapping[str, Linear]) -> None:
        self.all: list[Port] = []
        self.firsts: list[int] = []
        self.known: dict[tuple[str, str, str], Port] = {}
        for linear in linears.values():
            self.add(linear, OUT, linear.out_features)
            self.add(linear, IN, linear.in_features)

    def add(self, tensor: Linear | Constant, axis: str, width: int) -> Port:
        first = self.all[-1].first + self.all[-1].width if self.all else 0
        port = Port(tensor, axis, first, width)
        if port.key not in self.known:
            self.known[port.key] = port
            self.all.append(port)
            self.firsts.append(first)
        return self.known[port.key]

    def of(self, weight: str, axis: str) -> Port:
        return self.known[weight, "", axis]

    def constant(self, constant: Constant) -> Port:
        return self.add(constant, ELEMENT, constant.numel)

    def owner(self, feature: int) -> Port:
        return self.all[bisect_right(self.firsts, feature) - 1]


@dataclass(frozen=True)
class Setting:
    """What a run over the graph is given."""

    linears: Mapping[str, str]
    """Linear nodes → the node of their constant weight."""
    constants: Mapping[str, fx.Node]
    names: Mapping[str, str]
    """Placeholder of a weight → its fully qualified name."""
    ports: Ports
    size: Callable[[object], int]
    """A number for a size, symbolic or not."""
    constant_value: Callable[[fx.Node], Tensor | None]
    """The value of a small constant index, or None where it depends on data."""
    opaque_cache: bool = False
    """Whether keys and values may change in a cache (``kv_cache="opaque"``)."""


class Tracker:
    """Values of the nodes run so far, and what has been found out on the way."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ports, self.size = setting.ports, setting.size
        self.sources = Sources()
        self.values: dict[fx.Node, Value] = {}
        self.found = Labelling()
        self.touched_ports: set[int] = set()
        self.owner_sets: dict[tuple[int, ...], int] = {}
        self.weighed: set[int] = set()
        """Numbers of the sources that were mixed over tokens by something other than scores."""

    def value(self, arg: object) -> Value:
        return self.values[arg] if isinstance(arg, fx.Node) else PLAIN

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.size(s) for s in node.meta["val"].shape)

    def is_constant(self, node: object) -> bool:
        return isinstance(node, fx.Node) and node.name in self.setting.constants

    def code(self, reason: Reason, node: fx.Node) -> int:
        self.found.causes.append(Cause(reason, node.name))
        return FIRST_CAUSE - (len(self.found.causes) - 1)

    def cause(self, code: int) -> Cause:
        return self.found.causes[FIRST_CAUSE - code]

    def spoil(self, node: fx.Node, reason: Reason | None = None) -> int:
        """``node`` reads its arguments: labelled features are touched, the result is opaque."""
        reason = reason or rules.reason_for(node.target)
        seen = []
        for arg in node.all_input_nodes:
            value = self.values[arg]
            self.touch(value, reason, node)
            seen.append(self.summary(value, reason, node))
        return self.merge(seen)

    def touch(self, value: Value, reason: Reason, node: fx.Node) -> None:
        if isinstance(value, list):
            for item in value:
                self.touch(item, reason, node)
        elif isinstance(value, Outer):
            self.touch(value.a, reason, node)
            self.touch(value.b, reason, node)
        elif isinstance(value, Source) and value.features is None:
            first = value.first_feature
            if first not in self.touched_ports:  # the first cause counts
                self.touched_ports.add(first)
                self.touch_features(range(first, first + value.shape[-1]), reason, node)
        elif isinstance(value, Source | Labels):
            labels = self.materialise(value)
            self.touch_features(self.sources.distinct_features(labels.ids), reason, node)

    def touch_features(self, features: Iterable[int], reason: Reason, node: fx.Node) -> None:
        self.lose(features, Cause(reason, node.name))

    def lose(self, features: Iterable[int], cause: Cause) -> None:
        """Features that cannot be rewritten, with every term of those that are sums."""
        for feature in features:
            for term in self.sources.terms(feature):
                self.found.touched.setdefault(term, cause)

    def summary(self, value: Value, reason: Reason, node: fx.Node) -> int:
        """One code for a whole value as an opaque op sees it."""
        if isinstance(value, int):
            return value
        if isinstance(value, list):
            return self.merge([self.summary(v, reason, node) for v in value])
        if isinstance(value, Labels):
            codes = distinct(value.ids[value.ids < 0]).tolist()
            if (value.ids >= 0).any():
                codes.append(self.code_of(value.ids, reason, node))
            return self.merge(codes)
        if isinstance(value, Source):
            return self.summary(self.materialise(value), reason, node)
        return PLAIN if value is None else self.code(reason, node)

    def code_of(self, ids: Tensor, reason: Reason, node: fx.Node) -> int:
        """A code for labelled elements that are lost now, with what lost them first."""
        at = (ids >= 0).flatten().to(torch.uint8).argmax()
        first, _ = self.sources.locate(ids.flatten()[at : at + 1])
        (term, *_) = self.sources.terms(int(first))
        cause = self.found.touched.get(term, Cause(reason, node.name))
        self.found.causes.append(cause)
        return FIRST_CAUSE - (len(self.found.causes) - 1)

    @staticmethod
    def merge(codes: list[int]) -> int:
        if SCORES in codes:
            return SCORES
        spoilt = [c for c in codes if c <= FIRST_CAUSE]
        return max(spoilt) if spoilt else PLAIN

    def materialise(self, value: Value, shape: tuple[int, ...] | None = None) -> Labels:
        if isinstance(value, Labels):
            return value
        if isinstance(value, Source):
            return Labels(value.ids())
        code = value if isinstance(value, int) else PLAIN
        return Labels(torch.full((), code).expand(shape or ()))
