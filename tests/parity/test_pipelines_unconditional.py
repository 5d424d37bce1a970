"""Drawing without words against diffusers' pipelines (0.42) on tiny random models, fp32.

The same operators in another order: 1e-4 of [0, 1], from the same noise. Step numbers divide the 1000 times of
training, as diffusers' DDIM lands elsewhere otherwise.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.pipelines import UnconditionalPipeline
from tests.pipelines import AUTOENCODER, OF_ADM, UNET_2D, close, quiet, seeded

diffusers = pytest.importorskip("diffusers", reason="the reference")

ADM = {
    **UNET_2D,
    **OF_ADM,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
VQ = {**AUTOENCODER, "num_vq_embeddings": 16, "scaling_factor": 0.5}


def unet(config: dict[str, Any]) -> Any:
    """Build a network whose outputs are of the size of noise, so that a wrong step shows."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        net.conv_out.weight.mul_(2)
    return net


def folder(pipe: Any, path: Path) -> Path:
    pipe.save_pretrained(path)
    return path


def load(path: Path) -> UnconditionalPipeline:
    return quiet(UnconditionalPipeline.from_pretrained(path))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm(variance: str, clip: bool, tmp_path: Path) -> None:
    """Ancestral: the same generator draws the same noise; clip_sample, which pixels rely on, and the variance count."""
    scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=clip)
    theirs = quiet(diffusers.DDPMPipeline(unet(UNET_2D), scheduler))
    ours = load(folder(theirs, tmp_path))
    call: dict[str, Any] = {"batch_size": 2, "num_inference_steps": 10, "output_type": "pt"}
    close(ours(**call, generator=seeded()).images, theirs(**call, generator=seeded()).images)
    generators = [seeded(4), seeded(5)]
    close(ours(**call, seed=4).images, theirs(**call, generator=generators).images)
    assert ours.defaults.num_inference_steps == 1000


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim(eta: float, clip: bool, tmp_path: Path) -> None:
    """With clip_sample diffusers clips x0, but goes along the eps of before, unless use_clipped_model_output."""
    theirs = quiet(diffusers.DDIMPipeline(unet(UNET_2D), diffusers.DDIMScheduler(clip_sample=clip)))
    ours = load(folder(theirs, tmp_path))
    call: dict[str, Any] = {"batch_size": 2, "num_inference_steps": 10, "eta": eta, "output_type": "pt"}
    close(ours(**call, generator=seeded()).images, theirs(**call, generator=seeded()).images)
    if clip:
        options = {"sampler_options": {"keep_eps": False}}
        wanted = theirs(**call, generator=seeded(), use_clipped_model_output=True).images
        close(ours(**call, generator=seeded(), **options).images, wanted)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_latent_diffusion_without_words(name: str, tmp_path: Path) -> None:
    """LDM celebahq: a VQ model whose scale is written, and any scheduler."""
    torch.manual_seed(1)
    vqvae = diffusers.VQModel(**VQ).eval()
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    if name == "DDIMScheduler":
        scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    theirs = quiet(diffusers.LDMPipeline(vqvae=vqvae, unet=unet(UNET_2D), scheduler=scheduler))
    ours = load(folder(theirs, tmp_path))
    wanted = torch.from_numpy(theirs(2, generator=seeded(), num_inference_steps=10, output_type="np").images)
    got = ours(2, generator=seeded(), num_inference_steps=10, output_type="pt").images
    assert got.shape == (2, 3, 16, 16)
    close(got, wanted.permute(0, 3, 1, 2))


@pytest.mark.parametrize("way", ["set", "call"])
def test_a_scheduler_object_does_what_its_config_says(way: str, tmp_path: Path) -> None:
    """As in diffusers, one is swapped for another by its config; clip_sample is then its own business."""
    theirs = quiet(diffusers.DDIMPipeline(unet(UNET_2D), diffusers.DDIMScheduler()))
    ours = load(folder(diffusers.DDPMPipeline(theirs.unet, diffusers.DDPMScheduler()), tmp_path))
    call: dict[str, Any] = {"batch_size": 2, "num_inference_steps": 10, "output_type": "pt"}
    wanted = theirs(**call, generator=seeded()).images
    other = diffusers.DDIMScheduler.from_config(ours.scheduler.config)
    if way == "set":
        ours.scheduler = other
    else:
        call["sampler"] = other
    close(ours(**call, generator=seeded()).images, wanted)


def by_hand(net: Any, scheduler: Any, labels: Tensor, null: int | None, scale: float) -> Tensor:
    """Draw by class, which no pipeline of diffusers does with this network: their network, their scheduler."""
    generator = seeded()
    x = torch.randn((len(labels), 3, 8, 8), generator=generator)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = net(x, t, class_labels=labels).sample
            if null is not None:
                without = net(x, t, class_labels=torch.full_like(labels, null)).sample[:, :3]
                guided = without + scale * (output[:, :3] - without)
                output = torch.cat([guided, output[:, 3:]], dim=1)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("null", [None, 4])
def test_by_class_with_a_learnt_variance(null: int | None, tmp_path: Path) -> None:
    """ADM: classes, a learnt variance, and guidance where one of the classes means none."""
    net = unet(ADM)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2")
    ours = load(folder(diffusers.DDPMPipeline(net, scheduler), tmp_path))
    ours.null_label = null
    labels = torch.tensor([1, 3])
    wanted = by_hand(net, scheduler, labels, null, 2.5)
    call: dict[str, Any] = {"class_labels": [1, 3], "num_inference_steps": 10, "output_type": "pt"}
    close(ours(**call, guidance_scale=2.5 if null else 1.0, generator=seeded()).images, wanted)


@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "LDM"])
def test_diffusers_draws_what_was_written(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read, written, read by diffusers without a word, drawn: the same picture a third time."""
    ancestral = diffusers.DDPMScheduler(variance_type="fixed_large")
    scheduler = ancestral if kind == "DDPM" else diffusers.DDIMScheduler(clip_sample=kind == "DDIM")
    parts: dict[str, Any] = {"unet": unet(UNET_2D), "scheduler": scheduler}
    if kind == "LDM":
        torch.manual_seed(1)
        parts["vqvae"] = diffusers.VQModel(**VQ).eval()
    library = getattr(diffusers, f"{kind}Pipeline")
    ours = load(folder(library(**parts), tmp_path / "theirs"))
    ours.save_pretrained(tmp_path / "ours")
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        again = quiet(library.from_pretrained(tmp_path / "ours"))
    assert caplog.records == []
    call: dict[str, Any] = {"generator": seeded(), "num_inference_steps": 5, "output_type": "np"}
    wanted = torch.from_numpy(again(**call).images).permute(0, 3, 1, 2)
    close(load(tmp_path / "ours")(num_inference_steps=5, generator=seeded(), output_type="pt").images, wanted)
