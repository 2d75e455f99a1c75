"""Encoders of text, encoder-decoders, and decoders without MLA, from transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import (
    ALL,
    EAGER,
    VOCAB,
    B,
    Build,
    Entry,
    Expected,
    Inputs,
    S,
    Sites,
    T,
    configured,
    ids,
    neither,
    padded,
    partly,
    sites,
    values,
)


def tokens() -> Inputs:
    return {"input_ids": ids()}


def masked() -> Inputs:
    return {"input_ids": ids(), "attention_mask": padded()}


def uncached() -> Inputs:
    return {"input_ids": ids(), "use_cache": False}


def pair() -> Inputs:
    return {"input_ids": ids(), "decoder_input_ids": ids(T), "use_cache": False}


ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}


def encoder(family: str, inputs: Any = masked, **settings: Any) -> Build:
    return configured(f"{family}Model", f"{family}Config", inputs, **{**ENCODER, **settings})


def seq2seq(family: str, **settings: Any) -> Build:
    return configured(f"{family}Model", f"{family}Config", pair, **{**SEQ2SEQ, **settings})


def decoder(family: str, **settings: Any) -> Build:
    return configured(f"{family}Model", f"{family}Config", uncached, **settings)


class Cached(nn.Module):
    """A decoder that also returns its cache, as plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> list[Tensor]:
        output = self.model(input_ids, use_cache=True)
        layers = output.past_key_values.layers
        return [output.last_hidden_state, *(t for x in layers for t in (x.keys, x.values))]


def cached(build: Build) -> Build:
    def wrapped(attention: str) -> tuple[nn.Module, Inputs]:
        model, kwargs = build(attention)
        return Cached(model), {"input_ids": kwargs["input_ids"]}

    return wrapped


def rope(fraction: float) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": fraction,
        }
    }


def entities() -> Inputs:
    return {
        "input_ids": ids(),
        "entity_ids": torch.randint(1, 9, (B, 3)),
        "entity_position_ids": torch.randint(0, S, (B, 3, 4)),
        "entity_attention_mask": torch.ones(B, 3, dtype=torch.long),
    }


def boxes() -> Inputs:
    return {"input_ids": ids(), "bbox": torch.randint(0, 60, (B, S, 4)).sort(-1).values}


# Sites by hand. Encoders: D = 32/4 = 8 of E = 32. Decoders: D = 64/4 = 16 of E = 64.
# Encoder-decoders: 2 + 2 + 2 attentions (encoder, decoder, cross), all of E = 32.
ENCODERS = (
    Entry("bert", encoder("Bert"), sites(2, 8, 32, 4)),
    Entry(
        "distilbert",
        configured(
            "DistilBertModel",
            "DistilBertConfig",
            masked,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            vocab_size=VOCAB,
            max_position_embeddings=64,
        ),
        sites(2, 8, 32, 4),
    ),
    # Three layers share one set of weights: one site each, used three times.
    Entry(
        "albert",
        encoder("Albert", tokens, embedding_size=16, num_hidden_layers=3),
        sites(1, 8, 32, 4),
    ),
    Entry("electra", encoder("Electra", embedding_size=16), sites(2, 8, 32, 4)),
    Entry("roberta", encoder("Roberta"), sites(2, 8, 32, 4)),
    Entry("camembert", encoder("Camembert"), sites(2, 8, 32, 4)),
    Entry("mpnet", encoder("MPNet"), sites(2, 8, 32, 4), (EAGER,)),
    Entry(
        "layoutlm", encoder("LayoutLM", boxes, max_2d_position_embeddings=64), sites(2, 8, 32, 4)
    ),
    Entry("data2vec_text", encoder("Data2VecText"), sites(2, 8, 32, 4)),
    Entry("ernie", encoder("Ernie"), sites(2, 8, 32, 4)),
    Entry("rembert", encoder("RemBert", input_embedding_size=16), sites(2, 8, 32, 4), (EAGER,)),
    # Q and K read a bottleneck of 16 features, V the 32 of the block: D = 16/4 in both.
    Entry(
        "mobilebert",
        encoder(
            "MobileBert", intra_bottleneck_size=16, embedding_size=16, num_feedforward_networks=2
        ),
        Expected((Sites(2, 4, 16, 4, 4),), (Sites(2, 4, 32, 4, 4),)),
    ),
    # Four query linears meet the keys of words and of entities; K and V have one linear each.
    Entry(
        "luke",
        encoder("Luke", entities, entity_vocab_size=9, entity_emb_size=16),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
    # One key weight for words and for relative positions (c2p and p2c): one site each.
    Entry(
        "deberta_v2",
        encoder(
            "DebertaV2",
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=3,
            max_relative_positions=6,
            share_att_key=True,
            type_vocab_size=0,
        ),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
    # Constants are added to Q and V feature by feature: they change with the basis.
    Entry("deberta", encoder("Deberta", type_vocab_size=0), sites(2, 8, 32, 4), (EAGER,)),
    # Words and positions have keys and queries of their own: three products on one change of basis.
    Entry(
        "deberta_relative",
        encoder(
            "Deberta",
            type_vocab_size=0,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            max_relative_positions=6,
        ),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
    Entry(
        "big_bird", encoder("BigBird", attention_type="original_full"), sites(2, 8, 32, 4), (EAGER,)
    ),
    Entry(
        "xlm",
        configured(
            "XLMModel",
            "XLMConfig",
            masked,
            emb_dim=32,
            n_layers=2,
            n_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=64,
        ),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
    Entry(
        "esm", encoder("Esm", position_embedding_type="rotary", pad_token_id=1), values(2, 8, 32, 4)
    ),
    Entry("roformer", encoder("RoFormer", embedding_size=32), values(2, 8, 32, 4), (EAGER,)),
    Entry(
        "modernbert",
        encoder(
            "ModernBert",
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=4,
            global_attn_every_n_layers=2,
        ),
        values(2, 8, 32, 4),
    ),
    # Convolutions in 4 groups make Q, K and V: no linear. With one group they are linears.
    Entry(
        "squeezebert",
        encoder("SqueezeBert", embedding_size=32),
        neither(2, "NO_PROJECTION", "NO_PROJECTION"),
        (EAGER,),
    ),
    Entry(
        "squeezebert_ungrouped",
        encoder("SqueezeBert", embedding_size=32, q_groups=1, k_groups=1, v_groups=1),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
    # 4 / head_ratio = 2 heads of 32/4 = 8; the queries also make a convolution's kernel, which is a
    # product of its own.
    Entry(
        "convbert",
        encoder("ConvBert", embedding_size=16, head_ratio=2, conv_kernel_size=3),
        values(2, 8, 32, 2, reason="COMPUTED") + Expected(skipped=(("qk", "COMPUTED", 2),)),
        (EAGER,),
    ),
    # The keys of words and those of positions meet queries with biases of their own.
    Entry(
        "xlnet",
        configured(
            "XLNetModel",
            "XLNetConfig",
            lambda: {"input_ids": ids(), "use_mems": False},
            d_model=32,
            n_layer=2,
            n_head=4,
            d_inner=48,
            vocab_size=VOCAB,
        ),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
)

SEQ2SEQS = (
    Entry(
        "t5",
        configured(
            "T5Model",
            "T5Config",
            pair,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            vocab_size=VOCAB,
        ),
        sites(6, 8, 32, 4),
    ),
    # 5 heads of 12 features: wider together (60) than the model.
    Entry(
        "mt5",
        configured(
            "MT5Model",
            "MT5Config",
            pair,
            d_model=32,
            d_kv=12,
            d_ff=48,
            num_layers=1,
            num_heads=5,
            vocab_size=VOCAB,
        ),
        sites(3, 12, 32, 5),
    ),
    Entry("bart", seq2seq("Bart"), sites(6, 8, 32, 4), ALL),
    Entry("marian", seq2seq("Marian"), sites(6, 8, 32, 4)),
    Entry("pegasus", seq2seq("Pegasus"), sites(6, 8, 32, 4)),
    Entry("mbart", seq2seq("MBart"), sites(6, 8, 32, 4)),
    Entry("m2m_100", seq2seq("M2M100"), sites(6, 8, 32, 4)),
    Entry("blenderbot", seq2seq("Blenderbot"), sites(6, 8, 32, 4)),
)

DECODERS = (
    Entry(
        "gpt2",
        decoder(
            "GPT2",
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=VOCAB,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        sites(2, 8, 32, 4),
    ),
    Entry(
        "opt",
        decoder(
            "OPT",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
        sites(2, 8, 32, 4),
    ),
    Entry(
        "bloom",
        decoder("Bloom", hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB),
        sites(2, 16, 64, 4),
        (EAGER,),
    ),
    Entry(
        "mpt",
        decoder("Mpt", d_model=64, n_layers=2, n_heads=4, vocab_size=VOCAB, max_seq_len=64),
        sites(2, 16, 64, 4),
        (EAGER,),
    ),
    Entry(
        "falcon",
        decoder(
            "Falcon",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            multi_query=True,
        ),
        values(2, 16, 64, 4, 1),
    ),
    Entry(
        "falcon_alibi",
        decoder(
            "Falcon",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            multi_query=False,
            alibi=True,
        ),
        sites(2, 16, 64, 4),
    ),
    Entry(
        "falcon_grouped",
        decoder(
            "Falcon",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            new_decoder_architecture=True,
            num_kv_heads=2,
        ),
        values(2, 16, 64, 4, 2),
    ),
    Entry(
        "gpt_neo",
        decoder(
            "GPTNeo",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            window_size=4,
            intermediate_size=48,
            attention_types=[[["global", "local"], 1]],
            bos_token_id=1,
            eos_token_id=2,
        ),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
    Entry(
        "openai_gpt",
        configured(
            "OpenAIGPTModel",
            "OpenAIGPTConfig",
            tokens,
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=VOCAB,
            n_positions=64,
        ),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
    Entry(
        "ctrl",
        decoder("CTRL", n_embd=32, n_layer=2, n_head=4, dff=48, vocab_size=VOCAB, n_positions=64),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
    # The keys and values that are returned must stay what they are.
    Entry(
        "gpt2_cached",
        cached(
            decoder(
                "GPT2",
                n_embd=32,
                n_layer=2,
                n_head=4,
                vocab_size=VOCAB,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        neither(2, "RETURNED", "RETURNED"),
    ),
    # Multi-query without rotation: one key head of 16 features for 4 query heads.
    Entry(
        "gpt_bigcode",
        decoder(
            "GPTBigCode",
            n_embd=64,
            n_layer=2,
            n_head=4,
            vocab_size=VOCAB,
            n_positions=64,
            multi_query=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        sites(2, 16, 64, 4, 1),
    ),
    Entry("biogpt", decoder("BioGpt", **{**DECODER, "hidden_size": 32}), sites(2, 8, 32, 4)),
    Entry(
        "xglm",
        decoder(
            "XGLM",
            d_model=32,
            num_layers=2,
            attention_heads=4,
            ffn_dim=48,
            vocab_size=VOCAB,
            max_position_embeddings=64,
        ),
        sites(2, 8, 32, 4),
        (EAGER,),
    ),
    # Partial rotary: 16 features less those rotated.
    Entry("gpt_neox", decoder("GPTNeoX", **DECODER, **rope(0.25)), partly(2, 12, 16, 64, 4)),
    Entry(
        "gptj",
        decoder(
            "GPTJ",
            n_embd=64,
            n_layer=2,
            n_head=4,
            rotary_dim=4,
            vocab_size=VOCAB,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        partly(2, 12, 16, 64, 4),
        (EAGER,),
    ),
    Entry(
        "codegen",
        decoder(
            "CodeGen",
            n_embd=64,
            n_layer=2,
            n_head=4,
            rotary_dim=4,
            vocab_size=VOCAB,
            n_positions=64,
            n_ctx=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        partly(2, 12, 16, 64, 4),
        (EAGER,),
    ),
    Entry("phi", decoder("Phi", **DECODER, **rope(0.5)), partly(2, 8, 16, 64, 4)),
    Entry("stablelm", decoder("StableLm", **GROUPED, **rope(0.25)), partly(2, 12, 16, 64, 4, 2)),
    Entry("nemotron", decoder("Nemotron", **GROUPED, **rope(0.5)), partly(2, 8, 16, 64, 4, 2)),
    Entry(
        "persimmon",
        decoder("Persimmon", **DECODER, **rope(0.5), qk_layernorm=False),
        partly(2, 8, 16, 64, 4),
    ),
    Entry("glm", decoder("Glm", **GROUPED, **rope(0.5), head_dim=16), partly(2, 8, 16, 64, 4, 2)),
    # Rotated throughout: V alone.
    Entry("llama", decoder("Llama", **GROUPED), values(2, 16, 64, 4, 2), ALL),
    Entry("mistral", decoder("Mistral", **GROUPED), values(2, 16, 64, 4, 2)),
    Entry("qwen2", decoder("Qwen2", **GROUPED), values(2, 16, 64, 4, 2)),
    Entry(
        "gemma",
        decoder("Gemma", **{**GROUPED, "num_key_value_heads": 1}, head_dim=16),
        values(2, 16, 64, 4, 1),
    ),
    Entry(
        "gemma2",
        decoder("Gemma2", **GROUPED, head_dim=16, sliding_window=4, query_pre_attn_scalar=16),
        values(2, 16, 64, 4, 2),
        (EAGER,),
    ),
    Entry("phi3", decoder("Phi3", **GROUPED), values(2, 16, 64, 4, 2)),
    Entry("starcoder2", decoder("Starcoder2", **GROUPED), values(2, 16, 64, 4, 2)),
    Entry("cohere", decoder("Cohere", **GROUPED), values(2, 16, 64, 4, 2)),
    Entry("granite", decoder("Granite", **GROUPED), values(2, 16, 64, 4, 2)),
    Entry(
        "smollm3_nope",
        decoder("SmolLM3", **GROUPED, no_rope_layers=[0, 1]),
        # A layer without rotation, then one with.
        Expected(sites(1, 16, 64, 4, 2).qk, sites(2, 16, 64, 4, 2).vo, (("qk", "ROTATED", 1),)),
    ),
    Entry(
        "gpt_oss",
        decoder(
            "GptOss",
            **GROUPED,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        values(2, 16, 64, 4, 2),
        (EAGER,),
    ),
    Entry(
        "mixtral",
        decoder("Mixtral", **GROUPED, num_local_experts=2, num_experts_per_tok=1),
        values(2, 16, 64, 4, 2),
    ),
    # Normalised before the rotation.
    Entry(
        "qwen3",
        decoder("Qwen3", **GROUPED, head_dim=16),
        values(2, 16, 64, 4, 2, reason="NORMALISED"),
    ),
    Entry("olmo2", decoder("Olmo2", **GROUPED), values(2, 16, 64, 4, 2, reason="NORMALISED")),
    Entry(
        "gemma3",
        configured(
            "Gemma3TextModel",
            "Gemma3TextConfig",
            uncached,
            **GROUPED,
            head_dim=16,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        values(2, 16, 64, 4, 2, reason="NORMALISED"),
    ),
)

ENTRIES = ENCODERS + SEQ2SEQS + DECODERS
