"""One training of a diffusion model: data, networks, loss and results put together.

What enters: a `DiffusionConfig`. What leaves: a trainer to `fit()`, as the script and notebooks do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from autoencoder import Autoencoder, load_autoencoder
from conditioning.load import AnyTextEncoder, load_text_encoder
from ldm_pipe.data.dataset import Records
from ldm_pipe.data.images import make_grid, save_picture
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law
from ldm_pipe.training.run.environment import process_device
from ldm_pipe.training.run.loop import Part, Trainer
from ldm_pipe.training.tasks.beside import Beside
from ldm_pipe.training.tasks.diffusion import DiffusionConfig, build_importance, build_objective, diffusion_loss
from ldm_pipe.training.tasks.inputs import build_unet, cache_inputs, shown_beside
from ldm_pipe.training.tasks.joint import JointNet
from ldm_pipe.training.tasks.pictures import drawing_weights, open_records, plan_shapes


def load_stages(config: DiffusionConfig, device: torch.device) -> tuple[Autoencoder, list[AnyTextEncoder]]:
    """Load the trained autoencoder and the text encoders, frozen."""
    autoencoder = load_autoencoder(config.autoencoder, device=device).requires_grad_(False)
    names = [name for name in (config.text_encoder, config.text_encoder_2) if name is not None]
    return autoencoder, [load_text_encoder(name, device=device).requires_grad_(False) for name in names]


def make_pipeline(
    config: DiffusionConfig,
    unet: UNet,
    autoencoder: Autoencoder,
    text_encoders: list[AnyTextEncoder],
    schedule: Law,
    beside: Beside,
) -> LatentDiffusionPipeline:
    """Put the pipeline together that validation draws with and that is the result of the run."""
    discrete = config.schedule.kind == "discrete"
    sampler, spacing = ("ddim", config.schedule.timestep_spacing) if discrete else ("euler", None)
    defaults = Defaults(
        sampler=sampler, spacing=spacing, num_inference_steps=config.default_num_inference_steps,
        guidance_scale=config.default_guidance_scale, height=config.data.resolution, width=config.data.resolution,
    )  # fmt: skip
    more = {"spatial": beside.spatial, "labels": beside.classes}
    inputs: dict[str, Any] = {name: value for name, value in more.items() if value is not None}
    return LatentDiffusionPipeline(unet, autoencoder, text_encoders, schedule, defaults=defaults, **inputs)


def draw_sheet(
    pipe: LatentDiffusionPipeline, config: DiffusionConfig, beside: Beside, records: Records, path: Path
) -> None:
    """Draw the validation prompts as one sheet, all from seed 0."""
    pipe.set_progress_bar_config(disable=True)
    prompts = list(config.validation_prompts)
    images = pipe(
        prompts, seed=[0] * len(prompts), guidance_scale=config.validation_guidance_scale,
        num_inference_steps=config.validation_num_inference_steps, **shown_beside(beside, records, prompts),
    ).images  # fmt: skip
    save_picture(make_grid(images, columns=8, labels=prompts), path)


def make_trainer(config: DiffusionConfig) -> Trainer:
    """Put data, networks, loss and results of a run together.

    Latents and text embeddings are computed here, where the cache does not hold them.
    Raises: LdmPipeError for settings that mean nothing together, or data that cannot be trained on.
    """
    if config.data.streaming:
        raise LdmPipeError(
            "a stream has no cached latents", "data.streaming", "Leave it out: they are computed once and kept."
        )
    records, device = open_records(config.data, config.output_dir), process_device()
    autoencoder, text_encoders = load_stages(config, device)
    schedule = config.schedule.build()
    build_objective(config, schedule)  # refuses senseless settings before the work of caching
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    plan = plan_shapes(records, config.data, global_batch)
    data = cache_inputs(config, records, autoencoder, text_encoders, plan)
    beside = data.beside or Beside()
    token_width = sum(encoder.config.hidden_size for encoder in text_encoders)
    unet = build_unet(config, autoencoder, token_width, beside).to(device)
    net = JointNet(unet, text_encoders[0]) if config.train_text_encoder else unet
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    pipe = make_pipeline(config, unet, autoencoder, text_encoders, schedule, beside)
    folder = Path(config.output_dir)

    def validate(step: int, trainer: Trainer) -> None:
        path = folder / "grids" / f"step-{step:06d}.png"
        draw_sheet(pipe, config, beside, records, path)
        trainer.show("samples", path)

    importance = build_importance(config)
    part = Part("unet", net, lambda micro: loss(micro), config.optim, config.ema_decay if config.use_ema else None)
    trainer = Trainer(
        config, [part], num_items=len(records), order=plan.order(config.seed, drawing_weights(records, config.data)),
        fingerprint=records.fingerprint, validate=validate,
        save_result=lambda: pipe.save_pretrained(folder / "pipeline"),
        kept={} if importance is None else {"importance": importance},
    )  # fmt: skip
    sizes = {"global_batch": trainer.global_batch, "device": device}
    loss = diffusion_loss(part.module, data, schedule, config, importance=importance, **sizes)
    return trainer
