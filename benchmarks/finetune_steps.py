"""Fine-tune for some steps with one side, as its own script does, and report the time of a step as JSON.

    python -m benchmarks.finetune_steps --side diffusers --shape tiny --method lora --no-cache --batch 16

Ours is scripts/finetune.py. diffusers' is the loop of its examples train_text_to_image.py and its LoRA form:
torchvision transforms, autoencoder and text encoder in every step, DDPMScheduler, AdamW, peft; with `--cache` the same
loop on latents and embeddings computed beforehand, which the examples do not offer. Both sides take the same model,
kind of pictures, batch, optimiser and number type. `sd15` is the U-Net of Stable Diffusion 1.5 with random weights, on
cached inputs only.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.draw_warm import clock

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "ldm_pipe" / "assets" / "emoji"
TABLE = ROOT / "data" / "emoji" / "data" / "noto" / "train.parquet"
SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # else diffusers' defaults
NUM_PICTURES, NUM_TEXTS, LENGTH, RANK, LEARNING_RATE, CLIP = 64, 8, 77, 4, 1e-4, 1.0
BETAS, DECAY, EPSILON = (0.9, 0.999), 0.01, 1e-8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
Step = Callable[[], float]  # does one optimiser step and returns the loss


def random_inputs(side: int) -> tuple[Tensor, Tensor]:
    """Make latents (N, 4, side, side) and embeddings (V, 77, 768) for the shape of Stable Diffusion 1.5."""
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(NUM_PICTURES, 4, side, side, generator=source)
    return latents, torch.randn(NUM_TEXTS, LENGTH, SD15["cross_attention_dim"], generator=source)


def our_step(args: argparse.Namespace) -> Step:
    """Set our run up."""
    from ldm_pipe.training.run.config import DataConfig, OptimConfig
    from ldm_pipe.training.tasks.finetune.config import FinetuneConfig
    from ldm_pipe.training.tasks.finetune.run import load_model, make_trainer

    folder = tempfile.mkdtemp()
    optim = OptimConfig(
        learning_rate=LEARNING_RATE, lr_scheduler="constant", lr_warmup_steps=0, adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], adam_weight_decay=DECAY, adam_epsilon=EPSILON, max_grad_norm=CLIP,
        optimizer=args.optimizer,
    )  # fmt: skip
    config = FinetuneConfig(
        output_dir=folder, cache_dir=folder, cache_latents=args.cache, method=args.method, rank=RANK,
        train_batch_size=args.batch, num_threads=args.threads, optim=optim, caption_dropout=0.0, report_to="none",
        gradient_checkpointing=args.gradient_checkpointing,
        data=DataConfig(train_data_dir=str(TABLE), max_train_samples=NUM_PICTURES),
    )  # fmt: skip
    trainer = make_trainer(load_model(config), config)[0] if args.shape == "tiny" else our_large_trainer(args, config)
    return lambda: trainer.train_step()["unet/loss"]


def our_large_trainer(args: argparse.Namespace, config: Any) -> Any:
    """Train the U-Net of Stable Diffusion 1.5 on random inputs."""
    from ldm_pipe.interop.lora.layers import TrainableLora
    from ldm_pipe.networks import UNet
    from ldm_pipe.schedule import NoiseSchedule
    from ldm_pipe.training.run.loop import Part, Trainer
    from ldm_pipe.training.tasks.diffusion import DiffusionData
    from ldm_pipe.training.tasks.finetune.data import Inputs, finetune_loss
    from ldm_pipe.training.tasks.finetune.nets import FinetuneNet

    unet = UNet.from_config(SD15)
    unet.enable_gradient_checkpointing(config.gradient_checkpointing)
    lora = TrainableLora({"unet": unet}, rank=RANK) if args.method == "lora" else None
    latents, tokens = random_inputs(args.latents)
    rows = (torch.arange(NUM_PICTURES) % (NUM_TEXTS - 1))[:, None]
    data = DiffusionData(latents, torch.zeros_like(latents), tokens, rows)
    part = Part(
        "unet", FinetuneNet(unet, (), lora), lambda micro: loss(micro), config.optim, save_frozen=lora is None
    )  # fmt: skip
    trainer = Trainer(config, [part], num_items=NUM_PICTURES)
    inputs = Inputs(data, NUM_PICTURES, lambda _: trainer.order)
    loss = finetune_loss(
        part.module, inputs, NoiseSchedule(prediction="eps"), config, global_batch=trainer.global_batch,
        device=trainer.accelerator.device,
    )  # fmt: skip
    return trainer


class Pictures(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The pictures and captions of the table, decoded and framed at each use as the examples do."""

    def __init__(self, tokenizer: Any, side: int) -> None:
        """Read the rows; tokenize their captions."""
        from pyarrow import parquet
        from torchvision import transforms

        rows = parquet.read_table(TABLE, columns=["image", "text"]).slice(0, NUM_PICTURES).to_pylist()
        self.files = [row["image"]["bytes"] for row in rows]
        texts = [row["text"] for row in rows]
        how = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
        self.ids = tokenizer(texts, return_tensors="pt", **how).input_ids
        steps: list[Any] = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one picture (3, R, R) and its token ids."""
        from PIL import Image

        with Image.open(io.BytesIO(self.files[index])) as image:
            return self.transform(image.convert("RGB")), self.ids[index]


def diffusers_inputs(args: argparse.Namespace) -> tuple[Any, Any, Any, Callable[..., tuple[Tensor, Tensor]]]:
    """Return U-Net, noise schedule, data set, and what turns a batch into latents and embeddings."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from torch.utils.data import TensorDataset
    from transformers import CLIPTextModel, CLIPTokenizer

    if args.shape == "sd15":
        latents, tokens = random_inputs(args.latents)
        data = TensorDataset(latents, torch.arange(NUM_PICTURES) % NUM_TEXTS)
        schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        return UNet2DConditionModel(**SD15), schedule, data, lambda z, rows: (z, tokens[rows])
    part = {"pretrained_model_name_or_path": str(MODEL), "local_files_only": True}
    unet = UNet2DConditionModel.from_pretrained(**part, subfolder="unet", torch_dtype=torch.float32)
    schedule = DDPMScheduler.from_pretrained(**part, subfolder="scheduler")
    vae = AutoencoderKL.from_pretrained(**part, subfolder="vae", torch_dtype=torch.float32).requires_grad_(False)
    text = CLIPTextModel.from_pretrained(str(MODEL), subfolder="text_encoder", dtype=torch.float32).requires_grad_(
        False
    )
    pictures = Pictures(CLIPTokenizer.from_pretrained(str(MODEL), subfolder="tokenizer"), args.resolution)

    def encode(images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
        return latents, text(ids, return_dict=False)[0]

    if not args.cache:
        return unet, schedule, pictures, encode
    with torch.no_grad():
        kept = [encode(image[None], ids[None]) for image, ids in (pictures[i] for i in range(len(pictures)))]
    data = TensorDataset(*(torch.cat(values) for values in zip(*kept, strict=True)))
    return unet, schedule, data, lambda z, tokens: (z, tokens)


def diffusers_step(args: argparse.Namespace) -> Step:
    """Set the loop of the examples up."""
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler

    torch.set_num_threads(args.threads)
    accelerator = Accelerator(cpu=True)
    unet, noise_scheduler, data, inputs = diffusers_inputs(args)
    unet.train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.method == "lora":
        from peft import LoraConfig

        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    trained = [p for p in unet.parameters() if p.requires_grad]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, weight_decay=DECAY, eps=EPSILON)
    else:
        optimizer = torch.optim.Adafactor(trained, lr=LEARNING_RATE, weight_decay=DECAY)
    loader = torch.utils.data.DataLoader(data, batch_size=args.batch, shuffle=True, drop_last=True)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(
        unet, optimizer, loader, get_scheduler("constant", optimizer)
    )

    def batches() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    stream = batches()

    def step() -> float:
        with accelerator.accumulate(unet):
            latents, tokens = inputs(*next(stream))
            noise = torch.randn_like(latents)
            times = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),)).long()
            noisy = noise_scheduler.add_noise(latents, noise, times)
            target = noise
            if noise_scheduler.config.prediction_type == "v_prediction":
                target = noise_scheduler.get_velocity(latents, noise, times)
            prediction = unet(noisy, times, tokens, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="mean")
            value = accelerator.gather(loss.repeat(args.batch)).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        return value

    return step


def main() -> None:
    """Measure one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("ours", "diffusers"), required=True)
    parser.add_argument("--shape", choices=("tiny", "sd15"), default="tiny")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=64, help="of the pictures of the tiny shape")
    parser.add_argument("--latents", type=int, default=64, help="side of the latents of the sd15 shape")
    parser.add_argument("--optimizer", choices=("adamw", "adafactor"), default="adamw")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    step = our_step(args) if args.side == "ours" else diffusers_step(args)
    losses = [step(), step()]  # the first steps allocate the optimiser's state
    cpu, wall = clock("cpu")
    losses += [step() for _ in range(args.steps)]
    cpu_end, wall_end = clock("cpu")
    report = {"cpu_s": (cpu_end - cpu) / args.steps, "wall_s": (wall_end - wall) / args.steps}
    print(json.dumps({**report, "loss": statistics.mean(losses)}))


if __name__ == "__main__":
    main()
