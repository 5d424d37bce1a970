"""LoRAs and words that we write, read by diffusers (0.42) with peft; the pictures of both, and of kohya's spelling.

Tolerance 1e-4 in [0, 1]: they add the two halves to each layer's output, we merge them into its weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.interop.lora import Layers, LoraLayer, Loras, networks_of, save_lora
from ldm_pipe.interop.textual_inversion import load_word, save_word
from ldm_pipe.pretrained import save_tensors
from tests.single_files import make_folder

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
MODULES = {
    "unet": (f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_v", f"{ATTENTION}.attn1.to_out.0"),
    "text_encoder": ("text_model.encoder.layers.1.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"),
}


def _layers(pipe: LatentDiffusionPipeline) -> Layers:
    generator, layers, networks = torch.Generator().manual_seed(3), Layers(), networks_of(pipe)
    for part, names in MODULES.items():
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
    loras = Loras(networks_of(ours))
    loras.add(path, "one")
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="one")
    expected = _pictures(theirs, "abba")
    assert float((without - expected).abs().max()) > 1e-2
    torch.testing.assert_close(_pictures(ours, "abba"), expected, rtol=0, atol=1e-4)
    theirs.set_adapters(["one"], adapter_weights=[0.4])
    loras.set_scales(one=0.4)
    torch.testing.assert_close(_pictures(ours, "abba"), _pictures(theirs, "abba"), rtol=0, atol=1e-4)
    loras.unfuse()
    assert torch.equal(_pictures(ours, "abba"), without)


def test_diffusers_draws_the_same_with_our_word(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", "sd1")
    ours = LatentDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True, safety_checker=None)
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    save_word(tmp_path / "word.safetensors", "<thing>", [vectors])
    encoder = ours.text_encoders[0]
    assert load_word([encoder], tmp_path / "word.safetensors") == "<thing>"  # type: ignore[list-item]
    theirs.load_textual_inversion(str(tmp_path), weight_name="word.safetensors")
    expected = _pictures(theirs, "a <thing>")
    torch.testing.assert_close(_pictures(ours, "a <thing>"), expected, rtol=0, atol=1e-4)
    assert float((_pictures(ours, "a") - expected).abs().max()) > 1e-3
