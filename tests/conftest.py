"""What holds for all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_kept_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see what is done, and not what an earlier run of theirs kept."""
    monkeypatch.setattr("bda_fx.rewrite_cache._switched_on", lambda patches: False)
