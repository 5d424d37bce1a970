"""A text encoder that is made to read more tokens knows its old places as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conditioning import CLIPTextEncoder
from conditioning.lengthen import lengthened
from conditioning.tokenizer import train_bpe
from ldm_pipe.pretrained import LdmPipeError
from scripts import lengthen_text_encoder

CAPTIONS = ["red apple", "green apple", "grinning face", "a racing car"] * 4


def make(length: int = 16) -> CLIPTextEncoder:
    tokenizer = train_bpe(CAPTIONS, 540, max_length=length)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"vocab_size": len(tokenizer), "max_position_embeddings": length, "eos_token_id": tokenizer.end_id}
    torch.manual_seed(0)
    encoder = CLIPTextEncoder.from_config({**fields, "hidden_act": "gelu"}).eval()
    encoder.tokenizer = tokenizer
    return encoder


@torch.no_grad()
def test_old_places_keep_their_states_and_new_ones_are_there() -> None:
    encoder = make()
    longer = lengthened(encoder, 77)
    before, after = (e.encode(["red apple", ""]).tokens for e in (encoder, longer))
    assert before is not None
    assert after is not None
    assert after.shape == (2, 77, 32)
    torch.testing.assert_close(after[:, :16], before, rtol=0, atol=1e-5)
    assert encoder.max_length == 16, "the one that was given is left alone"
    assert encoder.config.max_position_embeddings == 16


def test_a_length_that_is_there_already_is_refused() -> None:
    with pytest.raises(LdmPipeError, match="reads 16 tokens already, 16 are asked for"):
        lengthened(make(), 16)


@torch.no_grad()
def test_the_script_writes_what_is_read_again(tmp_path: Path) -> None:
    encoder = make()
    encoder.save_pretrained(tmp_path / "short" / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "short" / "tokenizer")  # type: ignore[union-attr]
    lengthen_text_encoder.main(["--text_encoder", str(tmp_path / "short"), "--output", str(tmp_path / "long")])
    again = CLIPTextEncoder.from_pretrained(tmp_path / "long")
    assert again.max_length == 77
    wanted = lengthened(encoder, 77).encode(["a racing car"]).tokens
    torch.testing.assert_close(again.encode(["a racing car"]).tokens, wanted, rtol=0, atol=1e-6)
