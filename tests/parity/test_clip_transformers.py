"""Our CLIP text encoder and tokenizer against transformers, on tiny random weights and a tiny vocabulary.

Both compute in fp32 with the same operators; 1e-5 leaves room for another order of summation.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from conditioning import CLIPTextEncoder, ClipTokenizer
from conditioning.tokenizer import train_bpe
from tests.text_encoders import clip_fields

transformers = pytest.importorskip("transformers", reason="the reference")

TEXT = "red green apple apples grinning face with big eyes smiling pie food don't it's café naïve straße 12 345"
WORDS = TEXT.split(" ")
TOKENIZER = train_bpe([" ".join(WORDS), "grinning face", "red apple", "smiling eyes"] * 3, 620, max_length=24)


def texts() -> list[str]:
    rng = random.Random(0)
    odd = [
        "",
        " ",
        "\t\n",
        "É",
        "e\u0301",
        "ﬁ",
        "İstanbul",
        "ẞ",
        "🍎",
        "👩🏽‍🚀",
        "日本語",
        "a\x00b",
        "\x7f",
        "\u200b",
        "\u00a0x",
        "don't",
        "DON'T",
        "''s",
        "'re're",
        "rock'n'roll",
        "it\u2019s",
        "!!!",
        "?!a!",
        "$5.00",
        "1²3Ⅷ",
        "٣",
        "a_b-c",
        "...",
        "<|endoftext|>",
        "a<|startoftext|>b",
        "<|ENDOFTEXT|>",
        "<|endoftext",
        "\u2028",
        "x" * 300,
        "1" * 80,
        "\U0010ffff",
    ]
    pieces = [*WORDS, *odd, ",", ":", "  "]
    return odd + [rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(400)]


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_ids_are_those_of_cliptokenizer(pad_token: str, tmp_path: Path) -> None:
    ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=24, pad_token=pad_token).save_pretrained(tmp_path)
    ours, theirs = ClipTokenizer.from_pretrained(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 24
    assert len(theirs) == len(ours)
    for text in texts():
        expected = theirs([text], padding="max_length", truncation=True)
        got = ours([text])
        assert got.ids[0].tolist() == expected.input_ids[0], repr(text)
        assert got.mask[0].tolist() == [bool(flag) for flag in expected.attention_mask[0]], repr(text)


def test_a_folder_saved_by_transformers_is_read(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "ours")
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = ClipTokenizer.from_pretrained(tmp_path / "theirs")
    assert again.max_length == 24
    assert torch.equal(again(texts()).ids, TOKENIZER(texts()).ids)


def reference(projection: bool, **changes: Any) -> Any:
    config = transformers.CLIPTextConfig(**clip_fields(TOKENIZER, **changes))
    torch.manual_seed(0)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # the default of 0.02 would leave attention without a say
    return model


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}, {"layer_norm_eps": 1e-3}])
@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_outputs_are_those_of_cliptextmodel(projection: bool, changes: dict[str, Any], tmp_path: Path) -> None:
    model = reference(projection, **changes)
    model.save_pretrained(tmp_path)
    encoder = CLIPTextEncoder.from_pretrained(tmp_path)
    batch = TOKENIZER(["red apple", "", "smiling face with big eyes " * 6])
    ours, theirs = encoder(batch.ids), model(batch.ids, output_hidden_states=True)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(ours.last, theirs.last_hidden_state, **close)
    for mine, other in zip(ours.hidden, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, **close)
    if projection:
        torch.testing.assert_close(ours.projected, theirs.text_embeds, **close)
    else:
        torch.testing.assert_close(ours.pooled, theirs.pooler_output, **close)
    masked = model(batch.ids, attention_mask=batch.mask.long()).last_hidden_state
    torch.testing.assert_close(encoder(batch.ids, batch.mask).last, masked, **close)


@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_saved_by_us_loads_in_transformers_without_a_word(
    projection: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers must not fall back to random weights in silence (TRAPS: flat keys)."""
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    reference(projection).save_pretrained(tmp_path / "theirs")
    encoder = CLIPTextEncoder.from_pretrained(tmp_path / "theirs")
    encoder.save_pretrained(tmp_path / "ours")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    logging.getLogger("transformers").propagate = False
    assert not any(info.values()), info
    assert not caplog.records
    ids = TOKENIZER(["red apple", "pie"]).ids
    torch.testing.assert_close(model(ids).last_hidden_state, encoder(ids).last, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_clip_skip_is_that_of_diffusers(tmp_path: Path) -> None:
    """The formula of StableDiffusionPipeline.encode_prompt: hidden_states[-(clip_skip + 1)], then the final norm."""
    model = reference(projection=True)
    model.save_pretrained(tmp_path)
    encoder = CLIPTextEncoder.from_pretrained(tmp_path, tokenizer=None)
    encoder.tokenizer = TOKENIZER
    hidden = model(TOKENIZER(["red apple"]).ids, output_hidden_states=True).hidden_states
    for clip_skip in (1, 2):
        expected = model.text_model.final_layer_norm(hidden[-(clip_skip + 1)])
        got = encoder.encode(["red apple"], clip_skip=clip_skip).tokens
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
