"""Attention of diffusers: "eager" is ``AttnProcessor``, with ``baddbmm``, as on old PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import SDPA, B, Entry, Expected, Inputs, S, Sites, sites


def spelled(model: Any, attention: str) -> nn.Module:
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    for part in model.modules():
        if isinstance(part, Attention):
            part.set_processor(AttnProcessor2_0() if attention == SDPA else AttnProcessor())
    return model


def basic_block(attention: str) -> tuple[nn.Module, Inputs]:
    """Self-attention on 32 features, then cross-attention to a context of 24."""
    from diffusers.models.attention import BasicTransformerBlock

    model = BasicTransformerBlock(32, 4, 8, cross_attention_dim=24)
    return spelled(model, attention), {
        "hidden_states": torch.randn(B, S, 32),
        "encoder_hidden_states": torch.randn(B, 11, 24),
    }


def unet(attention: str) -> tuple[nn.Module, Inputs]:
    """The structure of SD-1.5 on two levels, with a context of 48 features."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return spelled(model, attention), {
        "sample": torch.randn(B, 4, 8, 8),
        "timestep": torch.tensor([3, 7, 11]),
        "encoder_hidden_states": torch.randn(B, 11, 48),
        "return_dict": False,
    }


class Joint(nn.Module):
    """SD3's block: one attention over image and text tokens, each with its own linears."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import JointTransformerBlock

        self.block = JointTransformerBlock(32, 4, 8)

    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> Any:
        return self.block(hidden_states=image, encoder_hidden_states=text, temb=time)


def joint(attention: str) -> tuple[nn.Module, Inputs]:
    return Joint(), {
        "image": torch.randn(B, S, 32),
        "text": torch.randn(B, 5, 32),
        "time": torch.randn(B, 32),
    }


# SD-1.5's U-Net by level: 1 block down, 2 up of 32 channels, 1 in the middle of 64; 4 heads, each
# block with a self-attention and one to the context. The 11 tokens of the context are fewer than
# the 64 and 16 of the image, so the sides of queries and outputs are decomposed (E = channels).
_UNET = (Sites(3 + 3, 8, 32, 4, 4), Sites(1 + 1, 16, 64, 4, 4))
_BLOCK = (Sites(1, 8, 32, 4, 4), Sites(1, 8, 24, 4, 4))

ENTRIES = (
    Entry("diffusers_block", basic_block, Expected(_BLOCK, _BLOCK), needs="diffusers"),
    Entry("diffusers_unet", unet, Expected(_UNET, _UNET), needs="diffusers"),
    # K and V are made of two linears each, along tokens, which turn together.
    Entry(
        "diffusers_sd3_joint",
        joint,
        sites(1, 8, 32, 4),
        (SDPA,),
        needs="diffusers",
    ),
)
