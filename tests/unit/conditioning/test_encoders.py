"""Laws of what is not CLIP: the own transformer, labels, sizes, maps, joined encoders, learned words, readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ldm_pipe.interop.textual_inversion import load_word

from conditioning import (
    CLIPTextEncoder,
    ClipTokenizer,
    Condition,
    LabelEncoder,
    Reading,
    SpatialRescaler,
    TransformerTextEncoder,
    load_text_encoder,
    score_condition,
    size_condition,
)
from conditioning.joined import drop_each, drop_masks, join_all
from conditioning.spatial import depth_condition, low_resolution, map_condition, one_hot_map, sobel_edges
from conditioning.text import SDXL, SDXL_2, ids_digest
from conditioning.tokenizer import train_bpe
from ldm_pipe.data.cache import TextCache, module_hash
from ldm_pipe.pretrained import LdmPipeError, save_tensors

TOKENIZER = train_bpe(["red apple", "green apple", "smiling face"] * 3, 540, max_length=12)


def fresh_tokenizer() -> ClipTokenizer:
    return ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=12)


def transformer(reading: Reading | None = None, **changes: Any) -> TransformerTextEncoder:
    torch.manual_seed(0)
    config = {
        "vocab_size": len(TOKENIZER),
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 3,
        "head_dim": 8,
        "encoder_ffn_dim": 32,
        "max_position_embeddings": 12,
        **changes,
    }
    return TransformerTextEncoder(config, fresh_tokenizer(), reading).eval()


def clip(reading: Reading | None = None, **changes: Any) -> CLIPTextEncoder:
    torch.manual_seed(0)
    config = {
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 16,
        "eos_token_id": TOKENIZER.end_id,
        **changes,
    }
    return CLIPTextEncoder(config, fresh_tokenizer(), reading).eval()


# The own transformer


def test_the_transformer_sees_both_ways_and_the_mask_hides() -> None:
    encoder = transformer()
    a, b = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 99]])
    mask = torch.tensor([[True, True, True, False]])
    assert not torch.allclose(encoder(a)[1][:, 0], encoder(b)[1][:, 0], atol=1e-4)
    assert torch.allclose(encoder(a, mask)[1][:, :3], encoder(b, mask)[1][:, :3], atol=1e-6)


def test_the_transformer_trains_jointly() -> None:
    encoder = transformer().train()
    tokens = encoder.encode(["red apple", "smiling face"]).tokens
    tokens.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


@pytest.mark.parametrize("reading", [None, Reading(attend_mask=True, keep_mask=True, max_length=8)])
def test_the_transformer_is_saved_and_found_by_its_kind(reading: Reading | None, tmp_path: Path) -> None:
    encoder = transformer(reading)
    encoder.save_pretrained(tmp_path / "text_encoder")
    fresh_tokenizer().save_pretrained(tmp_path / "tokenizer")
    loaded = load_text_encoder(tmp_path / "text_encoder")
    assert isinstance(loaded, TransformerTextEncoder)
    assert loaded.reading == encoder.reading
    ours, theirs = encoder.encode(["red apple", ""]).slots(), loaded.encode(["red apple", ""]).slots()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_language_head_is_left_out_and_other_kinds_are_refused(tmp_path: Path) -> None:
    encoder = transformer()
    encoder.save_pretrained(tmp_path)
    head = {"to_logits.weight": torch.zeros(3, 24), "to_logits.bias": torch.zeros(3)}
    save_tensors(tmp_path / "model.safetensors", {**encoder.state_dict(), **head})
    assert TransformerTextEncoder.from_pretrained(tmp_path).tokenizer is None
    for changes in ({"activation_function": "relu"}, {"d_model": 0}, {"dropout": 2}, {"model_type": "t5"}):
        with pytest.raises(LdmPipeError, match="text encoder config"):
            transformer(**changes)


# Readings


def test_sdxl_reads_the_penultimate_layer_without_norm() -> None:
    encoder = clip(SDXL_2)
    output = encoder(TOKENIZER(["red apple"]).ids)
    found = encoder.encode(["red apple"])
    assert torch.equal(found.tokens, output.hidden[-2])
    assert torch.equal(found.pooled, output.projected)
    assert torch.equal(encoder.encode(["red apple"], clip_skip=1).tokens, output.hidden[-3])
    assert clip(SDXL).encode(["red apple"]).pooled is None
    with pytest.raises(LdmPipeError, match="must be 0 to 2"):
        encoder.encode(["red apple"], clip_skip=3)


def test_a_reading_is_stored_only_where_it_is_not_the_usual_one(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path / "plain")
    clip(SDXL_2).save_pretrained(tmp_path / "sdxl")
    assert "ldm_pipe" not in (tmp_path / "plain" / "config.json").read_text()
    assert CLIPTextEncoder.from_pretrained(tmp_path / "sdxl").reading == SDXL_2
    assert CLIPTextEncoder.from_pretrained(tmp_path / "sdxl", reading=SDXL).reading == SDXL
    assert clip(SDXL_2).without_projection().reading == SDXL


@pytest.mark.parametrize(
    "stored", [{"skip": -1}, {"skip": True}, {"pooled": "mean"}, {"max_length": 1}, {"final_norm": 1}, {"more": 1}, 3]
)
def test_bad_readings_are_refused(stored: Any) -> None:
    with pytest.raises(LdmPipeError, match=r"Reading|text encoder config"):
        clip(ldm_pipe=stored)


def test_no_projection_to_read() -> None:
    with pytest.raises(LdmPipeError, match="no projection"):
        clip(SDXL_2, architectures=["CLIPTextModel"])


def test_masks_and_pooled_vectors_are_cached(tmp_path: Path) -> None:
    encoder = clip(Reading(pooled="projected", keep_mask=True))
    texts = ["red apple", "", "smiling face"]
    cache = TextCache.build(tmp_path, texts, encoder.encode, encoder_hash=module_hash(encoder))
    expected = encoder.encode(texts)
    assert torch.equal(cache.tokens, expected.tokens)
    assert torch.equal(cache.token_mask, expected.token_mask)
    assert torch.equal(cache.pooled, expected.pooled)
    assert module_hash(encoder) != module_hash(clip(SDXL))


def test_another_tokenizer_or_text_has_another_digest() -> None:
    encoder = clip()
    digest = ids_digest(encoder, ["red apple", ""])
    assert digest == ids_digest(clip(SDXL), ["red apple", ""])
    assert digest != ids_digest(encoder, ["red apples", ""])
    encoder.tokenizer = ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges[:3], max_length=12)
    assert digest != ids_digest(encoder, ["red apple", ""])


# Words of one's own


def test_a_learned_word_stands_for_its_vectors(tmp_path: Path) -> None:
    encoder = clip(eos_token_id=2)
    before = encoder.encode(["red apple"])
    pooled = encoder(TOKENIZER(["red apple"]).ids).pooled
    vectors = torch.randn(3, 32)
    save_tensors(tmp_path / "cat.safetensors", {"<cat>": vectors})
    assert load_word([encoder], tmp_path / "cat.safetensors") == "<cat>"
    assert torch.equal(encoder.encode(["red apple"]).tokens, before.tokens)
    ids = encoder.tokenizer(["a <cat> pie", "red apple"]).ids
    first = len(TOKENIZER)
    assert ids[0, 2:5].tolist() == [first, first + 1, first + 2]
    assert torch.equal(encoder.text_model.embeddings.token_embedding(ids[0, 2:5]), vectors)
    # the largest id is no longer the end token
    assert torch.equal(encoder(ids).pooled[1:], pooled)
    assert not torch.equal(encoder(ids).last[0, 2], encoder(ids).pooled[0])


def test_learned_words_are_saved_with_encoder_and_tokenizer(tmp_path: Path) -> None:
    encoder = clip()
    encoder.add_token("<cat>", torch.randn(2, 32))
    encoder.add_token("<dog>", torch.randn(32))
    encoder.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = CLIPTextEncoder.from_pretrained(tmp_path)
    texts = ["<cat> and <dog>", "<dog><cat>"]
    assert torch.equal(loaded.tokenizer(texts).ids, encoder.tokenizer(texts).ids)
    assert torch.allclose(loaded.encode(texts).tokens, encoder.encode(texts).tokens, atol=1e-6)


def test_words_that_do_not_fit_are_refused() -> None:
    encoder = clip()
    encoder.add_token("<cat>", torch.randn(32))
    words = (("<cat>", "is taken"), ("<CAT>", "is taken"), ("a b", "a space in it"), ("", "empty"))
    for word, message in words:
        with pytest.raises(LdmPipeError, match=message):
            encoder.add_token(word, torch.randn(32))


# Labels, sizes


@pytest.mark.parametrize("slot", ["tokens", "pooled", "labels"])
def test_labels_and_their_learned_null(slot: str, tmp_path: Path) -> None:
    encoder = LabelEncoder({"num_classes": 5, "width": 8, "slot": slot})
    encoder.save_pretrained(tmp_path)
    loaded = LabelEncoder.from_pretrained(tmp_path)
    found, again = encoder.encode([0, None, 4]), loaded.encode(torch.tensor([0, 5, 4]))
    assert list(found.slots()) == [slot]
    assert torch.equal(found.slots()[slot], again.slots()[slot])
    shapes = {"tokens": (3, 1, 8), "pooled": (3, 8), "labels": (3,)}
    assert found.slots()[slot].shape == shapes[slot]
    dropped = found.drop(torch.tensor([True, False, False]), encoder.encode([None]))
    assert torch.equal(dropped.slots()[slot][0], found.slots()[slot][1])


def test_prompts_may_be_names_of_classes(tmp_path: Path) -> None:
    encoder = LabelEncoder({"num_classes": 3, "width": 8, "classes": ["red apple", "cat", "dog"]})
    assert torch.equal(encoder.encode(["cat", "", "red apple"]).tokens, encoder.encode([1, None, 0]).tokens)
    encoder.save_pretrained(tmp_path / "text_encoder")
    loaded = load_text_encoder(tmp_path)
    assert torch.equal(loaded.encode(["dog"]).tokens, encoder.encode([2]).tokens)
    with pytest.raises(LdmPipeError, match=r"no class 'red aple'.*red apple"):
        encoder.encode(["red aple"])
    with pytest.raises(LdmPipeError, match="2 different names for 3 classes"):
        LabelEncoder({"num_classes": 3, "width": 8, "classes": ["a", "b", "b"]})


@pytest.mark.parametrize(("labels", "message"), [([5.0], "5.0"), ([6], "label 0 is 6"), ([0, -1], "label 1 is -1")])
def test_labels_out_of_range_are_named(labels: list[Any], message: str) -> None:
    with pytest.raises(LdmPipeError, match=message):
        LabelEncoder({"num_classes": 5, "width": 8}).encode(labels)


def test_sizes_and_crops() -> None:
    labels = size_condition([(512, 768)], [(0, 16)], [(1024, 1024)]).labels
    assert labels.tolist() == [[512, 768, 0, 16, 1024, 1024]]
    for bad in ([(0, 5)], [(5, 5.0)], [(5,)], [(5, 5), (5, 5)]):
        with pytest.raises(LdmPipeError, match="size_condition"):
            size_condition(bad, [(0, 0)], [(8, 8)])  # type: ignore[arg-type]
    assert score_condition([(512, 768)], [(0, 16)], [6.5]).slots()["labels"].tolist() == [[512, 768, 0, 16, 6.5]]
    with pytest.raises(LdmPipeError, match="score"):
        score_condition([(512, 768)], [(0, 16)], [float("nan")])


# Maps


def test_the_rescaler_shrinks_and_mixes(tmp_path: Path) -> None:
    rescaler = SpatialRescaler({"in_channels": 4, "out_channels": 3, "num_stages": 2})
    maps = torch.rand(2, 4, 16, 24)
    spatial = rescaler.encode(maps, size=(4, 6)).spatial
    assert spatial.shape == (2, 3, 4, 6)
    small = torch.nn.functional.interpolate(maps, scale_factor=0.5, mode="bilinear")
    small = torch.nn.functional.interpolate(small, scale_factor=0.5, mode="bilinear")
    weight = rescaler.state_dict()["channel_mapper.weight"]
    assert torch.allclose(spatial, torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], small), atol=1e-6)
    rescaler.save_pretrained(tmp_path)
    assert torch.equal(SpatialRescaler.from_pretrained(tmp_path).encode(maps).spatial, spatial)
    with pytest.raises(LdmPipeError, match=r"the map is 16x24, the latents are 8x8.*Give one of 32x32"):
        rescaler.encode(maps, size=(8, 8))
    with pytest.raises(LdmPipeError, match="the map is \\[2, 3, 8, 8\\]"):
        rescaler.encode(torch.rand(2, 3, 8, 8))


def test_semantic_maps_masks_depth_and_edges() -> None:
    classes = torch.tensor([[[0, 1], [2, 2]]])
    channels = one_hot_map(classes, 3)
    assert torch.equal(channels.argmax(dim=1), classes)
    assert torch.equal(channels.sum(dim=1), torch.ones(1, 2, 2))
    with pytest.raises(LdmPipeError, match=r"classes 0 to 2 in the map.*0 to 1"):
        one_hot_map(classes, 2)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    assert map_condition(mask, (2, 2)).spatial.tolist() == [[[[1, 0], [1, 0]]]]
    depth = depth_condition(torch.rand(2, 1, 16, 16) * 50, (4, 4)).spatial
    assert torch.equal(depth.amin(dim=(1, 2, 3)), -torch.ones(2))
    assert torch.allclose(depth.amax(dim=(1, 2, 3)), torch.ones(2))
    assert torch.isfinite(depth_condition(torch.ones(1, 1, 8, 8), (4, 4)).spatial).all()
    picture = torch.zeros(1, 3, 6, 6)
    picture[..., 3:] = 1
    edges = sobel_edges(picture)
    assert edges[..., 2:4].min() == 1
    assert edges[..., [0, 1, 4, 5]].max() == 0
    with pytest.raises(LdmPipeError, match="NaN"):
        map_condition(mask * float("nan"), (2, 2))


def test_a_small_picture_with_noise_of_a_known_level() -> None:
    image, eps = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    plain = low_resolution(image, (8, 8))
    assert torch.equal(plain.spatial, image)
    assert plain.labels is None
    level = torch.tensor([3, 20])
    noisy = low_resolution(
        image, (8, 8), noise_level=level, eps=eps, alpha=torch.tensor([1.0, 0.6]), sigma=torch.tensor([0.0, 0.8])
    )
    assert torch.equal(noisy.spatial[0], image[0])
    assert torch.allclose(noisy.spatial[1], 0.6 * image[1] + 0.8 * eps[1])
    assert torch.equal(noisy.labels, level)
    with pytest.raises(LdmPipeError, match="needs all three"):
        low_resolution(image, (8, 8), noise_level=level)


# Several at once


def test_each_encoder_is_dropped_by_itself() -> None:
    a, b = torch.randn(4, 3, 2), torch.randn(4, 3, 5)
    zero = [Condition(tokens=torch.zeros(1, 3, 2)), Condition(tokens=torch.zeros(1, 3, 5))]
    masks = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    parts = [Condition(tokens=a), Condition(tokens=b)]
    found = drop_each(parts, zero, masks).tokens
    assert torch.equal(found[0], join_all(parts).tokens[0])
    for row, (first, second) in enumerate(masks.tolist()):
        assert torch.equal(found[row, :, :2], torch.zeros(3, 2) if first else a[row])
        assert torch.equal(found[row, :, 2:], torch.zeros(3, 5) if second else b[row])
    with pytest.raises(LdmPipeError, match="drop_each"):
        drop_each(parts, zero, masks[:, :1])


def test_drop_rates_are_met() -> None:
    draws = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0))
    masks = drop_masks(draws, [0.1, 0.3], together=0.2).float()
    # P(dropped) = 1 - (1 - rate)(1 - together); three standard errors are below 0.01
    assert masks.mean(dim=0).tolist() == pytest.approx([0.28, 0.44], abs=0.01)
    assert masks.prod(dim=1).mean().item() == pytest.approx(0.2 + 0.8 * 0.03, abs=0.01)
    for rates, shape in (([1.5], (2, 2)), ([0.5], (2, 1))):
        with pytest.raises(LdmPipeError, match="drop_masks"):
            drop_masks(torch.rand(shape), rates)


def test_padding_is_hidden() -> None:
    short = Condition(tokens=torch.randn(2, 3, 4), pooled=torch.randn(2, 5))
    long = short.pad(5)
    assert long.tokens.shape == (2, 5, 4)
    assert long.token_mask.tolist() == [[True] * 3 + [False] * 2] * 2
    assert torch.equal(long.tokens[:, :3], short.tokens)
    assert short.pad(3) is short


def test_an_unknown_kind_of_text_encoder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(LdmPipeError, match=r"text encoder is a 'gpt2'.*clip_text_model"):
        load_text_encoder(tmp_path)
