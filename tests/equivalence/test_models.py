"""Which attention products of real models are rewritten, and what ``analyze`` leaves alone."""

from __future__ import annotations

import pytest
import torch

import bda_fx
from tests import models
from tests.models import Case
from tests.zoo.entry import sites
from tests.zoo.find_differences import assert_sites

FULL = {"basis_size": "full"}
"""The noise budget plays no part: whatever is legal is rewritten."""


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
    assert_sites(report, sites(6, 32, 384, 12))


def test_rxnfp_all_sites() -> None:
    kwargs = {"input_ids": torch.randint(13, 400, (models.B, models.S))}
    report = bda_fx.analyze(models.rxnfp(), (), kwargs, options=FULL)
    assert_sites(report, sites(12, 64, 256, 4))
