"""Laws of weighted prompts: plain ones are untouched, weights act where they stand, nothing is cut."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from conditioning import CLIPTextEncoder, Condition, encode_weighted
from conditioning.text import SDXL, SDXL_2, Reading
from conditioning.tokenizer import train_bpe
from conditioning.weighted import PromptSchedule
from ldm_pipe.pretrained import LdmPipeError

TOKENIZER = train_bpe(["red apple", "green apple", "smiling face", "cat dog"] * 3, 560, max_length=12)


def tiny(seed: int = 0, reading: Reading | None = None, width: int = 32) -> CLIPTextEncoder:
    torch.manual_seed(seed)
    config = {
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": len(TOKENIZER),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 16,
        "eos_token_id": TOKENIZER.end_id,
    }
    encoder = CLIPTextEncoder(config, TOKENIZER, reading).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


ENCODER = tiny()


def only(schedule: PromptSchedule, i: int = 0) -> Condition:
    stage = schedule.at(i)
    assert stage.is_plain
    return stage.conditions[0]


@torch.no_grad()
def tokens(prompt: str, i: int = 0, **options: object) -> Tensor:
    found = only(encode_weighted([ENCODER], [prompt], **options), i).tokens  # type: ignore[arg-type]
    assert found is not None
    return found


def test_plain_prompts_have_the_bits_of_an_ordinary_call() -> None:
    prompts = ["red apple", "", "a: b", "smiling face"]
    encoders = [tiny(1, SDXL), tiny(2, SDXL_2)]
    for clip_skip in (None, 1):
        plain = encoders[0].encode(prompts, clip_skip=clip_skip).join(encoders[1].encode(prompts, clip_skip=clip_skip))
        found = only(encode_weighted(encoders, prompts, num_steps=5, clip_skip=clip_skip))
        assert found.slots().keys() == plain.slots().keys() == {"tokens", "pooled"}
        assert all(torch.equal(found.slots()[name], value) for name, value in plain.slots().items())


def test_weight_one_in_brackets_is_a_plain_prompt() -> None:
    assert torch.equal(tokens("(red:1) apple"), tokens("red apple"))


@pytest.mark.parametrize("emphasis", ["interpolate", "mean", "scale"])
def test_a_weight_acts_on_its_tokens(emphasis: str) -> None:
    plain, strong = tokens("red apple"), tokens("(red:1.5) apple", emphasis=emphasis)
    inside = slice(1, 1 + len(TOKENIZER.pieces("red").ids))
    assert not torch.allclose(plain[:, inside], strong[:, inside], atol=1e-3)
    if emphasis == "mean":
        assert torch.allclose(strong.mean(), plain.mean(), atol=1e-5)
        return
    rest = [i for i in range(12) if i not in range(inside.start, inside.stop)]
    assert torch.equal(plain[:, rest], strong[:, rest])
    empty = tokens("") if emphasis == "interpolate" else torch.zeros_like(plain)
    expected = empty + 1.5 * (plain - empty)
    assert torch.allclose(strong[:, inside], expected[:, inside], atol=1e-5)


def test_weight_zero_is_the_empty_prompt() -> None:
    inside = slice(1, 1 + len(TOKENIZER.pieces("red").ids))
    for emphasis in ("interpolate", "context"):
        assert torch.allclose(tokens("(red:0) apple", emphasis=emphasis)[:, inside], tokens("")[:, inside], atol=1e-5)


def test_weight_zero_in_context_is_the_prompt_without_the_word() -> None:
    num = len(TOKENIZER.pieces("green").ids)
    found, without = tokens("(green:0) apple"), tokens("apple")
    assert torch.allclose(found[:, :1], without[:, :1], atol=1e-5)  # the start
    assert torch.allclose(found[:, 1 + num :], without[:, 1 : 12 - num], atol=1e-5)  # apple, end and padding
    assert not torch.allclose(tokens("(green:0) apple", emphasis="interpolate")[:, 1 + num :], without[:, 1 : 12 - num])
    second = tokens("red BREAK (green:0) apple")[:, 12:]
    assert torch.allclose(second, found, atol=1e-5)


def test_weights_in_context_add_up() -> None:
    plain = tokens("red apple")
    one, other = tokens("(red:0.5) apple") - plain, tokens("red (apple:1.5)") - plain
    assert torch.allclose(tokens("(red:0.5) (apple:1.5)"), plain + one + other, atol=1e-4)
    assert torch.allclose(tokens("(red:2) apple") - plain, -2 * one, atol=1e-4)
    assert one[:, 1:].abs().amax(dim=2).min() > 1e-4  # every token but the start had read "red"
    assert one[:, 0].abs().max() < 1e-6


def test_restoring_a_mean_of_zero_is_refused() -> None:
    centred = tiny()
    torch.nn.init.ones_(centred.text_model.final_layer_norm.weight)
    torch.nn.init.zeros_(centred.text_model.final_layer_norm.bias)
    with pytest.raises(LdmPipeError, match="mean of the embeddings is near 0"):
        encode_weighted([centred], ["(red:1.5) apple"], emphasis="mean")


def test_long_prompts_are_chunks_and_nothing_is_cut() -> None:
    text = "red apple green smiling face cat dog " * 3
    ids = TOKENIZER.pieces(text).ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tokens(text)
    assert found.shape == (1, 12 * -(-len(ids) // 10), 32)
    first, mask = TOKENIZER.frame([ids[:10]], 12)
    last, _ = TOKENIZER.frame([ids[len(ids) // 10 * 10 :]], 12)
    assert torch.allclose(found[:, :12], ENCODER.encode_ids(first, mask).tokens, atol=1e-5)
    assert torch.allclose(found[:, -12:], ENCODER.encode_ids(last, mask).tokens, atol=1e-5)


def test_break_starts_a_chunk() -> None:
    found = tokens("red BREAK apple")
    assert torch.allclose(found[:, :12], tokens("red"), atol=1e-5)
    assert torch.allclose(found[:, 12:], tokens("apple"), atol=1e-5)


def test_a_short_prompt_beside_a_long_one_is_hidden_not_changed() -> None:
    both = only(encode_weighted([ENCODER], ["red apple", "red BREAK apple"]))
    assert both.token_mask is not None
    assert both.token_mask.sum(dim=1).tolist() == [12, 24]
    assert torch.equal(both.tokens[:1, :12], tokens("red apple"))
    assert only(encode_weighted([ENCODER], ["red apple"])).token_mask is None


def test_switches_make_stages() -> None:
    schedule = encode_weighted([ENCODER], ["[cat:dog:0.5] face", "red"], num_steps=6)
    assert [stage.first for stage in schedule.stages] == [0, 3]
    for i, text in ((0, "cat face"), (2, "cat face"), (3, "dog face"), (5, "dog face")):
        expected = tokens(text)
        assert torch.allclose(only(schedule, i).select([0]).tokens, expected, atol=1e-5)
        assert torch.allclose(only(schedule, i).select([1]).tokens, tokens("red"), atol=1e-5)


def test_each_text_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = CLIPTextEncoder.forward
    monkeypatch.setattr(
        CLIPTextEncoder, "forward", lambda self, ids, mask=None: rows.append(len(ids)) or forward(self, ids, mask)
    )
    encode_weighted([ENCODER], ["[cat|dog]", "cat", "cat"], num_steps=50)
    assert sum(rows) == 2


def test_branches_have_weights_and_missing_ones_count_nothing() -> None:
    schedule = encode_weighted([ENCODER], ["cat AND dog :0.5", "red"])
    (stage,) = schedule.stages
    assert not stage.is_plain
    assert torch.equal(stage.weights, torch.tensor([[1.0, 1.0], [0.5, 0.0]]))
    assert torch.allclose(stage.conditions[1].select([0]).tokens, tokens("dog"), atol=1e-5)


def test_two_encoders_of_unequal_chunks_are_joined() -> None:
    small = train_bpe(["x"], 514, max_length=12)  # bytes only: more tokens for the same text
    other = tiny(3, width=16)
    other.tokenizer = small
    found = only(encode_weighted([ENCODER, other], ["(red apple:1.2) smiling"]))
    chunks = -(-len(small.pieces("red apple").ids + small.pieces(" smiling").ids) // 10)
    assert found.tokens.shape == (1, chunks * 12, 48)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(LdmPipeError, match="AND in a negative prompt"):
        encode_weighted([ENCODER], ["a AND b"], negative=True)
    with pytest.raises(LdmPipeError, match="At most 32 are read"):
        encode_weighted([ENCODER], ["apple " * 2000])
    with pytest.raises(LdmPipeError, match="emphasis is 'loud'"):
        encode_weighted([ENCODER], ["a"], emphasis="loud")  # type: ignore[arg-type]
