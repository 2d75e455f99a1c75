"""measure_sums: the length of runs, from the variance of their rounding, in any surroundings."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bda_fx.passes import measure_sums
from bda_fx.passes.measure_sums import LONGEST, STEP, longest_run, partial_sums_rounded


@pytest.fixture(autouse=True)
def measured_anew():
    longest_run.cache_clear()
    yield
    longest_run.cache_clear()


@pytest.mark.parametrize(("run", "found"), [(192, 192), (200, 192), (384, 384), (64, 64)])
def test_runs_of_equal_length_are_found(monkeypatch, run, found):
    monkeypatch.setattr(
        measure_sums, "partial_sums_rounded", lambda terms: terms / (2 * math.ceil(terms / run))
    )
    assert longest_run() == found


def test_sums_that_are_never_cut(monkeypatch):
    monkeypatch.setattr(measure_sums, "partial_sums_rounded", lambda terms: terms / 2)
    assert longest_run() == LONGEST


def test_sums_that_are_not_kept_in_float32(monkeypatch):
    """Sums in a wider dtype have no partial roundings: the shortest run, which is next to none."""
    monkeypatch.setattr(measure_sums, "partial_sums_rounded", lambda terms: 0.0)
    assert longest_run() == STEP


def test_the_same_at_every_call():
    assert partial_sums_rounded(256) == partial_sums_rounded(256)
    first = longest_run()
    longest_run.cache_clear()
    assert longest_run() == first


def test_the_surroundings_do_not_matter():
    first, state = longest_run(), torch.get_rng_state()
    longest_run.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
            assert longest_run() == first
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
