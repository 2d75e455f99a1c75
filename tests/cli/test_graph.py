"""``inspect --graph``: the picture shows the site as it is before and after, and nothing else."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from torch.export import Dim

import bda_fx
from bda_fx.api import export_module
from bda_fx.cli.draw_site import layers_of, svg_of
from bda_fx.cli.errors import ExitCode
from bda_fx.cli.site_graph import Box, SiteGraph, site_graph
from tests.cli.conftest import Cli, files
from tests.programs import Attention, example


def texts_of(svg: str) -> list[str]:
    return [e.text or "" for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def operators(graph: SiteGraph) -> list[str]:
    return [box.label for box in graph.boxes if box.kind == "op"]


def test_a_projection_before_and_after() -> None:
    program = export_module(
        Attention(), (example(),), dynamic_shapes={"x": {0: Dim("batch", max=9)}}
    )
    done = bda_fx.rewrite(program, options={"basis": "pivot", "basis_size": "full"})
    site = done.report.rewritten[0]
    before = site_graph(program, site.name, site.contractions)
    assert operators(before) == ["linear", "view", "transpose", "scaled_dot_product_attention"]
    assert [b.label for b in before.boxes if b.kind != "op"] == ["k.weight", "k.bias", "x"]
    after = site_graph(done.program, site.name, site.contractions)
    assert operators(after).count("linear") == 1
    assert {"index_select", "add"} <= set(operators(after))
    assert operators(after)[-1] == "scaled_dot_product_attention"
    shapes = {box.label: box.shape for box in after.boxes}
    assert shapes["k.weight_coefficients"] == "24 × 14"
    assert shapes["x"].endswith(" × 5 × 20")
    assert "q.weight" not in shapes  # the other factor is no part of the picture
    with pytest.raises(LookupError, match=r"no\.weight"):
        site_graph(program, "no.weight", ())


def test_an_output_projection() -> None:
    program = export_module(Attention(), (example(),))
    done = bda_fx.rewrite(program, options={"side": "qo", "products": ("vo",)})
    site = done.report.rewritten[0]
    assert site.name == "o.weight"
    before, after = (site_graph(p, site.name, site.contractions) for p in (program, done.program))
    assert "linear" in operators(before)
    assert {"linear", "cat"} <= set(operators(after))
    assert "scaled_dot_product_attention" in [b.name for b in after.boxes if b.kind == "input"]


def test_layers_lie_below_what_they_read() -> None:
    box = Box("a", "a", "1", "op")
    graph = SiteGraph((box,) * 5, ((0, 1), (1, 2), (2, 4), (3, 4), (0, 4)))
    assert layers_of(graph) == [0, 1, 2, 2, 3]  # 3 reads nothing: right above its reader
    root = ET.fromstring(svg_of({"one & two": graph}))
    paths = [e for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("marker-end")]
    assert len(paths) == len(graph.edges)
    assert "one & two" in texts_of(svg_of({"one & two": graph}))


@pytest.mark.parametrize("suffix", [".svg", ".dot"])
def test_the_command_draws(cli: Cli, bert: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"site{suffix}"
    ran = cli("inspect", bert, "--graph", out, "--site", "layer.1.attention.self.value.weight")
    assert ran.code == 0, ran.err
    assert files(tmp_path) == {out.name}
    drawn = "\n".join(texts_of(out.read_text())) if suffix == ".svg" else out.read_text()
    assert "encoder.layer.1.attention.self.value.weight: 1,056 parameters" in drawn
    assert "value.weight_coefficients" in drawn
    assert "scaled_dot_product" in drawn
    assert "key.weight" not in drawn
    again = cli("inspect", bert, "--graph", out)
    assert again.code == ExitCode.CANNOT_WRITE
    assert "--force" in again.err


def test_what_cannot_be_drawn(cli: Cli, bert: Path, tmp_path: Path) -> None:
    ran = cli("inspect", bert, "--graph", tmp_path / "site.png")
    assert (ran.code, "site.svg" in ran.err) == (ExitCode.USAGE, True)
    ran = cli("inspect", bert, "--graph", tmp_path / "site.svg", "--site", "pooler.dense.weight")
    assert (ran.code, "some that are: encoder.layer.0" in ran.err) == (ExitCode.USAGE, True)
    ran = cli("inspect", bert / "config.json", "--graph", tmp_path / "site.svg")
    assert ran.code == ExitCode.CANNOT_CONVERT
    assert "nothing to draw" in ran.err
    assert cli("inspect", bert, "--site", "x").code == ExitCode.USAGE
    assert files(tmp_path) == set()
