"""Models of images, and of images with text, from transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo.entry import (
    ALL,
    EAGER,
    SIMILARITY,
    VOCAB,
    B,
    Build,
    Entry,
    Expected,
    Inputs,
    S,
    Sites,
    configured,
    ids,
    padded,
    sites,
    values,
    with_attention,
)
from tests.zoo.text import ENCODER

IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}


def pixels(size: int = 16) -> Inputs:
    return {"pixel_values": torch.randn(B, 3, size, size)}


def larger_pixels() -> Inputs:
    return pixels(32)


def pixels_and_text() -> Inputs:
    return {**pixels(), "input_ids": ids(), "attention_mask": padded()}


def image(family: str, inputs: Any = pixels, **settings: Any) -> Build:
    return configured(f"{family}Model", f"{family}Config", inputs, **{**IMAGE, **settings})


def two_towers(family: str) -> Build:
    """Text of width 32 beside images of width 48."""
    text = {k: v for k, v in ENCODER.items() if k != "type_vocab_size"}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return configured(
        f"{family}Model",
        f"{family}Config",
        pixels_and_text,
        text_config={**text, **tokens, "projection_size": 24, "projection_dim": 24},
        vision_config={**IMAGE, "hidden_size": 48},
        projection_dim=24,
    )


def siglip() -> Build:
    return configured(
        "SiglipModel",
        "SiglipConfig",
        pixels_and_text,
        text_config={**ENCODER, "projection_size": 48},
        vision_config={**IMAGE, "hidden_size": 48},
    )


def detr(family: str) -> Build:
    """A ResNet of one stage, then an encoder-decoder whose keys also see positions."""

    def build(attention: str) -> tuple[nn.Module, Inputs]:
        import transformers

        backbone = transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            out_features=["stage2"],
        )
        config = getattr(transformers, f"{family}Config")(
            backbone_config=backbone,
            num_queries=5,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
        )
        model = with_attention(getattr(transformers, f"{family}Model"), config, attention)
        mask = torch.ones(B, 32, 32, dtype=torch.long)
        return model, {"pixel_values": torch.randn(B, 3, 32, 32), "pixel_mask": mask}

    return build


def staged(family: str, **settings: Any) -> Build:
    """A hierarchy of stages, each with its own width and number of heads."""
    return configured(f"{family}Model", f"{family}Config", larger_pixels, **settings)


# D = 32/4 = 8 of E = 32 unless said otherwise.
ENTRIES = (
    Entry("vit", image("ViT"), sites(2, 8, 32, 4), ALL),
    Entry("deit", image("DeiT"), sites(2, 8, 32, 4)),
    Entry("beit", image("Beit", use_relative_position_bias=True), sites(2, 8, 32, 4)),
    Entry("dinov2", image("Dinov2", hidden_size=48), sites(2, 12, 48, 4)),
    Entry("yolos", image("Yolos", image_size=[16, 16], num_detection_tokens=3), sites(2, 8, 32, 4)),
    Entry("vit_msn", image("ViTMSN"), sites(2, 8, 32, 4)),
    # Image tokens are rotated; those of class and registers are not, in the same features.
    Entry("dinov3", image("DINOv3ViT", num_register_tokens=1), values(2, 8, 32, 4)),
    # 2 text layers of width 32, 2 image layers of width 48.
    # The similarities of texts and images are a product of two projections too, of unit vectors.
    Entry("clip", two_towers("CLIP"), sites(2, 8, 32, 4) + sites(2, 12, 48, 4) + SIMILARITY),
    # One more in the image tower: the pooling, whose only query is a parameter.
    Entry("siglip", siglip(), sites(2, 8, 32, 4) + sites(3, 12, 48, 4) + SIMILARITY),
    Entry(
        "blip", two_towers("Blip"), sites(2, 8, 32, 4) + sites(2, 12, 48, 4) + SIMILARITY, (EAGER,)
    ),
    # 2 + 2 + 2 attentions; keys are made of features plus positions, values of features alone.
    Entry("detr", detr("Detr"), sites(6, 8, 32, 4)),
    # Content and position have linears of their own. In the encoder positions are added before; in
    # the decoder's self-attentions, and in the first layer's cross-attention, the linears' outputs
    # are added and turn together; in the second layer's they lie side by side: two sites of one
    # product.
    Entry(
        "conditional_detr",
        detr("ConditionalDetr"),
        Expected(sites(7, 8, 32, 4).qk, sites(6, 8, 32, 4).vo),
    ),
    # Queries also meet tables of relative positions. All of Q would have to change with them.
    Entry(
        "sam_vision",
        configured(
            "SamVisionModel",
            "SamVisionConfig",
            larger_pixels,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=4,
            window_size=3,
            global_attn_indexes=[1],
            output_channels=16,
            mlp_dim=48,
        ),
        values(2, 8, 32, 4, reason="READ_ELSEWHERE"),
    ),
    Entry(
        "sam_vision_unbiased",
        configured(
            "SamVisionModel",
            "SamVisionConfig",
            larger_pixels,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=4,
            window_size=3,
            global_attn_indexes=[1],
            output_channels=16,
            mlp_dim=48,
            use_rel_pos=False,
        ),
        sites(2, 8, 32, 4),
    ),
    # Convolutions come before the linears that make Q, K and V.
    Entry(
        "cvt",
        staged(
            "Cvt",
            patch_sizes=[7, 3],
            patch_stride=[4, 2],
            patch_padding=[2, 1],
            embed_dim=[16, 32],
            num_heads=[2, 4],
            depth=[1, 2],
            mlp_ratio=[2.0, 2.0],
            attention_drop_rate=[0.0, 0.0],
            drop_rate=[0.0, 0.0],
            drop_path_rate=[0.0, 0.0],
            qkv_bias=[True, True],
            cls_token=[False, True],
            qkv_projection_method=["dw_bn", "dw_bn"],
            kernel_qkv=[3, 3],
            padding_kv=[1, 1],
            stride_kv=[2, 2],
            padding_q=[1, 1],
            stride_q=[1, 1],
        ),
        sites(1, 8, 16, 2) + sites(2, 8, 32, 4),
        (EAGER,),
    ),
    # Windows are cut, and every second time shifted, before the linears.
    Entry(
        "swin",
        staged(
            "Swin",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        sites(2, 8, 16, 2) + sites(2, 8, 32, 4),
    ),
    # Queries and keys are normalised (cosine attention).
    Entry(
        "swinv2",
        staged(
            "Swinv2",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
        ),
        values(1, 8, 16, 2, reason="NORMALISED") + values(1, 8, 32, 4, reason="NORMALISED"),
        (EAGER,),
    ),
    # Keys and values come from a picture made smaller before their linears.
    Entry(
        "segformer",
        staged(
            "Segformer",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            num_attention_heads=[2, 4],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        ),
        sites(1, 8, 16, 2) + sites(1, 8, 32, 4),
        (EAGER,),
    ),
    Entry(
        "pvt",
        staged(
            "Pvt",
            image_size=32,
            num_encoder_blocks=2,
            depths=[1, 1],
            sequence_reduction_ratios=[2, 1],
            hidden_sizes=[16, 32],
            num_attention_heads=[2, 4],
            patch_sizes=[4, 2],
            strides=[4, 2],
            mlp_ratios=[2, 2],
        ),
        sites(1, 8, 16, 2) + sites(1, 8, 32, 4),
        (EAGER,),
    ),
    # The second stage takes the largest of four queries, and makes 32 features of 16.
    Entry(
        "hiera",
        staged(
            "Hiera",
            embed_dim=16,
            image_size=[32, 32],
            patch_size=[7, 7],
            patch_stride=[4, 4],
            patch_padding=[3, 3],
            mlp_ratio=2.0,
            depths=[1, 1],
            num_heads=[2, 4],
            num_query_pool=1,
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, False],
        ),
        Expected(
            (Sites(1, 8, 16, 2, 2),),
            (Sites(1, 8, 16, 2, 2), Sites(1, 8, 16, 4, 4)),
            (("qk", "COMPUTED", 1),),
        ),
        (EAGER,),
    ),
    # 5 latents, whose first queries are constants, read 24 features; then they read each other.
    Entry(
        "perceiver",
        configured(
            "PerceiverModel",
            "PerceiverConfig",
            lambda: {"inputs": torch.randn(B, S, 24)},
            num_latents=5,
            d_latents=32,
            d_model=24,
            num_self_attends_per_block=2,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
        ),
        sites(1, 6, 24, 4) + sites(2, 8, 32, 4),
        (EAGER,),
    ),
    # Time and space in turn.
    Entry(
        "timesformer",
        configured(
            "TimesformerModel",
            "TimesformerConfig",
            lambda: {"pixel_values": torch.randn(B, 3, 3, 16, 16)},
            **IMAGE,
            num_frames=3,
        ),
        sites(4, 8, 32, 4),
        (EAGER,),
    ),
    Entry(
        "videomae",
        configured(
            "VideoMAEModel",
            "VideoMAEConfig",
            lambda: {"pixel_values": torch.randn(B, 4, 3, 16, 16)},
            **IMAGE,
            num_frames=4,
            tubelet_size=2,
        ),
        sites(2, 8, 32, 4),
    ),
    Entry(
        "blip2_qformer",
        configured(
            "Blip2QFormerModel",
            "Blip2QFormerConfig",
            lambda: {
                "query_embeds": torch.randn(B, S, 32),
                "encoder_hidden_states": torch.randn(B, 11, 24),
            },
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            encoder_hidden_size=24,
            cross_attention_frequency=2,
            vocab_size=VOCAB,
        ),
        # Two self-attentions; one attention to pictures of width 24.
        Expected(
            (Sites(2, 8, 32, 4, 4), Sites(1, 8, 24, 4, 4)),
            (Sites(2, 8, 32, 4, 4), Sites(1, 8, 24, 4, 4)),
        ),
    ),
)
