"""Tiny models of the Stable Diffusion family, made by diffusers and transformers: folders of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENIZER = Path(__file__).parent / "data" / "tiny_pipeline" / "tokenizer"
_SMALL = {"block_out_channels": [16, 32], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
_LAW = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_UNET: dict[str, Any] = {
    **_SMALL,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,
    "use_linear_projection": True,
}
_NUMBERS = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
WIDTH, WIDTH_2, PROJECTED = 32, 24, 20


def shake(net: nn.Module, seed: int, scale: float = 0.08) -> nn.Module:
    """Move every parameter off its initial value: fresh networks hardly look at their conditions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))
    return net.eval()


def unet(seed: int = 0, **config: Any) -> Any:
    """Make a U-Net."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return shake(UNet2DConditionModel(**{**_UNET, "in_channels": 4, "cross_attention_dim": WIDTH, **config}), seed)


def vae() -> Any:
    """Make an autoencoder that shrinks pictures by 2, with other scales than any model has."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return shake(AutoencoderKL(**{**_SMALL, **kinds, "sample_size": 16, "scaling_factor": 0.4}), 1, 0.03)


def clip(width: int = WIDTH, *, projection: bool = False, activation: str = "quick_gelu") -> Any:
    """Make a text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_act=activation,
        projection_dim=PROJECTED,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(width)
    return shake((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), width)


def tokenizer() -> Any:
    """Load the tokenizer."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER)


def scheduler(name: str = "DDIMScheduler", **config: Any) -> Any:
    """Make a scheduler with Stable Diffusion's noise law."""
    import diffusers

    own = {"clip_sample": False, "set_alpha_to_one": False} if name == "DDIMScheduler" else {}
    return getattr(diffusers, name)(**{**_LAW, "steps_offset": 1, "timestep_spacing": "leading", **own, **config})


def sdxl(channels: int = 4, sampler: str = "DDIMScheduler", **unet_config: Any) -> dict[str, Any]:
    """Make the parts of SDXL: two text encoders, six numbers."""
    wide = {"cross_attention_dim": WIDTH + WIDTH_2, "projection_class_embeddings_input_dim": PROJECTED + 6 * 8}
    return {
        "unet": unet(2, **{**_NUMBERS, **wide, "in_channels": channels, **unet_config}),
        "vae": vae(),
        "text_encoder": clip(),
        "text_encoder_2": clip(WIDTH_2, projection=True, activation="gelu"),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": scheduler(sampler),
    }


def refiner(sampler: str = "DDIMScheduler") -> dict[str, Any]:
    """Make the parts of SDXL's refiner: the second text encoder only, five numbers."""
    wide = {"cross_attention_dim": WIDTH_2, "projection_class_embeddings_input_dim": PROJECTED + 5 * 8}
    parts = {**sdxl(sampler=sampler), "unet": unet(3, **{**_NUMBERS, **wide})}
    return {**parts, "text_encoder": None, "tokenizer": None}


def stable_diffusion(channels: int = 4) -> dict[str, Any]:
    """Make the parts of Stable Diffusion."""
    return {
        "unet": unet(4, in_channels=channels),
        "vae": vae(),
        "text_encoder": clip(activation="gelu"),
        "tokenizer": tokenizer(),
        "scheduler": scheduler(),
    }


def grey_picture(size: tuple[int, int]) -> Any:
    """Draw a grey picture, darker to the left."""
    from PIL import Image

    return Image.linear_gradient("L").rotate(90).resize(size)
