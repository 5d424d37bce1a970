"""DeepFloyd IF, both stages, against diffusers' pipelines (0.42) on tiny random models, fp32.

1e-4 of [0, 1], from the same noise, through T5, guidance, dynamic thresholding and a learnt variance.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.pipelines import PixelDiffusionPipeline, UpscalePipeline
from ldm_pipe.pretrained import LdmPipeError

diffusers = pytest.importorskip("diffusers", reason="the reference")
transformers = pytest.importorskip("transformers")

STAGE_1: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [16, 32],
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
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
STAGE_2 = {**STAGE_1, "sample_size": 16, "in_channels": 6, "class_embed_type": "timestep"}
LAW: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
PROMPT = "A Red Apple, please"


def texts(tmp_path: Path) -> dict[str, Any]:
    """Make a tiny T5 and its Unigram tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(["a red apple, please", "smiling face with big eyes"] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    library = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    torch.manual_seed(1)
    config = transformers.T5Config(vocab_size=70, d_model=24, d_kv=8, num_heads=3, d_ff=32, num_layers=2)
    return {"tokenizer": library, "text_encoder": transformers.T5EncoderModel(config).eval()}


def pipeline(kind: str, tmp_path: Path, **law: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**(STAGE_1 if kind == "IFPipeline" else STAGE_2)).eval()
    with torch.no_grad():
        unet.conv_out.weight.mul_(1.5)
    parts = {**texts(tmp_path), "unet": unet, "safety_checker": None, "feature_extractor": None, "watermarker": None}
    dynamic = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
    parts["scheduler"] = diffusers.DDPMScheduler(**LAW, **{"variance_type": "learned_range", **dynamic, **law})
    if kind == "IFSuperResolutionPipeline":
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(**LAW)
    pipe = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(kind: Any, path: Path) -> Any:
    pipe = kind.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(image: Any) -> Tensor:
    """Bring diffusers' "np" pictures into our form."""
    return torch.from_numpy(image).permute(0, 3, 1, 2)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.05, "a flat picture shows nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


CALL: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "eyes", "num_inference_steps": 5}


@pytest.mark.parametrize("thresholding", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_stage_1(scale: float, thresholding: bool, tmp_path: Path) -> None:
    """Ancestral steps from one generator; without dynamic thresholding the file's clip_sample stands."""
    theirs = pipeline("IFPipeline", tmp_path, thresholding=thresholding)
    theirs.save_pretrained(tmp_path)
    ours = load(PixelDiffusionPipeline, tmp_path)
    call = {**CALL, "guidance_scale": scale, "num_images_per_prompt": 2}
    call |= {} if scale > 1 else {"negative_prompt": None}
    wanted = theirs(**call, generator=seeded(), clean_caption=False, output_type="np").images
    close(ours(**call, generator=seeded(), output_type="pt").images, unit(wanted))


def test_stage_2(tmp_path: Path) -> None:
    """The small picture is enlarged bilinearly, corners on corners, and its noise is drawn after the first noise."""
    theirs = pipeline("IFSuperResolutionPipeline", tmp_path)
    theirs.save_pretrained(tmp_path)
    ours = load(UpscalePipeline, tmp_path)
    small = torch.rand((1, 3, 8, 8), generator=seeded(7))
    call = {**CALL, "guidance_scale": 2.0, "noise_level": 100}
    wanted = theirs(**call, image=small * 2 - 1, generator=seeded(), clean_caption=False, output_type="np").images
    got = ours(**call, image=small, generator=seeded(), output_type="pt").images
    assert got.shape == (1, 3, 16, 16)
    close(got, unit(wanted))
    assert ours(**call, image=small, height=24, width=20, seed=1, output_type="pt").images.shape == (1, 3, 24, 20)


@pytest.mark.parametrize("kind", ["IFPipeline", "IFSuperResolutionPipeline"])
def test_diffusers_draws_what_was_written(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read, written, read by diffusers without a word on keys, drawn: the same picture a third time."""
    pipeline(kind, tmp_path).save_pretrained(tmp_path / "theirs")
    ours_class: Any = PixelDiffusionPipeline if kind == "IFPipeline" else UpscalePipeline
    load(ours_class, tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        again = getattr(diffusers, kind).from_pretrained(tmp_path / "ours", safety_checker=None, watermarker=None)
    told = [record.message for record in caplog.records]
    assert [line for line in told if "key" in line.lower() or "initialized" in line.lower()] == []
    again.set_progress_bar_config(disable=True)
    small = torch.rand((1, 3, 8, 8), generator=seeded(7))
    mine, others = ({}, {}) if kind == "IFPipeline" else ({"image": small}, {"image": small * 2 - 1})
    wanted = again(**CALL, **others, generator=seeded(), clean_caption=False, output_type="np").images
    ours = load(ours_class, tmp_path / "ours")
    close(ours(**CALL, **mine, generator=seeded(), output_type="pt").images, unit(wanted))


def test_without_a_text_encoder_embeddings_are_asked_for(tmp_path: Path) -> None:
    """IF is often loaded in two halves, so that T5 leaves the memory first."""
    theirs = pipeline("IFPipeline", tmp_path)
    ours = load(PixelDiffusionPipeline, _saved(theirs, tmp_path / "whole"))
    tokens = ours.text_encoders[0].encode([PROMPT]).tokens
    theirs.register_modules(text_encoder=None, tokenizer=None)
    bare = load(PixelDiffusionPipeline, _saved(theirs, tmp_path / "bare"))
    with pytest.raises(LdmPipeError, match="no text encoder"):
        bare(PROMPT)
    call: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0, "seed": 2, "output_type": "pt"}
    close(bare(prompt_embeds=tokens, **call).images, ours(PROMPT, **call).images)


def _saved(pipe: Any, path: Path) -> Path:
    pipe.save_pretrained(path)
    return path
