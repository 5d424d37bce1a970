"""Results of fine-tuning, read by diffusers (0.42) with peft (0.21): the same pictures. And peft's gradients.

Tolerance of pictures 1e-4 in [0, 1]: diffusers adds a LoRA to each layer's output, our folder holds it merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.interop.lora.file import networks_of
from ldm_pipe.interop.lora.layers import TrainableLora
from ldm_pipe.training.tasks.finetune.nets import LORA_FILE, WORD_FILE
from tests.finetuning import TINY, start

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

WORD = {"method": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "apple", "num_vectors": 2}


def pictures(pipe: Any, prompt: str) -> torch.Tensor:
    """Draw from fixed noise with the DDIM steps of both libraries."""
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    how = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    return pipe(prompt, latents=latents, **how).images


def theirs(folder: Path) -> Any:
    """Load a folder with diffusers."""
    return diffusers.StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True, safety_checker=None)


def test_diffusers_draws_the_same_with_a_lora_trained_here(tmp_path: Path) -> None:
    start(tmp_path, method="lora", train_text_encoder=True, lora_alpha=8.0)[0].fit()
    ours = pictures(LatentDiffusionPipeline.from_pretrained(tmp_path / "run"), "red apple")
    plain = theirs(TINY)
    before = pictures(plain, "red apple")
    plain.load_lora_weights(str(tmp_path / "run"), weight_name=LORA_FILE)
    torch.testing.assert_close(pictures(plain, "red apple"), ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(pictures(theirs(tmp_path / "run" / "pipeline"), "red apple"), ours, rtol=0, atol=1e-4)
    assert float((before - ours).abs().max()) > 1e-2


def test_diffusers_draws_the_same_with_a_word_trained_here(tmp_path: Path) -> None:
    start(tmp_path, **WORD)[0].fit()
    ours = pictures(LatentDiffusionPipeline.from_pretrained(tmp_path / "run"), "<x> in the sea")
    plain = theirs(TINY)
    plain.load_textual_inversion(str(tmp_path / "run"), weight_name=WORD_FILE)
    torch.testing.assert_close(pictures(plain, "<x> in the sea"), ours, rtol=0, atol=1e-4)


def test_the_gradients_of_a_lora_are_those_of_peft() -> None:
    """float64: the two differ by the order of sums alone."""
    pipe, generator = LatentDiffusionPipeline.from_pretrained(TINY), torch.Generator().manual_seed(0)
    lora = TrainableLora({"unet": networks_of(pipe)["unet"]}, rank=3, alpha=6.0, generator=generator).double()
    unet = pipe.unet.double()
    other = diffusers.UNet2DConditionModel.from_pretrained(str(TINY / "unet"), local_files_only=True).double()
    other.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    other.add_adapter(peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=targets))
    matched = dict(other.named_parameters())
    pairs = []
    with torch.no_grad():
        for (_, name), branch in zip(lora.places, lora.branches, strict=True):
            branch.up.copy_(torch.randn(branch.up.shape, generator=generator))
            for half, mine in (("lora_A", branch.down), ("lora_B", branch.up)):
                peer = matched[f"{name}.{half}.default.weight"]
                peer.copy_(mine)
                pairs.append((mine, peer))
    x, tokens = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 8, 8), (2, 16, 32)))
    t = torch.tensor([3, 700])
    unet(x, t, tokens=tokens).square().mean().backward()
    other(x, t, tokens, return_dict=False)[0].square().mean().backward()
    assert len(pairs) == sum(p.requires_grad for p in other.parameters())
    for mine, peer in pairs:
        torch.testing.assert_close(mine.grad, peer.grad, rtol=1e-4, atol=1e-9)  # t is embedded in float32
