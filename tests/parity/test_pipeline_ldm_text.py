"""LDM's own text-to-image model (its transformer over BERT's words) draws as in diffusers 0.42 and comes back whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conditioning import TransformerTextEncoder
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pipelines.export import compare_with_diffusers
from ldm_pipe.pretrained import read_json
from tests import foreign_models as make

diffusers = pytest.importorskip("diffusers", reason="the reference")
transformers = pytest.importorskip("transformers", reason="the reference")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "golden", "sample", "##s"]


def test_ldm_text_to_image(tmp_path: Path) -> None:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 2, "head_dim": 16}
    config = LDMBertConfig(vocab_size=len(WORDS), max_position_embeddings=77, d_model=make.WIDTH, **sizes)
    parts = {
        "unet": make.unet(),
        "vqvae": make.vae(),
        "bert": make.shake(LDMBertModel(config), 5),
        "tokenizer": transformers.BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=512),
        "scheduler": make.scheduler(),
    }
    theirs = diffusers.LDMTextToImagePipeline(**parts)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "a")
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path / "a")
    ours.set_progress_bar_config(disable=True)
    assert isinstance(ours.text_encoders[0], TransformerTextEncoder)
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    call = {"prompt": ["red apple", "apples"], "latents": latents, "num_inference_steps": 6, "guidance_scale": 4.0}
    wanted = theirs(**call, output_type="pt", height=64, width=64).images  # it divides by 8 whatever the factor is
    assert float((ours(**call, output_type="pt").images - wanted).abs().max()) <= 1e-4
    ours.save_pretrained(tmp_path / "b")
    index, again = (read_json(tmp_path / name / "model_index.json") for name in ("a", "b"))
    assert {k: v for k, v in index.items() if k[0] != "_"} == {k: v for k, v in again.items() if k[0] != "_"}
    difference, said = compare_with_diffusers(tmp_path / "b", num_steps=3)
    assert difference <= 1e-4
    assert [line for line in said if "key" in line.lower() or "initialized" in line.lower()] == []
