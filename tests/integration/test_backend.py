"""``torch.compile(model, backend="bda")``: never wrong, never stale, no extra compiles."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import bda_fx
import bda_fx.backend as backend
import bda_fx.pipeline as pipeline
import bda_fx.rewrite_dynamo as rewrite_dynamo
from tests import tolerances
from tests.programs import Attention as SmallAttention
from tests.programs import example as small_example

B, S, E, H, D = 2, 5, 24, 4, 6
EAGER = {"inner": "eager", "basis_size": "full"}
AOT = {"inner": "aot_eager", "basis_size": "full"}


class Attention(nn.Module):
    """Self-attention with a residual; ``seed`` tells its weights from another layer's."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(E, E, dtype=dtype) for _ in range(4))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(value / E**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v)
        return x + self.o(heads.transpose(1, 2).flatten(2))


def example(batch: int = B, tokens: int = S, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, E, generator=generator, dtype=torch.float64)


def assert_close(value: Tensor, truth: Tensor) -> None:
    assert value.shape == truth.shape
    error = float((value - truth).norm() / truth.norm())
    assert error <= tolerances.FLOAT64_FRESH


@dataclass
class Rewrites:
    """Every graph that the backend rewrote, by what it handed to Dynamo."""

    calls: list[Any] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(call.derived_weights.nbytes for call in self.calls)

    @property
    def entries(self) -> int:
        return sum(len(call.derived_weights.entries) for call in self.calls)


@pytest.fixture(autouse=True)
def rewrites(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rewrites]:
    """Dynamo as new, and a record of what is rewritten from here on."""
    seen = Rewrites()
    compile_ = backend._compile

    def spy(*args: Any) -> Any:
        call = compile_(*args)
        seen.calls.append(call)
        return call

    monkeypatch.setattr(backend, "_compile", spy)
    backend._warned.clear()
    torch._dynamo.reset()
    counters.clear()
    with torch.random.fork_rng(devices=[]):
        yield seen
    torch._dynamo.reset()


def compiles() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(model: Any, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    return torch.compile(model, backend="bda", options=options or EAGER, **settings)


class TestManyModules:
    def test_twelve_layers_one_compile(self, rewrites: Rewrites) -> None:
        layers = [Attention(seed) for seed in range(12)]
        fast = [compiled(layer) for layer in layers]
        with torch.no_grad():
            for _ in range(2):
                x = truth = example()
                for layer, ours in zip(layers, fast, strict=True):
                    x, truth = ours(x), layer(truth)
                    assert_close(x, truth)
        assert compiles() == 1
        assert len(rewrites.calls) == 1
        assert rewrites.entries == 12

    def test_twelve_layers_under_inductor(self, rewrites: Rewrites) -> None:
        layers = [Attention(seed) for seed in range(12)]
        fast = [compiled(layer, {"basis_size": "full"}) for layer in layers]
        x = example()
        with torch.no_grad():
            for layer, ours in zip(layers, fast, strict=True):
                assert_close(ours(x), layer(x))
        assert compiles() == 1
        assert len(rewrites.calls) == 1

    def test_threads_share_one_graph(self, rewrites: Rewrites) -> None:
        layers = [Attention(seed) for seed in range(6)]
        fast = [compiled(layer, AOT) for layer in layers]

        def work(job: int) -> None:
            at, x = job % len(layers), example(seed=job)
            with torch.no_grad():
                assert_close(fast[at](x), layers[at](x))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(96)))
        assert rewrites.entries >= len(layers)

    def test_a_hundred_models_come_and_go(self, rewrites: Rewrites) -> None:
        for seed in range(100):
            layer = Attention(seed % 3)
            fast = compiled(layer)
            with torch.no_grad():
                assert_close(fast(example()), layer(example()))
            assert 0 < rewrites.entries <= 11
            del layer, fast
            if seed % 10 == 9:
                gc.collect()
        torch._dynamo.reset()
        gc.collect()
        assert rewrites.calls
        assert rewrites.nbytes == rewrites.entries == 0


def in_place(model: Attention, delta: Tensor) -> None:
    with torch.no_grad():
        model.k.weight.add_(delta)


def load_state_dict(model: Attention, delta: Tensor) -> None:
    model.load_state_dict({k: v + delta.sum() / E for k, v in model.state_dict().items()})


def load_state_dict_assign(model: Attention, delta: Tensor) -> None:
    state = {k: v * 1.5 for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def new_parameter(model: Attention, delta: Tensor) -> None:
    model.v.weight = nn.Parameter(model.v.weight.detach() + delta)


def new_data(model: Attention, delta: Tensor) -> None:
    model.k.weight.data = model.k.weight.detach() + delta


def optimizer_step(model: Attention, delta: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.enable_grad():
        (model(example()) * example(seed=3)).sum().backward()
    optimizer.step()
    model.zero_grad()


def merge_data(model: Attention, delta: Tensor) -> None:
    model.v.weight.data += delta


def merge_no_grad(model: Attention, delta: Tensor) -> None:
    with torch.no_grad():
        model.q.weight += delta


def partner_only(model: Attention, delta: Tensor) -> None:
    with torch.no_grad():
        model.o.weight -= delta


def bias_only(model: Attention, delta: Tensor) -> None:
    with torch.no_grad():
        model.v.bias += delta[0]  # a constant in k shifts all scores of a query alike: no change


CHANGES = (
    in_place,
    load_state_dict,
    load_state_dict_assign,
    new_parameter,
    new_data,
    optimizer_step,
    merge_data,
    merge_no_grad,
    partner_only,
    bias_only,
)


class TestNeverStale:
    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    def test_seen_at_the_next_call(self, change: Callable[..., None], rewrites: Rewrites) -> None:
        model = Attention()
        fast, x = compiled(model), example()
        generator = torch.Generator().manual_seed(7)
        delta = torch.randn(E, 2, generator=generator, dtype=torch.float64)
        delta = 0.1 * delta @ torch.randn(2, E, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            before = model(x)
            assert_close(fast(x), before)
        change(model, delta)
        with torch.no_grad():
            after = model(x)
            # The change is large enough to tell a stale weight from a fresh one.
            assert float((after - before).norm() / before.norm()) > tolerances.STALE
            assert_close(fast(x), after)
        assert rewrites.calls

    @pytest.mark.parametrize("under_no_grad", [False, True])
    def test_lora_merge_and_unmerge(self, under_no_grad: bool, rewrites: Rewrites) -> None:
        """``weight.data += B A`` and back, as PEFT does it: no version counter moves."""
        model = Attention()
        fast, x = compiled(model), example()
        generator = torch.Generator().manual_seed(9)
        up = torch.randn(E, 3, generator=generator, dtype=torch.float64)
        down = torch.randn(3, E, generator=generator, dtype=torch.float64)
        delta = 0.1 * up @ down
        for sign in (1, -1, 1, -1):
            for layer in (model.q, model.v):
                if under_no_grad:
                    with torch.no_grad():
                        layer.weight += sign * delta
                else:
                    layer.weight.data += sign * delta
            with torch.no_grad():
                assert_close(fast(x), model(x))
        assert rewrites.entries == 1

    def test_invalidate_after_a_write_that_nothing_records(self, rewrites: Rewrites) -> None:
        model = Attention()
        fast, x = compiled(model), example()
        with torch.no_grad():
            fast(x)
        # One element that the probes do not look at: only invalidate() can tell.
        model.k.weight.data[E - 1, E - 2] += 3.0
        bda_fx.invalidate()
        with torch.no_grad():
            assert_close(fast(x), model(x))
        model.k.weight.data.mul_(1.5)
        bda_fx.invalidate()
        with torch.no_grad():
            assert_close(fast(x), model(x))
        assert rewrites.entries == 1

    def test_unchanged_weights_are_derived_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of the example while it is compiled, those of another module at its first call."""
        calls = []
        transform = rewrite_dynamo.transform_weights

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return transform(*args, **kwargs)

        monkeypatch.setattr(rewrite_dynamo, "transform_weights", counted)
        for seed, derived_anew in ((0, 0), (1, 1)):
            model = Attention(seed)
            fast = compiled(model)
            with torch.no_grad():
                for _ in range(5):
                    assert_close(fast(example()), model(example()))
            assert len(calls) == derived_anew

    def test_weights_that_change_while_they_are_compiled(
        self, rewrites: Rewrites, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, compile_ = Attention(), backend._compile

        def changing(*args: Any) -> Any:
            with torch.no_grad():
                model.k.weight.mul_(1.5)
            return compile_(*args)

        monkeypatch.setattr(backend, "_compile", changing)
        fast = compiled(model)
        with torch.no_grad():
            assert_close(fast(example()), model(example()))


def shapes() -> list[Tensor]:
    return [example(2, tokens) for tokens in range(1, 65)] + [example(b, 7) for b in range(1, 9)]


class TestShapes:
    @pytest.mark.parametrize("dynamic", [True, None])
    def test_no_more_compiles_than_without(self, dynamic: bool | None, rewrites: Rewrites) -> None:
        model = Attention()
        counts = []
        for settings in ({"backend": "aot_eager"}, {"backend": "bda", "options": AOT}):
            torch._dynamo.reset()
            counters.clear()
            fast = torch.compile(model, dynamic=dynamic, **settings)
            with torch.no_grad():
                for x in shapes():
                    assert_close(fast(x), model(x))
            counts.append(compiles())
        plain, ours = counts
        assert ours <= plain
        assert len(rewrites.calls) == ours

    def test_no_more_compiles_than_inductor(self) -> None:
        model = Attention()
        counts = []
        for settings in (
            {"backend": "inductor"},
            {"backend": "bda", "options": {"basis_size": "full"}},
        ):
            torch._dynamo.reset()
            counters.clear()
            fast = torch.compile(model, dynamic=True, **settings)
            with torch.no_grad():
                for x in (example(2, 3), example(2, 64), example(8, 17), example(3, 5)):
                    assert_close(fast(x), model(x))
            counts.append(compiles())
        assert counts[1] <= counts[0]


class TestModes:
    def test_grad_mode_compiles_the_original_and_warns_once(self, rewrites: Rewrites) -> None:
        model, reference = Attention(), Attention()
        fast, x = compiled(model), example()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for tokens in (5, 6, 7):
                fast(example(B, tokens))
        ours = [w for w in caught if "bda_fx" in str(w.message)]
        assert [str(w.message) for w in ours] == [
            "bda_fx: grad mode is on and parameters require grad, so the original model is "
            "compiled. Call it under torch.no_grad() or torch.inference_mode() to use BD attention."
        ]
        fast(x).square().sum().backward()
        reference(x).square().sum().backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
        assert not rewrites.calls

    def test_grad_mode_with_frozen_parameters_is_rewritten(self, rewrites: Rewrites) -> None:
        model = Attention().requires_grad_(False)
        x = example()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_close(compiled(model)(x), model(x))
        assert rewrites.calls

    def test_no_grad_after_grad(self, rewrites: Rewrites) -> None:
        model = Attention()
        fast, x = compiled(model), example()
        with pytest.warns(UserWarning, match="original model is compiled"):
            fast(x)
        with torch.no_grad():
            assert_close(fast(x), model(x))
        assert len(rewrites.calls) == 1

    def test_inference_mode(self, rewrites: Rewrites) -> None:
        model = Attention()
        fast, x = compiled(model, AOT), example()
        with torch.inference_mode():
            assert_close(fast(x), model(x))
            assert_close(fast(x), model(x))
        assert rewrites.entries == 1
        with torch.no_grad():
            assert_close(fast(x), model(x))

    def test_parameters_made_under_inference_mode(self) -> None:
        with torch.inference_mode():
            model = Attention()
            fast, x = compiled(model), example()
            assert_close(fast(x), model(x))
            model.k.weight.mul_(1.5)
            assert_close(fast(x), model(x))

    def test_fullgraph(self, rewrites: Rewrites) -> None:
        model = Attention()
        with torch.no_grad():
            assert_close(compiled(model, fullgraph=True)(example()), model(example()))
        assert len(rewrites.calls) == 1

    def test_meta_tensors(self) -> None:
        model = Attention().to("meta")
        with torch.no_grad():
            output = compiled(model)(torch.empty(B, S, E, device="meta", dtype=torch.float64))
        assert output.device.type == "meta"
        assert output.shape == (B, S, E)

    def test_mode_and_inner_options_reach_inductor(
        self, monkeypatch: pytest.MonkeyPatch, rewrites: Rewrites
    ) -> None:
        import torch._inductor.compile_fx as inductor

        patches = []
        original = inductor.compile_fx

        def spy(*args: Any, config_patches: Any = None, **kwargs: Any) -> Any:
            if config_patches is not None:  # it patches the configuration and calls itself
                patches.append(config_patches)
            return original(*args, config_patches=config_patches, **kwargs)

        monkeypatch.setattr(inductor, "compile_fx", spy)
        model, x = Attention(), example()
        inner = {"basis_size": "full", "inner_options": {"epilogue_fusion": False}}
        with torch.no_grad():
            assert_close(compiled(model, inner)(x), model(x))
            torch._dynamo.reset()
            fast = torch.compile(model, backend="bda", mode="reduce-overhead")
            assert_close(fast(x), model(x))
        reduce_overhead = torch._inductor.list_mode_options("reduce-overhead")
        assert patches == [{"epilogue_fusion": False}, reduce_overhead]
        assert len(rewrites.calls) == 2

    def test_unknown_option(self) -> None:
        fast = compiled(Attention(), {"fast": True})
        with torch.no_grad(), pytest.raises(Exception, match="unknown option 'fast'; the options"):
            fast(example())


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(1), Attention(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class Counting(nn.Module):
    """Keeps a running mean of what it has seen, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(E, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x + self.mean)
        self.seen += 1
        self.mean.lerp_(y.mean((0, 1)), 0.5)
        return y


class TestPrograms:
    def test_graph_break(self, rewrites: Rewrites) -> None:
        model = Broken()
        with torch.no_grad():
            assert_close(compiled(model)(example()), model(example()))
        assert len(rewrites.calls) >= 1
        assert rewrites.entries == 2

    @pytest.mark.parametrize("options", [EAGER, AOT], ids=["eager", "aot_eager"])
    def test_mutated_buffer(self, options: dict[str, Any], rewrites: Rewrites) -> None:
        model = Counting()
        reference = copy.deepcopy(model)
        fast = compiled(model, options)
        with torch.no_grad():
            for seed in range(3):
                assert_close(fast(example(seed=seed)), reference(example(seed=seed)))
        assert model.seen == 3
        assert_close(model.mean, reference.mean)
        assert rewrites.calls

    def test_no_attention(self, rewrites: Rewrites) -> None:
        model = nn.Sequential(nn.Linear(E, E), nn.ReLU()).double()
        with torch.no_grad():
            assert torch.equal(compiled(model)(example()), model(example()))
        assert not rewrites.calls

    def test_weights_beyond_the_budget_run_the_original(self, rewrites: Rewrites) -> None:
        """The basis size belongs to the graph; a layer that it does not suit is not made noisy."""
        good, bad = Attention(0), Attention(1)
        options = {"inner": "eager", "noise_budget": 3.0}
        with torch.no_grad():
            # All rows but one nearly parallel: no basis of several rows is well conditioned.
            bad.k.weight.copy_(bad.k.weight[:, :1] + 1e-9 * bad.k.weight)
            first, second = compiled(good, options), compiled(bad, options)
            assert_close(first(example()), good(example()))
            assert_close(second(example()), bad(example()))
        assert len(rewrites.calls) == 1
        kept = rewrites.calls[0].derived_weights.entries.values()
        assert sorted(entry.derived is None for entry in kept) == [False, True]


STEPS = [
    (rewrite_dynamo, "canonicalize_dynamo", "canonicalize"),
    (pipeline, "normalize_linears", "normalize linears"),
    (pipeline, "find_sites", "find sites"),
    (pipeline, "find_folds", "find folds"),
    (pipeline, "plan_sites", "plan sites"),
    (pipeline, "transform_weights", "transform weights"),
    (pipeline, "rewrite_graph", "rewrite graph"),
    (pipeline, "restore_spellings", "restore spellings"),
    (pipeline, "renew_values", "renew values"),
    (pipeline, "check_graph", "check graph"),
    (backend, "_compile", "compile"),
]


def fail(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("injected")


@pytest.mark.parametrize(("module", "name", "step"), STEPS, ids=[s[2] for s in STEPS])
class TestFailures:
    def test_falls_back_and_names_the_step(
        self, module: Any, name: str, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, name, fail)
        model, x = Attention(), example()
        text = (
            f"bda_fx: {step} failed: ZeroDivisionError: injected. "
            "The original graph is compiled instead."
        )
        fast = compiled(model)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(fast(x), model(x))
        assert [str(w.message) for w in caught if "bda_fx" in str(w.message)] == [text]

    def test_strict_raises(
        self, module: Any, name: str, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, name, fail)
        fast = compiled(Attention(), {**EAGER, "strict": True})
        wanted = f"bda_fx: {step} failed: ZeroDivisionError: injected"
        with torch.no_grad(), pytest.raises(Exception, match=wanted):
            fast(example())


def test_failure_after_the_graph_is_changed_leaves_the_original_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The inner compiler fails on the rewritten graph alone: the original still compiles."""
    seen = []

    def picky(options: Any, mode: Any, **_: Any) -> Callable[..., Any]:
        def inner(module: Any, inputs: list[Any]) -> Any:
            seen.append(len(inputs))
            return fail() if len(seen) == 1 else module.forward

        return inner

    monkeypatch.setattr(backend, "_inner_compiler", picky)
    model, x = Attention(), example()
    fast = compiled(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="bda_fx: compile failed"):
        assert torch.equal(fast(x), model(x))
    assert len(seen) == 2


def test_failure_at_a_call_runs_the_original(
    monkeypatch: pytest.MonkeyPatch, rewrites: Rewrites
) -> None:
    """New weights are derived at a call, long after compilation; that may fail as well."""
    model, x = Attention(), example()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        monkeypatch.setattr(rewrite_dynamo, "transform_weights", fail)
        model.k.weight.mul_(1.5)
        with pytest.warns(UserWarning, match="bda_fx: transform weights failed: ZeroDivisionError"):
            assert torch.equal(fast(x), model(x))
    assert len(rewrites.calls) == 1


def test_failure_at_a_call_raises_when_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attention(), example()
    fast = compiled(model, {**EAGER, "strict": True})
    with torch.no_grad():
        fast(x)
        monkeypatch.setattr(rewrite_dynamo, "transform_weights", fail)
        model.k.weight.mul_(1.5)
        with pytest.raises(bda_fx.StepError, match="transform weights failed"):
            fast(x)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast_runs_the_original(where: str, caplog: pytest.LogCaptureFixture) -> None:
    model = SmallAttention()

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(x)

    chosen = model if where == "around" else Inside()
    compiled = torch.compile(chosen, backend="bda", options={"inner": "aot_eager", "strict": True})
    around = torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "around")
    with torch.no_grad(), around:
        assert torch.equal(compiled(small_example()), chosen(small_example()))
    assert "autocast" in caplog.text
