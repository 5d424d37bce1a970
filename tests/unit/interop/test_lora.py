"""Files of LoRAs and new words: names of all spellings, every form, refusals; merged and taken out to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conditioning import CLIPTextEncoder
from ldm_pipe.interop.lora.file import LohaLayer, LokrLayer, LoraLayer, read_lora, save_lora
from ldm_pipe.interop.lora.forms import changed
from ldm_pipe.interop.lora.layers import TrainableLora
from ldm_pipe.interop.lora.words import forget_words, load_word, read_vectors, save_word
from ldm_pipe.interop.single.ldm_names import rename, unet_modules
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.loras import Loras
from ldm_pipe.pretrained import LdmPipeError, load_tensors, save_tensors
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


def _layers(seed: int, networks: dict[str, nn.Module], alpha: float = 1.0) -> dict[tuple[str, str], LoraLayer]:
    """Two halves of rank 2 for a matrix, a convolution and a text encoder's matrix."""
    layers: dict[tuple[str, str], LoraLayer] = {}
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
    loras.add(tmp_path / "a.safetensors", "a")
    once = _weights(networks)
    loras.add(tmp_path / "b.safetensors", "other", 0.5)
    for (part, name), layer in first.items():
        key = f"{part} {name}.weight"
        both = plain[key] + layer.delta() + 0.5 * second[part, name].delta()
        torch.testing.assert_close(_weights(networks)[key], both, rtol=1e-5, atol=1e-5)
        assert not torch.equal(plain[key], once[key])
    loras.set({"a": 1.0})
    assert _same(networks, once)
    loras.set({"a": 1.0, "other": 0.5})
    loras.delete(["other"])
    assert _same(networks, once)
    loras.enable(False)
    assert _same(networks, plain)
    loras.enable(True)
    assert _same(networks, once)
    loras.delete(["a"])
    assert _same(networks, plain)
    assert loras.adapters == {}


def test_fused_loras_stay_and_come_out_to_the_bit(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    """diffusers' words: fuse_lora fixes them, unload_lora_weights leaves the fused ones in the weights for good."""
    plain, loras = _weights(networks), Loras(networks)
    for name in ("a", "b"):
        save_lora(tmp_path / name, _layers(ord(name), networks))
        loras.add(tmp_path / name, name, {"unet": 0.5, "text_encoder": 2.0} if name == "b" else 1.0)
    both = _weights(networks)
    loras.fuse()
    assert _same(networks, both)
    with pytest.raises(LdmPipeError, match="is fused"):
        loras.set({"a": 0.5})
    with pytest.raises(LdmPipeError, match="is fused"):
        loras.delete(["b"])
    loras.enable(False)  # acts on what is not fused
    assert _same(networks, both)
    loras.enable(True)
    loras.unfuse()
    loras.fuse(0.0)
    assert _same(networks, plain)
    loras.unfuse()
    assert _same(networks, both)
    loras.set({"a": 1.0})
    only_a = _weights(networks)
    loras.fuse(1.0, ["a"])
    loras.unload()
    assert _same(networks, only_a)
    assert loras.adapters == {}
    with pytest.raises(LdmPipeError, match="no LoRA is active"):
        loras.fuse()


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
    Loras(networks).add(tmp_path / "a.safetensors", "a")
    a, b = layers["unet", Q].down, layers["unet", Q].up
    torch.testing.assert_close(linear(x), before[0] + 1.5 * x @ a.T @ b.T, rtol=1e-5, atol=1e-4)
    a, b = layers["unet", CONV].down, layers["unet", CONV].up
    change = nn.functional.conv2d(nn.functional.conv2d(image, a, padding=1), b)
    torch.testing.assert_close(conv(image), before[1] + 1.5 * change, rtol=1e-5, atol=1e-3)


def _kohya(layers: dict[tuple[str, str], LoraLayer], unet: UNet, *, original: bool) -> dict[str, Tensor]:
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
        "half": ({name: x for name, x in good.items() if name != down}, "a part is missing"),
        "wide": ({**good, down: torch.ones(2, 33)}, "the weight"),
        "dora": ({**good, down.replace("lora_down.weight", "dora_scale"): torch.ones(3)}, "of factors|the weight"),
        "norm": ({**good, "lora_unet_x.w_norm": torch.ones(1)}, "tensors of no known adapter: lora_unet_x.w_norm"),
        "oft": ({**good, "lora_unet_x.oft_blocks": torch.ones(1)}, "tensors of no known adapter"),
        "full": ({**good, "lora_unet_x.diff": torch.ones(1)}, "tensors of no known adapter"),
        "bias": ({**good, "unet.x.lora_B.bias": torch.ones(1)}, "tensors of no known adapter"),
        "other": ({**good, "betas": torch.ones(2)}, "tensors of no known adapter: betas"),
        "nan": ({**good, down: torch.full((2, 32), torch.nan)}, "NaN or infinity"),
        "empty": ({"x.alpha": torch.tensor(1.0)}, "alphas without an adapter: x"),
        "alpha": ({**good, "lora_unet_y.alpha": torch.tensor(1.0)}, "alphas without an adapter: lora_unet_y"),
        "mixed": ({**good, down.replace("lora_down.weight", "hada_w1_a"): torch.ones(1)}, "a part is missing"),
    }
    loras = Loras(networks)
    for name, (tensors, reason) in cases.items():
        save_tensors(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(LdmPipeError, match=reason):
            loras.add(tmp_path / f"{name}.safetensors", name)
        assert loras.adapters == {}
    save_tensors(tmp_path / "good.safetensors", good)
    assert _same(networks, plain)
    loras.add(tmp_path / "good.safetensors", "good")
    with pytest.raises(LdmPipeError, match="there is a LoRA 'good' already"):
        loras.add(tmp_path / "good.safetensors", "good")
    with pytest.raises(LdmPipeError, match="there is no LoRA 'bad'"):
        loras.set({"bad": 1.0})
    for weight in (float("nan"), {"vae": 1.0}, "much"):
        with pytest.raises(LdmPipeError, match="weight"):
            loras.set({"good": weight})  # type: ignore[dict-item]


def _forms(weight: Tensor) -> dict[str, Any]:
    """Every form of an adapter for one weight, rank 2, alpha 3."""
    rows, columns, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    flat = weight[0].numel()
    magnitude = _numbers(5, rows).abs() + 1
    lora = LoraLayer(_numbers(1, 2, *weight.shape[1:]), _numbers(2, rows, 2, *[1] * len(kernel)), 3.0)
    forms: dict[str, Any] = {
        "lora": lora,
        "dora": LoraLayer(lora.down, lora.up, 3.0, magnitude=magnitude),
        "dora of inputs": LoraLayer(lora.down, lora.up, 3.0, magnitude=_numbers(5, 1, columns, *[1] * len(kernel))),
        "loha": LohaLayer(*(_numbers(i, *shape) for i, shape in enumerate(((rows, 2), (2, flat)) * 2)), alpha=3.0),
        "lokr": LokrLayer(_numbers(1, 4, 2), (_numbers(2, rows // 4, 2), _numbers(3, 2, flat // 2)), 3.0),
        "lokr whole": LokrLayer(_numbers(1, 4, 2), _numbers(2, rows // 4, columns // 2, *kernel), 3.0),
    }
    if kernel:
        core = _numbers(7, 2, 2, *kernel)
        halves = _numbers(1, 2, columns, 1, 1), _numbers(2, rows, 2, 1, 1)
        pairs = [_numbers(i, 2, side) for i, side in enumerate((rows, columns) * 2)]
        forms["locon"] = LoraLayer(*halves, 3.0, core=core)
        forms["loha core"] = LohaLayer(*pairs, alpha=3.0, core1=core, core2=core + 1)
        pair = _numbers(2, 2, rows // 4), _numbers(3, 2, columns // 2)
        forms["lokr core"] = LokrLayer((_numbers(1, 4, 2), _numbers(4, 2, 2)), pair, 3.0, core=core)
    return forms


@pytest.mark.parametrize("module", [Q, CONV])
def test_every_form_is_written_for_a1111_and_read_again(
    module: str, networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    weight = networks["unet"].get_submodule(module).weight
    assert isinstance(weight, Tensor)
    for name, layer in _forms(weight.detach()).items():
        path = tmp_path / f"{name}.safetensors"
        save_lora(path, {("unet", module): layer}, layout="kohya", networks=networks)
        ((place, found),) = read_lora(path, networks).items()
        assert place == ("unet", module)
        assert type(found) is type(layer)
        wanted = changed(layer, weight.detach(), 0.5)
        assert torch.equal(changed(found, weight.detach(), 0.5), wanted), name
        assert float(wanted.abs().max()) > 0.1
    scale = load_tensors(tmp_path / "dora.safetensors")[f"lora_unet_{module.replace('.', '_')}.dora_scale"]
    assert scale.shape == (len(weight), *[1] * (weight.ndim - 1))  # ComfyUI 0.3.64 cannot multiply by a vector
    with pytest.raises(LdmPipeError, match="does not read for these models"):
        save_lora(tmp_path / "x", {("unet", module): _forms(weight.detach())["loha"]})


@pytest.mark.parametrize("module", [Q, CONV])
def test_a_magnitude_of_dora_sets_the_norm(module: str, networks: dict[str, nn.Module]) -> None:
    """Liu et al. 2024, eq. 5: each output's (or input's) weights have the norm m, whatever the change."""
    weight = networks["unet"].get_submodule(module).weight
    assert isinstance(weight, Tensor)
    forms = _forms(weight.detach())
    whole = weight + changed(forms["dora"], weight, 0.7)
    torch.testing.assert_close(whole.flatten(1).norm(dim=1), forms["dora"].magnitude.flatten(), rtol=1e-5, atol=1e-5)
    columns = (weight + changed(forms["dora of inputs"], weight, 0.7)).transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(columns, forms["dora of inputs"].magnitude.flatten().abs(), rtol=1e-5, atol=1e-5)


def test_the_alphas_of_pefts_config_count(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    """diffusers writes PEFT's config into the header of the file; PEFT itself beside it; the file has no alphas."""
    layers = _layers(1, networks)
    save_lora(tmp_path / "plain.safetensors", layers)
    tensors = load_tensors(tmp_path / "plain.safetensors")  # alpha / r is 0.5, in the second half
    config = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 8}, "text_encoder.r": 2}
    save_tensors(tmp_path / "diffusers.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)})
    found = read_lora(tmp_path / "diffusers.safetensors", networks)
    for place, factor in ((("unet", Q), 4.0), (("unet", CONV), 3.0), (("text_encoder", TEXT), 1.0)):
        torch.testing.assert_close(found[place].delta(), factor * layers[place].delta())
    folder = tmp_path / "peft"
    folder.mkdir()
    unet = {f"base_model.model.{n.removeprefix('unet.')}": x for n, x in tensors.items() if n.startswith("unet.")}
    save_tensors(folder / "adapter_model.safetensors", unet)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "use_rslora": True}))
    found = read_lora(folder, networks)
    torch.testing.assert_close(found["unet", Q].delta(), 6 / 2**0.5 * layers["unet", Q].delta())
    (folder / "adapter_config.json").write_text(json.dumps({"alpha_pattern": {".*(to_q|to_k)": 8}}))
    with pytest.raises(LdmPipeError, match="alpha_pattern"):
        read_lora(folder, networks)
    save_tensors(tmp_path / "bad.safetensors", tensors, {"lora_adapter_metadata": "["})
    with pytest.raises(LdmPipeError, match="no JSON object"):
        read_lora(tmp_path / "bad.safetensors", networks)


@torch.no_grad()
def test_a_lora_in_training_computes_what_it_is_merged_to(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    """Linear, 1x1, strided and upsampling convolutions; also where the U-Net has shorter ways for them."""
    unet = networks["unet"].eval()
    assert isinstance(unet, UNet)
    x, tokens = _numbers(1, 1, 4, 8, 8), _numbers(2, 1, 5, 32)

    def compute() -> Tensor:
        return unet(x, 3.0, tokens=unet.keep_tokens(tokens))

    plain = compute()
    ends = {"unet": ("to_q", "conv", "conv_shortcut", "proj_in", "net.2"), "text_encoder": ("q_proj", "fc1")}
    lora = TrainableLora(networks, rank=2, alpha=3.0, targets=ends, generator=torch.Generator().manual_seed(0))
    assert not any(p.requires_grad for net in networks.values() for p in net.parameters())
    torch.testing.assert_close(compute(), plain, rtol=1e-5, atol=1e-5)  # the shorter ways round otherwise
    for i, parameter in enumerate(lora.parameters()):
        parameter.copy_(0.2 * _numbers(i, *parameter.shape))
    trained = compute()
    assert float((trained - plain).abs().max()) > 0.1
    save_lora(tmp_path / "x", lora.layers())
    again = TrainableLora(networks, rank=2, alpha=1.0, targets=ends)
    again.load(read_lora(tmp_path / "x", networks))
    again.remove()
    lora.remove()
    assert torch.equal(compute(), plain)
    Loras(networks).add(tmp_path / "x", "x")
    torch.testing.assert_close(compute(), trained, rtol=1e-4, atol=1e-4)
    for place, layer in again.layers().items():
        torch.testing.assert_close(layer.delta(), lora.layers()[place].delta())
    with pytest.raises(LdmPipeError, match="another rank"):
        TrainableLora(networks, rank=3, targets=ends).load(lora.layers())
    with pytest.raises(LdmPipeError, match="no module whose name ends in"):
        TrainableLora(networks, rank=2, targets={"unet": ("nothing",)})


@pytest.mark.parametrize("kind", ["diffusers", "a1111", "bare"])
def test_a_word_is_learnt_from_every_kind_of_file(kind: str, folder: Path, tmp_path: Path) -> None:
    encoder = CLIPTextEncoder.from_pretrained(folder / "text_encoder")
    before = encoder.text_model.embeddings.token_embedding.weight.detach().clone()
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
    plain = encoder.tokenizer(["a b"]).ids
    with pytest.raises(LdmPipeError, match="the word '<thing>' is taken"):
        load_word([encoder], path, "<thing>")
    encoder.add_token("<other>", vectors + 1)
    forget_words(encoder, ["<thing>"])
    assert encoder.tokenizer(["a <other>"]).ids[0, 2:4].tolist() == [size, size + 1]
    assert torch.equal(encoder.text_model.embeddings.token_embedding.weight[size:], vectors + 1)
    with pytest.raises(LdmPipeError, match="were not added"):
        forget_words(encoder, ["<thing>"])
    forget_words(encoder)
    assert torch.equal(encoder.text_model.embeddings.token_embedding.weight, before)
    assert torch.equal(encoder.tokenizer(["a b"]).ids, plain)
    assert encoder.config.vocab_size == size


def test_a_word_for_two_encoders_and_one_of_another_family(folder: Path, tmp_path: Path) -> None:
    encoders = [CLIPTextEncoder.from_pretrained(folder / "text_encoder") for _ in range(2)]
    save_word(tmp_path / "two.safetensors", "<x>", [torch.ones(1, 32), torch.zeros(1, 32)])
    assert [x.tolist() for x in read_vectors(tmp_path / "two.safetensors")[1]] == [[[1.0] * 32], [[0.0] * 32]]
    assert load_word(encoders, tmp_path / "two.safetensors", "<x>") == "<x>"
    save_word(tmp_path / "wide.safetensors", "<y>", [torch.ones(1, 33)])
    with pytest.raises(LdmPipeError, match=r"the vectors are \[33\] wide, the text encoders \[32\]"):
        load_word(encoders[:1], tmp_path / "wide.safetensors")
    save_word(tmp_path / "nan.safetensors", "<z>", [torch.full((1, 32), torch.nan)])
    with pytest.raises(LdmPipeError, match="NaN or infinity in the word '<z>'"):
        load_word(encoders[:1], tmp_path / "nan.safetensors")
    save_tensors(tmp_path / "many.safetensors", {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(LdmPipeError, match="One word, or clip_l and clip_g"):
        read_vectors(tmp_path / "many.safetensors")
