"""Whether this code draws the same pictures and has the same losses as other code, to the bit.

    python -m benchmarks.same --record FILE    writes the hashes of this code
    python -m benchmarks.same --compare FILE   draws again, and names what differs; then the exit status is 1
    make same [BASE=HEAD~1]                    records at a commit and compares the working tree with it

Small seeded pictures of every pipeline and of every sampler, and the losses of six steps of every kind of training. The
networks are tiny and random. Hashes (SHA-256 of the float32 values) are of one machine: they are compared where they
were made, and not kept. It takes one minute of CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import AutoencoderKL
from ldm_pipe import NoiseSchedule, UNet, samplers
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.pipelines import PixelDiffusionPipeline, SuperResolutionPipeline, UnconditionalPipeline, UpscalePipeline
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow
from ldm_pipe.training.run.loop import Trainer
from tests import autoencoders, finetuning, training
from tests.pipelines import AUTOENCODER, OF_IF, UNET_2D, fill, quiet, tiny
from tests.unit.pipelines import test_unclip as unclip

LAW = NoiseSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps_offset=0)
FEW: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, "output_type": "pt"}
PROMPT = "red apple"
IF = {
    **OF_IF,
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
# What LatentDiffusionPipeline is asked for besides a prompt.
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 5.0, "negative_prompt": "eyes", "guidance_rescale": 0.7},
    "dynamic": {"thresholding": {"kind": "dynamic", "max_value": 0.8}, "eta": 0.7},
    "pixel": {"thresholding": {"kind": "static", "space": "pixel"}},
    "karras": {"sampler": "dpmpp_2m", "spacing": "karras", "num_images_per_prompt": 2},
    "ancestral": {"sampler": "euler_ancestral", "prompt": ["red apple", "green worm"]},
    "weighted": {"prompt": "(red:1.3) apple AND a [worm:cat:0.5]", "prompt_syntax": "weighted"},
    "timesteps": {"timesteps": [900, 500, 100]},
    "one by one": {"num_images_per_prompt": 2, "deterministic_batch": True},
    "generator": {"seed": None, "eta": 1.0},
    "handed on": {"denoising_end": 0.5, "output_type": "latent"},
}


def numbers(seed: int, *shape: int) -> Tensor:
    """Draw unit Gaussian numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(config: dict[str, Any]) -> UNet:
    """Build a U-Net of random weights."""
    return fill(UNet.from_config(config))


def latent_pictures() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the calls of LatentDiffusionPipeline, and its samplers."""
    pipe: Any = tiny()
    image, mask = numbers(1, 3, 32, 32).sigmoid(), torch.zeros(32, 32)
    mask[8:20] = 1
    calls = {
        **CALLS,
        **{f"sampler {name}": {"sampler": name, "num_inference_steps": 6} for name in samplers.NAMES},
        "picture": {"image": image, "strength": 0.7, "num_inference_steps": 6},
        "mask": {"image": image, "mask_image": mask},
    }
    calls["sampler lcm"] |= {"spacing": "lcm", "num_inference_steps": 4}

    def draw(call: dict[str, Any]) -> Tensor:
        generator = {} if call.get("seed", 1) else {"generator": torch.Generator().manual_seed(2)}
        return pipe(**{"prompt": PROMPT, **FEW, **call, **generator}).images

    for name, call in calls.items():
        yield f"latent, {name}", lambda call=call: draw(call)
    yield "latent, inverted", lambda: pipe.invert(image, PROMPT, num_inference_steps=4).latents
    yield "latent, frames", lambda: pipe.interpolate([PROMPT, "cat"], num_frames=3, **FEW).images
    yield "latent, varied", lambda: pipe.vary(image, PROMPT, strength=0.3, **FEW).images
    laws = {"vp": ContinuousVP(), "flow": Flow(), "ve": VE(), "edm": EDM()}
    for name, law in laws.items():
        net = quiet(UnconditionalPipeline(network({"_class_name": "UNet2DModel", **UNET_2D}), law))
        for sampler in ("ddim", "dpmpp_2m", "heun"):
            yield f"law {name}, {sampler}", lambda net=net, sampler=sampler: net(sampler=sampler, **FEW).images


def other_pictures() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the calls of the other pipelines."""
    plain = {"_class_name": "UNet2DModel", **UNET_2D}
    vae = fill(AutoencoderKL.from_config(AUTOENCODER))
    by_class = quiet(UnconditionalPipeline(network({**plain, "num_class_embeds": 5}), LAW, null_label=4))
    ancestral = Defaults(sampler="ddpm")
    small, width = numbers(4, 3, 8, 8).sigmoid(), IF["encoder_hid_dim"]
    embeds = {"prompt_embeds": numbers(5, 1, 4, width), "negative_prompt_embeds": numbers(6, 1, 4, width)}

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([(x * (i - 2)).flatten(1).mean(1) for i in range(5)], dim=1)

    steered = {"class_labels": 1, "classifier": classifier, "classifier_scale": 50.0}
    yield "pixels", lambda: quiet(UnconditionalPipeline(network(plain), LAW, defaults=ancestral))(**FEW).images
    yield "LDM", lambda: quiet(UnconditionalPipeline(network(plain), LAW, vae))(**FEW).images
    yield "by class", lambda: by_class(class_labels=[1, 2], guidance_scale=3.0, **FEW).images
    yield "classifier, score", lambda: by_class(**steered, **FEW).images
    yield "classifier, mean", lambda: by_class(**steered, sampler="ddpm", **FEW).images
    wide = network({**plain, "in_channels": 6})
    yield "super-resolution", lambda: quiet(SuperResolutionPipeline(wide, vae, LAW))(image=small, **FEW).images
    stage_1: Any = quiet(PixelDiffusionPipeline(network(IF), (), LAW, defaults=ancestral))
    yield "IF, stage I", lambda: stage_1(**embeds, guidance_scale=4.0, thresholding="dynamic", **FEW).images
    yield "IF, picture", lambda: stage_1(**embeds, image=small, strength=0.6, **FEW).images
    second = network({**IF, "sample_size": 16, "in_channels": 6, "class_embed_type": "timestep"})
    stage_2: Any = quiet(UpscalePipeline(second, None, (), LAW, LAW))
    yield "IF, stage II", lambda: stage_2(**embeds, image=small, noise_level=100, guidance_scale=2.0, **FEW).images
    for name, (make, call) in unclip.MAKERS.items():
        yield name, lambda make=make, call=call: make()(**call, seed=1).images


def trainings(folder: Path) -> Iterator[tuple[str, Callable[[], Trainer]]]:
    """Yield a trainer of every kind."""
    prior = {"instance_prompt": "a sks apple", "with_prior_preservation": True, "class_prompt": "an apple"}
    word = {"method": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "apple"}
    kinds: dict[str, dict[str, Any]] = {
        "diffusion": {},
        "diffusion of v": {"schedule": {"prediction_type": "v_prediction"}, "snr_gamma": 5.0},
        "diffusion by flow": {"schedule": {"kind": "flow", "prediction_type": "flow_prediction"}},
        "diffusion of EDM": {"schedule": {"kind": "edm", "prediction_type": "edm"}},
    }
    methods: dict[str, dict[str, Any]] = {
        "full": {"use_ema": True},
        "text encoder": {"train_text_encoder": True},
        "LoRA": {"method": "lora"},
        "word": word,
        "inpainting": {"inpainting": True},
        "dreambooth": {**prior, "num_class_images": 3, "sample_batch_size": 2},
    }
    for name, changes in kinds.items():
        config = training.make_config(folder / name, **changes)
        yield name, lambda config=config: training.make_trainer(config)
    for name, changes in methods.items():
        yield (
            f"fine-tuning, {name}",
            lambda name=name, changes=changes: finetuning.start(
                folder / name, max_train_steps=6, checkpointing_steps=100, **changes
            )[0],
        )
    yield "autoencoder", lambda: autoencoders.make_trainer(folder / "kl", max_train_steps=6)
    yield "VQ autoencoder", lambda: autoencoders.make_vq_trainer(folder / "vq", max_train_steps=6)


def digest(values: Tensor) -> str:
    """Hash float32 values."""
    return hashlib.sha256(values.detach().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def losses(trainer: Trainer) -> Tensor:
    """Return what six steps tell of themselves, in the order of their names, but for times and sizes."""
    steps = [trainer.train_step() for _ in range(6)]
    return torch.tensor([step[name] for step in steps for name in sorted(step) if "loss" in name], dtype=torch.float64)


def hashes() -> dict[str, str]:
    """Draw and train everything."""
    torch.set_num_threads(1)
    found = {name: digest(draw()) for name, draw in (*latent_pictures(), *other_pictures())}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in trainings(Path(folder)):
            found[f"six losses, {name}"] = digest(losses(make()))
    return found


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--record", type=Path, metavar="FILE")
    which.add_argument("--compare", type=Path, metavar="FILE")
    given = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = hashes()
    if given.record is not None:
        given.record.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{len(found)} hashes written to {given.record}")
        return 0
    known: dict[str, str] = json.loads(given.compare.read_text(encoding="utf-8"))
    for name in sorted(known.keys() ^ found.keys()):
        print(f"only {'before' if name in known else 'now'}: {name}")
    changed = [name for name in known.keys() & found.keys() if known[name] != found[name]]
    for name in sorted(changed):
        print(f"not the same: {name}")
    print(f"{len(known.keys() & found.keys()) - len(changed)} of {len(found)} are the same to the bit")
    return 1 if changed or known.keys() - found.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
