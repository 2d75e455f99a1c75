"""Draw a site before and after its rewrite, as SVG or in Graphviz's language.

The layout is in layers: every op lies below what it reads, weights and inputs right above the first
op that reads them. An edge that passes a layer gets a place in it, and the places of a layer are
ordered by the mean place of their neighbours, layer by layer, up and down a few times.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from bda_fx.cli.site_graph import Box, SiteGraph

WIDTH, HEIGHT, GAP_X, GAP_Y = 184, 38, 14, 26
PASS = 10
"""Width of the place of an edge that only passes a layer."""
COLOURS = {"op": "#ffffff", "weight": "#f6dfc0", "input": "#d8e6f3"}
SWEEPS = 8

Place = tuple[int, int]
"""(box, layer): a box where it lies, or an edge's source where the edge passes."""


def svg_of(pictures: Mapping[str, SiteGraph]) -> str:
    """Graphs side by side under their titles."""
    drawn = [_Drawing(graph) for graph in pictures.values()]
    top, margin = 34, 24
    width = sum(d.width for d in drawn) + margin * (len(drawn) + 1)
    height = max(d.height for d in drawn) + top + margin
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    x = margin
    for title, drawing in zip(pictures, drawn, strict=True):
        lines.append(f'<g transform="translate({x} {top})">')
        lines.append(
            f'<text x="{drawing.width / 2:g}" y="-14" text-anchor="middle" '
            f'font-weight="bold">{escape(title)}</text>'
        )
        lines += [*drawing.svg(), "</g>"]
        x += drawing.width + margin
    return "\n".join([*lines, "</svg>"]) + "\n"


def dot_of(pictures: Mapping[str, SiteGraph]) -> str:
    """The same for Graphviz: one digraph, a cluster for each graph."""
    lines = ["digraph site {", '  node [shape=box, style=filled, fontname="sans-serif"];']
    for number, (title, graph) in enumerate(pictures.items()):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(title)};"]
        for at, box in enumerate(graph.boxes):
            label = _quoted("\n".join(filter(None, (box.label, box.shape))))
            colour = COLOURS[box.kind]
            lines.append(f'    n{number}_{at} [label={label}, fillcolor="{colour}"];')
        lines += [f"    n{number}_{a} -> n{number}_{b};" for a, b in graph.edges]
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


class _Drawing:
    """Where everything of one graph lies."""

    def __init__(self, graph: SiteGraph) -> None:
        self.graph = graph
        self.layer_of = layers_of(graph)
        self.paths = [self._path(source, target) for source, target in graph.edges]
        rows: dict[int, dict[Place, None]] = defaultdict(dict)
        for at, layer in enumerate(self.layer_of):
            rows[layer][at, layer] = None
        for place in (place for path in self.paths for place in path):
            rows[place[1]][place] = None
        self.rows = [list(rows[layer]) for layer in sorted(rows)]
        self._order()
        widths = [self._row_width(row) for row in self.rows]
        self.width = max(widths, default=0)
        self.height = len(self.rows) * (HEIGHT + GAP_Y) - GAP_Y
        self.x: dict[Place, float] = {}
        for row, width in zip(self.rows, widths, strict=True):
            left = (self.width - width) / 2
            for place in row:
                self.x[place] = left + self._place_width(place) / 2
                left += self._place_width(place) + GAP_X

    def svg(self) -> list[str]:
        lines = []
        for path in self.paths:
            points = [(self.x[place], place[1] * (HEIGHT + GAP_Y)) for place in path]
            turns = [f"M{points[0][0]:g} {points[0][1] + HEIGHT:g}"]
            for x, y in points[1:-1]:
                turns += [f"L{x:g} {y:g}", f"L{x:g} {y + HEIGHT:g}"]
            turns.append(f"L{points[-1][0]:g} {points[-1][1]:g}")
            lines.append(
                f'<path d="{" ".join(turns)}" fill="none" stroke="#555" marker-end="url(#tip)"/>'
            )
        for at, box in enumerate(self.graph.boxes):
            lines += self._box(box, self.x[at, self.layer_of[at]], self.layer_of[at])
        return lines

    @staticmethod
    def _box(box: Box, x: float, layer: int) -> Iterable[str]:
        y = layer * (HEIGHT + GAP_Y)
        yield (
            f'<rect x="{x - WIDTH / 2:g}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" '
            f'fill="{COLOURS[box.kind]}" stroke="#555"/>'
        )
        label = escape(_short(box.label))
        yield f'<text x="{x:g}" y="{y + 16}" text-anchor="middle">{label}</text>'
        yield (
            f'<text x="{x:g}" y="{y + 31}" text-anchor="middle" font-size="10" fill="#444">'
            f"{escape(_short(box.shape))}</text>"
        )

    def _path(self, source: int, target: int) -> list[Place]:
        start, end = self.layer_of[source], self.layer_of[target]
        return [*((source, layer) for layer in range(start, end)), (target, end)]

    def _place_width(self, place: Place) -> int:
        return WIDTH if self.layer_of[place[0]] == place[1] else PASS

    def _row_width(self, row: Sequence[Place]) -> int:
        return sum(map(self._place_width, row)) + GAP_X * (len(row) - 1)

    def _order(self) -> None:
        above: dict[Place, list[Place]] = defaultdict(list)
        below: dict[Place, list[Place]] = defaultdict(list)
        for path in self.paths:
            for high, low in itertools.pairwise(path):
                below[high].append(low)
                above[low].append(high)
        for sweep in range(SWEEPS):
            near, rows = (above, self.rows) if sweep % 2 == 0 else (below, self.rows[::-1])
            where = {p: (at + 0.5) / len(r) for r in self.rows for at, p in enumerate(r)}
            for row in rows:
                mean = {p: statistics.fmean(where[q] for q in near[p] or [p]) for p in row}
                row.sort(key=mean.__getitem__)
                where |= {p: (at + 0.5) / len(row) for at, p in enumerate(row)}


def layers_of(graph: SiteGraph) -> list[int]:
    """The layer of each box: below all that it reads; what reads nothing right above its reader."""
    layers = [0] * len(graph.boxes)
    for source, target in sorted(graph.edges, key=lambda edge: edge[1]):
        layers[target] = max(layers[target], layers[source] + 1)
    reads = {target for _, target in graph.edges}
    for at in range(len(layers)):
        readers = [layers[target] for source, target in graph.edges if source == at]
        if at not in reads and readers:
            layers[at] = min(readers) - 1
    return layers


def _short(text: str, most: int = 28) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
