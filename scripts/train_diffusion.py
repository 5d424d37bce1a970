"""Train the diffusion model (second stage) on cached latents and text embeddings.

    accelerate launch scripts/train_diffusion.py --config configs/emoji/diffusion.yaml [--any.value X]

Needs a trained autoencoder and text encoder (see the config). Writes `<output_dir>/pipeline`, a diffusers folder with
EMA weights that `LatentDiffusionPipeline.from_pretrained` reads, beside checkpoints, TensorBoard and sample grids.
"""

from __future__ import annotations

from ldm_pipe.training.run.config import parse_config, run_script
from ldm_pipe.training.tasks.diffusion import DiffusionConfig
from ldm_pipe.training.tasks.diffusion_run import make_trainer


def main(argv: list[str]) -> None:
    """Run one training."""
    make_trainer(parse_config(DiffusionConfig, argv, "Train the diffusion model (second stage).")).fit()


if __name__ == "__main__":
    run_script(main)
