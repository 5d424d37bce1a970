"""Make tests/data/tiny_pipeline: every real component, random weights, a few hundred kB.

The folder is frozen: it is the old checkpoint that must go on loading. When the format changes, make a new one beside
it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from autoencoder import AutoencoderKL
from conditioning import CLIPTextEncoder
from conditioning.tokenizer import train_bpe
from ldm_pipe import LatentDiffusionPipeline, NoiseSchedule, UNet
from ldm_pipe.drawing.output import Defaults

CAPTIONS = ["red apple", "green apple", "grinning face", "a racing car", "octopus in the sea", "a worm in an apple"] * 4


def make() -> LatentDiffusionPipeline:
    """Build the pipeline from seed 0."""
    torch.manual_seed(0)
    tokenizer = train_bpe(CAPTIONS, 560, max_length=16)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "hidden_act": "quick_gelu",
        "projection_dim": 32,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    unet = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    vae = {
        "block_out_channels": [8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.7,
    }
    encoder = CLIPTextEncoder.from_config(text)
    encoder.tokenizer = tokenizer
    parts = (UNet.from_config(unet), AutoencoderKL.from_config(vae), [encoder])
    with torch.no_grad():
        parts[1].decoder.conv_out.weight *= 1.5  # random weights draw grey: spread the colours
    schedule = NoiseSchedule()
    defaults = Defaults(sampler="ddim", num_inference_steps=4, guidance_scale=3.0)
    for part in (*parts[:2], encoder):
        part.eval()
    return LatentDiffusionPipeline(*parts, schedule, defaults=defaults, name="tiny")


if __name__ == "__main__":
    make().save_pretrained(Path(sys.argv[1]), dtype=torch.float16)
