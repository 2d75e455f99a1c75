"""The models of ``deployment.py``: two with trained weights, four of true sizes and few layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from models import minilm, rxnfp, sentences  # noqa: E402

BATCH, LENGTH = Dim("batch", min=1, max=64), Dim("length", min=2, max=256)


@dataclass(frozen=True)
class Case:
    """A model, and inputs [2, 64] or so to plan for, to prove with and to time."""

    model: nn.Module
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any]
    choose: bool = False
    """Whether it is exported once more with the sites that the exporter chooses."""


def tokens(model: nn.Module, ids: Tensor, *, mask: bool = True) -> Case:
    kwargs = {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if mask else {})}
    return Case(model, kwargs, {name: {0: BATCH, 1: LENGTH} for name in kwargs})


def lively(model: nn.Module) -> nn.Module:
    """Random weights of the size of their fan-in, and no two biases alike: as initialised, softmax
    is flat, what attention adds to the noise does not show, and equal zeros are stored once."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def minilm_case() -> Case:
    model, tokenizer = minilm()
    batch = tokenizer(sentences(4), padding=True, truncation=True, max_length=64,
                      return_tensors="pt")  # fmt: skip
    return tokens(model, batch["input_ids"])


def rxnfp_case() -> Case:
    return replace(tokens(rxnfp(), torch.randint(13, 400, (2, 64))), choose=True)


def latent_case() -> Case:
    """DeepSeek-V2-Lite's attention: E = 512, 16 heads of 128, decoupled RoPE; V3's code for it."""
    from transformers import DeepseekV3Config, DeepseekV3Model

    config = DeepseekV3Config(
        hidden_size=512, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=1024, vocab_size=1000, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=2,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=64, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, 1000, (2, 64))
    return replace(tokens(lively(DeepseekV3Model(config)), ids, mask=False), choose=True)


def vit_case() -> Case:
    """DeiT-Tiny's shape: 192 features, 3 heads of 64."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3,
                       intermediate_size=768)  # fmt: skip
    pixels = torch.randn(2, 3, 224, 224)
    return Case(lively(ViTModel(config)), {"pixel_values": pixels}, {"pixel_values": {0: BATCH}})


def t5_case() -> Case:
    """T5-small's encoder: 512 features, 8 heads of 64."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=2, vocab_size=1000)
    return tokens(lively(T5EncoderModel(config)), torch.randint(2, 1000, (2, 64)))


def whisper_case() -> Case:
    """Whisper-tiny's encoder: 384 features, 6 heads of 64, 1500 positions; 300 of them here."""
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(d_model=384, encoder_layers=2, encoder_attention_heads=6,
                           encoder_ffn_dim=1536, decoder_layers=1, decoder_attention_heads=6,
                           vocab_size=1000, max_source_positions=300, pad_token_id=0,
                           bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    encoder = lively(WhisperModel(config)).encoder
    features = torch.randn(2, 80, 600)  # a batch of one would be fixed by the export
    return Case(encoder, {"input_features": features}, {"input_features": {0: BATCH}})


CASES: dict[str, Callable[[], Case]] = {
    "MiniLM-L6": minilm_case,
    "rxnfp": rxnfp_case,
    "MLA (V2-Lite's shape)": latent_case,
    "ViT (DeiT-Tiny's)": vit_case,
    "T5-small encoder": t5_case,
    "Whisper-tiny encoder": whisper_case,
}
