"""Tiny models of every family that has single files: folders of random weights, for the tests of interop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder import AutoencoderKL
from conditioning import CLIPTextEncoder
from conditioning.tokenizer import ClipTokenizer
from ldm_pipe.interop.single.families import FAMILIES, Family
from ldm_pipe.networks import UNet

_SMALL = {"block_out_channels": [32, 64], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
_UNET: dict[str, Any] = {
    **_SMALL,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
_XL = {
    **_UNET,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}
UNETS = {
    "sd1": _UNET,
    "sd2": {**_UNET, "use_linear_projection": True, "attention_head_dim": [2, 4]},
    "sdxl": {**_XL, "cross_attention_dim": 32 + 48, "projection_class_embeddings_input_dim": 32 + 48},
    "sdxl-refiner": {**_XL, "cross_attention_dim": 48, "projection_class_embeddings_input_dim": 32 + 40},
}
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def random_weights(net: nn.Module, seed: int) -> dict[str, Tensor]:
    """Fill every tensor with numbers (zero biases and unit norms hide mistakes)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return {name: value.detach() for name, value in net.state_dict().items()}


def make_folder(root: Path, name: str, *, channels: int = 4, prediction: str = "epsilon") -> Path:
    """Write a diffusers folder of a tiny model of a family."""
    family: Family = FAMILIES[name]
    unet = UNet.from_config({**UNETS[name], "in_channels": channels})
    vae_config = {**family.vae, **_SMALL, "down_block_types": ["DownEncoderBlock2D"] * 2}
    vae = AutoencoderKL.from_config({**vae_config, "up_block_types": ["UpDecoderBlock2D"] * 2})
    pipeline = family.pipeline if channels == 4 else family.pipeline.replace("Pipeline", "InpaintPipeline")
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.38.0"}
    random_weights(unet, 1)
    random_weights(vae, 2)
    unet.save_pretrained(root / "unet")
    vae.save_pretrained(root / "vae")
    letters = [f"{letter}{end}" for letter in "abcdefgh!" for end in ("", "</w>")]
    words = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    for i, text in enumerate(family.texts):
        sizes = {"vocab_size": len(words), "projection_dim": 32, "eos_token_id": len(words) - 1}
        wide = {"hidden_size": 48} if text.folder == "text_encoder_2" else {}  # diffusers tells the two by their width
        encoder = CLIPTextEncoder.from_config({**text.config, **_TEXT, **wide, **sizes})
        random_weights(encoder, 3 + i)
        encoder.save_pretrained(root / text.folder)
        kind = "CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"
        place = text.folder.replace("text_encoder", "tokenizer")
        ClipTokenizer(words, [], pad_token=text.pad_token).save_pretrained(root / place)
        index |= {text.folder: ["transformers", kind], place: ["transformers", "CLIPTokenizer"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", family.scheduler["_class_name"]]
    (root / "scheduler").mkdir()
    scheduler = {**family.scheduler, "prediction_type": prediction}
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (root / "model_index.json").write_text(json.dumps(index))
    return root
