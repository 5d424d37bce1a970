"""Laws of LoRAs and new words: merged, taken out to the bit, several at once; names of all spellings; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conditioning import CLIPTextEncoder
from ldm_pipe.interop.ldm_names import rename, unet_modules
from ldm_pipe.interop.lora import Layers, LoraLayer, Loras, read_lora, save_lora
from ldm_pipe.interop.textual_inversion import load_word, read_vectors, save_word
from ldm_pipe.pretrained import LdmPipeError, load_tensors, save_tensors
from ldm_pipe.unet import UNet
from tests.single_files import make_folder

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.1.conv2"
TEXT = "text_model.encoder.layers.1.self_attn.out_proj"


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture
def networks(folder: Path) -> dict[str, nn.Module]:
    return {
        "unet": UNet.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextEncoder.from_pretrained(folder / "text_encoder"),
    }


def _layers(seed: int, networks: dict[str, nn.Module], alpha: float = 1.0) -> Layers:
    """Two halves of rank 2 for a matrix, a convolution and a text encoder's matrix."""
    layers = Layers()
    for i, (part, name) in enumerate((("unet", Q), ("unet", CONV), ("text_encoder", TEXT))):
        weight = networks[part].get_submodule(name).weight
        assert isinstance(weight, Tensor)
        up = _numbers(seed + i, weight.shape[0], 2, *([1] * (weight.ndim - 2)))
        layers[part, name] = LoraLayer(_numbers(seed + 9 + i, 2, *weight.shape[1:]), up, alpha)
    return layers


def _weights(networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part} {k}": v.clone() for part, net in networks.items() for k, v in net.state_dict().items()}


def _same(networks: dict[str, nn.Module], wanted: dict[str, Tensor]) -> bool:
    found = _weights(networks)
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_merged_is_the_sum_and_taken_out_is_what_was_there(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    plain, first, second = _weights(networks), _layers(1, networks), _layers(50, networks)
    save_lora(tmp_path / "a.safetensors", first)
    save_lora(tmp_path / "b.safetensors", second)
    loras = Loras(networks)
    assert loras.add(tmp_path / "a.safetensors") == "a"
    once = _weights(networks)
    loras.add(tmp_path / "b.safetensors", "other", scale=0.5)
    for (part, name), layer in first.items():
        key = f"{part} {name}.weight"
        both = plain[key] + layer.delta() + 0.5 * second[part, name].delta()
        torch.testing.assert_close(_weights(networks)[key], both, rtol=1e-5, atol=1e-5)
        assert not torch.equal(plain[key], once[key])
    loras.set_scales(other=0.0)
    assert _same(networks, once)
    loras.set_scales(other=0.5)
    loras.remove("other")
    assert _same(networks, once)
    loras.unfuse()
    assert _same(networks, plain)
    loras.fuse()
    assert _same(networks, once)
    loras.remove("a")
    assert _same(networks, plain)
    assert loras.scales == {}


@torch.no_grad()
def test_a_merged_matrix_computes_the_two_halves_beside_the_weight(
    networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    """Hu et al. 2021, eq. 3: h = W0 x + (alpha / r) B A x; also of a strided convolution."""
    layers = _layers(1, networks, alpha=3.0)
    x, image = _numbers(5, 4, 32), _numbers(6, 1, 64, 5, 5)
    linear, conv = (networks["unet"].get_submodule(name) for name in (Q, CONV))
    before = linear(x), conv(image)
    save_lora(tmp_path / "a.safetensors", layers)
    Loras(networks).add(tmp_path / "a.safetensors")
    a, b = layers["unet", Q].down, layers["unet", Q].up
    torch.testing.assert_close(linear(x), before[0] + 1.5 * x @ a.T @ b.T, rtol=1e-5, atol=1e-4)
    a, b = layers["unet", CONV].down, layers["unet", CONV].up
    change = nn.functional.conv2d(nn.functional.conv2d(image, a, padding=1), b)
    torch.testing.assert_close(conv(image), before[1] + 1.5 * change, rtol=1e-5, atol=1e-3)


def _kohya(layers: Layers, unet: UNet, *, original: bool) -> dict[str, Tensor]:
    tensors = {}
    for (part, name), layer in layers.items():
        if part == "unet" and original:
            name = rename([f"{name}.weight"], unet_modules(unet.spec))[f"{name}.weight"].removesuffix(".weight")
        flat = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": layer.down, f"{flat}.lora_up.weight": layer.up}
        tensors[f"{flat}.alpha"] = torch.tensor(layer.alpha)
    return tensors


@pytest.mark.parametrize("spelling", ["kohya", "kohya_original", "peft", "processor", "linear_layer"])
def test_every_spelling_means_the_same_layers(spelling: str, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    unet = networks["unet"]
    assert isinstance(unet, UNet)
    layers = _layers(1, networks, alpha=2.0 if spelling in ("peft", "processor", "linear_layer") else 0.5)
    if spelling.startswith("kohya"):
        tensors = _kohya(layers, unet, original=spelling == "kohya_original")
    elif spelling == "peft":
        save_lora(tmp_path / "peft.safetensors", layers)
        tensors = load_tensors(tmp_path / "peft.safetensors")
    else:
        layers = {place: layer for place, layer in layers.items() if place[1] != CONV}
        ends = {
            "processor": {Q: Q.replace("to_q", "processor.to_q_lora"), TEXT: TEXT.replace("out_proj", "to_out_lora")},
            "linear_layer": {Q: f"{Q}.lora", TEXT: f"{TEXT}.lora_linear_layer"},
        }[spelling]
        tensors = {}
        for (part, name), layer in layers.items():
            tensors |= {f"{part}.{ends[name]}.down.weight": layer.down, f"{part}.{ends[name]}.up.weight": layer.up}
    save_tensors(tmp_path / "x.safetensors", tensors)
    found = read_lora(tmp_path / "x.safetensors", networks)
    assert set(found) == set(layers)
    for place, layer in layers.items():
        torch.testing.assert_close(found[place].delta(), layer.delta(), rtol=1e-6, atol=1e-6)


def test_files_that_do_not_fit_are_refused_and_change_nothing(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    plain = _weights(networks)
    unet = networks["unet"]
    assert isinstance(unet, UNet)
    good = _kohya(_layers(1, networks), unet, original=False)
    down = next(name for name in good if name.endswith("to_q.lora_down.weight"))
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "elsewhere": ({"lora_unet_nowhere.lora_down.weight": torch.ones(1)}, "modules that this model does not have"),
        "half": ({name: x for name, x in good.items() if name != down}, "has only one half"),
        "wide": ({**good, down: torch.ones(2, 33)}, "the weight"),
        "dora": ({**good, "lora_unet_x.dora_scale": torch.ones(1)}, "not plain LoRA"),
        "other": ({**good, "betas": torch.ones(2)}, "tensors of no LoRA: betas"),
        "nan": ({**good, down: torch.full((2, 32), torch.nan)}, "NaN or infinity"),
        "empty": ({"x.alpha": torch.tensor(1.0)}, "holds no LoRA"),
    }
    loras = Loras(networks)
    for name, (tensors, reason) in cases.items():
        save_tensors(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(LdmPipeError, match=reason):
            loras.add(tmp_path / f"{name}.safetensors")
    save_tensors(tmp_path / "good.safetensors", good)
    assert _same(networks, plain)
    loras.add(tmp_path / "good.safetensors")
    with pytest.raises(LdmPipeError, match="there is a LoRA 'good' already"):
        loras.add(tmp_path / "good.safetensors")
    with pytest.raises(LdmPipeError, match="there is no LoRA 'bad'"):
        loras.set_scales(bad=1.0)


@pytest.mark.parametrize("kind", ["diffusers", "a1111", "bare"])
def test_a_word_is_learnt_from_every_kind_of_file(kind: str, folder: Path, tmp_path: Path) -> None:
    encoder = CLIPTextEncoder.from_pretrained(folder / "text_encoder")
    vectors, path = _numbers(3, 2, 32), tmp_path / "word.pt"
    content: Any = {"string_to_param": {"*": vectors}, "string_to_token": {"*": 265}, "name": "<thing>", "step": 9}
    match kind:
        case "diffusers":
            path = tmp_path / "word.safetensors"
            save_word(path, "<thing>", [vectors])
        case "a1111":
            torch.save(content, path)
        case "bare":
            torch.save(vectors, path)
            with pytest.raises(LdmPipeError, match="does not name its word"):
                load_word([encoder], path)
    size = encoder.config.vocab_size
    assert load_word([encoder], path, "<thing>" if kind == "bare" else None) == "<thing>"
    assert torch.equal(encoder.text_model.embeddings.token_embedding.weight[size:], vectors)
    assert encoder.tokenizer is not None
    assert encoder.tokenizer(["a <thing>"]).ids[0, 2:4].tolist() == [size, size + 1]


def test_a_word_for_two_encoders_and_one_of_another_family(folder: Path, tmp_path: Path) -> None:
    encoders = [CLIPTextEncoder.from_pretrained(folder / "text_encoder") for _ in range(2)]
    save_word(tmp_path / "two.safetensors", "<x>", [torch.ones(1, 32), torch.zeros(1, 32)])
    assert [x.tolist() for x in read_vectors(tmp_path / "two.safetensors")[1]] == [[[1.0] * 32], [[0.0] * 32]]
    assert load_word(encoders, tmp_path / "two.safetensors", "<x>") == "<x>"
    save_word(tmp_path / "wide.safetensors", "<y>", [torch.ones(1, 33)])
    with pytest.raises(LdmPipeError, match=r"the vectors are \[33\] wide, the text encoders \[32\]"):
        load_word(encoders[:1], tmp_path / "wide.safetensors")
    save_tensors(tmp_path / "many.safetensors", {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(LdmPipeError, match="One word, or clip_l and clip_g"):
        read_vectors(tmp_path / "many.safetensors")
