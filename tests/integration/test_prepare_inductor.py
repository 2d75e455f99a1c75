"""What goes on beside an analysis: the garbage collector pauses and Inductor is prepared."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import bda_fx.backend as backend
import bda_fx.prepare_inductor as module
from bda_fx.pause_collector import collector_paused
from bda_fx.prepare_inductor import beside_inductor, inductor_prepared, wait_for_inductor
from tests.programs import Attention, B, E, S, randn


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled: bool) -> None:
    @collector_paused()
    def fail() -> None:
        assert not gc.isenabled()
        raise KeyError

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        for _ in range(2):  # the decorated function can be called again
            with pytest.raises(KeyError):
                fail()
            assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_the_collector_pauses_while_the_backend_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def inner(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append(gc.isenabled())
        return graph.forward

    monkeypatch.setattr(backend, "_inner_compiler", lambda *_, **__: inner)
    with torch.no_grad():
        torch.compile(Attention(), backend="bda", options={"inner": "eager"})(randn(B, S, E))
    assert seen == [False]
    assert gc.isenabled()


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_thread", None)


def test_inductor_is_prepared_once_by_a_thread(
    unprepared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import codecache, cpu_vec_isa

    asked: list[str] = []
    go = threading.Event()

    def isa() -> None:
        assert go.wait(10)
        assert torch._inductor.config.cpp.vec_isa_ok is False  # the caller's options
        asked.append(f"isa {threading.current_thread() is threading.main_thread()}")

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", isa)
    monkeypatch.setattr(codecache, "torch_key", lambda: asked.append("key"))
    with inductor_prepared(False):
        pass
    assert module._thread is None
    options = torch._inductor.config.patch({"cpp.vec_isa_ok": False})
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with options, inductor_prepared(True):
            assert not asked  # the block goes on meanwhile
            with beside_inductor():
                assert torch.get_num_threads() == 2  # one is the compiler's
            assert torch.get_num_threads() == 3
            go.set()
        with beside_inductor():
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert asked == ["isa False", "key"]
    with inductor_prepared(True):
        pass
    wait_for_inductor()
    assert len(asked) == 2


def test_what_fails_is_left_to_inductor(
    unprepared: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import cpu_vec_isa

    def fail() -> None:
        raise OSError("read only")

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", fail)
    with caplog.at_level("DEBUG", "bda_fx"), inductor_prepared(True):
        pass
    assert "read only" in caplog.text
