"""Compare the autoencoder with diffusers': training with a discriminator, and decoding, whole and in tiles.

    python benchmarks/autoencoder.py [--only train,whole,tiled] [--repeats N] [--device cuda] [--output FILE]

train  pictures per second of a training step with L1, perceptual and adversarial loss, and peak memory
whole  pictures per second of decoding at once, and peak memory
tiled  the same in tiles: ours gives the picture of decoding at once, diffusers' a blend of tiles decoded alone

diffusers' example never steps its discriminator and cuts the gradient of its perceptual loss; its side here is the same
networks in a plain loop that does what ours does: one reconstruction for both games, adaptive weight, two AdamW, EMA.
Both sides train the same discriminator under the same frozen features from random weights. Every measurement has a
process of its own; on a CPU, time is CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.against_diffusers import column, float_difference, memory, rates
from benchmarks.measure import SIDES, Row, compare, machine, markdown, write_results

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("train", "whole", "tiled")
NUM_ROWS, SEED, EMA_DECAY, CLIP = 64, 0, 0.995, 1.0
LEARNING_RATE, BETAS, DECAY = 1e-3, (0.9, 0.99), 0.01
PERCEPTUAL, KL, ADVERSARIAL = 0.3, 1e-6, 0.3
TILE = 256  # pixels


def network_config(widths: list[int], size: int) -> dict[str, Any]:
    """Return the config of both sides' AutoencoderKL."""
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": 4,
        "norm_num_groups": 8,
        "mid_block_add_attention": True,
        "sample_size": size,
    }


def random_pictures(num: int, size: int) -> Tensor:
    """Draw smooth pictures (N, 3, H, W) in [-1, 1]."""
    import torch

    coarse = torch.rand(num, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


@contextmanager
def seeded() -> Iterator[None]:
    """Draw initial weights from the benchmark's seed, and leave the global generator as it was."""
    import torch

    with torch.random.fork_rng():
        torch.default_generator.set_state(torch.Generator().manual_seed(SEED).get_state())
        yield


def shared_networks(device: str) -> tuple[Any, Callable[[Tensor], Any]]:
    """Build the discriminator and the frozen features of both sides."""
    from autoencoder import PatchDiscriminator
    from conditioning.contrastive import ImageTower

    with seeded():
        judge = PatchDiscriminator(width=32, num_layers=2).to(device).train()
        tower = ImageTower.from_config({"channels": [32, 64, 128], "projection_dim": 64})
    return judge, tower.to(device).requires_grad_(False).features


def our_step(args: argparse.Namespace) -> Callable[[], float]:
    """Set the trainer of scripts/train_autoencoder.py up."""
    import torch

    from autoencoder import AutoencoderKL
    from ldm_pipe.training.run.config import build_config
    from ldm_pipe.training.run.loop import Trainer
    from ldm_pipe.training.tasks.autoencoder import AutoencoderConfig, autoencoder_parts

    optim = {
        "learning_rate": LEARNING_RATE, "lr_scheduler": "constant", "lr_warmup_steps": 0, "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1], "adam_weight_decay": DECAY, "max_grad_norm": CLIP,
    }  # fmt: skip
    objective = {
        "perceptual_weight": PERCEPTUAL, "kl_weight": KL, "adversarial_weight": ADVERSARIAL, "adversarial_start": 0,
    }  # fmt: skip
    values = {
        "output_dir": tempfile.gettempdir(), "train_batch_size": args.batch, "ema_decay": EMA_DECAY, "optim": optim,
        "discriminator_optim": optim, "objective": objective, "num_threads": args.threads, "report_to": "none",
        "data": {"resolution": args.size},
    }  # fmt: skip
    config = build_config(AutoencoderConfig, values, "benchmark")
    pictures = random_pictures(NUM_ROWS, args.size)
    judge, features = shared_networks(args.device)
    with seeded():
        autoencoder = AutoencoderKL.from_config(network_config(args.widths, args.size)).to(args.device).train()
    device = torch.device(args.device)
    parts = autoencoder_parts(config, autoencoder, judge, lambda rows: pictures[rows], features, device)
    trainer = Trainer(config, parts, num_items=NUM_ROWS)
    return lambda: trainer.train_step()["autoencoder/reconstruction"]


def diffusers_step(args: argparse.Namespace) -> Callable[[], float]:
    """Set the plain loop up."""
    import torch
    from diffusers import AutoencoderKL
    from diffusers.training_utils import EMAModel
    from torch.nn import functional as F

    torch.set_num_threads(args.threads)
    judge, features = shared_networks(args.device)
    with seeded():
        vae: Any = AutoencoderKL(**network_config(args.widths, args.size)).to(args.device).train()
    ema = EMAModel(vae.parameters(), decay=EMA_DECAY, model_cls=AutoencoderKL, model_config=vae.config)
    kind = {"lr": LEARNING_RATE, "betas": BETAS, "weight_decay": DECAY}
    optimizers = [torch.optim.AdamW(network.parameters(), **kind) for network in (vae, judge)]
    pictures, last = random_pictures(NUM_ROWS, args.size).to(args.device), vae.decoder.conv_out.weight

    def distance(image: Tensor, reconstruction: Tensor) -> Tensor:
        maps = zip(features(image), features(reconstruction), strict=True)
        return sum((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean() for x, y in maps)  # type: ignore[return-value]

    def update(loss: Tensor, network: Any, optimizer: Any) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> float:
        image = pictures[torch.randint(NUM_ROWS, (args.batch,))]
        posterior = vae.encode(image).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        pixels = F.l1_loss(reconstruction, image)
        term = pixels + PERCEPTUAL * distance(image, reconstruction)
        judge.requires_grad_(False)
        fooled = -judge(reconstruction).mean()
        slopes = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (term, fooled)]
        weight = (slopes[0] / (slopes[1] + 1e-6)).clamp(max=1e4).detach()
        loss = term + KL * posterior.kl().mean() / image[0].numel() + ADVERSARIAL * weight * fooled
        update(loss, vae, optimizers[0])
        ema.step(vae.parameters())
        judge.requires_grad_(True)
        real, fake = judge(torch.cat([image, reconstruction.detach()])).chunk(2)
        update(0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()), judge, optimizers[1])
        return float(pixels)

    return step


def decoder(args: argparse.Namespace) -> Callable[[], Tensor]:
    """Load one side's autoencoder with the same weights; return what decodes a batch."""
    import torch

    config = network_config(args.widths, args.size)
    if args.side == "ours":
        from autoencoder import AutoencoderKL

        model: Any = AutoencoderKL.from_config(config).to(args.device).eval()
    else:
        from diffusers import AutoencoderKL

        model = AutoencoderKL(**config).to(args.device).eval()
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        torch.nn.init.normal_(parameter, 0.0, 0.05, generator=torch.Generator(args.device).manual_seed(number))
    if args.what == "tiled":
        if args.side == "ours":
            model.enable_tiling(TILE)
        else:
            model.enable_tiling()
            model.tile_sample_min_size, model.tile_latent_min_size = TILE, TILE // 2 ** (len(args.widths) - 1)
    side = args.size // 2 ** (len(args.widths) - 1)
    z = torch.randn(args.batch, 4, side, side, generator=torch.Generator().manual_seed(SEED)).to(args.device)
    if args.side == "ours":
        return torch.no_grad()(lambda: model.decode(z))
    return torch.no_grad()(lambda: model.decode(z / model.config.scaling_factor).sample)


def measure(args: argparse.Namespace) -> None:
    """Measure one side in this process and print a report as JSON."""
    import torch

    from benchmarks.draw_warm import clock

    torch.set_num_threads(args.threads)
    report: dict[str, float] = {}
    if args.what == "train":
        step = (our_step if args.side == "ours" else diffusers_step)(args)
        step(), step()  # the first steps allocate the optimisers' state
        begin = clock(args.device)
        report["loss"] = sum(step() for _ in range(args.steps)) / args.steps
    else:
        decode = decoder(args)
        image = decode()
        args.picture.write_bytes(image.float().cpu().contiguous().numpy().tobytes())
        begin = clock(args.device)
        for _ in range(args.steps):
            decode()
    end = clock(args.device)
    report |= {name: (b - a) / args.steps for name, a, b in zip(("cpu_s", "wall_s"), begin, end, strict=True)}
    if args.device != "cpu":
        report["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(report))


def compare_part(what: str, args: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Measure both sides of one part, in processes of their own."""
    batch, size = (args.batch, args.size) if what == "train" else (1, args.decode_size)
    shared = ["--what", what, "--batch", str(batch), "--size", str(size), "--steps", str(args.steps)]
    shared += ["--device", args.device, "--threads", str(args.threads), "--widths", *map(str, args.widths)]
    pictures = {side: folder / f"{what}-{side}.f32" for side in SIDES}
    program = [sys.executable, "-m", "benchmarks.autoencoder"]
    commands = {side: [*program, "--side", side, *shared, "--picture", str(pictures[side])] for side in SIDES}
    found = compare(commands, args.repeats, threads=args.threads)
    name, field = f"{what}, {size} pixels, batch {batch}", "report.cpu_s" if args.device == "cpu" else "report.wall_s"
    unit = f"pictures per {'CPU ' * (args.device == 'cpu')}second"
    rows = [rates(found, f"{name}: {unit}", field, batch, 1.0), *memory(found, name)]
    if what == "train":
        return rows, {f"{name}: mean L1, {side}": column(found[side], "report.loss")[-1] for side in SIDES}
    difference = float_difference(*(path.read_bytes() for path in pictures.values()))
    return rows, {f"{name}: largest difference of the pictures": difference}


def main(argv: list[str] | None = None) -> None:
    """Compare both sides, or, with --side, measure one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps or pictures per process")
    parser.add_argument("--batch", type=int, default=8, help="pictures per training step")
    parser.add_argument("--size", type=int, default=64, help="side of the training pictures")
    parser.add_argument("--decode_size", type=int, default=512, help="side of the decoded pictures")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON of everything measured")
    parser.add_argument("--side", choices=SIDES, help="measure this side in this process")
    parser.add_argument("--what", choices=PARTS, help="with --side")
    parser.add_argument("--picture", type=Path, help="with --side: file for the decoded picture, float32")
    args = parser.parse_args(argv)
    if args.side:
        measure(args)
        return
    rows: list[Row] = []
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for what in args.only.split(","):
            if what not in PARTS:
                parser.error(f"--only {what}: known are {', '.join(PARTS)}")
            part_rows, part_checks = compare_part(what, args, Path(folder))
            rows += part_rows
            checks |= part_checks
    print(markdown(rows))
    for name, value in checks.items():
        print(f"{name}: {value:.3g}")
    if args.output:
        write_results(args.output, rows, {"machine": machine(), "checks": checks})


if __name__ == "__main__":
    main()
