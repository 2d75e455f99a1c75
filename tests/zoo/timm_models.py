"""Vision transformers from timm; "eager" is its spelling without fused attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo import torchvision_stand_in
from tests.zoo.entry import SDPA, B, Build, Entry, Inputs, sites, values


def timm(module: str) -> Any:
    """A module of ``timm.models``, imported with a stand-in for torchvision."""
    import importlib

    torchvision_stand_in.install()
    try:
        return importlib.import_module(f"timm.models.{module}")
    finally:
        torchvision_stand_in.remove()


def spelled(model: nn.Module, attention: str) -> nn.Module:
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = attention == SDPA
    return model


def images(size: int = 16) -> Inputs:
    return {"x": torch.randn(B, 3, size, size)}


def plain(module: str, family: str, size: int = 16, **settings: Any) -> Build:
    def build(attention: str) -> tuple[nn.Module, Inputs]:
        model = getattr(timm(module), family)(img_size=size, num_classes=5, **settings)
        return spelled(model, attention), images(size)

    return build


def maxvit(attention: str) -> tuple[nn.Module, Inputs]:
    maxxvit = timm("maxxvit")
    config = maxxvit.MaxxVitCfg(
        embed_dim=(16, 32),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=16,
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(
            dim_head=8, expand_ratio=2.0, window_size=(4, 4), rel_pos_type="bias"
        ),
    )
    model = maxxvit.MaxxVit(config, img_size=32, num_classes=5)
    return spelled(model, attention), images(32)


VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}

ENTRIES = (
    Entry(
        "timm_vit",
        plain("vision_transformer", "VisionTransformer", **VIT),
        sites(2, 8, 32, 4),
        needs="timm",
    ),
    Entry(
        "timm_vit_qk_norm",
        plain("vision_transformer", "VisionTransformer", **VIT, qk_norm=True),
        values(2, 8, 32, 4, reason="NORMALISED"),
        needs="timm",
    ),
    Entry(
        "timm_beit",
        plain("beit", "Beit", **VIT, use_rel_pos_bias=True),
        sites(2, 8, 32, 4),
        needs="timm",
    ),
    Entry(
        "timm_swin",
        plain(
            "swin_transformer",
            "SwinTransformer",
            32,
            patch_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
        ),
        sites(2, 8, 16, 2) + sites(2, 8, 32, 4),
        needs="timm",
    ),
    # A window and a grid attention in each block.
    Entry("timm_maxvit", maxvit, sites(2, 8, 16, 2) + sites(2, 8, 32, 4), needs="timm"),
    # Linears mix the heads' scores before and after the softmax; one layer has a class query.
    Entry(
        "timm_cait",
        plain("cait", "Cait", **VIT, depth_token_only=1),
        sites(3, 8, 32, 4),
        ("eager",),
        needs="timm",
    ),
)
