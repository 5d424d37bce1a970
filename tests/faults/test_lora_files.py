"""LoRAs and words that are usable were refused: by the place of the file, or by its names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.interop.lora.file import networks_of, read_lora
from ldm_pipe.interop.single.ldm_names import rename, unet_modules
from ldm_pipe.pretrained import LdmPipeError, save_tensors
from tests.single_files import make_folder

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(make_folder(tmp_path_factory.mktemp("models") / "sdxl", "sdxl"))


def lora(pipe: LatentDiffusionPipeline, part: str, name: Callable[[str], str], down: str, up: str) -> Tensors:
    """Make a LoRA of every attention projection of one network, under other names."""
    torch.manual_seed(0)
    tensors: Tensors = {}
    for module, net in networks_of(pipe)[part].named_modules():
        if module.endswith(("to_q", "to_k", "q_proj", "v_proj")):
            rows, columns = net.weight.shape  # type: ignore[union-attr,misc]
            tensors[f"{name(module)}.{down}.weight"] = torch.randn(2, columns)
            tensors[f"{name(module)}.{up}.weight"] = torch.randn(rows, 2)
    return tensors


def original(pipe: LatentDiffusionPipeline, module: str) -> str:
    return rename([f"{module}.weight"], unet_modules(pipe.unet.spec))[f"{module}.weight"].removesuffix(".weight")


PEFT, KOHYA = ("lora_A", "lora_B"), ("lora_down", "lora_up")
NAMES: dict[str, tuple[str, str, tuple[str, str]]] = {
    "ComfyUI, original names": ("unet", "diffusion_model.{original}", KOHYA),
    "ComfyUI, PEFT's ends": ("unet", "diffusion_model.{original}", PEFT),
    "whole name": ("unet", "model.diffusion_model.{original}", KOHYA),
    "ComfyUI, our names": ("unet", "diffusion_model.{ours}", PEFT),
    "PEFT inside a prefix": ("unet", "unet.base_model.model.{ours}", PEFT),
    "PEFT": ("unet", "base_model.model.{ours}", PEFT),
    "diffusers": ("unet", "unet.{ours}", PEFT),
    "first encoder, PEFT": ("text_encoder", "base_model.model.{ours}", PEFT),
    "second encoder, PEFT": ("text_encoder_2", "base_model.model.{ours}", PEFT),
    "second encoder, bare": ("text_encoder_2", "{ours}", PEFT),
    "second encoder, PEFT inside a prefix": ("text_encoder_2", "text_encoder_2.base_model.model.{ours}", PEFT),
    "first encoder, ComfyUI": ("text_encoder", "text_encoders.clip_l.transformer.{ours}", KOHYA),
    "second encoder, ComfyUI": ("text_encoder_2", "text_encoders.clip_g.transformer.{ours}", KOHYA),
}


def check(pipe: LatentDiffusionPipeline, part: str, path: Path) -> None:
    """Load a LoRA and compare it with the same one under diffusers' names."""
    wanted = read_lora(lora(pipe, part, lambda m: f"{part}.{m}", *PEFT), networks_of(pipe))
    try:
        pipe.load_lora_weights(path, "x")
        found = pipe.loras.adapters["x"].layers
    finally:
        pipe.unload_lora_weights()
    assert found.keys() == wanted.keys()
    for key, layer in wanted.items():
        assert torch.equal(layer.delta(), found[key].delta())


@pytest.mark.parametrize(("part", "form", "ends"), NAMES.values(), ids=NAMES.keys())
def test_a_lora_is_read_under_every_name(
    pipe: LatentDiffusionPipeline, part: str, form: str, ends: tuple[str, str], tmp_path: Path
) -> None:
    tensors = lora(
        pipe, part, lambda m: form.format(ours=m, original=original(pipe, m) if part == "unet" else m), *ends
    )
    save_tensors(tmp_path / "x.safetensors", tensors)
    check(pipe, part, tmp_path / "x.safetensors")


PLACES = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "my.bin", "adapter_model.safetensors",
          "adapter_model.bin"]  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_lora_is_found_in_its_folder(pipe: LatentDiffusionPipeline, name: str, tmp_path: Path) -> None:
    tensors = lora(pipe, "text_encoder_2", lambda m: f"base_model.model.{m}", *PEFT)
    (torch.save(tensors, tmp_path / name) if name.endswith(".bin") else save_tensors(tmp_path / name, tensors))
    if "adapter" in name:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    check(pipe, "text_encoder_2", tmp_path)


WORDS: dict[str, Callable[[], Tensors]] = {
    "clip_l and clip_g": lambda: {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)},
    "of A1111": lambda: {"string_to_param.clip_l": torch.randn(1, 32), "string_to_param.clip_g": torch.randn(1, 48)},
}


@pytest.mark.parametrize("make", WORDS.values(), ids=WORDS.keys())
def test_words_inside_a_lora_are_taught_and_leave_with_it(
    pipe: LatentDiffusionPipeline, make: Callable[[], Tensors], tmp_path: Path
) -> None:
    before = [encoder.encode(["a b"]).tokens for encoder in pipe.text_encoders]
    tables = [encoder.text_model.embeddings.token_embedding.weight.clone() for encoder in pipe.text_encoders]
    tensors = lora(pipe, "unet", lambda m: f"unet.{m}", *PEFT)
    tensors |= {f"bundle_emb.<x>.{name}": value for name, value in make().items()}
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors)
    pipe.load_lora_weights(path, "one")
    assert all("<x>" in encoder.tokenizer.vocab for encoder in pipe.text_encoders)
    with pytest.raises(LdmPipeError, match="is taken"):
        pipe.load_lora_weights(path, "two")
    assert pipe.get_active_adapters() == ["one"]
    pipe.delete_adapters("one")
    assert not any("<x>" in encoder.tokenizer.vocab for encoder in pipe.text_encoders)
    for encoder, tokens, table in zip(pipe.text_encoders, before, tables, strict=True):
        assert torch.equal(encoder.text_model.embeddings.token_embedding.weight, table)
        assert torch.equal(encoder.encode(["a b"]).tokens, tokens)


@pytest.mark.parametrize("name", ["learned_embeds.bin", "learned_embeds.safetensors", "my.pt"])
def test_a_word_is_found_in_its_folder(pipe: LatentDiffusionPipeline, name: str, tmp_path: Path) -> None:
    tensors = {"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 48)}
    path = tmp_path / name
    (save_tensors(path, tensors) if path.suffix == ".safetensors" else torch.save(tensors, path))
    pipe.load_textual_inversion(tmp_path, token="<y>")
    assert "<y>" in pipe.tokenizer.vocab
    pipe.unload_textual_inversion()


def test_an_original_file_of_a_word_holds_a_parameter_dict(tmp_path: Path) -> None:
    from ldm_pipe.interop.lora.words import read_vectors

    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 32))})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, tmp_path / "x.pt")
    name, (vectors,) = read_vectors(tmp_path / "x.pt")
    assert name is None
    assert torch.equal(vectors, torch.ones(2, 32))
