"""Models too large to load: on the meta device everything but the weights' values is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bda_fx

transformers = pytest.importorskip("transformers")

LAYERS, HEADS, LATENT, NOPE, ROPE, VALUE = 3, 4, 32, 16, 8, 12


@pytest.fixture(scope="module")
def deepseek() -> nn.Module:
    """DeepSeek-V3 in small: one dense layer, two of four experts, MLA with a query latent."""
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=LATENT,
        q_lora_rank=24,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        use_cache=False,
    )
    with torch.device("meta"):
        return transformers.DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()


def test_every_attention_is_accounted_for(deepseek: nn.Module) -> None:
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    report = bda_fx.analyze(deepseek, kwargs={"input_ids": ids})
    found = {(site.name, site.product) for site in report.skipped}
    names = [f"model.layers.{i}.self_attn.kv_b_proj.weight" for i in range(LAYERS)]
    assert found == {(name, product) for name in names for product in ("qk", "vo")}
    assert len(report.sites) == 2 * LAYERS
    assert {site.reason_code for site in report.sites} == {"NO_VALUES"}


@pytest.mark.parametrize(("product", "decomposed"), [("qk", NOPE), ("vo", VALUE)])
def test_sites_without_values_have_their_sizes(
    deepseek: nn.Module, product: str, decomposed: int
) -> None:
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    report = bda_fx.analyze(deepseek, kwargs={"input_ids": ids})
    sites = [site for site in report.sites if site.product == product]
    assert len(sites) == LAYERS
    for site in sites:
        assert (site.heads, site.decomposed, site.in_features) == (HEADS, decomposed, LATENT)
