"""Laws of the CLIP text encoder and of its contrastive training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning import CLIPTextEncoder
from conditioning.contrastive import ImageTower, contrastive_loss
from conditioning.tokenizer import train_bpe
from ldm_pipe.data.captions import mix_caption
from ldm_pipe.pretrained import LdmPipeError, load_tensors, save_tensors

TOKENIZER = train_bpe(["red apple", "green apple", "smiling face"] * 3, 540, max_length=12)


def tiny_config(**changes: Any) -> dict[str, Any]:
    return {
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


def tiny_encoder(**changes: Any) -> CLIPTextEncoder:
    torch.manual_seed(0)
    return CLIPTextEncoder(tiny_config(**changes), TOKENIZER).eval()


def save_folder(encoder: CLIPTextEncoder, folder: Path) -> None:
    encoder.save_pretrained(folder / "text_encoder")
    TOKENIZER.save_pretrained(folder / "tokenizer")


def test_causal_what_comes_later_changes_nothing_before() -> None:
    encoder = tiny_encoder()
    a = torch.tensor([[5, 6, 7, 8, 9]])
    b = torch.tensor([[5, 6, 7, 100, 101]])
    assert torch.allclose(encoder(a).last[:, :3], encoder(b).last[:, :3], atol=1e-6)
    assert not torch.allclose(encoder(a).last[:, 3:], encoder(b).last[:, 3:], atol=1e-3)


def test_mask_hides_padding() -> None:
    encoder = tiny_encoder()
    a, b = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 99, 7, 8]])
    mask = torch.tensor([[True, False, True, True]])
    assert torch.allclose(encoder(a, mask).last[:, 2:], encoder(b, mask).last[:, 2:], atol=1e-6)
    assert torch.allclose(encoder(a, torch.ones(1, 4)).last, encoder(a).last, atol=1e-6)


def test_batch_of_prompts_is_the_single_prompts() -> None:
    encoder = tiny_encoder()
    prompts = ["red apple", "", "smiling face, green"]
    together = encoder.encode(prompts).tokens
    alone = torch.cat([encoder.encode([prompt]).tokens for prompt in prompts])
    assert together.shape == (3, 12, 32)
    assert torch.allclose(together, alone, atol=1e-5)


def test_pooled_is_read_at_the_first_end_token_by_both_rules() -> None:
    ids = TOKENIZER(["red apple", ""]).ids
    new, old = tiny_encoder(), tiny_encoder(eos_token_id=2)
    output = new(ids)
    where = (ids == TOKENIZER.end_id).int().argmax(dim=1)
    assert torch.equal(output.pooled, output.last[torch.arange(2), where])
    assert torch.allclose(output.pooled, old(ids).pooled, atol=1e-6)
    assert not torch.equal(where, torch.zeros(2))


def test_clip_skip_leaves_out_layers() -> None:
    deep = tiny_encoder()
    shallow = tiny_encoder(num_hidden_layers=2)
    weights = {name: value for name, value in deep.state_dict().items() if ".layers.2." not in name}
    shallow.load_state_dict(weights)
    skipped = deep.encode(["red apple"], clip_skip=1).tokens
    assert torch.allclose(skipped, shallow.encode(["red apple"]).tokens, atol=1e-6)
    assert torch.allclose(deep.encode(["red apple"], clip_skip=0).tokens, deep.encode(["red apple"]).tokens, atol=1e-6)
    for bad in (-1, 4, 1.0, True):
        with pytest.raises(LdmPipeError, match="clip_skip"):
            deep.encode(["red apple"], clip_skip=bad)  # type: ignore[arg-type]


def test_long_prompt_gives_one_warning_with_what_is_cut() -> None:
    encoder = tiny_encoder()
    with pytest.warns(UserWarning, match="'smiling face'.*'green'") as caught:
        encoder.encode(["red apple " * 5 + "smiling face", "red apple " * 5 + "green", "apple"])
    assert len(caught) == 1


def test_encode_needs_a_tokenizer() -> None:
    encoder = tiny_encoder()
    encoder.tokenizer = None
    with pytest.raises(LdmPipeError, match="no tokenizer"):
        encoder.encode(["red apple"])


@pytest.mark.parametrize("architecture", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_save_load_is_bitwise_from_pipeline_and_component_folder(architecture: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(architectures=[architecture], unknown_field=[1])
    save_folder(encoder, tmp_path)
    expected = encoder(TOKENIZER(["red apple"]).ids)
    for folder, subfolder in ((tmp_path, None), (tmp_path / "text_encoder", None), (tmp_path, "text_encoder")):
        loaded = CLIPTextEncoder.from_pretrained(folder, subfolder=subfolder)
        output = loaded(TOKENIZER(["red apple"]).ids)
        weights = loaded.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
        assert torch.allclose(loaded.encode(["red apple"]).tokens, expected.last, atol=1e-6)
        assert loaded.config.unknown_field == [1]
        assert (output.projected is None) == (architecture == "CLIPTextModel")
        assert output.projected is None or torch.allclose(output.projected, expected.projected, atol=1e-6)


def test_without_projection_is_the_same_tower(tmp_path: Path) -> None:
    encoder = tiny_encoder(architectures=["CLIPTextModelWithProjection"])
    save_folder(encoder.without_projection(), tmp_path)
    assert not any("text_projection" in name for name in load_tensors(tmp_path / "text_encoder" / "model.safetensors"))
    loaded = CLIPTextEncoder.from_pretrained(tmp_path).encode(["red apple"]).tokens
    assert torch.allclose(loaded, encoder.encode(["red apple"]).tokens, atol=1e-6)


def test_flat_keys_of_transformers_5_and_old_position_ids_are_read(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_folder(encoder, tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_tensors(path)
    assert all(name.startswith("text_model.") for name in tensors)
    expected = encoder.encode(["red apple"]).tokens
    position_ids = torch.arange(12)[None]
    old = {**tensors, "text_model.embeddings.position_ids": position_ids}
    flat = {name.removeprefix("text_model."): value for name, value in old.items()}
    for layout in (old, flat):
        save_tensors(path, layout)
        loaded = CLIPTextEncoder.from_pretrained(tmp_path).encode(["red apple"]).tokens
        assert torch.allclose(loaded, expected, atol=1e-6)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_folder(tiny_encoder(), tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_tensors(path)
    tensors.pop("text_model.encoder.layers.1.mlp.fc1.weight")
    save_tensors(path, tensors)
    with pytest.raises(LdmPipeError, match=r"missing text_model\.encoder\.layers\.1\.mlp\.fc1\.weight"):
        CLIPTextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"hidden_size": 33},
        {"hidden_size": -32},
        {"vocab_size": 2**40},
        {"num_hidden_layers": 10**6},
        {"num_attention_heads": 2.0},
        {"hidden_act": "relu"},
        {"hidden_act": None},
        {"model_type": "t5"},
        {"architectures": ["BertModel"]},
    ],
)
def test_bad_config_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError, match="text encoder config"):
        CLIPTextEncoder(tiny_config(**changes))


def test_config_file_is_what_transformers_writes(tmp_path: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModel"]
    assert config["model_type"] == "clip_text_model"


def perfect(batch: int, width: int = 64) -> Tensor:
    return torch.eye(batch, width)


def test_contrastive_loss_of_chance_is_log_batch() -> None:
    same = torch.ones(16, 8)
    assert contrastive_loss(same, same, torch.tensor(3.0)).item() == pytest.approx(math.log(16), abs=1e-5)


def test_contrastive_loss_of_perfect_alignment_goes_to_zero() -> None:
    vectors = perfect(16)
    losses = [contrastive_loss(vectors, 3 * vectors, torch.tensor(scale)).item() for scale in (0.0, 2.0, 4.0)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 1e-6
    assert contrastive_loss(vectors, vectors.roll(1, 0), torch.tensor(4.0)).item() > 10


def test_contrastive_loss_is_symmetric() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, 5, generator=draw)
    concepts = torch.tensor([0, 1, 2, 3, 0, 5, 6, 1])
    loss = contrastive_loss(a, b, torch.tensor(1.0), concepts)
    assert loss.item() == pytest.approx(contrastive_loss(b, a, torch.tensor(1.0), concepts).item(), abs=1e-6)


def test_duplicates_of_a_concept_are_no_negatives() -> None:
    vectors = torch.cat([perfect(4), perfect(4)])
    concepts = torch.arange(4).repeat(2)
    assert contrastive_loss(vectors, vectors, torch.tensor(4.0), concepts).item() < 1e-6
    assert contrastive_loss(vectors, vectors, torch.tensor(4.0)).item() == pytest.approx(math.log(2), abs=1e-5)


def test_towers_learn_to_match_a_batch() -> None:
    torch.manual_seed(0)
    encoder = tiny_encoder(architectures=["CLIPTextModelWithProjection"]).train()
    tower = ImageTower({"channels": [8, 16], "projection_dim": 16})
    ids = TOKENIZER(["red apple", "green apple", "smiling face", "pie"]).ids
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    log_scale = torch.tensor(2.0, requires_grad=True)
    weights = [*encoder.parameters(), *tower.parameters(), log_scale]
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    losses = []
    for _ in range(30):
        loss = contrastive_loss(tower(images), encoder(ids).projected, log_scale)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in weights)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] < 0.1


def test_image_tower_features_and_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = ImageTower({"channels": [8, 16, 24], "projection_dim": 4}).eval()
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    maps = tower.features(image)
    assert [tuple(x.shape[1:]) for x in maps] == [(8, 16, 16), (16, 8, 8), (24, 4, 4)]
    sum(x.square().sum() for x in maps).backward()
    assert image.grad is not None
    assert image.grad.abs().amin(dim=1).gt(0).float().mean() > 0.9
    tower.save_pretrained(tmp_path)
    assert torch.allclose(ImageTower.from_pretrained(tmp_path)(image), tower(image), atol=1e-6)
    with pytest.raises(LdmPipeError, match="channels"):
        ImageTower({"channels": [7], "projection_dim": 4})


def test_mix_caption_is_a_function_of_its_seed_and_mixes() -> None:
    words = ["fruit", "red", "food", "red apple"]
    captions = [mix_caption("red apple", words, random.Random(seed)) for seed in range(2000)]
    assert captions == [mix_caption("red apple", words, random.Random(seed)) for seed in range(2000)]
    alone = sum(caption == "red apple" for caption in captions) / len(captions)
    named = sum(caption.startswith("red apple,") for caption in captions) / len(captions)
    assert alone == pytest.approx(0.5 * 0.95**2, abs=0.04)
    assert named == pytest.approx(0.3 * 0.95**2, abs=0.06)
    assert all(captions)
    assert {part for caption in captions for part in caption.replace(",", "").split()} == {
        "red",
        "apple",
        "fruit",
        "food",
    }
    assert mix_caption("flag", [], random.Random(0)) == "flag"
