"""Modules made to mislead the finder, each beside what must become of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.programs import B, Body, E, Projections, example, randn, rewrite_in_float64

Outcome = tuple[Body, list[tuple[str, int, int]], list[tuple[str, str]]]


class Cases(dict[str, Outcome]):
    """Bodies by name: what is rewritten, as (product, heads, D), and what is skipped and why."""

    def __call__(
        self, rewritten: list[tuple[str, int, int]], skipped: list[tuple[str, str]]
    ) -> Callable[[Body], Body]:
        def note(body: Body) -> Body:
            self[body.__name__] = (body, rewritten, skipped)
            return body

        return note

    def outcome(self, name: str, *, dynamic: bool) -> Outcome:
        """What becomes of it in float64, at the example's sizes or with dynamic tokens."""
        body, *_ = self[name]
        others = ((randn(B, 9, E, seed=5),),) if dynamic else ()
        shapes = {"x": {1: torch.export.Dim.DYNAMIC}} if dynamic else None
        report = rewrite_in_float64(
            Projections(body), (example(),), others=others, dynamic_shapes=shapes
        )
        rewritten = [(s.product, s.kv_heads or 0, s.decomposed or 0) for s in report.rewritten]
        skipped = [(s.product, s.reason_code or "") for s in report.skipped]
        return body, sorted(rewritten), sorted(skipped)
