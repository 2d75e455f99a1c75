"""Every reason for leaving an attention alone, each reached by a small module of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bda_fx
from bda_fx.passes import label_moves
from bda_fx.passes.sites import Reason
from bda_fx.report import Report
from tests.programs import FULL, Attention, B, D, E, FusedAttention, H, example, seeded

Case = Callable[[], tuple[nn.Module, str, dict[str, Any]]]
CASES: dict[Reason, Case] = {}


def case(reason: Reason) -> Callable[[Case], Case]:
    def note(make: Case) -> Case:
        CASES[reason] = make
        return make

    return note


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding, halves layout."""
    half = D // 2
    angle = torch.arange(x.shape[-2])[:, None] * 0.1 ** torch.arange(half)
    angle = torch.cat([angle, angle], -1).to(x)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angle.cos() + turned * angle.sin()


def attention(change: Callable[..., Any], product: str = "qk", **options: Any) -> Any:
    return Attention(change=change), product, options


@case(Reason.ROTATED)
def rotated() -> Any:
    return attention(lambda q, k, v, x: (rotate(q), rotate(k), v))


@case(Reason.NORMALISED)
def normalised() -> Any:
    return attention(lambda q, k, v, x: (q, F.rms_norm(k, (D,)), v))


@case(Reason.ADDED)
def added() -> Any:
    return attention(lambda q, k, v, x: (q, k + x[:, None, :, :D], v))


@case(Reason.COMPUTED)
def computed() -> Any:
    return attention(lambda q, k, v, x: (q, k.relu(), v))


@case(Reason.DATA_DEPENDENT)
def data_dependent() -> Any:
    def change(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Any:
        order = (torch.arange(D) + x.abs().sum().long()) % D
        return q, k[..., order], v

    return attention(change)


@case(Reason.NO_PROJECTION)
def no_projection() -> Any:
    return attention(lambda q, k, v, x: (q, x[:, None, :, :D].expand_as(q), v))


@case(Reason.NO_OUTPUT_LINEAR)
def no_output_linear() -> Any:
    """The output goes nowhere: its values are used for their shape alone."""

    def finish(module: Attention, out: Tensor) -> Tensor:
        return torch.zeros_like(out) + out.shape[-1]

    class Scores(Attention):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            q, k, v = self.project(x, x)
            p = (q @ k.transpose(-1, -2)).softmax(-1)
            return finish(self, p @ v) + p.sum()

    return Scores(), "vo", {}


@case(Reason.RETURNED)
def returned() -> Any:
    return attention(lambda q, k, v, x: (q, k, v, k))


@case(Reason.READ_ELSEWHERE)
def read_elsewhere() -> Any:
    def finish(module: Attention, out: Tensor) -> Tensor:
        return module.o(out)

    class Chain(Attention):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            return super().forward(x) + self.o(self.v(x))

    return Chain(finish=finish), "vo", {}


@case(Reason.MISMATCHED)
def mismatched() -> Any:
    return attention(lambda q, k, v, x: (q, torch.cat([k[:1], k[1:].flip(-1)]), v))


@case(Reason.SHARED_WEIGHT)
def shared_weight() -> Any:
    class Tied(Attention):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            return super().forward(x) * self.k.weight.sum()

    return seeded(Tied()), "qk", {}


@case(Reason.CHAINED)
def chained() -> Any:
    """The output linear of one attention is the value linear of the next."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(E, H * D) for _ in range(3))
            self.between = nn.Linear(H * D, H * D)
            self.o = nn.Linear(H * D, E)
            seeded(self)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
            p = (q @ k.transpose(-1, -2)).softmax(-1)
            v = self.between((p @ v).transpose(1, 2).flatten(-2))
            v = v.unflatten(-1, (H, D)).transpose(1, 2)
            return self.o((p @ v).transpose(1, 2).flatten(-2))

    return Chain(), "vo", {}


@case(Reason.NO_VALUES)
def no_values() -> Any:
    return Attention().to("meta"), "qk", {}


@case(Reason.NOT_FLOATING)
def not_floating() -> Any:
    return Attention().to(torch.complex64), "qk", {}


@case(Reason.NOT_FINITE)
def not_finite() -> Any:
    model = Attention()
    with torch.no_grad():
        model.k.weight[3, 2] = float("nan")
    return model, "qk", {}


@case(Reason.NOTHING_SAVED)
def nothing_saved() -> Any:
    return attention(lambda q, k, v, x: (q, k * torch.arange(1.0, D + 1).to(k), v))


@case(Reason.RANK_DEFICIENT)
def rank_deficient() -> Any:
    """A head whose bias lies outside of what its weights span: no full basis can hold it."""
    model = Attention()
    with torch.no_grad():
        model.k.weight[:D] = 0
    return model, "qk", {"side": "kv"}


@case(Reason.TOO_NOISY)
def too_noisy() -> Any:
    return Attention(), "qk", {"basis": "first", "basis_size": "auto", "noise_budget": 1.0}


@case(Reason.OUT_OF_RANGE)
def out_of_range() -> Any:
    """Large queries meet large keys: K' is as large as x, which leaves Q' as large as the scores.

    They pass float32's range, as 10³ times 10³ passes that of float16.
    """
    model = Attention()
    with torch.no_grad():
        for linear in (model.q, model.k):
            linear.weight.mul_(1e20)
    return model, "qk", {}


@case(Reason.NOT_REQUESTED)
def not_requested() -> Any:
    return Attention(), "qk", {"products": ("vo",)}


@case(Reason.CACHED)
def cached() -> Any:
    class Buffered(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("past", torch.zeros(B, H, 9, D))

        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            q, k, v = self.project(x, x)
            k = self.past.index_copy_(2, torch.arange(x.shape[1]), k)
            v = F.pad(v, (0, 0, 0, 9 - v.shape[2]))
            out = F.scaled_dot_product_attention(q, k, v)
            return self.o(out.transpose(1, 2).flatten(-2))

    return Buffered(), "qk", {}


@torch.library.custom_op("bda_fx_tests::unknown_attention", mutates_args=())
def unknown_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@unknown_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@case(Reason.UNKNOWN_OP)
def unknown_op() -> Any:
    class Custom(Attention):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            out = unknown_attention(*self.project(x, x))
            return self.o(out.transpose(1, 2).flatten(-2))

    return Custom(), "vo", {}


@case(Reason.NESTED)
def nested() -> Any:
    def finish(module: Attention, out: Tensor) -> Tensor:
        return module.o(out)

    class Cond(Attention):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            q, k, v = self.project(x, x)
            attend = F.scaled_dot_product_attention
            out = torch.cond(
                x.sum() > 0,
                lambda q, k, v: attend(q, k, v),
                lambda q, k, v: attend(2 * q, k, v),
                (q, k, v),
            )
            return finish(self, out.transpose(1, 2).flatten(-2))

    return Cond(), "qk", {}


def report_for(model: nn.Module, options: dict[str, Any]) -> Report:
    x = example()
    parameter = next(model.parameters())
    x = x.to(parameter.device).to(parameter.dtype) if parameter.dtype.is_complex else x
    x = x.to(parameter.device)
    return bda_fx.analyze(model, (x,), options={**FULL, **options})


@pytest.mark.parametrize("reason", CASES, ids=lambda r: r.name)
def test_skipped_for(reason: Reason) -> None:
    model, product, options = CASES[reason]()
    report = report_for(model, options)
    codes = [s.reason_code for s in report.skipped if s.product == product]
    assert reason.name in codes
    assert all(s.reason and s.node is not None for s in report.skipped)


def test_unproven_where_a_movement_cannot_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported programs run at every size they allow, so the failure has to be made here."""

    def refuse(*args: Any) -> Any:
        raise RuntimeError("shape is invalid for this size")

    monkeypatch.setattr(label_moves, "run_move", refuse)
    report = report_for(Attention(), {})
    assert {s.reason_code for s in report.skipped} == {Reason.UNPROVEN.name}


def test_a_chained_skip_names_the_linear_that_is_in_another_site() -> None:
    model, _, options = chained()
    (skip,) = [s for s in report_for(model, options).skipped if s.reason_code == "CHAINED"]
    assert (skip.node or "").startswith("linear")


def test_every_reason_has_a_case() -> None:
    assert set(CASES) | {Reason.UNPROVEN, Reason.NOT_PROFITABLE} == set(Reason)


def test_a_skip_names_the_node_and_the_source() -> None:
    model, _, options = rotated()
    skip = next(s for s in report_for(model, options).skipped if s.product == "qk")
    assert skip.node
    assert skip.source
    assert "rotated" in str(report_for(model, options))


def test_fused_weight_is_left_alone_where_only_one_part_is_spoilt() -> None:
    class Half(FusedAttention):
        def forward(self, x: Tensor) -> Tensor:
            b, s, _ = x.shape
            q, k, v = (t.view(b, s, H, D).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            out = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
            return self.o(out.transpose(1, 2).reshape(b, s, H * D))

    report = report_for(Half(), {})
    assert [s.product for s in report.rewritten] == ["vo"]
    assert [s.reason_code for s in report.skipped] == ["ROTATED"]
