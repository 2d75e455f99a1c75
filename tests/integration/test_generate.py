"""``generate()`` with keys and values cached in the new basis: the same tokens, token for token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import bda_fx
from bda_fx import backend
from bda_fx.report import Report, report_of

transformers = pytest.importorskip("transformers")

NEW_TOKENS = 64
VOCAB = 99


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=128,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _mla(kind: str) -> nn.Module:
    config = getattr(transformers, f"Deepseek{kind}Config")(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=48, vocab_size=VOCAB, kv_lora_rank=32, q_lora_rank=24,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=5,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, max_position_embeddings=128,
    )  # fmt: skip
    return getattr(transformers, f"Deepseek{kind}ForCausalLM")(config)


def deepseek_v2() -> nn.Module:
    return _mla("V2")


def deepseek_v3() -> nn.Module:
    return _mla("V3")


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=VOCAB,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


SITES = {gpt2: ("qk", "vo"), deepseek_v2: ("qk", "vo"), deepseek_v3: ("qk", "vo"), llama: ("vo",)}
"""Products that are rewritten in every layer of every graph."""


def make(build: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # random models say one word over and over
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts(vocabulary: int = VOCAB) -> dict[str, Tensor]:
    """Two prompts, of 4 and 7 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :3] = mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: nn.Module, inputs: dict[str, Tensor], cache: str, tokens: int) -> Tensor:
    kwargs = {"cache_implementation": cache} if cache == "static" else {}
    return model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=tokens, do_sample=False, disable_compile=True, **kwargs
    )


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Report]]:
    """The reports of all graphs that are compiled."""
    found: list[Report] = []

    def note(*args: Any) -> Any:
        outcome, inputs = rewrite(*args)
        found.append(report_of(outcome.plan))
        return outcome, inputs

    rewrite = backend._rewrite
    monkeypatch.setattr(backend, "_rewrite", note)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def compiled(
    model: nn.Module, inputs: dict[str, Tensor], cache: str, tokens: int, **compiler: Any
) -> tuple[Tensor, int]:
    """Tokens, and how many graphs were compiled for them."""
    torch._dynamo.reset()
    counters.clear()
    original = model.forward
    model.forward = torch.compile(original, **compiler)
    try:
        return generate(model, inputs, cache, tokens), counters["stats"]["unique_graphs"]
    finally:
        model.forward = original


def options(inner: str) -> dict[str, Any]:
    return {"inner": inner, "kv_cache": "opaque", "basis_size": "full", "strict": True}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("build", SITES, ids=lambda b: b.__name__)
def test_same_tokens(build: Any, cache: str, reports: list[Report]) -> None:
    model, inputs = make(build), prompts()
    expected = generate(model, inputs, cache, NEW_TOKENS)
    assert len(expected[0].unique()) > 5
    got, graphs = compiled(
        model, inputs, cache, NEW_TOKENS, backend="bda", options=options("eager")
    )
    assert torch.equal(got, expected)
    assert len(reports) == graphs
    for report in reports:
        assert len(report.rewritten) == 2 * len(SITES[build])


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_same_tokens_and_no_more_graphs_with_inductor(cache: str, reports: list[Report]) -> None:
    model, inputs = make(gpt2), prompts()
    expected, graphs = compiled(model, inputs, cache, NEW_TOKENS, backend="inductor")
    got, mine = compiled(
        model, inputs, cache, NEW_TOKENS, backend="bda", options=options("inductor")
    )
    assert torch.equal(got, expected)
    assert mine == graphs
    assert all(len(report.rewritten) == 4 for report in reports)


def test_caches_are_left_alone_by_default(reports: list[Report]) -> None:
    model, inputs = make(gpt2), prompts()
    expected = generate(model, inputs, "dynamic", 8)
    got, _ = compiled(model, inputs, "dynamic", 8, backend="bda", options={"inner": "eager"})
    assert torch.equal(got, expected)
    assert all(not report.rewritten for report in reports)
    assert all("kv_cache='opaque'" in (s.remedy or "") for r in reports for s in r.skipped)


def test_latent_caches_need_no_permission(reports: list[Report]) -> None:
    """MLA caches what its keys and values are made from."""
    model, inputs = make(deepseek_v2), prompts()
    expected = generate(model, inputs, "dynamic", 8)
    chosen = {"inner": "eager", "basis_size": "full"}
    got, _ = compiled(model, inputs, "dynamic", 8, backend="bda", options=chosen)
    assert torch.equal(got, expected)
    assert all(len(report.rewritten) == 4 for report in reports)


class Step(nn.Module):
    """Attention with a cache; ``spoil`` makes the graph one that cannot be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, past: Any = None, spoil: bool = False) -> Any:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if spoil:
            k, v = torch.relu(k), torch.relu(v)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).flatten(-2)), (k, v)


def test_graphs_that_disagree_on_a_cache_are_an_error() -> None:
    torch._dynamo.reset()
    model = Step().eval()
    step = torch.compile(model, backend="bda", options=options("eager"))
    with torch.no_grad():
        _, past = step(torch.randn(1, 4, 16))
        step(torch.randn(1, 1, 16), past)
        with pytest.raises(BackendCompilerFailed, match="CacheConflict"):
            step(torch.randn(1, 1, 16), past, spoil=True)
    torch._dynamo.reset()


def test_invalidate_forgets_what_caches_hold() -> None:
    """One model with other options: its caches must not mix, which only the user can know."""
    model, x = Step().eval(), torch.randn(1, 4, 16)
    for size in (1.0, 0.5):
        torch._dynamo.reset()
        bda_fx.invalidate()
        chosen = {**options("eager"), "basis_size": size}
        with torch.no_grad():
            torch.compile(model, backend="bda", options=chosen)(x)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="CacheConflict"):
        torch.compile(model, backend="bda", options=options("eager"))(x)
    torch._dynamo.reset()


def test_smollm2_same_tokens(reports: list[Report]) -> None:
    """Real weights: V is decomposed in all layers, keys are rotated. The first six of the 30 layers
    and 16 tokens; ``make soak`` takes all of them and 64."""
    from tests.models import smollm2

    layers, count = (30, NEW_TOKENS) if os.environ.get("BDA_FX_SOAK") else (6, 16)
    model, inputs = smollm2(["The capital of France is", "Once upon a time, there was a"])
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    expected = generate(model, inputs, "dynamic", count)
    got, _ = compiled(model, inputs, "dynamic", count, backend="bda", options=options("eager"))
    assert torch.equal(got, expected)
    for report in reports:
        assert len(report.rewritten) == layers
        assert {s.product for s in report.rewritten} == {"vo"}
