"""LoRAs and words that we write, read by diffusers (0.42) with peft; the pictures of both, and of kohya's spelling.

Tolerance 1e-4 in [0, 1]: they add the two halves to each layer's output, we merge them into its weight.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conditioning import CLIPTextEncoder
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.interop.lora.file import Layers, LoraLayer, networks_of, read_lora, save_lora
from ldm_pipe.interop.lora.forms import changed
from ldm_pipe.interop.lora.words import save_word
from ldm_pipe.interop.single.families import FAMILIES
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.export import _listening as listening
from ldm_pipe.pretrained import load_tensors, save_tensors
from tests.single_files import make_folder

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
MODULES = {
    "unet": (f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_v", f"{ATTENTION}.attn1.to_out.0"),
    "text_encoder": ("text_model.encoder.layers.1.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"),
}


def _layers(
    pipe: LatentDiffusionPipeline, seed: int = 3, modules: dict[str, tuple[str, ...]] = MODULES
) -> dict[tuple[str, str], LoraLayer]:
    generator, networks = torch.Generator().manual_seed(seed), networks_of(pipe)
    layers: dict[tuple[str, str], LoraLayer] = {}
    for part, names in modules.items():
        for name in names:
            rows, columns = networks[part].get_submodule(name).weight.shape  # type: ignore[misc]
            halves = (0.3 * torch.randn(shape, generator=generator) for shape in ((2, columns), (rows, 2)))
            layers[part, name] = LoraLayer(*halves, alpha=1.0)
    return layers


def _pictures(pipe: Any, prompt: str, **more: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    return pipe(prompt, latents=latents, **sizes, **more).images


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_diffusers_draws_the_same_with_our_lora(spelling: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", "sd1")
    ours = LatentDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True, safety_checker=None)
    layers, path = _layers(ours), tmp_path / "lora.safetensors"
    if spelling == "diffusers":
        save_lora(path, layers)
    else:
        flat = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
        tensors = {}
        for (part, module), layer in layers.items():
            name = flat[part] + module.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
        save_tensors(path, tensors)
    without = _pictures(ours, "abba")
    ours.load_lora_weights(path, "one")
    with listening() as said:
        theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="one")
    assert said == [] or spelling == "kohya"  # diffusers itself renames those of text encoders wrongly
    expected = _pictures(theirs, "abba")
    assert float((without - expected).abs().max()) > 1e-2
    torch.testing.assert_close(_pictures(ours, "abba"), expected, rtol=0, atol=1e-4)
    theirs.set_adapters(["one"], adapter_weights=[0.4])
    ours.set_adapters(["one"], [0.4])
    torch.testing.assert_close(_pictures(ours, "abba"), _pictures(theirs, "abba"), rtol=0, atol=1e-4)
    ours.disable_lora()
    assert torch.equal(_pictures(ours, "abba"), without)


def test_the_methods_mean_what_they_mean_in_diffusers(tmp_path: Path) -> None:
    """Several at once, weights by network, fused, unfused, disabled, deleted, unloaded: the same picture each time."""
    folder = make_folder(tmp_path / "folder", "sd1")
    ours = LatentDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True, safety_checker=None)
    for seed, name in enumerate("ab"):
        save_lora(tmp_path / f"{name}.safetensors", _layers(ours, seed))
    without = _pictures(ours, "abba")

    def same() -> torch.Tensor:
        mine = _pictures(ours, "abba")
        torch.testing.assert_close(mine, _pictures(theirs, "abba"), rtol=0, atol=1e-4)
        assert set(ours.get_active_adapters()) == set(theirs.get_active_adapters())
        assert {k: set(v) for k, v in ours.get_list_adapters().items()} == {
            k: set(v) for k, v in theirs.get_list_adapters().items() if v
        }
        return mine

    steps: list[tuple[str, tuple[Any, ...]]] = [
        ("set_adapters", (["a", "b"], [0.5, 0.8])),
        ("set_adapters", (["a", "b"], [{"unet": 0.2, "text_encoder": 1.1}, 0.4])),
        ("set_adapters", ("b",)),
        ("disable_lora", ()),
        ("enable_lora", ()),
        ("set_adapters", (["a", "b"], 0.7)),
        ("delete_adapters", ("a",)),
    ]
    for pipe in (ours, theirs):
        for name in "ab":
            pipe.load_lora_weights(str(tmp_path / f"{name}.safetensors"), adapter_name=name)
    pictures = []
    for method, arguments in steps:
        for pipe in (ours, theirs):
            getattr(pipe, method)(*arguments)
        pictures.append(same())
    assert torch.equal(pictures[3], without)
    assert torch.equal(pictures[2], pictures[4])
    for pipe in (ours, theirs):
        pipe.fuse_lora(lora_scale=0.5)
    fused = same()
    ours.unfuse_lora()
    assert torch.equal(_pictures(ours, "abba"), pictures[-1])
    theirs.unfuse_lora()
    for pipe in (ours, theirs):  # diffusers keeps lora_scale until the weights are set anew
        pipe.set_adapters(["b"], 0.7)
    assert torch.equal(same(), pictures[-1])
    for pipe in (ours, theirs):
        pipe.fuse_lora(lora_scale=0.5)
        pipe.unload_lora_weights()
    assert torch.equal(_pictures(ours, "abba"), fused)
    torch.testing.assert_close(_pictures(theirs, "abba"), fused, rtol=0, atol=1e-4)


def test_diffusers_reads_our_kohya_layout_of_sdxl(tmp_path: Path) -> None:
    """The U-Net's modules stand there under the original names; the scales are alphas of their own."""
    folder = make_folder(tmp_path / "folder", "sdxl")
    ours = LatentDiffusionPipeline.from_pretrained(folder)
    unet = diffusers.UNet2DConditionModel.from_pretrained(str(folder / "unet"))
    name = "up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_v"
    rows, columns = ours.unet.get_submodule(name).weight.shape  # type: ignore[misc]
    generator = torch.Generator().manual_seed(0)
    halves = (torch.randn(shape, generator=generator) for shape in ((2, columns), (rows, 2)))
    layer = LoraLayer(*halves, alpha=1.0)
    save_lora(tmp_path / "xl.safetensors", {("unet", name): layer}, layout="kohya", networks=networks_of(ours))
    load = diffusers.StableDiffusionXLPipeline
    tensors, alphas = load.lora_state_dict(str(tmp_path / "xl.safetensors"), unet_config=unet.config)
    load.load_lora_into_unet(tensors, network_alphas=alphas, unet=unet, adapter_name="xl")
    found = unet.get_submodule(name)
    torch.testing.assert_close(found.get_delta_weight("xl").detach(), layer.delta(), rtol=1e-5, atol=1e-5)
    ours.load_lora_weights(tmp_path / "xl.safetensors")
    merged = found.base_layer.weight.detach() + layer.delta()
    torch.testing.assert_close(ours.unet.get_submodule(name).weight.detach(), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_sdxl_draws_the_same_with_loras_of_the_unet_and_both_encoders(layout: Any, tmp_path: Path) -> None:
    """One at a scale, two with weights by network, fused: pictures, 1e-4 of [0, 1]."""
    folder = make_folder(tmp_path / "folder", "sdxl")
    ours = LatentDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(str(folder), local_files_only=True)
    # without an out_proj diffusers misreads kohya's names of a text encoder's attention
    text = tuple(
        f"text_model.encoder.layers.0.{name}" for name in ("self_attn.v_proj", "self_attn.out_proj", "mlp.fc1")
    )
    up = "up_blocks.0.attentions.0.transformer_blocks.1"
    unet = (f"{up}.attn1.to_q", f"{up}.attn2.to_v", f"{up}.ff.net.0.proj")
    modules = {"unet": unet, "text_encoder": text, "text_encoder_2": text}
    for seed, name in enumerate("ab"):
        path = tmp_path / f"{name}.safetensors"
        save_lora(path, _layers(ours, seed, modules), layout=layout, networks=networks_of(ours))
        for pipe in (ours, theirs):
            pipe.load_lora_weights(str(path), adapter_name=name)
    pictures = []
    weights: list[tuple[Any, Any]] = [
        (["a"], [0.4]),
        (["a", "b"], [0.5, 0.8]),
        (["a", "b"], [{"unet": 0.0, "text_encoder": 1.1, "text_encoder_2": 0.0}, 0.0]),
        (["a", "b"], [{"unet": 0.0, "text_encoder": 0.0, "text_encoder_2": 1.1}, 0.2]),
    ]
    for names, scales in weights:
        for pipe in (ours, theirs):
            pipe.set_adapters(names, scales)
        pictures.append(_pictures(ours, "abba"))
        torch.testing.assert_close(pictures[-1], _pictures(theirs, "abba"), rtol=0, atol=1e-4)
    for pipe in (ours, theirs):
        pipe.set_adapters(["a", "b"], [0.5, 0.8])
        pipe.fuse_lora(lora_scale=0.7)
        pipe.unload_lora_weights()
    pictures.append(_pictures(ours, "abba"))
    torch.testing.assert_close(pictures[-1], _pictures(theirs, "abba"), rtol=0, atol=1e-4)
    pairs = [(x - y).abs().max() for i, x in enumerate(pictures) for y in pictures[:i]]
    assert float(min(pairs)) > 1e-3


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sd1", (354, "d41a9f3fdcd976b2")),
        ("sd2", (420, "55663dcb99981469")),
        ("sdxl", (1059, "53a7a5f500942650")),
        ("sdxl-refiner", (747, "b28a19d884c8462f")),
    ],
)
def test_kohyas_names_are_those_that_comfyui_and_a1111_look_up(
    name: str, wanted: tuple[int, str], tmp_path: Path
) -> None:
    """Every Linear and Conv2d of the full-size networks.

    ComfyUI a125cd8 found each of these names, but for the refiner's projection; A1111's rules lead each to a module of
    CompVis or sgm, but for SDXL's projection and the refiner's text encoder.
    """
    family = FAMILIES[name]
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {"unet": UNet.from_config(family.unet)}
        networks |= {text.folder: CLIPTextEncoder.from_config(text.config) for text in family.texts}
    layer = LoraLayer(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    kinds = (nn.Linear, nn.Conv2d)
    names = {(part, key) for part, net in networks.items() for key, m in net.named_modules() if isinstance(m, kinds)}
    save_lora(tmp_path / "x.safetensors", dict.fromkeys(names, layer), layout="kohya", networks=networks)
    lines = "\n".join(sorted(load_tensors(tmp_path / "x.safetensors")))
    assert (len(names), hashlib.sha256(lines.encode()).hexdigest()[:16]) == wanted


def test_dora_of_peft_draws_the_same(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", "sd1")
    ours = LatentDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True, safety_checker=None)
    layers = Layers()
    for (part, name), layer in _layers(ours).items():
        if part == "unet":
            weight: Any = ours.unet.get_submodule(name).weight
            layers[part, name] = replace(layer, magnitude=1.3 * weight.detach().norm(dim=1))
    save_lora(tmp_path / "dora.safetensors", layers)
    for pipe in (ours, theirs):
        pipe.load_lora_weights(str(tmp_path / "dora.safetensors"), adapter_name="dora")
    assert theirs.unet.peft_config["dora"].use_dora
    torch.testing.assert_close(_pictures(ours, "abba"), _pictures(theirs, "abba"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "LoraConfig"])
def test_what_peft_saves_changes_the_weights_as_in_peft(kind: str, tmp_path: Path) -> None:
    """PEFT 0.21's own files: LoHa, LoKr (with cores, of Linear and Conv2d) and LoRA by rank-stabilised alpha."""
    peft: Any = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(12, 8), torch.nn.Conv2d(8, 12, 3)

    torch.manual_seed(0)
    more: dict[str, Any] = {
        "LoHaConfig": {"alpha": 3, "use_effective_conv2d": True, "init_weights": False},
        "LoKrConfig": {"alpha": 3, "use_effective_conv2d": True, "init_weights": False},
        "LoraConfig": {"lora_alpha": 3, "use_rslora": True, "init_lora_weights": False, "alpha_pattern": {"two": 5}},
    }[kind]
    net = Net()
    plain = {name: getattr(net, name).weight.detach().clone() for name in ("one", "two")}
    model = peft.get_peft_model(net, getattr(peft, kind)(r=2, target_modules=["one", "two"], **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(str(tmp_path / "file"))
    layers = read_lora(tmp_path / "file", {"unet": Net()})
    merged = model.merge_and_unload()
    for name, weight in plain.items():
        found = weight + changed(layers["unet", name], weight, 1.0)
        torch.testing.assert_close(found, getattr(merged, name).weight.detach(), rtol=1e-5, atol=1e-4)
        assert not torch.allclose(found, weight, atol=1e-2)


def test_diffusers_draws_the_same_with_our_word(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", "sd1")
    ours = LatentDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True, safety_checker=None)
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    save_word(tmp_path / "word.safetensors", "<thing>", [vectors])
    ours.load_textual_inversion(tmp_path / "word.safetensors")
    theirs.load_textual_inversion(str(tmp_path), weight_name="word.safetensors")
    expected = _pictures(theirs, "a <thing>")
    torch.testing.assert_close(_pictures(ours, "a <thing>"), expected, rtol=0, atol=1e-4)
    assert float((_pictures(ours, "a") - expected).abs().max()) > 1e-3
    theirs.unload_textual_inversion()
    ours.unload_textual_inversion()
    torch.testing.assert_close(_pictures(ours, "a b"), _pictures(theirs, "a b"), rtol=0, atol=1e-4)
