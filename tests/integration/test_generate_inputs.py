"""Inputs made from a program's signature."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import bda_fx
from bda_fx.generate_inputs import SPAN, generate_inputs, make_tensor
from tests import models
from tests.models import Case


def exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **more: Any
) -> ExportedProgram:
    return torch.export.export(module.eval(), args, kwargs, strict=False, **more)


class Lookups(nn.Module):
    """Tables reached directly, through moves, and through arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 4)
        self.types = nn.Embedding(3, 4)
        self.register_buffer("table", torch.randn(7, 4))

    def forward(
        self, words: Tensor, both: Tensor, rows: Tensor, mask: Tensor, keep: Tensor, x: Tensor
    ) -> Tensor:
        moved = both.view(-1).to(torch.int64).reshape(both.shape)
        places = mask.cumsum(-1) - 1
        y = self.words(words) + self.words(moved) + self.types(both) + self.table[rows]
        return (y + self.words(places) + x) * keep[..., None]


def test_integers_stay_below_the_tables_that_they_index() -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    keep = torch.ones(2, 5, dtype=torch.bool)
    example = (ids, ids.int(), ids.clone(), ids + 1, keep, torch.zeros(2, 5, 4))
    program = exported(Lookups(), example)
    made = generate_inputs(program)
    for (words, both, rows, mask, kept, x), kwargs in made:
        assert kwargs == {}
        assert [t.dtype for t in (words, both, x)] == [torch.int64, torch.int32, torch.float32]
        assert 3 < words.max() < 50  # 10 draws below 50: all below 4 with probability 1e-11
        assert both.max() < 3
        assert rows.max() < 7
        assert (mask == 1).all()  # what reaches a table through arithmetic is no index
        assert kept.all()
        assert x.std() > 0
    first, second = made[0][0][0], made[1][0][0]
    assert not torch.equal(first, second)
    assert torch.equal(first, generate_inputs(program)[0][0][0])
    fidelity = bda_fx.verify(program, program)
    assert fidelity.passed
    assert fidelity.inputs == "generated"
    assert fidelity.num_inputs == len(made)
    note = f"on {len(made)} inputs generated from the signature: real ones tell more"
    assert note in str(fidelity)


def test_ids_by_rank_are_log_uniform() -> None:
    ids = torch.zeros(100, 100, dtype=torch.int64)
    (words,) = exported(nn.Embedding(1000, 4), (ids,)).graph.find_nodes(op="placeholder")[1:]
    random = torch.Generator().manual_seed(0)
    drawn = make_tensor(words, list(ids.shape), random, by_rank=True)
    assert drawn.min() == 0
    assert 900 < drawn.max() < 1000
    for below in (1, 10, 100, 1000):
        expected = math.log(below + 1) / math.log(1001)
        assert float((drawn < below).float().mean()) == pytest.approx(expected, abs=0.02)


class Joined(nn.Module):
    """Two inputs of one batch size; the second is twice as long as the first."""

    def forward(self, x: Tensor, *, y: Tensor, scale: float | None = None) -> Tensor:
        return torch.cat([x, x], 1) + y


def test_open_sizes_agree_and_stay_within_their_range() -> None:
    batch, length = Dim("batch", min=3, max=6), Dim("length", max=64)
    program = exported(
        Joined(),
        (torch.zeros(4, 5),),
        {"y": torch.zeros(4, 10), "scale": None},
        dynamic_shapes={"x": {0: batch, 1: length}, "y": {0: batch, 1: 2 * length}, "scale": None},
    )
    made = generate_inputs(program, 20)
    sizes = {tuple(x.shape) for (x,), _ in made}
    assert {b for b, _ in sizes} == {3, 4, 5, 6}
    assert all(2 <= n <= 2 + SPAN for _, n in sizes)
    for (x,), kwargs in made:
        assert kwargs["scale"] is None
        assert kwargs["y"].shape == (x.shape[0], 2 * x.shape[1])
    assert bda_fx.verify(program, program).passed


def test_a_module_beside_a_program() -> None:
    """The candidate's signature serves too; a reference that is a module follows it."""
    example = models.make(Case("bert", "sdpa"))
    program = bda_fx.rewrite(example.model, (), example.kwargs).program
    fidelity = bda_fx.verify(example.model, program)
    assert fidelity.passed
    assert fidelity.inputs == "generated"


def test_sizes_without_an_end() -> None:
    sizes = {"x": {0: Dim.AUTO, 1: Dim.AUTO}, "y": {0: Dim.AUTO, 1: Dim.AUTO}, "scale": None}
    example = {"y": torch.zeros(4, 10), "scale": None}
    program = exported(Joined(), (torch.zeros(4, 5),), example, dynamic_shapes=sizes)
    assert len({x.shape for (x,), _ in generate_inputs(program)}) > 1
    assert bda_fx.verify(program, program).passed


class Loose(nn.Module):
    """Looks up the mask at each place, so that its length is a symbol of its own."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask[:, torch.arange(x.shape[1])]


def test_sizes_that_were_equal_stay_equal() -> None:
    sizes = {"x": {1: Dim.AUTO}, "mask": {1: Dim.AUTO}}
    ones = torch.ones(4, 5)
    program = exported(Loose(), (ones, ones.clone()), dynamic_shapes=sizes)
    assert len([s for s in program.range_constraints if s.is_symbol]) == 2
    made = generate_inputs(program)
    assert all(x.shape == mask.shape for (x, mask), _ in made)
    assert len({x.shape for (x, _), _ in made}) > 1


class Differences(nn.Module):
    """An index that is a difference of inputs, which no signature tells."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.table(x - 2 * y)


def test_made_inputs_that_do_not_run() -> None:
    ids = torch.zeros(2, dtype=torch.int64)
    program = exported(Differences(), (ids, ids))
    wanted = r"^the inputs made from the program's signature do not run \(.*\): pass args and kwar"
    with pytest.raises(ValueError, match=wanted):
        bda_fx.verify(program, program)


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "vit", "clip", "whisper", "deepseek_v2"])
def test_models_run_on_them(architecture: str) -> None:
    program = models.exported(models.make(Case(architecture, "sdpa")))
    assert bda_fx.verify(program, program).passed
