"""Train a U-Net for some steps with one side, on cached latents and embeddings, and report the time of a step as JSON.

    python -m benchmarks.train_steps --side diffusers --model FOLDER --batch 32

Ours is the loop of scripts/train_diffusion.py; diffusers' is the plain loop its examples teach: accelerate,
DDPMScheduler, AdamW, EMAModel. Both train the U-Net of the folder's config from fresh weights and do the same per step:
sample latents from their posterior, drop captions, diffuse, predict, squared error, backward, clip, AdamW, average.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.draw_warm import clock

NUM_ROWS, NUM_TEXTS, DROPOUT, LEARNING_RATE = 512, 64, 0.1, 1e-4
BETAS, DECAY, EPSILON, CLIP, EMA_DECAY = (0.9, 0.99), 0.01, 1e-8, 1.0, 0.999
Step = Callable[[], float]  # does one optimiser step and returns the loss


def cached_inputs(model: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Make what the caches of a training hold: mean and std of latents (N, C, h, w), embeddings (V, L, D) in half."""
    unet = json.loads((model / "unet" / "config.json").read_text(encoding="utf-8"))
    text = json.loads((model / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    source = torch.Generator().manual_seed(0)
    shape = (NUM_ROWS, unet["in_channels"], unet["sample_size"], unet["sample_size"])
    tokens = torch.randn(NUM_TEXTS, text["max_position_embeddings"], unet["cross_attention_dim"], generator=source)
    return torch.randn(shape, generator=source), torch.full(shape, 0.1), tokens.half()


def our_step(model: Path, batch: int, device: str, threads: int) -> Step:
    """Set our trainer up."""
    from ldm_pipe.networks import UNet
    from ldm_pipe.pretrained import read_json
    from ldm_pipe.schedule import NoiseSchedule
    from ldm_pipe.training.run.config import OptimConfig
    from ldm_pipe.training.run.loop import Part, Trainer
    from ldm_pipe.training.tasks.diffusion import DiffusionConfig, DiffusionData, diffusion_loss

    optim = OptimConfig(
        learning_rate=LEARNING_RATE, lr_scheduler="constant", lr_warmup_steps=0, adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], adam_weight_decay=DECAY, adam_epsilon=EPSILON, max_grad_norm=CLIP,
    )  # fmt: skip
    config = DiffusionConfig(
        output_dir=tempfile.gettempdir(), train_batch_size=batch, ema_decay=EMA_DECAY, optim=optim, num_threads=threads,
        snr_gamma=None, caption_dropout=DROPOUT, report_to="none",
    )  # fmt: skip
    mean, std, tokens = cached_inputs(model)
    data = DiffusionData(mean, std, tokens, (torch.arange(NUM_ROWS) % (NUM_TEXTS - 1))[:, None])
    schedule = NoiseSchedule.from_config(read_json(model / "scheduler" / "scheduler_config.json"))
    unet = UNet.from_config(read_json(model / "unet" / "config.json")).to(device).train()
    part = Part("unet", unet, lambda micro: loss(micro), optim, EMA_DECAY)
    trainer = Trainer(config, [part], num_items=NUM_ROWS)
    loss = diffusion_loss(
        part.module, data, schedule, config, global_batch=trainer.global_batch, device=torch.device(device)
    )
    return lambda: trainer.train_step()["unet/loss"]


def diffusers_step(model: Path, batch: int, device: str) -> Step:
    """Set the plain loop up."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = Accelerator(cpu=device == "cpu")
    noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model / "unet"))
    unet.train()
    ema = EMAModel(unet.parameters(), decay=EMA_DECAY, model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=DECAY, eps=EPSILON)
    lr_scheduler = get_scheduler("constant", optimizer)
    mean, std, tokens = cached_inputs(model)
    rows = torch.arange(NUM_ROWS) % (NUM_TEXTS - 1)
    loader = DataLoader(TensorDataset(mean, std, rows), batch_size=batch, shuffle=True, drop_last=True)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    ema.to(accelerator.device)
    tokens = tokens.to(accelerator.device)

    def batches() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    stream = batches()

    def step() -> float:
        mean, std, rows = next(stream)
        with accelerator.accumulate(unet):
            latents = mean + std * torch.randn_like(mean)
            rows = torch.where(torch.rand(len(rows), device=rows.device) < DROPOUT, NUM_TEXTS - 1, rows)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(rows),), device=rows.device)
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            match noise_scheduler.config.prediction_type:
                case "epsilon":
                    target = noise
                case "v_prediction":
                    target = noise_scheduler.get_velocity(latents, noise, timesteps)
                case _:
                    target = latents
            prediction = unet(noisy, timesteps, tokens[rows].float(), return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="mean")
            value = accelerator.gather(loss.repeat(batch)).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), CLIP)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        ema.step(unet.parameters())
        return value

    return step


def main() -> None:
    """Measure one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("ours", "diffusers"), required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side == "ours":
        step = our_step(args.model, args.batch, args.device, args.threads)
    else:
        step = diffusers_step(args.model, args.batch, args.device)
    losses = [step(), step()]  # the first steps allocate the optimiser's state
    cpu, wall = clock(args.device)
    losses += [step() for _ in range(args.steps)]
    cpu_end, wall_end = clock(args.device)
    report = {"cpu_s": (cpu_end - cpu) / args.steps, "wall_s": (wall_end - wall) / args.steps}
    report["loss"] = statistics.mean(losses)
    if args.device != "cpu":
        report["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(report))


if __name__ == "__main__":
    main()
