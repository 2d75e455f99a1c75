"""Rewritten graphs kept in files: found again by another process, and never for anything else."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bda_fx.backend as backend
import bda_fx.hash_graph as hash_graph
import bda_fx.rewrite_cache as rewrite_cache
import bda_fx.rewrite_dynamo as rewrite_dynamo
from bda_fx.outcome import on_step
from tests.programs import Attention as SmallAttention
from tests.programs import B, E, S, assert_close, randn, seeded
from tests.tolerances import FLOAT32_MODEL
from tests.zoo import latent

FULL = {"basis_size": "full"}


class Block(nn.Module):
    """An attention, and a linear that no site reads."""

    def __init__(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        super().__init__()
        self.attention, self.other = SmallAttention(), nn.Linear(E, E)
        self.register_buffer("shift", torch.zeros(E))
        self.scale = scale
        seeded(self).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.attention(x)) * self.scale + self.shift


@pytest.fixture(autouse=True)
def no_kept_rewrites() -> None:
    """Here they are kept."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the files; Inductor's place is taken by eager execution, which compiles
    nothing."""
    rewrite_dynamo.serves(torch.device("cpu"), torch.float32)  # the kernel is not built anew
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        backend, "_inner_compiler", lambda *_, **__: lambda module, _: module.forward
    )
    return tmp_path / "bda_fx" / "rewrites"


@pytest.fixture
def planned() -> Iterator[Callable[[], bool]]:
    """Asks whether anything was planned since it was last asked."""
    steps: list[str] = []
    token = on_step.set(steps.append)

    def since() -> bool:
        found = "plan sites" in steps
        steps.clear()
        return found

    yield since
    on_step.reset(token)


def run(model: nn.Module, *inputs: Tensor, dynamic: bool | None = None, **options: Any) -> Tensor:
    """What ``model`` computes as if it were compiled in a new process."""
    torch._dynamo.reset()
    chosen = {**FULL, **options}
    with torch.no_grad():
        compiled = torch.compile(model, backend="bda", options=chosen, dynamic=dynamic)
        result: Tensor = compiled(*inputs)
    return result


def x(tokens: int = S, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(B, tokens, E, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_second_process_plans_nothing(
    cache: Path, planned: Callable[[], bool], dtype: torch.dtype
) -> None:
    first = run(Block(dtype), x(dtype=dtype))
    assert planned()
    assert len(list(cache.glob("*.pt"))) == 1
    assert torch.equal(run(Block(dtype), x(dtype=dtype)), first)
    assert not planned()


@pytest.mark.parametrize("side", ["kv", "qo"])
def test_every_kind_of_form_comes_back(cache: Path, planned: Callable[[], bool], side: str) -> None:
    first = run(Block(), x(), side=side)
    assert planned()
    assert torch.equal(run(Block(), x(), side=side), first)
    assert not planned()


def test_latent_attention_with_gathers_folded(cache: Path, planned: Callable[[], bool]) -> None:
    (entry,) = (entry for entry in latent.ENTRIES if entry.name == "deepseek_v2")
    results = []
    for again in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, inputs = entry.build("sdpa")
        with torch.no_grad():
            results.append(torch.compile(model, backend="bda", options=FULL)(**inputs))
        assert planned() != again
    assert torch.equal(*(result.last_hidden_state for result in results))


def test_plain_aten_comes_back(
    cache: Path, planned: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite_dynamo, "serves", lambda *_: False)
    first = run(Block(), x())
    assert planned()
    assert torch.equal(run(Block(), x()), first)
    assert not planned()


def test_a_kernel_that_is_gone_is_not_asked_for(
    cache: Path, planned: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Block(), x())
    planned()
    for module in (rewrite_dynamo, rewrite_cache):
        monkeypatch.setattr(module, "serves", lambda *_: False)
    run(Block(), x())
    assert planned()


def change(model: Block, name: str) -> None:
    with torch.no_grad():
        value = model.get_parameter(name) if name != "shift" else model.shift
        value.view(-1)[-1] += 2.0**-10


@pytest.mark.parametrize("name", ["attention.k.weight", "other.weight", "shift"])
def test_one_element_of_any_weight_tells_two_models_apart(
    cache: Path, planned: Callable[[], bool], name: str
) -> None:
    run(Block(), x())
    planned()
    other = Block()
    change(other, name)
    result = run(other, x())
    assert planned()
    assert_close(result, other(x()).detach(), FLOAT32_MODEL)


@pytest.mark.parametrize(
    "again",
    [
        lambda: run(Block(), x(), basis="window"),
        lambda: run(Block(), x(), keep=("*k.weight",)),
        lambda: run(Block(), x(), inner_options={"freezing": True}),
        lambda: run(Block(), x(S + 1)),
        lambda: run(Block(scale=2.0), x()),
        lambda: run(Block(torch.float64), x(dtype=torch.float64)),
    ],
    ids=["basis", "keep", "inner options", "shape", "constant", "dtype"],
)
def test_whatever_counts_tells_two_calls_apart(
    cache: Path, planned: Callable[[], bool], again: Callable[[], Tensor]
) -> None:
    run(Block(), x())
    planned()
    again()
    assert planned()


def test_weights_loaded_later_are_never_stale(cache: Path, planned: Callable[[], bool]) -> None:
    run(Block(), x())
    planned()
    torch._dynamo.reset()
    model = Block()
    compiled = torch.compile(model, backend="bda", options=FULL)
    with torch.no_grad():
        compiled(x())
        assert not planned()
        for parameter in model.parameters():
            parameter.mul_(-1.5)
        truth = copy.deepcopy(model)(x())
        assert_close(compiled(x()), truth, FLOAT32_MODEL)


def test_symbolic_sizes(cache: Path, planned: Callable[[], bool]) -> None:
    model = Block()
    run(model, x(), dynamic=True)
    assert planned()
    assert len(list(cache.glob("*.pt"))) == 1
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="bda", options=FULL, dynamic=True)
    with torch.no_grad():
        for tokens in (S, S + 4, 3):
            assert_close(compiled(x(tokens)), model(x(tokens)), FLOAT32_MODEL)
    assert not planned()


def test_what_holds_for_some_sizes_only_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that asks about a size adds a guard that another process would not have."""
    original = rewrite_dynamo.canonicalize_dynamo

    def asking(module: Any, inputs: list[Any]) -> Any:
        (size,) = [v for v in hash_graph.values_of(module, inputs) if isinstance(v, torch.SymInt)]
        assert size % 5 == 0
        return original(module, inputs)

    monkeypatch.setattr(rewrite_dynamo, "canonicalize_dynamo", asking)
    torch._dynamo.reset()
    inputs = x()
    torch._dynamo.mark_dynamic(inputs, 1)
    run(Block(), inputs)
    assert not cache.exists()


def test_inference_mode(cache: Path, planned: Callable[[], bool]) -> None:
    model, results = Block(), []
    for _ in range(2):
        torch._dynamo.reset()
        with torch.inference_mode():
            results.append(torch.compile(model, backend="bda", options=FULL)(x()))
    assert torch.equal(*results)


class NoAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_a_graph_without_sites(cache: Path, planned: Callable[[], bool]) -> None:
    run(NoAttention(), x())
    assert planned()
    assert torch.equal(run(NoAttention(), x()), x().relu())
    assert not planned()


@torch.library.custom_op("bda_tests::of_the_users_own", mutates_args=())
def of_the_users_own(x: Tensor) -> Tensor:
    return x.clone()


@of_the_users_own.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class WithAnOp(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(of_the_users_own(x))


def test_code_of_the_users_own_has_no_hash(cache: Path, planned: Callable[[], bool]) -> None:
    for _ in range(2):
        run(WithAnOp(), x())
        assert planned()
    assert not cache.exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[::-1]])
def test_a_damaged_file_is_as_none(
    cache: Path, planned: Callable[[], bool], damage: Callable[[bytes], bytes]
) -> None:
    first = run(Block(), x())
    planned()
    (file,) = cache.glob("*.pt")
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(run(Block(), x()), first)
    assert planned()
    assert torch.equal(run(Block(), x()), first)
    assert not planned()


def test_a_place_that_cannot_be_written_is_as_none(
    cache: Path, planned: Callable[[], bool]
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the way")
    run(Block(), x())
    run(Block(), x())
    assert planned()


def test_inductors_switches_hold(cache: Path) -> None:
    run(Block(), x(), inner_options={"force_disable_caches": True})
    with torch._inductor.config.patch(fx_graph_cache=False):
        run(Block(), x())
    run(Block(), x(), inner="aot_eager")
    assert not cache.exists()


def test_the_least_used_files_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite_cache, "MOST_BYTES", 250)
    for age, name in enumerate(["new", "older", "oldest"]):
        file = tmp_path / f"{name}.pt"
        file.write_bytes(bytes(100))
        os.utime(file, (1000 - age, 1000 - age))
    rewrite_cache.make_room(tmp_path, 100)
    assert [file.stem for file in tmp_path.glob("*.pt")] == ["new"]


@pytest.mark.parametrize("part", [0.5, 1.0], ids=["is not hashed", "is not kept"])
def test_one_that_is_too_large(cache: Path, monkeypatch: pytest.MonkeyPatch, part: float) -> None:
    model = Block()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(rewrite_cache, "MOST_BYTES", part * weights)
    run(model, x())
    assert not list(cache.glob("*"))


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.clone().set_(v.untyped_storage(), 1, (2, 2), (2, 1)),
        lambda v: v.T,
        lambda v: v.to(torch.float64),
        lambda v: v.reshape(9, 1),
        lambda v: nn.Parameter(v, requires_grad=True),
    ],
)
def test_values_are_told_apart(change: Callable[[Tensor], Tensor]) -> None:
    value = torch.arange(9.0).view(3, 3)
    assert hash_graph._value(change(value)) != hash_graph._value(value)


def test_what_cannot_be_recognised() -> None:
    for value in (torch.ones(2).to_sparse(), torch.zeros(2).to_mkldnn()):
        with pytest.raises(hash_graph.NoHash):
            hash_graph._value(value)
    for target in (lambda x: x, of_the_users_own, torch.ops.bda_tests.of_the_users_own.default):
        with pytest.raises(hash_graph.NoHash):
            hash_graph._function(target)
    assert hash_graph._function(F.linear) != hash_graph._function(F.gelu)
