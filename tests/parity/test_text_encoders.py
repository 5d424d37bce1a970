"""CLIP, T5 and LDM's text encoder against transformers and diffusers' own pipelines, on tiny random weights.

All compute in fp32 with the same operators; 1e-5 leaves room for another order of summation. Every weight is drawn with
a deviation of 0.3 or less, so that no layer is without a say.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from conditioning import CLIPTextEncoder, T5TextEncoder, TransformerTextEncoder, load_text_encoder
from conditioning.text import DEEPFLOYD_IF, KARLO, SDXL, SDXL_2, Reading
from ldm_pipe.pretrained import LdmPipeError, save_tensors
from tests.bfloat16 import assert_as_close_as_the_reference
from tests.text_encoders import CLOSE, PROMPTS, clip_fields, draw, tokenizer_folder, unigram_tokenizer

transformers = pytest.importorskip("transformers", reason="the reference")


def clip_folder(folder: Path, *, projection: bool = False, **changes: Any) -> Any:
    """Save a tiny CLIP text model of transformers and its tokenizer."""
    config = transformers.CLIPTextConfig(**clip_fields(**changes))
    model = draw((transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config))
    model.save_pretrained(folder)
    return model


def bare(cls: Any, **parts: Any) -> Any:
    """Make a pipeline of diffusers that holds nothing but what encodes prompts."""
    names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    flags = {name: False for name in names if name in ("requires_safety_checker", "add_watermarker")}
    return cls(**{**dict.fromkeys(names), **flags, **parts})


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
@torch.no_grad()
def test_stable_diffusion_1_and_2(pad_token: str, tmp_path: Path) -> None:
    """SD2's folder differs by its padding, its activation and one layer less."""
    diffusers = pytest.importorskip("diffusers", reason="the reference")
    activation = {"<|endoftext|>": "quick_gelu", "!": "gelu"}[pad_token]
    model = clip_folder(tmp_path / "text_encoder", hidden_act=activation)
    tokenizer_folder(tmp_path / "tokenizer", pad_token)
    theirs = bare(
        diffusers.StableDiffusionPipeline,
        text_encoder=model,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
        unet=tiny_unet(),
        vae=tiny_vae(),
    )
    encoder = CLIPTextEncoder.from_pretrained(tmp_path)
    # clip_skip of diffusers 0.42 fails with transformers 5 here; test_clip_transformers.py holds its formula
    positive, negative = theirs.encode_prompt(PROMPTS, "cpu", 1, True, ["red"] * 3)
    torch.testing.assert_close(encoder.encode(PROMPTS).tokens, positive, **CLOSE)
    torch.testing.assert_close(encoder.encode(["red"] * 3).tokens, negative, **CLOSE)


def tiny_unet() -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=48,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    )  # fmt: skip


def tiny_vae() -> Any:
    import diffusers

    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


@torch.no_grad()
def test_sdxl_both_encoders(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the reference")
    first = clip_folder(tmp_path / "text_encoder", hidden_act="quick_gelu")
    second = clip_folder(tmp_path / "text_encoder_2", projection=True, hidden_act="gelu")
    tokenizer_folder(tmp_path / "tokenizer")
    tokenizer_folder(tmp_path / "tokenizer_2", "!")
    library = transformers.CLIPTokenizer
    theirs = bare(
        diffusers.StableDiffusionXLPipeline,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=library.from_pretrained(tmp_path / "tokenizer"),
        tokenizer_2=library.from_pretrained(tmp_path / "tokenizer_2"),
        unet=tiny_unet(),
        vae=tiny_vae(),
        force_zeros_for_empty_prompt=False,
    )
    ours = [
        CLIPTextEncoder.from_pretrained(tmp_path, reading=SDXL),
        CLIPTextEncoder.from_pretrained(tmp_path, subfolder="text_encoder_2", reading=SDXL_2),
    ]
    negative = ["red"] * 3
    for clip_skip in (None, 1):
        tokens, their_negative, pooled, negative_pooled = theirs.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=True, negative_prompt=negative, clip_skip=clip_skip
        )
        parts = [encoder.encode(PROMPTS, clip_skip=clip_skip) for encoder in ours]
        found = parts[0].join(parts[1])
        torch.testing.assert_close(found.tokens, tokens, **CLOSE)
        torch.testing.assert_close(found.pooled, pooled, **CLOSE)
        found = ours[0].encode(negative).join(ours[1].encode(negative))  # theirs skips no further layer here
        torch.testing.assert_close(found.tokens, their_negative, **CLOSE)
        torch.testing.assert_close(found.pooled, negative_pooled, **CLOSE)


@torch.no_grad()
def test_karlo(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the reference")
    from diffusers import UnCLIPPipeline

    model = clip_folder(tmp_path / "text_encoder", projection=True)
    library = transformers.CLIPTokenizer.from_pretrained(tokenizer_folder(tmp_path / "tokenizer"))
    theirs = bare(UnCLIPPipeline, text_encoder=model, tokenizer=library)
    pooled, tokens, mask = theirs._encode_prompt(PROMPTS, "cpu", 1, False)
    found = CLIPTextEncoder.from_pretrained(tmp_path, reading=KARLO).encode(PROMPTS)
    torch.testing.assert_close(found.tokens, tokens, **CLOSE)
    torch.testing.assert_close(found.pooled, pooled, **CLOSE)
    assert torch.equal(found.token_mask, mask)
    both = theirs._encode_prompt(PROMPTS, "cpu", 1, True)  # the unconditional rows first
    empty = CLIPTextEncoder.from_pretrained(tmp_path, reading=KARLO).encode([""] * 3)
    for name, value in zip(("pooled", "tokens", "token_mask"), both, strict=True):
        torch.testing.assert_close(empty.slots()[name], value[:3], **CLOSE)


def t5_folder(root: Path, kind: str = "t5", **changes: Any) -> Any:
    """Save a tiny encoder of the T5 family and a Unigram tokenizer."""
    library = unigram_tokenizer()
    library.save_pretrained(root / "tokenizer")
    classes = {
        "t5": (transformers.T5Config, transformers.T5EncoderModel),
        "mt5": (transformers.MT5Config, transformers.MT5EncoderModel),
        "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
    }
    config = classes[kind][0](
        vocab_size=70, d_model=24, d_kv=8, num_heads=3, d_ff=32, num_layers=2, feed_forward_proj="gated-gelu",
        dropout_rate=0.1, **changes,
    )  # fmt: skip
    model = draw(classes[kind][1](config))
    model.save_pretrained(root / "text_encoder")
    return model, library


@torch.no_grad()
def test_deepfloyd_if_hides_the_padding(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the reference")
    model, library = t5_folder(tmp_path)
    theirs = bare(diffusers.IFPipeline, text_encoder=model, tokenizer=library)
    positive, negative = theirs.encode_prompt(PROMPTS, device="cpu", negative_prompt=["red"] * 3)
    encoder = T5TextEncoder.from_pretrained(tmp_path / "text_encoder", reading=DEEPFLOYD_IF)
    assert positive.shape == (3, 77, 24)
    torch.testing.assert_close(encoder.encode(PROMPTS).tokens, positive, **CLOSE)
    torch.testing.assert_close(encoder.encode(["red"] * 3).tokens, negative, **CLOSE)
    assert encoder.encode(PROMPTS).token_mask is None


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
@torch.no_grad()
def test_the_t5_family(kind: str, tmp_path: Path) -> None:
    model, library = t5_folder(tmp_path, kind)
    reading = Reading(skip=1, attend_mask=True, keep_mask=True, max_length=40)
    encoder = T5TextEncoder.from_pretrained(tmp_path / "text_encoder", reading=reading)
    rows = library(PROMPTS, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
    expected = model(rows.input_ids, attention_mask=rows.attention_mask, output_hidden_states=True)
    output = encoder(rows.input_ids, rows.attention_mask)
    torch.testing.assert_close(output[1], expected.last_hidden_state, **CLOSE)
    found = encoder.encode(PROMPTS)
    normed = model.encoder.final_layer_norm(expected.hidden_states[-2])
    torch.testing.assert_close(found.tokens, normed, **CLOSE)
    assert torch.equal(found.token_mask, rows.attention_mask.bool())
    long = [PROMPTS[2] * 9]
    cut = library(long, max_length=40, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(encoder.tokenizer(long, max_length=40).ids, cut)
    with pytest.warns(UserWarning, match="longer than 40 tokens, this part is cut: .*big eyes'"):
        encoder.encode(long)


@pytest.mark.parametrize("kind", ["clip", "clip with projection", "t5", "umt5", "ldmbert"])
@torch.no_grad()
def test_bfloat16_is_as_close_to_fp32_as_the_library_is(kind: str, tmp_path: Path) -> None:
    """OpenCLIP's towers are open_clip's own network."""
    folder = tmp_path / "text_encoder"
    if kind == "ldmbert":
        theirs: Any = ldmbert(folder)
    else:
        clip = kind.startswith("clip")
        theirs = clip_folder(folder, projection=kind != "clip") if clip else t5_folder(tmp_path, kind)[0]
    ours = load_text_encoder(folder, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    ids = torch.randint(5, 20, (3, 16), generator=torch.Generator().manual_seed(0))
    output: Any = ours(ids)
    found = output.last if kind.startswith("clip") else output[1]
    exact, half = theirs(ids), theirs.bfloat16()(ids)
    if kind == "clip with projection":
        assert_as_close_as_the_reference(output.projected, half.text_embeds, exact.text_embeds)
    last = (x[0] if kind == "ldmbert" else x.last_hidden_state for x in (half, exact))
    assert_as_close_as_the_reference(found, *last)


def test_t5_is_loaded_without_the_librarys_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stood on the screen with --quiet too; the setting of the library is left as it was."""
    from transformers.utils import logging

    t5_folder(tmp_path)
    logging.enable_progress_bar()
    capsys.readouterr()
    T5TextEncoder.from_pretrained(tmp_path / "text_encoder")
    assert capsys.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


@torch.no_grad()
def test_t5_is_saved_for_transformers_and_stays_sane_in_bfloat16(tmp_path: Path) -> None:
    model, _ = t5_folder(tmp_path)
    encoder = T5TextEncoder.from_pretrained(tmp_path / "text_encoder")
    encoder.save_pretrained(tmp_path / "again")
    theirs, info = transformers.T5EncoderModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor([[5, 6, 7, 1]])
    torch.testing.assert_close(theirs(ids).last_hidden_state, model(ids).last_hidden_state, **CLOSE)
    assert isinstance(load_text_encoder(tmp_path / "again"), T5TextEncoder)
    half = T5TextEncoder.from_pretrained(tmp_path / "text_encoder", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    a, b = encoder(ids)[1], half(ids)[1].float()
    assert (a - b).abs().mean() < 0.05 * a.abs().mean()  # 8 bits of mantissa, two layers
    with pytest.warns(UserWarning, match="float16 overflows in T5"):
        assert T5TextEncoder.from_pretrained(tmp_path / "text_encoder", dtype=torch.float16).dtype == torch.float32


def test_t5_with_missing_weights_is_refused_and_a_decoder_is_left_out(tmp_path: Path) -> None:
    model, _ = t5_folder(tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    folder = tmp_path / "text_encoder"
    save_tensors(
        folder / "model.safetensors", {**weights, "decoder.x": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    )
    T5TextEncoder.from_pretrained(folder)
    weights.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_tensors(folder / "model.safetensors", weights)
    with pytest.raises(LdmPipeError, match=r"missing \['encoder.block.1.layer.0.SelfAttention.q.weight"):
        T5TextEncoder.from_pretrained(folder)


def ldmbert(folder: Path) -> Any:
    """Save a tiny text encoder of LDM's."""
    pytest.importorskip("diffusers", reason="the reference")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        vocab_size=20, max_position_embeddings=20, encoder_layers=2, encoder_ffn_dim=32, encoder_attention_heads=3,
        head_dim=8, d_model=16,
    )  # fmt: skip
    model = draw(LDMBertModel(config))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_ldm_text_to_image(tmp_path: Path) -> None:
    """LDMTextToImagePipeline encodes by bert(tokenizer(prompt, max_length=77, padding).input_ids)[0], no mask."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", ",", "please", "smiling", "face", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    library = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=20)
    library.save_pretrained(tmp_path / "tokenizer")
    model = ldmbert(tmp_path / "bert")
    rows = library(PROMPTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    expected = model(rows.input_ids)[0]
    encoder = TransformerTextEncoder.from_pretrained(tmp_path / "bert")
    assert torch.equal(encoder.tokenizer(PROMPTS).ids, rows.input_ids)
    torch.testing.assert_close(encoder.encode(PROMPTS).tokens, expected, **CLOSE)
