"""Train the diffusion model (second stage) on cached latents and text embeddings.

    accelerate launch scripts/train_diffusion.py --config configs/emoji/diffusion.yaml [--any.value X]

Needs a trained autoencoder and text encoder (see the config). Writes `<output_dir>/pipeline`, a diffusers folder with
EMA weights that `LatentDiffusionPipeline.from_pretrained` reads, beside checkpoints, TensorBoard and sample grids.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from autoencoder import Autoencoder, load_autoencoder
from conditioning.load import AnyTextEncoder, load_text_encoder
from conditioning.text import ids_digest
from ldm_pipe.data.cache import LatentCache, TextCache, caption_variants, module_hash
from ldm_pipe.data.captions import mix_caption
from ldm_pipe.data.dataset import Records
from ldm_pipe.data.images import make_grid
from ldm_pipe.outputs import Defaults
from ldm_pipe.pipeline import LatentDiffusionPipeline
from ldm_pipe.training.config import parse_config, run_script
from ldm_pipe.training.diffusion import (
    DiffusionConfig,
    DiffusionData,
    build_importance,
    build_objective,
    diffusion_loss,
)
from ldm_pipe.training.environment import process_device
from ldm_pipe.training.joint import JointNet, token_ids
from ldm_pipe.training.loop import Part, Trainer
from ldm_pipe.training.pictures import drawing_weights, open_records
from ldm_pipe.training.rng import generator
from ldm_pipe.unet import UNet


def build_unet(config: DiffusionConfig, autoencoder: Autoencoder, token_width: int) -> UNet:
    """Build the network of the config with weights drawn from its seed."""
    shape = config.unet.model_dump(mode="json") | {
        "sample_size": config.data.resolution // autoencoder.factor,
        "in_channels": autoencoder.latent_channels,
        "out_channels": autoencoder.latent_channels * (2 if config.learn_variance else 1),
        "cross_attention_dim": token_width,
    }
    with torch.random.fork_rng():
        torch.default_generator.set_state(generator(config.seed, "init", "unet").get_state())
        return UNet.from_config(shape)


@torch.no_grad()
def cache_inputs(
    config: DiffusionConfig, records: Records, autoencoder: Autoencoder, text_encoder: AnyTextEncoder
) -> DiffusionData:
    """Compute, or find, the latents of every picture and the embeddings of every caption variant."""
    with tqdm(total=len(records), desc="latents") as bar:
        latents = LatentCache.build(
            config.cache_dir, records, autoencoder.encode_moments,
            autoencoder_hash=module_hash(autoencoder), resolution=config.data.resolution,
            device=autoencoder.device, progress=lambda done, _: bar.update(done - bar.n) and None,
        )  # fmt: skip
    variants = caption_variants(
        records.captions, records.keywords, config.num_caption_variants, config.seed, mix_caption
    )
    texts = list(dict.fromkeys(text for row in variants for text in row if text))
    scale, shift = autoencoder.scaling_factor, autoencoder.shift_factor
    mean = (latents.mean - shift) * scale
    std = torch.exp(0.5 * latents.log_var) * scale
    if config.train_text_encoder:
        rows = {text: row for row, text in enumerate(texts)}
        table = torch.tensor([[rows.get(text, len(texts)) for text in row] for row in variants])
        ids, mask = token_ids(text_encoder, [*texts, ""])
        return DiffusionData(mean, std, ids, table, token_mask=mask)
    with tqdm(total=len(texts) + 1, desc="captions") as bar:
        embeddings = TextCache.build(
            config.cache_dir, [*texts, ""], text_encoder.encode,
            encoder_hash=f"{module_hash(text_encoder)} {ids_digest(text_encoder, [*texts, ''])}",
            dtype=torch.float16, progress=lambda done, _: bar.update(done - bar.n) and None,
        )  # fmt: skip
    return DiffusionData(
        mean, std, embeddings.tokens, embeddings.table(variants),
        token_mask=embeddings.token_mask, pooled=embeddings.pooled,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    """Run one training."""
    config = parse_config(DiffusionConfig, argv, "Train the diffusion model (second stage).")
    records = open_records(config.data)
    device = process_device()
    autoencoder = load_autoencoder(config.autoencoder, device=device).requires_grad_(False)
    text_encoder = load_text_encoder(config.text_encoder, device=device).requires_grad_(False)
    schedule = config.schedule.build()
    build_objective(config, schedule)  # refuses senseless settings before the work of caching
    data = cache_inputs(config, records, autoencoder, text_encoder)
    unet = build_unet(config, autoencoder, text_encoder.config.hidden_size).to(device)
    net = JointNet(unet, text_encoder) if config.train_text_encoder else unet
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    sampler, spacing = ("ddim", "leading") if config.schedule.kind == "discrete" else ("euler", None)
    defaults = Defaults(
        sampler=sampler, spacing=spacing, num_inference_steps=config.default_num_inference_steps,
        guidance_scale=config.default_guidance_scale, height=config.data.resolution, width=config.data.resolution,
    )  # fmt: skip
    pipe = LatentDiffusionPipeline(unet, autoencoder, [text_encoder], schedule, defaults=defaults)
    folder = Path(config.output_dir)

    def validate(step: int, trainer: Trainer) -> None:
        pipe.set_progress_bar_config(disable=True)
        prompts = list(config.validation_prompts)
        images = pipe(
            prompts, seed=[0] * len(prompts), guidance_scale=config.validation_guidance_scale,
            num_inference_steps=config.validation_num_inference_steps,
        ).images  # fmt: skip
        path = folder / "grids" / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_grid(images, columns=8, labels=prompts).save(path)
        trainer.show("samples", path)

    importance = build_importance(config)
    part = Part("unet", net, lambda micro: loss(micro), config.optim, config.ema_decay if config.use_ema else None)
    trainer = Trainer(
        config, [part], num_items=len(records), weights=drawing_weights(records, config.data),
        fingerprint=records.fingerprint, validate=validate,
        save_result=lambda: pipe.save_pretrained(folder / "pipeline"),
        kept={} if importance is None else {"importance": importance},
    )  # fmt: skip
    sizes = {"global_batch": trainer.global_batch, "device": device}
    loss = diffusion_loss(part.module, data, schedule, config, importance=importance, **sizes)
    trainer.fit()


if __name__ == "__main__":
    run_script(main)
