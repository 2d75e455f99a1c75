"""Which attention products of which model are rewritten: a table, and nothing beside it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

import bda_fx
from tests import models
from tests.models import CASES, Case

FULL = {"basis_size": "full"}
"""The noise budget plays no part: whatever is legal is rewritten."""


@dataclass(frozen=True)
class Expected:
    """Sites per product: how many, and the D decomposed features of E input features of each."""

    qk: int
    vo: int
    qk_size: tuple[int, int]
    vo_size: tuple[int, int]
    heads: tuple[int, int] = (4, 4)
    """Query heads and key/value heads."""
    rotated: int = 0
    """QK products that are skipped because all their features are rotated."""


SITES = {
    "bert": Expected(2, 2, (8, 32), (8, 32)),
    "gpt2": Expected(2, 2, (8, 32), (8, 32)),
    "t5": Expected(6, 6, (8, 32), (8, 32)),
    "vit": Expected(2, 2, (8, 32), (8, 32)),
    "whisper": Expected(6, 6, (8, 32), (8, 32)),
    "deepseek_v2": Expected(2, 2, (8, 32), (8, 32)),
    "deepseek_v2_q_lora": Expected(2, 2, (8, 32), (8, 32)),
    "llama": Expected(0, 2, (0, 0), (16, 64), heads=(4, 2), rotated=2),
    "gpt_neox": Expected(2, 2, (12, 64), (16, 64)),
    "falcon": Expected(0, 2, (0, 0), (16, 64), heads=(4, 1), rotated=2),
    # Three layers share one set of weights: one site each, used three times.
    "albert": Expected(1, 1, (8, 32), (8, 32)),
    "bloom": Expected(2, 2, (16, 64), (16, 64)),
    "mha": Expected(1, 1, (8, 32), (8, 32)),
    "encoder": Expected(2, 2, (8, 32), (8, 32)),
}


def assert_sites(report: bda_fx.Report, expected: Expected) -> None:
    sizes = Counter((s.product, s.decomposed, s.in_features) for s in report.rewritten)
    wanted = Counter()
    if expected.qk:
        wanted[("qk", *expected.qk_size)] = expected.qk
    if expected.vo:
        wanted[("vo", *expected.vo_size)] = expected.vo
    assert sizes == wanted
    skips = Counter((s.product, s.reason_code) for s in report.skipped)
    assert skips == (Counter({("qk", "ROTATED"): expected.rotated}) if expected.rotated else {})
    assert {(s.heads, s.kv_heads) for s in report.rewritten} == {expected.heads}
    for s in report.rewritten:
        # Full size is all D features; parameters fall by r/E and the reported MACs with them.
        assert s.basis_size == s.decomposed
        assert s.macs_per_token_before == s.kv_heads * s.decomposed * s.in_features
        saved = s.kv_heads * s.decomposed * s.basis_size
        assert s.macs_per_token_before - s.macs_per_token_after == saved
    assert len(report.sites) == len(report.rewritten) + len(report.skipped)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sites(case: Case) -> None:
    example = models.make(case)
    report = bda_fx.analyze(example.model, (), example.kwargs, options=FULL)
    assert_sites(report, SITES[case.architecture])


def test_names_are_those_of_the_weights() -> None:
    example = models.make(Case("bert", "sdpa"))
    report = bda_fx.analyze(example.model, (), example.kwargs, options=FULL)
    layers = [f"encoder.layer.{i}.attention.self." for i in (0, 1)]
    wanted = {("qk", f"{layer}key.weight") for layer in layers}
    wanted |= {("vo", f"{layer}value.weight") for layer in layers}
    assert {(s.product, s.name) for s in report.rewritten} == wanted
    parameters = dict(example.model.named_parameters())
    assert all(s.name in parameters for s in report.rewritten)


def test_analyze_changes_nothing() -> None:
    example = models.make(Case("gpt2", "sdpa"))
    before = {k: v.clone() for k, v in example.model.state_dict().items()}
    program = models.exported(example)
    code = program.graph_module.code
    bda_fx.analyze(program)
    assert program.graph_module.code == code
    for name, value in example.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("products", [("qk",), ("vo",), ()], ids="+".join)
def test_products_are_those_asked_for(products: tuple[str, ...]) -> None:
    example = models.make(Case("bert", "sdpa"))
    report = bda_fx.analyze(example.model, (), example.kwargs, options={"products": products})
    assert {s.product for s in report.rewritten} == set(products)
    assert len(report.sites) == 4
    assert {s.reason_code for s in report.skipped} == {"NOT_REQUESTED"}


def test_minilm_all_sites() -> None:
    kwargs = {
        "input_ids": torch.randint(1000, 2000, (models.B, models.S)),
        "attention_mask": torch.ones(models.B, models.S, dtype=torch.long),
    }
    report = bda_fx.analyze(models.minilm(), (), kwargs, options=FULL)
    assert_sites(report, Expected(6, 6, (32, 384), (32, 384), heads=(12, 12)))


def test_rxnfp_all_sites() -> None:
    kwargs = {"input_ids": torch.randint(13, 400, (models.B, models.S))}
    report = bda_fx.analyze(models.rxnfp(), (), kwargs, options=FULL)
    assert_sites(report, Expected(12, 12, (64, 256), (64, 256)))
