"""Keep account of features while a graph runs on labels: who touched which, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
    Source,
    Sources,
    Value,
)
from bda_fx.passes.sites import Reason


@dataclass(frozen=True)
class Ports:
    """Where the features and columns of each linear weight lie in the common number space."""

    first_feature: Mapping[str, int]
    first_column: Mapping[str, int]


class Tracker:
    """Values of the nodes run so far, and what has been found out on the way."""

    def __init__(
        self,
        linears: Mapping[str, str],
        constants: Mapping[str, Any],
        ports: Ports,
        size: Callable[[Any], int],
        constant_value: Callable[[fx.Node], Tensor | None],
    ) -> None:
        self.linears, self.constants, self.ports = linears, constants, ports
        self.size, self.constant_value = size, constant_value
        self.sources = Sources()
        self.values: dict[fx.Node, Value] = {}
        self.found = Labelling()

    def value(self, arg: Any) -> Value:
        return self.values[arg] if isinstance(arg, fx.Node) else PLAIN

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.size(s) for s in node.meta["val"].shape)

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
        elif isinstance(value, Source) and value.features is None:
            width = value.shape[-1]
            self.touch_features(
                range(value.first_feature, value.first_feature + width), reason, node
            )
        elif isinstance(value, Source | Labels):
            labels = self.materialise(value)
            self.touch_features(self.sources.distinct_features(labels.ids), reason, node)

    def touch_features(self, features: Iterable[int], reason: Reason, node: fx.Node) -> None:
        cause = Cause(reason, node.name)
        for feature in features:
            self.found.touched.setdefault(feature, cause)

    def summary(self, value: Value, reason: Reason, node: fx.Node) -> int:
        """One code for a whole value as an opaque op sees it."""
        if isinstance(value, int):
            return value
        if isinstance(value, list):
            return self.merge([self.summary(v, reason, node) for v in value])
        if isinstance(value, Labels):
            codes = value.ids[value.ids < 0].unique().tolist()
            if (value.ids >= 0).any():
                codes.append(self.code(reason, node))
            return self.merge(codes)
        return PLAIN if value is None else self.code(reason, node)

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
