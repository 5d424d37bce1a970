"""What tests of pipelines share: the tiny model, configs of tiny networks, seeds, and how close pictures must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm_pipe import LatentDiffusionPipeline

PipeT = TypeVar("PipeT")

TINY = Path(__file__).parent / "data" / "tiny_pipeline"
UNET_2D: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
OF_ADM: dict[str, Any] = {  # what makes it openai's, but for the kinds of its blocks
    "out_channels": 6,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 4,
    "num_class_embeds": 5,
}
OF_IF: dict[str, Any] = {  # what makes it DeepFloyd's, but for widths and the kinds of its blocks
    "in_channels": 3,
    "out_channels": 6,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
}
AUTOENCODER: dict[str, Any] = {  # shrinks by 2, to latents of 3 channels
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "sample_size": 16,
}


def quiet(pipe: PipeT) -> PipeT:
    """Take the progress bar off a pipeline, ours or diffusers'."""
    pipe.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    return pipe


def tiny() -> LatentDiffusionPipeline:
    """Load the tiny model."""
    return quiet(LatentDiffusionPipeline.from_pretrained(TINY))


def seeded(seed: int = 3) -> torch.Generator:
    """Return a generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def unit(image: Any) -> Tensor:
    """Bring diffusers' "np" pictures into our form."""
    return torch.from_numpy(image).permute(0, 3, 1, 2)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Ask for the same pictures in [0, 1] to 1e-4: the same operators in fp32, in another order."""
    assert theirs.std() > 0.05, "a flat picture shows nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def fill(net: nn.Module) -> Any:
    """Make every weight random (zero biases and unit norms hide mistakes), of a size that keeps features of one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in net.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            width = 0.2 if value.ndim == 1 else value[0].numel() ** -0.5
            value.copy_(around + width * torch.randn(value.shape, generator=generator))
    return net.eval()
