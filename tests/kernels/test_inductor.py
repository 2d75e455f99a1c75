"""The operator inside of Inductor: what is emitted, in which modes it runs, what is cached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bda_fx
import bda_fx.backend as backend
import bda_fx.rewrite_dynamo as rewrite_dynamo
from bda_fx.assemble_program import assemble_program
from bda_fx.passes.canonicalize import canonicalize_module
from bda_fx.passes.emit_projection import ByTokens, ChooseSpelling, Spelling
from bda_fx.pipeline import transform
from tests import programs
from tests.integration.test_backend import Attention, example
from tests.programs import FusedAttention
from tests.tolerances import FLOAT32_MODEL, STALE

OPTIONS = {"basis_size": "full", "strict": True}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops of every graph that the backend rewrites."""
    called: list[str] = []
    original = rewrite_dynamo.transform

    def recorded(*args: Any, **kwargs: Any) -> Any:
        outcome = original(*args, **kwargs)
        called.extend(str(node.target) for node in outcome.program.graph.nodes)
        return outcome

    monkeypatch.setattr(rewrite_dynamo, "transform", recorded)
    return called


def run(model: nn.Module, x: Tensor, **keywords: Any) -> Tensor:
    options = {**OPTIONS, **keywords.pop("options", {})}
    compiled = torch.compile(model, backend="bda", options=options, **keywords)
    with torch.no_grad():
        return compiled(x)


def assert_close(value: Tensor, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        truth = model(x)
    assert float((value - truth).norm() / truth.norm()) <= FLOAT32_MODEL


def layer(seed: int = 0) -> Attention:
    return Attention(seed, torch.float32)


def inputs(batch: int = 2, tokens: int = 5) -> Tensor:
    return example(batch, tokens).float()


MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "freezing": {"options": {"inner_options": {"freezing": True}}},
    "max-autotune": {"options": {"inner_options": {"max_autotune": True}}},
    "cpp_wrapper": {"options": {"inner_options": {"cpp_wrapper": True}}},
    "graph partitions": {"options": {"inner_options": {"graph_partition": True}}},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes(mode: dict[str, Any], targets: list[str]) -> None:
    model, x = layer(), inputs()
    assert_close(run(model, x, **dict(mode)), model, x)
    assert targets.count("bda_fx.packed_projection.default") == 2


def test_half_precision_is_packed_too(targets: list[str]) -> None:
    model, x = layer().bfloat16(), inputs().bfloat16()
    value = run(model, x)
    truth = layer().double()(x.double())
    with torch.no_grad():
        own = float((model(x) - truth).norm())
    assert float((value - truth).norm()) <= 2 * own  # the promise to users; 1.0 measured
    assert targets.count("bda_fx.packed_projection.default") == 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_other_compilers_get_aten(inner: str, targets: list[str]) -> None:
    run(layer(), inputs(), options={"inner": inner})
    assert targets
    assert not [name for name in targets if name.startswith("bda_fx")]


def test_wider_types_get_aten(targets: list[str]) -> None:
    run(Attention(), example())
    assert not [name for name in targets if name.startswith("bda_fx")]


def test_exported_programs_hold_aten() -> None:
    program = bda_fx.rewrite(layer(), (inputs(),), options=OPTIONS).program
    assert not [n for n in program.graph.nodes if str(n.target).startswith("bda_fx")]


def spell(monkeypatch: pytest.MonkeyPatch, choose: ChooseSpelling) -> None:
    monkeypatch.setattr(rewrite_dynamo, "spelling_for", lambda options, patches: choose)


def test_plain_coefficients(monkeypatch: pytest.MonkeyPatch, targets: list[str]) -> None:
    """The spelling is chosen for each piece: here one operator, one of each kind."""
    kinds: Iterator[Spelling] = iter(["operator", "aten"])
    spell(monkeypatch, lambda x, form, piece: next(kinds))
    model, x = layer(), inputs()
    assert_close(run(model, x), model, x)
    assert targets.count("bda_fx.basis_projection.default") == 1
    assert targets.count("aten.index_select.default") == 2


@pytest.mark.parametrize(
    "spelling", ["dense", ByTokens(((1, 9), (40, 50)))], ids=["dense", "tokens"]
)
def test_dense_in_the_same_basis(
    spelling: Spelling, monkeypatch: pytest.MonkeyPatch, targets: list[str]
) -> None:
    """One graph, in a range of tokens, between two, and beyond them."""
    spell(monkeypatch, lambda x, form, piece: spelling)
    model = layer()
    compiled = torch.compile(model, backend="bda", options=OPTIONS, dynamic=True)
    for tokens in (2, 7, 10, 30):
        x = inputs(4, tokens)
        with torch.no_grad():
            assert_close(compiled(x), model, x)
    assert targets.count("output") == 1
    assert not [name for name in targets if "index_select" in name]
    operator = "bda_fx.packed_projection_by_tokens.default"
    assert targets.count(operator) == (0 if spelling == "dense" else 2)


@pytest.mark.parametrize("basis", ["pivot", "window"])
def test_dense_joins_the_pieces_of_a_fused_weight(
    basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several bases, features that are not decomposed, biases: one linear as before."""
    spelled: ChooseSpelling = lambda x, form, piece: "dense"  # noqa: E731
    model, x = FusedAttention().float(), programs.example().float()
    canonical = canonicalize_module(model, (x,))
    count = sum("linear" in str(node.target) for node in canonical.graph.nodes)
    chosen = bda_fx.Options(basis=basis, basis_size=0.8)
    outcome = transform(canonical, chosen, fixed_rows=True, spelling=spelled)
    assert len(outcome.plan.sites) == 2
    program = assemble_program(outcome)
    assert sum("linear" in str(node.target) for node in program.graph.nodes) == count
    assert not [n for n in program.graph.nodes if "index_select" in str(n.target)]
    assert_close(program.module()(x), model, x)


def test_one_graph_serves_every_size_and_layer(targets: list[str]) -> None:
    compiled = torch.compile(layer(), backend="bda", options=OPTIONS, dynamic=True)
    model = compiled._orig_mod
    for tokens in (3, 7, 300):
        x = inputs(4, tokens)
        with torch.no_grad():
            assert_close(compiled(x), model, x)
    graphs = targets.count("output")
    assert graphs == 1


def test_regional_compilation(targets: list[str]) -> None:
    model = nn.Sequential(*[layer(seed) for seed in range(3)])
    truth, x = nn.Sequential(*[layer(seed) for seed in range(3)]), inputs()
    for part in model:
        part.compile(backend="bda", options=OPTIONS)
    with torch.no_grad():
        assert_close(model(x), truth, x)
    assert targets.count("output") == 1


def in_place(model: Attention) -> None:
    model.k.weight.add_(1.0)


def new_data(model: Attention) -> None:
    model.v.weight.data = model.v.weight.detach() * 2 + 1


def load_state_dict(model: Attention) -> None:
    model.load_state_dict(layer(seed=9).state_dict())


@pytest.mark.parametrize("change", [in_place, new_data, load_state_dict])
def test_packed_weights_are_never_stale(change: Any) -> None:
    model, x = layer(), inputs()
    compiled = torch.compile(model, backend="bda", options=OPTIONS)
    with torch.no_grad():
        before = compiled(x)
        change(model)
        after = compiled(x)
    assert_close(after, model, x)
    assert float((after - before).norm() / before.norm()) > STALE


def test_plain_coefficients_are_not_kept() -> None:
    """Only what the graph reads stays in memory: packed weights instead of plain ones."""
    calls: list[Any] = []
    original = backend._compile

    def recorded(*args: Any) -> Any:
        calls.append(original(*args))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_compile", recorded)
        model = layer()
        run(model, inputs())
    (entry,) = calls[0].derived_weights.entries.values()
    matrices = sorted(tuple(t.shape) for t in entry.derived if t.dim() > 1)
    panel = (1, 18, torch.ops.bda_fx.panel_width())
    assert matrices == [panel, panel, (24, 24), (24, 24)]


def test_training_keeps_the_original(targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_warned", set())  # it warns once, of other tests' frames too
    model, x = layer(), inputs()
    compiled = torch.compile(model, backend="bda", options=OPTIONS)
    with pytest.warns(UserWarning, match="grad mode is on"):
        compiled(x).sum().backward()
    assert model.k.weight.grad is not None
    assert not targets


SCRIPT = """
import json, torch
from pathlib import Path
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import CppBuilder
from bda_fx.outcome import on_step
from tests.kernels.test_inductor import OPTIONS, Wide, inputs, layer

built, original, steps = [], CppBuilder.build, []
CppBuilder.build = lambda self: (built.append(self.get_target_file_path()), original(self))[1]
on_step.set(steps.append)
torch.manual_seed(0)
with torch.no_grad():
    y = torch.compile(layer(), backend="bda", options=OPTIONS)(inputs())
    measured = {**OPTIONS, "profitability": "measure"}
    torch.compile(Wide(), backend="bda", options=measured, dynamic=True)(torch.ones(2, 60, 256))
print(json.dumps({
    "kernels": sum(Path(path).parent.name == "bda_fx" for path in built),
    "sum": float(y.sum()),
    "plans": steps.count("plan sites"),
    **{kind: counters["inductor"]["fxgraph_cache_" + kind] for kind in ("hit", "miss", "bypass")},
}))
"""


def start(script: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_processes_share_what_is_compiled(tmp_path: Path) -> None:
    """Two at once build the kernel once; a third one plans and compiles nothing at all."""
    processes = [start(SCRIPT, tmp_path) for _ in range(2)]
    first, second = (result(process) for process in processes)
    assert first["kernels"] + second["kernels"] == 1
    assert len(list((tmp_path / "bda_fx").glob("*.so"))) == 1
    assert len(list((tmp_path / "bda_fx").glob("timings-*.json"))) == 1
    third = result(start(SCRIPT, tmp_path))
    done = {"kernels": 0, "plans": 0, "hit": 2, "miss": 0, "bypass": 0}
    assert third == {**done, "sum": first["sum"]}


ALONE = """
import json, warnings, torch
from bda_fx.kernels.packed_projection import serves
from bda_fx.kernels.basis_projection import basis_projection, project_in_aten
arguments = torch.randn(5, 24), torch.randn(24, 16), None, None, 3, 8, [*range(8)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    same = [torch.equal(basis_projection(*arguments), project_in_aten(*arguments)) for _ in "ab"]
print(json.dumps({"same": same, "warnings": [str(w.message) for w in caught]}))
"""


def test_without_a_compiler_aten_serves_and_says_so_once(tmp_path: Path) -> None:
    got = result(start(ALONE, tmp_path, CXX="no-such-compiler"))
    assert got["same"] == [True, True]
    (warning,) = got["warnings"]
    assert "plain ATen ops" in warning
    assert "name it in CXX" in warning


# -- profitability --------------------------------------------------------------------------------


class Wide(nn.Module):
    """Keys and values of 4 × 64 out of 256 features: a quarter is saved."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v, self.o = (nn.Linear(256, 256) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 64)).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(heads.transpose(1, 2).flatten(2))


def timed(monkeypatch: pytest.MonkeyPatch, faster: Any) -> list[int]:
    """A timer that calls every form once; ``faster(tokens)`` tells whether the kernel is."""
    seen: list[int] = []

    def timer(calls: Any, device: torch.device) -> dict[str, float]:
        shapes = {name: call().shape for name, call in calls.items()}
        assert len(set(shapes.values())) == 1
        tokens = shapes["0"][0]
        seen.append(tokens)
        speedup = 2.0 if faster(tokens) else 0.5
        return {name: 1 / speedup if name == "0" else 1.0 for name in calls}

    monkeypatch.setattr("bda_fx.measure_projection.time_calls", timer)
    return seen


@pytest.fixture
def no_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of other runs, and nothing is kept."""
    monkeypatch.setattr("bda_fx.timing_cache.TimingCache._read", lambda self: {})
    keep = lambda self, key, seconds: self.known.update({key: seconds})  # noqa: E731
    monkeypatch.setattr("bda_fx.timing_cache.TimingCache.put", keep)


@pytest.mark.usefixtures("no_timings")
def test_one_graph_has_two_forms_and_chooses_by_tokens(
    monkeypatch: pytest.MonkeyPatch, targets: list[str]
) -> None:
    seen = timed(monkeypatch, lambda tokens: tokens == 16)
    model = Wide()
    options = {**OPTIONS, "profitability": "measure"}
    compiled = torch.compile(model, backend="bda", options=options, dynamic=True)
    for batch, tokens in ((2, 4), (4, 4), (2, 300)):
        x = torch.randn(batch, tokens, 256)
        with torch.no_grad():
            assert_close(compiled(x), model, x)
    assert targets.count("output") == 1
    assert targets.count("bda_fx.packed_projection_by_tokens.default") == 2
    assert sorted(seen) == [1, 16, 128, 1024]


@pytest.mark.usefixtures("no_timings")
def test_what_does_not_pay_is_the_original(
    monkeypatch: pytest.MonkeyPatch, targets: list[str]
) -> None:
    timed(monkeypatch, lambda tokens: False)
    model, x = Wide(), torch.randn(2, 8, 256)
    with torch.no_grad():
        plain = torch.compile(model)(x)
    value = run(model, x, options={"profitability": "measure"})
    assert torch.equal(value, plain)
    assert not [name for name in targets if name.startswith("bda_fx")]


@pytest.mark.parametrize("mode", ["measure", "model"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighed_for_real(mode: str, dynamic: bool, dtype: torch.dtype) -> None:
    """Whatever this machine finds: the outputs are right, in bounded time."""
    model = nn.Sequential(*map(Wide, range(3)))
    x = torch.randn(2, 100, 256)
    with torch.no_grad():
        truth = model(x)
        own = float((model.to(dtype)(x.to(dtype)).float() - truth).norm())
        value = run(model, x.to(dtype), options={"profitability": mode}, dynamic=dynamic).float()
    assert value.shape == truth.shape
    assert float((value - truth).norm()) <= max(2 * own, FLOAT32_MODEL * float(truth.norm()))


def test_freezing_while_weighed() -> None:
    model, x = Wide(), torch.randn(2, 100, 256)
    options = {"profitability": "measure", "inner_options": {"freezing": True}}
    assert_close(run(model, x, options=options), model, x)


@pytest.mark.parametrize("mode", ["measure", "model"])
@pytest.mark.usefixtures("no_timings")
def test_weighed_in_inference_mode_with_another_default_dtype(mode: str) -> None:
    model, x = Wide(), torch.randn(2, 100, 256)
    state = torch.get_rng_state()
    options = {**OPTIONS, "profitability": mode}
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode():
            value = torch.compile(model, backend="bda", options=options)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(value, model, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("no_timings")
def test_an_opaque_cache_keeps_its_basis(
    monkeypatch: pytest.MonkeyPatch, targets: list[str]
) -> None:
    """Prefill is decomposed and decode is not, and both put the same into the cache."""
    timed(monkeypatch, lambda tokens: tokens > 10)
    model = Wide()
    keys: list[Tensor] = []

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x).unflatten(-1, (4, 64)).transpose(1, 2) for p in (model.q, model.k, model.v))
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return model.o(heads.transpose(1, 2).flatten(2)), k, v

    options = {**OPTIONS, "profitability": "measure", "kv_cache": "opaque"}
    compiled = torch.compile(forward, backend="bda", options=options, dynamic=False)
    x = torch.randn(1, 20, 256)
    with torch.no_grad():
        for part in (x, x[:, :3]):
            y, k, _ = compiled(part)
            truth, own, _ = forward(part)
            assert float((y - truth).norm() / truth.norm()) <= FLOAT32_MODEL
            assert float((k - own).norm() / own.norm()) > STALE  # another basis than the model's
            keys.append(k[:, :, :3])
    assert float((keys[0] - keys[1]).norm() / keys[0].norm()) <= FLOAT32_MODEL
    assert targets.count("bda_fx.packed_projection.default") == 2
    assert targets.count("output") == 2


# -- CUDA, as far as it can be shown without ------------------------------------------------------


def test_on_cuda_the_operator_is_offered_and_caches_are_keyed_by_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph is the same each time: found again, until a kernel's source changes."""
    from torch._dynamo.utils import counters
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.utils import fresh_cache

    class Own(CustomGraphPass):
        graphs = 0

        def __call__(self, graph: torch.fx.Graph) -> None:
            Own.graphs += 1

        def uuid(self) -> str:
            return "the user's own"

    offered: list[None] = []
    monkeypatch.setattr(backend, "_on", lambda device, inputs: device == "cuda")
    cuda = backend.basis_projection_cuda
    monkeypatch.setattr(cuda, "offer_to_inductor", lambda: offered.append(None))
    options = {"inner_options": {"post_grad_custom_post_pass": Own()}}
    kinds = []
    with fresh_cache():
        for key in ("one", "one", "two"):
            torch._dynamo.reset()
            counters.clear()
            monkeypatch.setattr(backend, "kernel_source_key", lambda key=key: key)
            run(layer(), inputs(), options=options)
            kinds.append([kind for kind in ("hit", "miss", "bypass")
                          if counters["inductor"]["fxgraph_cache_" + kind]])  # fmt: skip
    assert kinds == [["miss"], ["hit"], ["miss"]]
    assert Own.graphs == 2
    assert len(offered) == 3


def test_the_key_covers_every_source_of_the_kernels(tmp_path: Path) -> None:
    from bda_fx.kernels import source_key

    kernels = shutil.copytree(Path(source_key.__file__).parent, tmp_path / "kernels")
    keys = {source_key.kernel_source_key()}
    assert keys == {source_key.hash_sources(kernels)}
    for name in ("basis_projection.cpp", "register_tile.h", "basis_projection_triton.py"):
        with (kernels / name).open("a") as source:
            source.write("\n")
        keys.add(source_key.hash_sources(kernels))
    assert len(keys) == 4


def test_on_cuda_aten_unless_max_autotune_weighs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.basis_projection_cuda, "serves", lambda device, dtype: True)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 8, device="cuda")
    form: Any = None
    options = bda_fx.Options()
    assert rewrite_dynamo.spelling_for(options, {})(x, form, 0) == "aten"
    for patches in (backend._patches(options, "max-autotune"), {"max_autotune_gemm": True}):
        assert rewrite_dynamo.spelling_for(options, patches)(x, form, 0) == "operator"
    assert rewrite_dynamo.offer_for(options)(x) == ("operator", "aten")
