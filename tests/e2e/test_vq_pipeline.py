"""A diffusion model on VQ latents: saved, loaded and drawn by us and by diffusers, to the same picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autoencoder import VQModel
from conditioning import CLIPTextEncoder
from conditioning.tokenizer import train_bpe
from ldm_pipe import LatentDiffusionPipeline, NoiseSchedule, UNet
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.pipelines.export import export_diffusers
from ldm_pipe.pretrained import LdmPipeError

CAPTIONS = ["red apple", "green apple", "grinning face", "a racing car"] * 4


def make(levels: int = 3, length: int = 77) -> LatentDiffusionPipeline:
    """Build a tiny text-to-image model on VQ latents; random weights, codes where the U-Net's latents are."""
    torch.manual_seed(0)
    tokenizer = train_bpe(CAPTIONS, 540, max_length=length)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": length,
        "hidden_act": "gelu",
        "projection_dim": 32,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    unet = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    vqvae = {
        "block_out_channels": [8, 16, 16][:levels],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 4,
        "latent_channels": 3,
        "num_vq_embeddings": 16,
        "sample_size": 8 * 2 ** (levels - 1),
    }
    encoder = CLIPTextEncoder.from_config(text)
    encoder.tokenizer = tokenizer
    autoencoder = VQModel.from_config(vqvae)
    with torch.no_grad():
        autoencoder.quantize.weight.normal_()
    autoencoder.set_latent_statistics([0.1, -0.1, 0.0], [0.5, 0.5, 0.5])
    parts = (UNet.from_config(unet).eval(), autoencoder.eval(), [encoder.eval()])
    defaults = Defaults(sampler="ddim", num_inference_steps=3, guidance_scale=2.0)
    pipe = LatentDiffusionPipeline(*parts, NoiseSchedule(), defaults=defaults, name="vq")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_vq_model_is_written_as_diffusers_ldm_pipeline_and_read_again(tmp_path: Path) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LDMTextToImagePipeline"
    assert index["vqvae"] == ["diffusers", "VQModel"]
    assert {"vqvae", "bert", "tokenizer", "unet", "scheduler"} <= {path.name for path in tmp_path.iterdir()}
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)  # replays the golden sample
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.autoencoder, VQModel)
    wanted = pipe("red apple", seed=1, output_type="pt").images
    torch.testing.assert_close(again("red apple", seed=1, output_type="pt").images, wanted, atol=1e-6, rtol=0)


def test_a_picture_can_be_changed_on_vq_latents() -> None:
    pipe = make()
    image = pipe("red apple", seed=1).images[0]
    other = pipe("green apple", image=image, strength=0.7, seed=2, num_inference_steps=4).images[0]
    assert other.size == image.size == (32, 32)


@pytest.mark.parametrize(("levels", "sampler"), [(3, "ddim"), (2, "dpmpp_2m")])
def test_diffusers_draws_the_same_picture_from_vq_latents(levels: int, sampler: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the reference")
    make(levels).save_pretrained(tmp_path / "model")
    report = export_diffusers(tmp_path / "model", tmp_path / "exported", sampler=sampler)
    assert report.difference is not None
    assert report.difference <= 1e-4
    assert "Pass guidance_scale=2 in diffusers; its default is 1." in report.notes


@pytest.mark.parametrize(("length", "sampler", "named"), [(16, "ddim", "reads 16 tokens"), (77, "euler", "euler")])
def test_what_diffusers_cannot_draw_is_refused_with_the_reason(
    length: int, sampler: str, named: str, tmp_path: Path
) -> None:
    make(length=length).save_pretrained(tmp_path / "model")
    with pytest.raises(LdmPipeError, match=named):
        export_diffusers(tmp_path / "model", tmp_path / "exported", sampler=sampler)
    assert not (tmp_path / "exported").exists()
