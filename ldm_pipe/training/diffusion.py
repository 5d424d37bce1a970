"""The diffusion task: cached latents and embeddings in, the loss of a global batch's slice out.

What enters: normalised latent moments, caption embeddings, a schedule and a U-Net. What leaves: `loss(micro)` for the
trainer. It knows no files, no pictures and no optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ldm_pipe import objectives
from ldm_pipe.process import q_sample
from ldm_pipe.schedule import NoiseSchedule
from ldm_pipe.training.config import StrictModel, TrainConfig
from ldm_pipe.training.loop import Logs, Micro
from ldm_pipe.training.rng import batch_normal, batch_uniform


class UNetConfig(StrictModel):
    """Shape of the U-Net, in diffusers' words (UNet2DConditionModel)."""

    block_out_channels: tuple[int, ...] = (96, 192, 288)
    layers_per_block: int | tuple[int, ...] = 1
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = Field(
        (3, 6, 9), description="number of heads per level (diffusers' misnomer)"
    )
    use_linear_projection: bool = True
    norm_num_groups: int = 32


class ScheduleConfig(StrictModel):
    """Noise schedule and prediction, in diffusers' words."""

    num_train_timesteps: int = Field(1000, ge=2)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"


class DiffusionConfig(TrainConfig):
    """One diffusion training run."""

    autoencoder: str = Field("runs/emoji/autoencoder/vae", description="folder of the trained autoencoder")
    text_encoder: str = Field("runs/emoji/clip", description="folder holding text_encoder/ and tokenizer/")
    cache_dir: str = Field("runs/cache", description="latents and text embeddings are computed once and kept here")
    unet: UNetConfig = UNetConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="share of captions replaced by the empty prompt, for guidance"
    )
    num_caption_variants: int = Field(8, ge=1, description="captions per picture mixed from its name and keywords")
    snr_gamma: float | None = Field(5.0, gt=0, description="min-SNR weighting; null is L_simple")
    noise_offset: float = Field(0.0, ge=0)
    validation_prompts: tuple[str, ...] = ("red apple", "octopus", "grinning face", "racing car")
    validation_guidance_scale: float = 4.0
    validation_num_inference_steps: int = Field(20, ge=1)
    default_guidance_scale: float = Field(5.0, description="stored with the result as the pipeline's default")
    default_num_inference_steps: int = Field(30, ge=1)


@dataclass(frozen=True)
class DiffusionData:
    """Everything a step needs, in memory.

    Args:
        mean, std: normalised latent posterior of each row, (N, C, h, w) each.
        tokens: embeddings of all distinct texts, (V, L, D); the last row is the empty prompt.
        caption_rows: rows of `tokens` that describe picture i, (N, K) int64.
    """

    mean: Tensor
    std: Tensor
    tokens: Tensor
    caption_rows: Tensor


def stratified_t(u: Tensor, positions: range, global_batch: int, num_train_timesteps: int) -> Tensor:
    """Spread one uniform over the batch, so that every batch covers all noise levels evenly.

        t_i = floor(T ((u + i / B) mod 1))      (Kingma et al. 2021, arXiv:2107.00630, appendix I.1)

    Args:
        u: one uniform in [0, 1), shape ().
        positions: places i of this slice in the global batch of B pictures.
    Returns: integer times as float32, shape (len(positions),); each is uniform on 0..T-1.
    """
    places = torch.tensor(list(positions), dtype=torch.float64) / global_batch
    return ((u + places).remainder(1.0) * num_train_timesteps).floor().clamp_max(num_train_timesteps - 1).float()


def diffusion_loss(
    net: Callable[..., Tensor],
    data: DiffusionData,
    schedule: NoiseSchedule,
    config: DiffusionConfig,
    *,
    global_batch: int,
    device: torch.device,
) -> Callable[[Micro], tuple[Tensor, Logs]]:
    """Make the loss function of a run: L_simple or min-SNR weighted, with caption dropout.

    All draws are keyed by (seed, purpose, step, position), see `ldm_pipe.training.rng`.
    """
    prediction = schedule.prediction
    null_row = data.tokens.shape[0] - 1

    def loss(micro: Micro) -> tuple[Tensor, Logs]:
        keys, shape = (config.seed,), tuple(data.mean.shape[1:])
        rows = torch.tensor(micro.indices)
        draws = batch_uniform(2, *keys, "caption", micro.step, positions=micro.positions)  # (B, 2)
        variant = (draws[:, 0] * data.caption_rows.shape[1]).long()
        text_rows = data.caption_rows[rows, variant]
        text_rows = torch.where(draws[:, 1] < config.caption_dropout, null_row, text_rows)
        tokens = data.tokens[text_rows].float().to(device)  # (B, L, D)
        posterior = batch_normal(shape, *keys, "posterior", micro.step, positions=micro.positions)
        x0 = (data.mean[rows] + data.std[rows] * posterior).to(device)
        eps = batch_normal(shape, *keys, "noise", micro.step, positions=micro.positions).to(device)
        if config.noise_offset:
            offset = batch_normal(shape[:1], *keys, "offset", micro.step, positions=micro.positions)
            eps = objectives.offset_noise(eps, offset.to(device), config.noise_offset)
        u = batch_uniform(1, *keys, "t", micro.step, positions=range(1))[0, 0]
        t = stratified_t(u, micro.positions, global_batch, schedule.num_train_timesteps)
        alpha, sigma = (c.to(device) for c in schedule.alpha_sigma(t))
        x_t = q_sample(x0, eps, alpha, sigma)
        output = net(x_t, t.to(device), tokens=tokens)
        weight = (
            None if config.snr_gamma is None else objectives.min_snr_weight(prediction, alpha, sigma, config.snr_gamma)
        )
        wanted = objectives.target(prediction, x0, eps, alpha, sigma)
        return objectives.squared_error(output, wanted, weight).mean(), {}

    return loss


def count_parameters(module: nn.Module) -> int:
    """Return the number of weights."""
    return sum(p.numel() for p in module.parameters())
