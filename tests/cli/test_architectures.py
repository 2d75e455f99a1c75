"""Directories of every kind of input, and of caches: products are found and outputs kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bda_fx.cli.errors import ExitCode
from bda_fx.cli.example_inputs import made_inputs
from bda_fx.cli.open_model import Settings
from tests.cli.conftest import Cli

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def t5() -> Any:
    config = transformers.T5Config(
        d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0, **SMALL
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=64, decoder_start_token_id=2, **SMALL,
    )  # fmt: skip
    return transformers.BartModel(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        image_size=32, patch_size=16,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=20, max_target_positions=40, decoder_start_token_id=1, **SMALL,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def wav2vec2() -> Any:
    config = transformers.Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        conv_dim=(8, 8), conv_stride=(16, 16), conv_kernel=(16, 16), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=50,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def clip() -> Any:
    part = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 32}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={**part, **SMALL, "max_position_embeddings": 40},
        vision_config={**part, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=24, n_layer=1, n_head=4, n_positions=64, **SMALL, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def videomae() -> Any:
    config = transformers.VideoMAEConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        image_size=32, patch_size=16, num_frames=4,
    )  # fmt: skip
    return transformers.VideoMAEModel(config)


def speech2text() -> Any:
    config = transformers.Speech2TextConfig(
        d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, conv_channels=16,
        input_feat_per_channel=8, decoder_start_token_id=2, **SMALL,
    )  # fmt: skip
    return transformers.Speech2TextModel(config)


def clap() -> Any:
    config = transformers.ClapAudioConfig(
        spec_size=64, num_mel_bins=16, patch_size=4, patch_stride=[4, 4], hidden_size=32,
        patch_embeds_hidden_size=8, depths=[1, 1], num_attention_heads=[2, 4], window_size=4,
    )  # fmt: skip
    return transformers.ClapAudioModel(config)


def xlnet() -> Any:
    config = transformers.XLNetConfig(d_model=24, n_layer=1, n_head=4, d_inner=32, **SMALL)
    return transformers.XLNetModel(config)


MODELS: dict[str, tuple[Callable[[], Any], set[str], int]] = {
    # model, its inputs, attention products (one rotated or position-free pair a layer)
    "T5": (t5, {"input_ids", "attention_mask", "decoder_input_ids"}, 6),
    "BART": (bart, {"input_ids", "attention_mask", "decoder_input_ids"}, 6),
    "ViT": (vit, {"pixel_values"}, 2),
    "Whisper": (whisper, {"input_features", "decoder_input_ids"}, 6),
    "wav2vec2": (wav2vec2, {"input_values"}, 2),
    "CLIP": (clip, {"input_ids", "attention_mask", "pixel_values"}, 4),
}


def saved(make: Callable[[], Any], path: Path) -> Path:
    torch.manual_seed(0)
    make().eval().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_rewritten_and_verified(cli: Cli, tmp_path: Path, name: str) -> None:
    """With made-up inputs of the right names, open sizes, every product rewritten, outputs kept."""
    make, inputs, products = MODELS[name]
    home, out = saved(make, tmp_path / "model"), tmp_path / "out.pt2"
    ran = cli("rewrite", home, "-o", out, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["report"]["rewritten"] == products
    shapes = ran.data["details"]["inputs"]
    assert set(shapes) == inputs
    assert all(isinstance(shape[0], str) for shape in shapes.values())  # the batch is open
    ran = cli("verify", home, out, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["noise_ratio"] < 4


@pytest.mark.parametrize(
    ("name", "cache", "products"),
    [
        ("GPT-2", "none", 2),
        ("GPT-2", "skip", 0),
        ("GPT-2", "opaque", 2),
        ("T5", "skip", 2),  # the encoder's alone
        ("T5", "opaque", 4),  # cross-attention's cache is read by programs without its weights
    ],
)
def test_caches(cli: Cli, tmp_path: Path, name: str, cache: str, products: int) -> None:
    """K and V that are returned in a cache stay as they are, unless nobody else reads it."""
    make = gpt2 if name == "GPT-2" else t5
    home, out = saved(make, tmp_path / "model"), tmp_path / "out.pt2"
    ran = cli("rewrite", home, "-o", out, "--kv-cache", cache, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["report"]["rewritten"] == products
    skips = [site for site in ran.data["report"]["sites"] if site["reason"]]
    assert all(site["reason"].startswith("returned by the program") for site in skips)
    assert len(skips) == (6 if name == "T5" else 2) - products
    assert cli("inspect", out, "--json").code == 0  # the file loads


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (videomae, {"pixel_values": (2, 4, 3, 32, 32)}),  # a film: [batch, frames, …]
        (speech2text, {"input_features": (2, 9, 8), "decoder_input_ids": (2, 9)}),
        (clap, {"input_features": (2, 1, 256, 16)}),
        (xlnet, {"input_ids": (2, 9), "attention_mask": (2, 9)}),  # of any length: -1 positions
    ],
)
def test_made_up_inputs_run(make: Callable[[], Any], shapes: dict[str, tuple[int, ...]]) -> None:
    model = make().eval()
    made = made_inputs(model, Settings(length=9))
    assert {name: tuple(value.shape) for name, value in made.items()} == shapes
    with torch.no_grad():
        model(**made)


def test_an_input_that_cannot_be_made_up(cli: Cli, tmp_path: Path) -> None:
    """It is named, with the ways to give it."""
    config = transformers.Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        encoder_hidden_size=24, vocab_size=50,
    )  # fmt: skip
    home = saved(lambda: transformers.Blip2QFormerModel(config), tmp_path / "model")
    ran = cli("inspect", home)
    assert ran.code == ExitCode.CANNOT_CONVERT
    assert "no example can be made up for the input 'query_embeds'" in ran.err
    assert "--inputs" in ran.err
