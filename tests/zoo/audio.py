"""Models of sound and of time series, from transformers."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import EAGER, VOCAB, B, Build, Entry, Inputs, T, configured, ids, sites

WAVE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def waves() -> Inputs:
    return {"input_values": torch.randn(B, 160)}


def wave(family: str, **settings: Any) -> Build:
    return configured(f"{family}Model", f"{family}Config", waves, **{**WAVE, **settings})


def spectrogram_and_text() -> Inputs:
    return {
        "input_features": torch.randn(B, 8, 16),
        "decoder_input_ids": ids(T),
        "use_cache": False,
    }


ENTRIES = (
    # Encoder, decoder, and cross-attention; K has no bias.
    Entry(
        "whisper",
        configured(
            "WhisperModel",
            "WhisperConfig",
            spectrogram_and_text,
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
        ),
        sites(6, 8, 32, 4),
    ),
    Entry("wav2vec2", wave("Wav2Vec2"), sites(2, 8, 32, 4)),
    Entry("hubert", wave("Hubert"), sites(2, 8, 32, 4)),
    Entry("unispeech", wave("UniSpeech"), sites(2, 8, 32, 4)),
    Entry("data2vec_audio", wave("Data2VecAudio"), sites(2, 8, 32, 4)),
    Entry("sew", wave("SEW", squeeze_factor=2), sites(2, 8, 32, 4)),
    # A bias of positions, gated by the layer's input, is added to the scores.
    Entry(
        "wavlm", wave("WavLM", num_buckets=8, max_bucket_distance=16), sites(2, 8, 32, 4), (EAGER,)
    ),
    Entry(
        "ast",
        configured(
            "ASTModel",
            "ASTConfig",
            lambda: {"input_values": torch.randn(B, 24, 16)},
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            max_length=24,
            num_mel_bins=16,
        ),
        sites(2, 8, 32, 4),
    ),
    # Windows on a spectrogram: one stage of width 16, one of 32.
    Entry(
        "clap_audio",
        configured(
            "ClapAudioModel",
            "ClapAudioConfig",
            lambda: {"input_features": torch.randn(B, 1, 64, 8), "is_longer": None},
            spec_size=32,
            window_size=4,
            num_mel_bins=8,
            patch_size=4,
            patch_stride=[4, 4],
            patch_embeds_hidden_size=16,
            hidden_size=32,
            depths=[1, 1],
            num_attention_heads=[2, 4],
            num_hidden_layers=2,
            enable_fusion=False,
            num_classes=5,
        ),
        sites(1, 8, 16, 2) + sites(1, 8, 32, 4),
        (EAGER,),
    ),
)
