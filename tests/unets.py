"""A small UNet of diffusers."""

from typing import Any

import pytest
import torch


def make_unet(*, attention: bool = False) -> Any:
    """For 8 x 8 pixels, always with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    down, up = ("AttnDownBlock2D", "AttnUpBlock2D") if attention else ("DownBlock2D", "UpBlock2D")
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", down),
        up_block_types=(up, "UpBlock2D"),
        add_attention=attention,
    )
