"""A model folder holds any text encoder; diffusers is told by its class name that it does not read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conditioning import ClipTokenizer, LabelEncoder, T5TextEncoder, TransformerTextEncoder
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pipelines.export import check_representable
from ldm_pipe.pretrained import LdmPipeError

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny_pipeline"
KINDS = {"transformer": "LDMBertModel", "t5": "T5EncoderModel", "labels": "LabelEncoder"}


def build(kind: str, width: int) -> Any:
    torch.manual_seed(0)
    tokenizer = ClipTokenizer.from_pretrained(TINY / "tokenizer")
    if kind == "labels":
        return LabelEncoder({"num_classes": 2, "width": width, "classes": ["cat", "dog"]}).eval()
    shared = {"vocab_size": len(tokenizer), "d_model": width}
    if kind == "transformer":
        sizes = {"encoder_layers": 1, "encoder_attention_heads": 2, "head_dim": 8, "encoder_ffn_dim": 16}
        config = {**shared, **sizes, "max_position_embeddings": tokenizer.max_length}
        return TransformerTextEncoder(config, tokenizer).eval()
    sizes = {"d_kv": 8, "num_heads": 2, "num_layers": 1, "d_ff": 16, "pad_token_id": tokenizer.pad_id}
    return T5TextEncoder(T5TextEncoder.from_config({**shared, **sizes}).model, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_another_text_encoder_draws_the_same(kind: str, tmp_path: Path) -> None:
    tiny = LatentDiffusionPipeline.from_pretrained(TINY)
    encoder = build(kind, tiny.unet.config.cross_attention_dim)
    pipe = LatentDiffusionPipeline(tiny.unet, tiny.autoencoder, [encoder], tiny.schedule)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LatentDiffusionPipeline"
    assert index["text_encoder"] == ["conditioning", KINDS[kind]]
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    settings = {"seed": 1, "num_inference_steps": 3, "output_type": "latent", "prompt_syntax": "weighted"}
    for prompt in ("cat", "(cat:1.3)", "[cat:dog:1]", ["cat", "cat AND dog"]):
        drawn = pipe(prompt, **settings).images
        assert torch.allclose(loaded(prompt, **settings).images, drawn, atol=1e-5)
    assert not torch.allclose(pipe("cat", **settings).images, pipe("dog", **settings).images, atol=1e-4)


def test_such_a_model_is_not_exported() -> None:
    tiny = LatentDiffusionPipeline.from_pretrained(TINY)
    encoder = build("transformer", tiny.unet.config.cross_attention_dim)
    pipe = LatentDiffusionPipeline(tiny.unet, tiny.autoencoder, [encoder], tiny.schedule)
    with pytest.raises(LdmPipeError, match=r"text encoder is a TransformerTextEncoder.*reads CLIP's"):
        check_representable(pipe, "ddim")


def test_an_encoder_of_another_width_is_refused_with_both() -> None:
    tiny = LatentDiffusionPipeline.from_pretrained(TINY)
    width = tiny.unet.config.cross_attention_dim
    with pytest.raises(LdmPipeError, match=f"text encoder is {width + 8} wide, the U-Net takes {width}"):
        LatentDiffusionPipeline(tiny.unet, tiny.autoencoder, [build("labels", width + 8)], tiny.schedule)
