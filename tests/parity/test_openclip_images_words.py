"""OpenCLIP, CLIP's image tower and learned words against their libraries, on tiny random weights.

All compute in fp32 with the same operators; 1e-5 leaves room for another order of summation. Every weight is drawn with
a deviation of 0.3 or less, so that no layer is without a say.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning import CLIPImageEncoder, CLIPTextEncoder, ClipTokenizer, OpenCLIPTextEncoder, load_text_encoder
from conditioning.text import OPENCLIP_SD2, LibraryTokenizer, Reading
from ldm_pipe.pretrained import LdmPipeError, save_tensors
from tests.text_encoders import CLOSE, PROMPTS, TOKENIZER, draw

transformers = pytest.importorskip("transformers", reason="the reference")

TOWERS: dict[str, dict[str, Any]] = {
    "clip": {},
    "gelu_tanh": {"act_kwargs": {"approximate": "tanh"}},
    "siglip": {"no_causal_mask": True, "pool_type": "last", "proj_type": "none"},
    "coca": {"embed_cls": True},
}


def openclip_config(**changes: Any) -> dict[str, Any]:
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3, **changes}
    return {"embed_dim": 16, "quick_gelu": False, "text_cfg": text}


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_openclip_towers(tower: str, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="the reference")
    config = openclip_config(**TOWERS[tower])
    encoder = draw(OpenCLIPTextEncoder(config, reading=Reading(skip=1, pooled="projected")))
    ids = open_clip.SimpleTokenizer(context_length=12)(PROMPTS)
    batch = encoder.tokenizer(PROMPTS)
    assert torch.equal(batch.ids, ids)
    torch.testing.assert_close(encoder.encode(PROMPTS).pooled, encoder.text(ids), **CLOSE)
    # the penultimate layer by a hook, not by the library's own list
    seen: list[Tensor] = []
    handle = encoder.text.transformer.resblocks[-2].register_forward_hook(lambda *args: seen.append(args[2]))
    encoder.text(ids)
    handle.remove()
    expected = encoder.text.ln_final(seen[0][:, :12])
    torch.testing.assert_close(encoder.encode(PROMPTS).tokens, expected, **CLOSE)
    encoder.save_pretrained(tmp_path)
    loaded = load_text_encoder(tmp_path)
    assert loaded.reading == encoder.reading
    assert torch.equal(loaded.encode(PROMPTS).tokens, encoder.encode(PROMPTS).tokens)


@torch.no_grad()
def test_a_whole_openclip_model_gives_its_text_tower(tmp_path: Path) -> None:
    """Old models hold the text tower without a prefix, new ones under `text.`; folders hold open_clip_config.json."""
    open_clip = pytest.importorskip("open_clip", reason="the reference")
    import json

    config = {**openclip_config(), "vision_cfg": {"image_size": 8, "layers": 1, "width": 64, "patch_size": 4}}
    for build in (open_clip.CLIP, open_clip.CustomTextCLIP):
        model = draw(build(**config), 0.1)
        save_tensors(tmp_path / "open_clip_model.safetensors", model.state_dict())
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        encoder = OpenCLIPTextEncoder.from_pretrained(tmp_path, reading=Reading(pooled="projected"))
        ids = encoder.tokenizer(PROMPTS).ids
        torch.testing.assert_close(encoder.encode(PROMPTS).pooled, model.encode_text(ids), **CLOSE)


@torch.no_grad()
def test_openclip_penultimate_is_stable_diffusion_2s_cliptextmodel() -> None:
    """SD2's folder is a CLIPTextModel made of OpenCLIP's tower without its last layer: fused qkv taken apart."""
    pytest.importorskip("open_clip", reason="the reference")
    tower = draw(OpenCLIPTextEncoder(openclip_config(context_length=77)))
    assert tower.reading == OPENCLIP_SD2
    clip = CLIPTextEncoder({
        "vocab_size": 49408, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": "gelu",
    })  # fmt: skip
    clip.load_state_dict(as_clip_keys(tower.text.state_dict(), num_layers=2))
    batch = tower.tokenizer(PROMPTS)
    expected = clip(batch.ids).last
    torch.testing.assert_close(tower.encode(PROMPTS).tokens, expected, **CLOSE)


def as_clip_keys(tower: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    named = {
        "embeddings.token_embedding.weight": tower["token_embedding.weight"],
        "embeddings.position_embedding.weight": tower["positional_embedding"],
        "final_layer_norm.weight": tower["ln_final.weight"],
        "final_layer_norm.bias": tower["ln_final.bias"],
    }
    pairs = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for i in range(num_layers):
        block = f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            for theirs, ours in pairs.items():
                named[f"encoder.layers.{i}.{ours}.{kind}"] = tower[f"{block}{theirs}.{kind}"]
            fused = tower[f"{block}attn.in_proj_{kind}"].chunk(3)
            for name, value in zip(("q_proj", "k_proj", "v_proj"), fused, strict=True):
                named[f"encoder.layers.{i}.self_attn.{name}.{kind}"] = value
    return {f"text_model.{name}": value for name, value in named.items()}


def test_openclip_says_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="the library")
    with pytest.raises(LdmPipeError, match="knows no model 'ViT-Z'"):
        OpenCLIPTextEncoder.from_open_clip("ViT-Z")
    with pytest.raises(LdmPipeError, match="embed_dim and text_cfg"):
        OpenCLIPTextEncoder({"embed_dim": 8})
    with pytest.raises(LdmPipeError, match="open_clip cannot build it"):
        OpenCLIPTextEncoder({"embed_dim": 8, "text_cfg": {"wide": 3}})
    encoder = OpenCLIPTextEncoder(openclip_config())
    encoder.save_pretrained(tmp_path)
    weights = {name: value for name, value in encoder.state_dict().items() if "ln_final" not in name}
    save_tensors(tmp_path / "model.safetensors", weights)
    with pytest.raises(LdmPipeError, match=r"missing text\.ln_final"):
        OpenCLIPTextEncoder.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="this part is cut: 'apple apple"):
        encoder.encode(["red " * 10 + "apple apple"])


@torch.no_grad()
def test_clip_image_embeddings(tmp_path: Path) -> None:
    """Own resampling is antialiased bicubic on floats, theirs rounds to bytes twice: 2 / 255 / std apart at most.

    Theirs also clips between its two passes, so the values stay where nothing overshoots.
    """
    import numpy as np
    from PIL import Image

    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    model = draw(transformers.CLIPVisionModelWithProjection(config), 0.1)
    model.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(80, 176, (6, 9, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    expected = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    encoder = CLIPImageEncoder.from_pretrained(tmp_path)
    found = encoder.preprocess(image)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2 / 255 / 0.26
    torch.testing.assert_close(encoder.encode(image).pooled, model(found).image_embeds, **CLOSE)
    for slot, shape in (("token", (1, 1, 12)), ("patches", (1, 5, 32))):
        tokens = CLIPImageEncoder.from_pretrained(tmp_path, slot=slot).encode(image).tokens
        assert tokens.shape == shape
    encoder.save_pretrained(tmp_path / "ours")
    again, info = transformers.CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    torch.testing.assert_close(again(found).image_embeds, model(found).image_embeds, **CLOSE)
    assert torch.equal(encoder.null(encoder.encode(image)).pooled, torch.zeros(1, 12))


def test_learned_words_have_the_ids_that_transformers_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=24)
    tokenizer.add_token("<cat>", range(len(TOKENIZER), len(TOKENIZER) + 2))
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    text = "a <cat> red <cat>"
    # diffusers writes the further vectors out before it tokenizes (maybe_convert_prompt)
    expected = theirs(text.replace("<cat>", "<cat> <cat>_1"), padding="max_length", truncation=True).input_ids
    assert tokenizer([text]).ids[0].tolist() == expected


@pytest.mark.parametrize("name", ["transformers", "open_clip"])
def test_heavy_libraries_wait_until_they_are_needed(name: str) -> None:
    import subprocess
    import sys

    code = f"import sys, conditioning; from conditioning import *; sys.exit({name!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with pytest.raises(LdmPipeError, match="no tokenizer can be read"):
        LibraryTokenizer.from_pretrained(tmp_path)
