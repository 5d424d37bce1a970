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
from torch import Tensor

from conditioning import Condition
from conditioning.joined import drop_masks
from ldm_pipe.denoiser import network_input
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, NoiseSchedule, Prediction
from ldm_pipe.schedule.betas import BetaSchedule
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow
from ldm_pipe.schedule.process import q_sample
from ldm_pipe.training.objectives import objective as objectives
from ldm_pipe.training.objectives import times
from ldm_pipe.training.objectives.objective import Objective
from ldm_pipe.training.run.config import StrictModel, TrainConfig
from ldm_pipe.training.run.loop import Logs, Micro
from ldm_pipe.training.run.rng import batch_normal, batch_uniform
from ldm_pipe.training.tasks.beside import Beside


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


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow", "score": "score",
    "posterior_mean": "mean", "edm": "edm",
}  # fmt: skip


class ScheduleConfig(StrictModel):
    """Noise schedule and prediction, in diffusers' words where it has them."""

    kind: Literal["discrete", "vp", "flow", "ve", "edm"] = Field(
        "discrete", description="discrete betas; or in continuous time: VP (linear beta(t)), rectified flow, VE, EDM's"
    )
    num_train_timesteps: int = Field(1000, ge=2)
    beta_schedule: BetaSchedule = Field(
        "scaled_linear", description="of the discrete kind, with beta_start and beta_end"
    )
    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    timestep_spacing: Literal["leading", "trailing", "linspace"] = Field(
        "leading", description="of the discrete kind when drawing; trailing starts at the noisiest level"
    )
    zero_terminal_snr: bool = Field(False, description="the discrete kind's last level is pure noise")
    sigma_min: float = Field(0.01, gt=0, description="cleanest level of ve and edm")
    sigma_max: float = Field(50.0, gt=0, description="noisiest level of ve and edm")
    sigma_data: float = Field(1.0, gt=0, description="standard deviation of the latents, for edm; they are normalised")
    shift: float = Field(1.0, gt=0, description="of flow's times when drawing, towards the noise")
    prediction_type: Literal[
        "epsilon", "sample", "v_prediction", "flow_prediction", "score", "posterior_mean", "edm"
    ] = "v_prediction"

    def build(self) -> Law:
        """Build the noise law."""
        prediction, num = PREDICTIONS[self.prediction_type], self.num_train_timesteps
        match self.kind:
            case "discrete":
                return NoiseSchedule(
                    beta_schedule=self.beta_schedule,
                    beta_start=self.beta_start,
                    beta_end=self.beta_end,
                    num_train_timesteps=num,
                    prediction=prediction,
                    spacing=self.timestep_spacing,
                    zero_terminal_snr=self.zero_terminal_snr,
                )
            case "vp":
                return ContinuousVP(prediction=prediction, num_train_timesteps=num)
            case "flow":
                return Flow(prediction=prediction, num_train_timesteps=num, shift=self.shift)
            case "ve":
                ends = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
                sigma_data = self.sigma_data if prediction == "edm" else None
                return VE(prediction=prediction, num_train_timesteps=num, sigma_data=sigma_data, **ends)
            case "edm":
                return EDM(self.sigma_min, self.sigma_max, self.sigma_data, prediction=prediction)


class DiffusionConfig(TrainConfig):
    """One diffusion training run."""

    autoencoder: str = Field("runs/emoji/autoencoder/vae", description="folder of the trained autoencoder")
    text_encoder: str = Field("runs/emoji/clip", description="folder holding text_encoder/ and tokenizer/")
    text_encoder_2: str | None = Field(None, description="a second one, frozen, of as many tokens; joined by channels")
    train_text_encoder: bool = Field(False, description="train it jointly with the U-Net; false: frozen and cached")
    cache_dir: str = Field("runs/cache", description="latents and text embeddings are computed once and kept here")
    unet: UNetConfig = UNetConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="share of captions replaced by the empty prompt, for guidance"
    )
    caption_dropout_2: float = Field(0.1, ge=0, le=1, description="the same for text_encoder_2 alone")
    mask_dropout: float = Field(0.1, ge=0, le=1, description="share of maps left out; of a data.mask_column")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of classes left out; of a data.label_column")
    all_dropout: float = Field(0.0, ge=0, le=1, description="share of pictures that lose all of these at once")
    num_caption_variants: int = Field(8, ge=1, description="captions per picture mixed from its name and keywords")
    objective: objectives.Kind = Field("simple", description="hybrid and vlb are for the discrete kind of schedule")
    learn_variance: bool = Field(False, description="the U-Net gets twice the output channels; for hybrid and vlb")
    vlb_weight: float = Field(0.001, gt=0, description="lambda of hybrid")
    loss_weighting: objectives.Weighting = Field("min_snr", description="of the noise levels in the simple loss")
    snr_gamma: float | None = Field(5.0, gt=0, description="of min_snr and soft_min_snr; null is L_simple")
    p2_gamma: float = Field(1.0, gt=0)
    loss_type: objectives.LossType = "l2"
    huber_c: float = Field(0.1, gt=0)
    time_sampling: Literal["uniform", "logit_normal", "log_normal", "importance"] | None = Field(
        None, description="null: log_normal for the schedule edm, else uniform"
    )
    time_mean: float | None = Field(None, description="of logit_normal (null: 0) and log_normal (null: -1.2)")
    time_std: float | None = Field(None, gt=0, description="of logit_normal (null: 1) and log_normal (null: 1.2)")
    noise_offset: float = Field(0.0, ge=0)
    input_perturbation: float = Field(0.0, ge=0, description="0.1 in DDPM-IP")
    validation_prompts: tuple[str, ...] = ("red apple", "octopus", "grinning face", "racing car")
    validation_guidance_scale: float = 4.0
    validation_num_inference_steps: int = Field(20, ge=1)
    default_guidance_scale: float = Field(5.0, description="stored with the result as the pipeline's default")
    default_num_inference_steps: int = Field(30, ge=1)


@dataclass(frozen=True)
class Texts:
    """What a text encoder says of all distinct texts, (V, L, D), (V, L) and (V, P); the last is the empty prompt."""

    tokens: Tensor
    token_mask: Tensor | None = None
    pooled: Tensor | None = None

    def condition(self, rows: Tensor, device: torch.device) -> Condition:
        """Return the condition of some texts."""
        slots = {"tokens": self.tokens, "token_mask": self.token_mask, "pooled": self.pooled}
        taken = {name: value[rows] for name, value in slots.items() if value is not None}
        return Condition(**taken).to(device, torch.float32)


@dataclass(frozen=True)
class DiffusionData:
    """Everything a step needs.

    Args:
        mean, std: normalised latent posterior of each row, (N, C, h, w) each; None where `moments` gives them.
        tokens: embeddings of all distinct texts, (V, L, D), or token ids (V, L) that the network encodes by itself; the
            last row is the empty prompt.
        caption_rows: rows of `tokens` that describe picture i, (N, K) int64.
        token_mask, pooled: of all distinct texts, (V, L) and (V, P), where the text encoder gives them.
        second: what a second encoder says of the same texts.
        beside: maps and labels of the pictures.
        moments: mean and std of the rows of a slice, (B, C, h, w) each; all slices of a step have one size.
        more: further slots of the network for a slice.
    """

    mean: Tensor | None
    std: Tensor | None
    tokens: Tensor
    caption_rows: Tensor
    token_mask: Tensor | None = None
    pooled: Tensor | None = None
    second: Texts | None = None
    beside: Beside | None = None
    moments: Callable[[Micro], tuple[Tensor, Tensor]] | None = None
    more: Callable[[Micro], dict[str, Tensor]] | None = None

    def posterior(self, micro: Micro) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of a slice, (B, C, h, w) each.

        Raises: LdmPipeError if there are none.
        """
        if self.moments is not None:
            return self.moments(micro)
        if self.mean is None or self.std is None:
            raise LdmPipeError("neither mean and std nor moments were given", "DiffusionData")
        return self.mean[micro.indices], self.std[micro.indices]

    def condition(self, rows: Tensor, device: torch.device, second_rows: Tensor | None = None) -> dict[str, Tensor]:
        """Return the slots of some texts, and of those that the second encoder reads (None: the same)."""
        if self.second is None:
            slots = {"tokens": self.tokens, "token_mask": self.token_mask, "pooled": self.pooled}
            taken = {name: value[rows].to(device) for name, value in slots.items() if value is not None}
            return {name: value.float() if value.is_floating_point() else value for name, value in taken.items()}
        first = Texts(self.tokens, self.token_mask, self.pooled).condition(rows, device)
        return first.join(self.second.condition(rows if second_rows is None else second_rows, device)).slots()


def build_objective(config: DiffusionConfig, law: Law) -> Objective:
    """Build what the run minimises.

    Raises: LdmPipeError for settings that mean nothing together.
    """
    if config.objective != "simple" and not isinstance(law, NoiseSchedule):
        what = f"objective {config.objective} sums over discrete times, schedule.kind {config.schedule.kind} has none"
        raise LdmPipeError(what, "config", "use objective simple, or schedule.kind discrete")
    if config.time_sampling == "importance" and not isinstance(law, NoiseSchedule):
        what = f"time_sampling importance counts discrete times, schedule.kind {config.schedule.kind} has none"
        raise LdmPipeError(what, "config", "use another time_sampling, or schedule.kind discrete")
    weighting, gamma = config.loss_weighting, config.p2_gamma
    if weighting in ("min_snr", "soft_min_snr"):
        weighting, gamma = ("none", 1.0) if config.snr_gamma is None else (weighting, config.snr_gamma)
    return Objective(
        kind=config.objective,
        weighting=weighting,
        gamma=gamma,
        loss_type=config.loss_type,
        huber_c=config.huber_c,
        vlb_weight=config.vlb_weight,
        variance="learned" if config.learn_variance else "fixed_small",
    )


def build_importance(config: DiffusionConfig) -> times.SecondMoment | None:
    """Build the state of importance sampling, if the run has it; the trainer keeps it in its checkpoints."""
    return times.SecondMoment(config.schedule.num_train_timesteps) if config.time_sampling == "importance" else None


def choose_times(
    config: DiffusionConfig, law: Law, micro: Micro, global_batch: int, importance: times.SecondMoment | None
) -> tuple[Tensor, Tensor | None]:
    """Return the times of a slice, and the weights of importance sampling."""
    if importance is not None:
        u = batch_uniform(1, config.seed, "t", micro.step, positions=micro.positions)[:, 0]
        return importance.draw(u)
    u = batch_uniform(1, config.seed, "t", micro.step, positions=range(1))[0, 0]
    u = times.stratify(u, micro.positions, global_batch)
    chosen = {"mean": config.time_mean, "std": config.time_std}
    options = {name: value for name, value in chosen.items() if value is not None}
    match config.time_sampling or ("log_normal" if isinstance(law, EDM) else "uniform"):
        case "logit_normal":
            return times.logit_normal(law, u, **options), None
        case "log_normal":
            return times.log_normal(law, u, **options), None
    return times.uniform(law, u), None


def of_all_processes(values: Tensor, device: torch.device) -> Tensor:
    """Join the values of all processes along the first axis, in the order of their ranks; they pass by the device."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values.cpu()
    values = values.to(device)
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts).cpu()


def draw_condition(
    data: DiffusionData, config: DiffusionConfig, micro: Micro, device: torch.device
) -> dict[str, Tensor]:
    """Draw one of each picture's captions, and leave every condition out at its own rate.

    Returns: the slots of the network for a slice, B rows each.
    """
    rows = torch.tensor(micro.indices)
    draws = batch_uniform(2, config.seed, "caption", micro.step, positions=micro.positions)  # (B, 2)
    variant = (draws[:, 0] * data.caption_rows.shape[1]).long()
    more = batch_uniform(4, config.seed, "drop", micro.step, positions=micro.positions)
    rates = (config.caption_dropout, config.mask_dropout, config.label_dropout, config.caption_dropout_2)
    dropped = drop_masks(torch.cat([draws[:, 1:], more], dim=1), rates, config.all_dropout)  # (B, 4)
    captions, empty = data.caption_rows[rows, variant], data.tokens.shape[0] - 1
    first, second = (torch.where(dropped[:, n], empty, captions) for n in (0, 3))
    cond = data.condition(first, device, second)
    if data.beside is not None:
        cond |= data.beside.slots(rows, dropped[:, 1:3], device)
    if data.more is not None:
        cond |= {name: value.to(device) for name, value in data.more(micro).items()}
    return cond


def draw_x_t(
    data: DiffusionData, schedule: Law, config: DiffusionConfig, micro: Micro, t: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw latents from their posterior and noise, and mix them at the times t (B,).

    With input_perturbation x_t holds other noise than the eps that is to be predicted (DDPM-IP).
    Returns: x0, eps and x_t, (B, C, h, w) each.
    """

    def normal(purpose: str, size: tuple[int, ...]) -> Tensor:
        return batch_normal(size, config.seed, purpose, micro.step, positions=micro.positions)

    mean, std = data.posterior(micro)
    shape = tuple(mean.shape[1:])
    x0 = (mean + std * normal("posterior", shape)).to(device)
    eps = normal("noise", shape).to(device)
    if config.noise_offset:
        eps = objectives.offset_noise(eps, normal("offset", shape[:1]).to(device), config.noise_offset)
    mixed = eps
    if config.input_perturbation:
        mixed = objectives.perturb_input(eps, normal("perturbation", shape).to(device), config.input_perturbation)
    alpha, sigma = (c.to(device) for c in schedule.alpha_sigma(t))
    return x0, eps, q_sample(x0, mixed, alpha, sigma)


def diffusion_loss(
    net: Callable[..., Tensor],
    data: DiffusionData,
    schedule: Law,
    config: DiffusionConfig,
    *,
    global_batch: int,
    device: torch.device,
    importance: times.SecondMoment | None = None,
) -> Callable[[Micro], tuple[Tensor, Logs]]:
    """Make the loss function of a run: the config's objective, each condition dropped by itself.

    All draws are keyed by (seed, purpose, step, position), see `ldm_pipe.training.run.rng`. Importance sampling learns
    from the losses of all processes, so that they stay alike, and draws the times of a batch independently.
    """
    objective = build_objective(config, schedule)

    def loss(micro: Micro) -> tuple[Tensor, Logs]:
        cond = draw_condition(data, config, micro, device)
        t, weight = choose_times(config, schedule, micro, global_batch, importance)
        x0, eps, x_t = draw_x_t(data, schedule, config, micro, t, device)
        shown, time = network_input(schedule, schedule.prediction, x_t, t)
        output = net(shown, time.to(device, torch.float32), **cond)
        losses = objectives.losses(objective, schedule, output, x0, eps, x_t, t)
        if importance is not None and weight is not None:
            importance.update(of_all_processes(t, device), of_all_processes(losses.detach().float(), device))
            losses = losses * weight.to(losses)
        return losses.mean(), {}

    return loss
