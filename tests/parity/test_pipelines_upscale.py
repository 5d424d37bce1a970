"""Enlarging against diffusers' pipelines (0.42) on tiny random models, fp32: 1e-4 of [0, 1], from the same noise."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning.tokenizer import train_bpe
from ldm_pipe.interop.lora.file import LoraLayer, save_lora
from ldm_pipe.pipelines import SuperResolutionPipeline, UpscalePipeline
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import close, quiet, seeded

diffusers = pytest.importorskip("diffusers", reason="the reference")
transformers = pytest.importorskip("transformers")

QUERY = "text_model.encoder.layers.1.self_attn.q_proj"
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
X4 = {
    **UNET,
    "in_channels": 7,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "only_cross_attention": [True, False],
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
SUPER = {
    **UNET,
    "in_channels": 6,
    "out_channels": 3,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
    "sample_size": 32,
}


def random(build: Any, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    net = build(**config).eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.startswith(("conv_out.weight", "decoder.conv_out.weight")):
                value.mul_(2)
    return net


def x4(tmp_path: Path, **scheduler: Any) -> Any:
    """Build diffusers' x4 upscaler: v prediction, a table of noise levels, its own law for the small picture."""
    words = train_bpe(["red apple", "green worm"] * 4, 540, max_length=77)
    words.save_pretrained(tmp_path / "words")
    torch.manual_seed(1)
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=32, bos_token_id=words.start_id, eos_token_id=words.end_id, pad_token_id=words.pad_id,
    )  # fmt: skip
    law = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=random(diffusers.AutoencoderKL, {**AUTOENCODER, "latent_channels": 4, "scaling_factor": 0.08333}),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tmp_path / "words"),
        unet=random(diffusers.UNet2DConditionModel, X4),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=1000),
        scheduler=diffusers.DDIMScheduler(**law, prediction_type="v_prediction", clip_sample=False, **scheduler),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(kind: Any, path: Path) -> Any:
    return quiet(kind.from_pretrained(path))


def pictures(count: int = 1, side: int = 8) -> Tensor:
    return torch.rand((count, 3, side, side), generator=seeded(7))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_x4(scale: float, tmp_path: Path) -> None:
    theirs = x4(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(UpscalePipeline, tmp_path / "theirs")
    call: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": scale, "noise_level": 40, "output_type": "pt"}
    prompts = {"prompt": ["red apple", "worm"], "negative_prompt": ["", "green"] if scale > 1 else None}
    small = pictures(2)
    wanted = theirs(**prompts, image=small * 2 - 1, **call, generator=seeded()).images
    got = ours(**prompts, image=small, **call, generator=seeded()).images
    assert got.shape == (2, 3, 32, 32)
    close(got, wanted)
    generators = [seeded(4), seeded(5)]
    wanted = theirs(**prompts, image=small * 2 - 1, **call, generator=generators).images
    close(ours(**prompts, image=small, **call, seed=4).images, wanted)


def test_the_level_of_noise_and_the_small_picture_count(tmp_path: Path) -> None:
    theirs = x4(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(UpscalePipeline, tmp_path / "theirs")
    assert ours.max_noise_level == 350
    call: dict[str, Any] = {"prompt": "red apple", "num_inference_steps": 2, "output_type": "pt", "seed": 1}
    call |= {"latents": torch.randn((1, 4, 8, 8), generator=seeded())}
    first = ours(**call, image=pictures(), noise_level=0).images
    assert not torch.allclose(ours(**call, image=pictures(), noise_level=300).images, first, atol=1e-3)
    assert not torch.allclose(ours(**call, image=1 - pictures(), noise_level=0).images, first, atol=1e-3)
    for wrong in ({"noise_level": 351}, {"image": None}, {"image": pictures(3)}, {"height": 40}):
        with pytest.raises(LdmPipeError):
            ours(**{**call, "image": pictures(), **wrong})


def test_another_scale_of_latents_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    """Its constructor sets 0.08333 whatever the folder says; we say so."""
    theirs = x4(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.18215}))
    with pytest.warns(UserWarning, match=r"0\.18215 .* 0\.08333"):
        ours = load(UpscalePipeline, tmp_path / "theirs")
    call: dict[str, Any] = {"prompt": "red apple", "num_inference_steps": 2, "output_type": "pt"}
    again = diffusers.StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "theirs")
    again.set_progress_bar_config(disable=True)
    wanted = again(**call, image=pictures() * 2 - 1, generator=seeded()).images
    close(ours(**call, image=pictures(), generator=seeded()).images, wanted)


def test_a_lora_acts_as_in_diffusers(tmp_path: Path) -> None:
    """Merged here, beside the layer there: 1e-4; taken out, the picture is the old one to the bit."""
    pytest.importorskip("peft")
    theirs = x4(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(UpscalePipeline, tmp_path / "theirs")
    layers = {}
    for part, name in (("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"), ("text_encoder", QUERY)):
        halves = (0.5 * torch.randn(shape, generator=seeded(i)) for i, shape in enumerate(((2, 32), (32, 2))))
        layers[part, name] = LoraLayer(*halves, alpha=2.0)
    save_lora(tmp_path / "lora.safetensors", layers)
    call: dict[str, Any] = {"prompt": "red apple", "num_inference_steps": 3, "output_type": "pt"}
    without = ours(**call, image=pictures(), generator=seeded()).images
    ours.load_lora_weights(tmp_path / "lora.safetensors", "one")
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="one")
    drawn = ours(**call, image=pictures(), generator=seeded())
    close(drawn.images, theirs(**call, image=pictures() * 2 - 1, generator=seeded()).images)
    assert float((drawn.images - without).abs().max()) > 1e-3
    assert drawn.infos[0].settings["Lora"] == "one:1"
    ours.unload_lora_weights()
    assert torch.equal(ours(**call, image=pictures(), generator=seeded()).images, without)


def test_super_resolution(tmp_path: Path) -> None:
    """Latents are not scaled, though the folder of diffusers says 0.18215."""
    vqvae = random(diffusers.VQModel, {**AUTOENCODER, "latent_channels": 3, "num_vq_embeddings": 16})
    assert vqvae.config.scaling_factor == 0.18215
    law = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155, clip_sample=False)
    theirs = diffusers.LDMSuperResolutionPipeline(vqvae, random(diffusers.UNet2DModel, SUPER), law)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    ours = load(SuperResolutionPipeline, tmp_path)
    call: dict[str, Any] = {"num_inference_steps": 10, "output_type": "pt"}
    small = pictures(2)
    wanted = theirs(small * 2 - 1, **call, generator=seeded()).images
    got = ours(small, **call, generator=seeded()).images
    assert got.shape == (2, 3, 32, 32)
    close(got, wanted)
    assert len(ours(small[:1], batch_size=3, num_inference_steps=1).images) == 3


@pytest.mark.parametrize("kind", ["x4", "super"])
def test_diffusers_draws_what_was_written(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read, written, read by diffusers without a word, drawn: the same picture a third time."""
    if kind == "x4":
        theirs: Any = x4(tmp_path)
        ours_class: Any = UpscalePipeline
    else:
        vqvae = random(diffusers.VQModel, {**AUTOENCODER, "latent_channels": 3, "num_vq_embeddings": 16})
        unet = random(diffusers.UNet2DModel, SUPER)
        theirs = diffusers.LDMSuperResolutionPipeline(vqvae, unet, diffusers.DDIMScheduler(clip_sample=False))
        ours_class = SuperResolutionPipeline
    theirs.save_pretrained(tmp_path / "theirs")
    load(ours_class, tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        again = type(theirs).from_pretrained(tmp_path / "ours")
    assert [record.message for record in caplog.records if "safety" not in record.message] == []
    again.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 5, "output_type": "pt"}
    call |= {"prompt": "red apple"} if kind == "x4" else {}
    wanted = again(image=pictures() * 2 - 1, **call, generator=seeded()).images
    close(load(ours_class, tmp_path / "ours")(image=pictures(), **call, generator=seeded()).images, wanted)
