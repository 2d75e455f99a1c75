"""Multi-head latent attention: K and V are made of a latent; a part of K is rotated."""

from __future__ import annotations

from typing import Any

from tests.zoo.entry import VOCAB, Build, Entry, partly
from tests.zoo.text import cached, decoder

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 5,
    "moe_intermediate_size": 16,
}


def latent(family: str, **settings: Any) -> Build:
    return decoder(family, **{**SIZES, **settings})


# 8 features of K and 8 (or 6) of V, made of the 32 of the latent; 4 rotated ones are not.
ENTRIES = (
    Entry("deepseek_v2", latent("DeepseekV2", **EXPERTS, q_lora_rank=None), partly(2, 8, 8, 32, 4)),
    Entry(
        "deepseek_v2_q_lora",
        latent("DeepseekV2", **EXPERTS, q_lora_rank=24),
        partly(2, 8, 8, 32, 4),
    ),
    Entry(
        "deepseek_v3",
        latent("DeepseekV3", **EXPERTS, q_lora_rank=24, n_group=2, topk_group=1),
        partly(2, 8, 8, 32, 4),
    ),
    # What is cached is the latent, before the projection: nothing is lost by it.
    Entry(
        "deepseek_v3_cached",
        cached(latent("DeepseekV3", **EXPERTS, q_lora_rank=24, n_group=2, topk_group=1)),
        partly(2, 8, 8, 32, 4),
    ),
    # Values wider than keys.
    Entry(
        "glm4_moe_lite",
        latent("Glm4MoeLite", q_lora_rank=24, v_head_dim=12, mlp_layer_types=["dense", "dense"]),
        partly(2, 8, 12, 32, 4),
    ),
    # Keys wider than values.
    Entry(
        "minicpm3",
        latent("MiniCPM3", q_lora_rank=24, v_head_dim=6),
        partly(2, 8, 6, 32, 4),
    ),
)
