"""``spell_complex``: the same numbers in pairs, and programs that it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from bda_fx.api import export_module
from bda_fx.exporters.spell_complex import is_complex, spell_complex
from tests.programs import randn

TURN = torch.linspace(0.1, 2.0, 3)


class Rotary(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, 6]"""
        angles = torch.arange(x.shape[1], dtype=torch.float32).outer(TURN)
        table = torch.polar(torch.full_like(angles, 1.5), angles)
        z = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous())
        return torch.view_as_real(self.body(z, table)).flatten(-2)


@pytest.mark.parametrize(
    "body",
    [
        lambda z, table: z * table,
        lambda z, table: z * (table * 0.5).unsqueeze(0),
        lambda z, table: (z * table)[:, 1:],
        lambda z, table: z.unsqueeze(-1).select(-1, 0) * table,
        lambda z, table: z * torch.ones(3).cumsum(0),
        lambda z, table: torch.ones(3).cumsum(0) * z,
    ],
)
def test_same_numbers(body: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = Rotary(body), randn(2, 5, 6)
    shapes = {"x": {0: Dim("batch", max=8), 1: Dim("length", min=3, max=16)}}
    program = export_module(model, (x,), dynamic_shapes=shapes)
    spelled = spell_complex(program)
    assert spelled is not program
    assert not any(is_complex(node) for node in spelled.graph.nodes)
    assert any(is_complex(node) for node in program.graph.nodes)  # the original stays
    for sizes in ((2, 5), (3, 9)):
        x = randn(*sizes, 6, seed=3)
        # Four products and two sums a number, in whatever order: a few units of roundoff.
        torch.testing.assert_close(spelled.module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_it_does_not_know_stays() -> None:
    program = export_module(Rotary(lambda z, table: z / table), (randn(2, 5, 6),))
    assert spell_complex(program) is program


def test_real_programs_stay() -> None:
    program = export_module(nn.Linear(6, 2), (randn(2, 6),))
    assert spell_complex(program) is program
