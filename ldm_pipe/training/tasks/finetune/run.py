"""One fine-tuning run: model, data, trainer and results put together.

What enters: a FinetuneConfig. What leaves: a trainer to `fit()`, as the script and notebooks do. Its parts are
in finetune_*.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ldm_pipe.data.images import make_grid, save_picture
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.environment import git_commit, process_device
from ldm_pipe.training.run.loop import Part, Trainer
from ldm_pipe.training.tasks.finetune.config import FinetuneConfig, check_config, resolve
from ldm_pipe.training.tasks.finetune.convert import convert
from ldm_pipe.training.tasks.finetune.data import finetune_loss, make_inputs, open_instances, stream_inputs
from ldm_pipe.training.tasks.finetune.dreambooth import class_pictures
from ldm_pipe.training.tasks.finetune.nets import Trained, build_trained


def load_model(config: FinetuneConfig) -> LatentDiffusionPipeline:
    """Load the model to be fine-tuned, in float32, and convert it where the config asks for it.

    Raises: LdmPipeError for settings that mean nothing together, or that the model cannot follow.
    """
    check_config(config)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    pipe = LatentDiffusionPipeline.from_pretrained(
        config.pretrained_model_name_or_path, variant=config.variant, revision=config.revision
    )
    if pipe.spatial is not None or pipe.labels is not None:
        what = "the model reads maps or classes beside the text"
        raise LdmPipeError(what, "fine-tuning", "Train it on with scripts/train_diffusion.py.")
    pipe = convert(pipe, config).to(process_device())
    pipe.set_progress_bar_config(disable=True)
    if config.enable_xformers_memory_efficient_attention:
        pipe.unet.set_attention("xformers")
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return pipe


def draw_sheet(pipe: LatentDiffusionPipeline, config: FinetuneConfig, path: Path) -> None:
    """Draw the validation prompts from fixed seeds: one row per prompt.

    Where the weights are sharded, the whole U-Net waits on the CPU, and the others join it there for the drawing.
    """
    num, side = config.num_validation_images, config.data.resolution
    prompts = [prompt for prompt in config.validation_prompts for _ in range(num)]
    scale = {} if config.validation_guidance_scale is None else {"guidance_scale": config.validation_guidance_scale}
    homes = [(module, module.device) for module in (pipe.autoencoder, *pipe.text_encoders)]
    try:
        images = pipe.to(pipe.unet.device)(
            prompts, seed=[i % num for i in range(len(prompts))], height=side, width=side,
            num_inference_steps=config.validation_num_inference_steps, **scale,
        ).images  # fmt: skip
    finally:
        for module, home in homes:
            module.to(home)
    save_picture(make_grid(images, columns=num if num > 1 else 8, labels=prompts), path)


def make_trainer(pipe: LatentDiffusionPipeline, config: FinetuneConfig) -> tuple[Trainer, Trained]:
    """Put data, networks, loss and results of a run together."""
    records = None if config.data.streaming else open_instances(config)
    others = class_pictures(pipe, config) if config.with_prior_preservation else None
    folder = Path(config.output_dir)
    trained = build_trained(pipe, config)
    before = folder / "grids" / "step-000000.png"
    if config.validation_prompts and os.environ.get("RANK", "0") == "0" and not before.is_file():
        draw_sheet(pipe, config, before)
    inputs = stream_inputs(pipe, config) if records is None else make_inputs(pipe, config, records, others)
    config = resolve(config, inputs.num_rows, int(os.environ.get("WORLD_SIZE", "1")))
    facts = {
        "data": f"{inputs.num_rows or 'a stream of'} pictures of {config.data.train_data_dir}",
        "steps": str(config.max_train_steps),
        "commit": git_commit() or "unknown", "fine-tuned from": pipe.name, "method": config.method,
    }  # fmt: skip

    def validate(step: int, trainer: Trainer) -> None:
        path = folder / "grids" / f"step-{step:06d}.png"
        draw_sheet(pipe, config, path)
        trainer.show("validation", path)

    part = Part(
        "unet", trained.net, lambda micro: loss(micro), config.optim, config.ema_decay if config.use_ema else None,
        save_frozen=config.method == "full" and config.train_parts == ("all",),
    )  # fmt: skip
    trainer = Trainer(
        config, [part], num_items=inputs.num_rows, order=inputs.order,
        fingerprint=inputs.fingerprint, validate=validate if config.validation_prompts else None,
        save_result=lambda: trained.save(folder, facts),
    )  # fmt: skip
    sizes = {"global_batch": trainer.global_batch, "device": process_device()}
    loss = finetune_loss(part.module, inputs, pipe.schedule, config, **sizes)
    return trainer, trained
