"""What the conditions of a picture cannot be, and the odd texts that are prompts all the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from conditioning import CLIPTextEncoder, ClipTokenizer, LabelEncoder, TransformerTextEncoder, encode_weighted
from conditioning.text import Reading
from conditioning.tokenizer import train_bpe
from ldm_pipe.pretrained import LdmPipeError
from tests.training import make_unet

TOKENIZER = train_bpe(["red apple", "green apple", "smiling face"] * 3, 540, max_length=12)


def encoders() -> dict[str, Any]:
    torch.manual_seed(0)
    size = len(TOKENIZER)
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": TOKENIZER.end_id, "hidden_act": "gelu"}
    clip = {"vocab_size": size, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 12, **heads}
    sizes = {"encoder_layers": 1, "encoder_attention_heads": 2, "head_dim": 8, "encoder_ffn_dim": 16}
    own = {"vocab_size": size, "d_model": 16, "max_position_embeddings": 12, **sizes}
    reading = Reading(attend_mask=True)
    tokenizer = ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=12)
    return {
        "clip": CLIPTextEncoder(clip, tokenizer, reading).eval(),
        "transformer": TransformerTextEncoder(own, tokenizer, reading).eval(),
    }


@pytest.mark.parametrize("kind", ["clip", "transformer"])
@pytest.mark.parametrize("mask", [torch.ones(2, 11), torch.ones(2, 13), torch.ones(1, 12), torch.ones(12)])
def test_a_token_mask_of_another_length_is_refused(kind: str, mask: torch.Tensor) -> None:
    ids = TOKENIZER(["red apple", "face"]).ids
    with pytest.raises(LdmPipeError, match=r"the token mask is \[.*\], the ids are \[2, 12\]"):
        encoders()[kind].encode_ids(ids, mask.bool())


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(2, 6), torch.ones(5), torch.ones(2, 5, 1)])
def test_the_network_refuses_a_token_mask_of_another_length(mask: torch.Tensor) -> None:
    with pytest.raises(LdmPipeError, match=r"token_mask of shape \(.*\) for 5 tokens"):
        make_unet()(torch.zeros(2, 2, 4, 4), torch.zeros(2), tokens=torch.zeros(2, 5, 8), token_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "transformer"])
@pytest.mark.parametrize("text", ["", " ", "\t \n ", "\u3000\u00a0"])
def test_space_alone_is_the_empty_prompt(kind: str, text: str) -> None:
    encoder = encoders()[kind]
    assert torch.equal(encoder.encode([text]).tokens, encoder.encode([""]).tokens)
    (stage,) = encode_weighted([encoder], [text]).stages
    assert torch.equal(stage.conditions[0].tokens, encoder.encode([""]).tokens)


def test_space_alone_is_no_class() -> None:
    table = LabelEncoder({"num_classes": 2, "width": 4, "classes": ["cat", "dog"]})
    assert torch.equal(table.encode([" "]).tokens, table.encode([None]).tokens)


@torch.no_grad()
@pytest.mark.parametrize(
    "text", ["\U0001f34e", "\u7ea2\u82f9\u679c", "\u043a\u0440\u0430\u0441\u043d\u043e\u0435", "a\u0301"]
)
def test_emoji_and_other_scripts_are_prompts_with_a_say_of_their_own(text: str) -> None:
    encoder = encoders()["clip"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = encode_weighted([encoder], [text]).stages[0].conditions[0].tokens
        strong = encode_weighted([encoder], [f"({text}:1.3)"]).stages[0].conditions[0].tokens
    empty = encoder.encode(["", ""]).tokens
    assert not torch.allclose(plain[:, :12], empty[:1], atol=1e-4)
    assert not torch.allclose(plain, strong, atol=1e-4)


@torch.no_grad()
def test_a_very_long_prompt_is_cut_with_a_word_read_whole_or_refused() -> None:
    encoder, text = encoders()["clip"], "red apple " * 150
    with pytest.warns(UserWarning, match="longer than 12 tokens, this part is cut: 'red apple"):
        assert encoder.encode([text]).tokens.shape == (1, 12, 16)
    (stage,) = encode_weighted([encoder], [text]).stages
    assert stage.conditions[0].tokens.shape == (1, 30 * 12, 16)  # 300 words, 10 to a chunk
    with pytest.raises(LdmPipeError, match=r"the prompt fills 60 chunks of 10 tokens\. At most 32 are read"):
        encode_weighted([encoder], [text * 2])
