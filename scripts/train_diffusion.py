"""Train the diffusion model (second stage) on cached latents and text embeddings.

    accelerate launch scripts/train_diffusion.py --config configs/emoji/diffusion.yaml [--any.value X]

Needs a trained autoencoder and text encoder (see the config). Writes `<output_dir>/pipeline`, a diffusers folder with
EMA weights that `LatentDiffusionPipeline.from_pretrained` reads, beside checkpoints, TensorBoard and sample grids.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from autoencoder import Autoencoder, load_autoencoder
from conditioning.load import AnyTextEncoder, load_text_encoder
from conditioning.text import ids_digest
from ldm_pipe.data.cache import TextCache, caption_variants, module_hash
from ldm_pipe.data.captions import mix_caption
from ldm_pipe.data.dataset import Records
from ldm_pipe.data.images import make_grid
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import parse_config, run_script
from ldm_pipe.training.run.environment import process_device
from ldm_pipe.training.run.loop import Micro, Part, Trainer
from ldm_pipe.training.run.rng import generator
from ldm_pipe.training.tasks.beside import Beside
from ldm_pipe.training.tasks.diffusion import (
    DiffusionConfig,
    DiffusionData,
    Texts,
    build_importance,
    build_objective,
    diffusion_loss,
)
from ldm_pipe.training.tasks.joint import JointNet, token_ids
from ldm_pipe.training.tasks.pictures import LatentBatches, ShapePlan, drawing_weights, open_records, plan_shapes


def build_unet(config: DiffusionConfig, autoencoder: Autoencoder, token_width: int, beside: Beside) -> UNet:
    """Build the network of the config with weights drawn from its seed."""
    maps = 0 if beside.spatial is None else beside.spatial.channels
    shape = config.unet.model_dump(mode="json") | {
        "sample_size": config.data.resolution // autoencoder.factor,
        "in_channels": autoencoder.latent_channels + maps,
        "out_channels": autoencoder.latent_channels * (2 if config.learn_variance else 1),
        "cross_attention_dim": token_width,
    }
    if beside.classes is not None:
        shape["num_class_embeds"] = beside.classes.null_label + 1
    with torch.random.fork_rng():
        torch.default_generator.set_state(generator(config.seed, "init", "unet").get_state())
        return UNet.from_config(shape)


def cache_latents(
    config: DiffusionConfig, records: Records, autoencoder: Autoencoder, plan: ShapePlan
) -> Callable[[Micro], tuple[Tensor, Tensor]]:
    """Compute, or find, the latents of every picture.

    Returns: what gives the normalised posterior of a slice, mean and standard deviation (B, C, h, w).
    """
    with tqdm(total=len(records), desc="latents") as bar:
        latents = LatentBatches.build(
            config.cache_dir, records, plan, autoencoder.encode_moments, config.data, config.seed,
            autoencoder_hash=module_hash(autoencoder), device=autoencoder.device,
            progress=lambda done, _: bar.update(done - bar.n) and None,
        )  # fmt: skip
    scale, shift = autoencoder.scaling_factor, autoencoder.shift_factor

    def moments(micro: Micro) -> tuple[Tensor, Tensor]:
        batch = latents(micro)
        return (batch.mean - shift) * scale, torch.exp(0.5 * batch.log_var) * scale

    return moments


@torch.no_grad()
def cache_texts(config: DiffusionConfig, records: Records, text_encoders: list[AnyTextEncoder]) -> dict[str, Any]:
    """Compute, or find, the embeddings of every caption variant; token ids where the encoder is trained too.

    Returns: the fields of `DiffusionData` that captions fill.
    """
    variants = caption_variants(
        records.caption_lists, records.keywords, config.num_caption_variants, config.seed, mix_caption
    )
    text_encoder, *others = text_encoders
    texts = list(dict.fromkeys(text for row in variants for text in row if text))
    if config.train_text_encoder:
        if others:
            what = "train_text_encoder trains one encoder, text_encoder_2 names another"
            raise LdmPipeError(what, "config", "Leave one of the two out.")
        rows = {text: row for row, text in enumerate(texts)}
        table = torch.tensor([[rows.get(text, len(texts)) for text in row] for row in variants])
        ids, mask = token_ids(text_encoder, [*texts, ""])
        return {"tokens": ids, "token_mask": mask, "caption_rows": table}
    found = [embed(config, [*texts, ""], encoder) for encoder in text_encoders]
    second = Texts(found[1].tokens, found[1].token_mask, found[1].pooled) if others else None
    told = {"token_mask": found[0].token_mask, "pooled": found[0].pooled, "second": second}
    return {"tokens": found[0].tokens, "caption_rows": found[0].table(variants), **told}


def embed(config: DiffusionConfig, texts: list[str], text_encoder: AnyTextEncoder) -> TextCache:
    """Compute, or find, what one encoder says of texts."""
    with tqdm(total=len(texts), desc="captions") as bar:
        return TextCache.build(
            config.cache_dir, texts, text_encoder.encode,
            encoder_hash=f"{module_hash(text_encoder)} {ids_digest(text_encoder, texts)}",
            dtype=torch.float16, progress=lambda done, _: bar.update(done - bar.n) and None,
        )  # fmt: skip


def cache_inputs(
    config: DiffusionConfig, records: Records, autoencoder: Autoencoder, encoders: list[AnyTextEncoder], plan: ShapePlan
) -> DiffusionData:
    """Gather everything a step needs."""
    side = config.data.resolution // autoencoder.factor
    moments = cache_latents(config, records, autoencoder, plan)
    told = cache_texts(config, records, encoders)
    return DiffusionData(None, None, beside=Beside.read(records, config.data, (side, side)), moments=moments, **told)


def shown_beside(beside: Beside, records: Records, prompts: list[str]) -> dict[str, Any]:
    """Return the maps and classes that validation prompts are drawn with: those of the picture so called, else none."""
    rows = [records.captions.index(prompt) if prompt in records.captions else None for prompt in prompts]
    found: dict[str, Any] = {}
    if beside.maps is not None:
        nothing = torch.zeros_like(beside.maps[0])
        maps = torch.stack([nothing if row is None else beside.maps[row] for row in rows])
        found["spatial"] = (maps + 1) / 2  # 0.5 is no map
    if beside.labels is not None:
        found["class_labels"] = [None if row is None else int(beside.labels[row]) for row in rows]
    return found


def main(argv: list[str]) -> None:
    """Run one training."""
    config = parse_config(DiffusionConfig, argv, "Train the diffusion model (second stage).")
    if config.data.streaming:
        raise LdmPipeError(
            "a stream has no cached latents", "data.streaming", "Leave it out: they are computed once and kept."
        )
    records = open_records(config.data, config.output_dir)
    device = process_device()
    autoencoder = load_autoencoder(config.autoencoder, device=device).requires_grad_(False)
    names = [name for name in (config.text_encoder, config.text_encoder_2) if name is not None]
    text_encoders = [load_text_encoder(name, device=device).requires_grad_(False) for name in names]
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
    discrete = config.schedule.kind == "discrete"
    sampler, spacing = ("ddim", config.schedule.timestep_spacing) if discrete else ("euler", None)
    defaults = Defaults(
        sampler=sampler, spacing=spacing, num_inference_steps=config.default_num_inference_steps,
        guidance_scale=config.default_guidance_scale, height=config.data.resolution, width=config.data.resolution,
    )  # fmt: skip
    inputs = {"spatial": beside.spatial, "labels": beside.classes}
    told: dict[str, Any] = {name: value for name, value in inputs.items() if value is not None}
    pipe = LatentDiffusionPipeline(unet, autoencoder, text_encoders, schedule, defaults=defaults, **told)
    folder = Path(config.output_dir)

    def validate(step: int, trainer: Trainer) -> None:
        pipe.set_progress_bar_config(disable=True)
        prompts = list(config.validation_prompts)
        images = pipe(
            prompts, seed=[0] * len(prompts), guidance_scale=config.validation_guidance_scale,
            num_inference_steps=config.validation_num_inference_steps, **shown_beside(beside, records, prompts),
        ).images  # fmt: skip
        path = folder / "grids" / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_grid(images, columns=8, labels=prompts).save(path)
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
    trainer.fit()


if __name__ == "__main__":
    run_script(main)
