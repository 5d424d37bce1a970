"""Train the autoencoder (first stage) on a captioned or uncaptioned picture set.

    accelerate launch scripts/train_autoencoder.py --config configs/emoji/autoencoder.yaml [--any.value X]

Writes `<output_dir>/vae` (config.json, weights, measured latent scale), checkpoints, TensorBoard, sample grids and, at
the end, `<output_dir>/preview`, a decoder for pictures that are still being drawn. `scripts/evaluate.py autoencoder`
measures the result.
"""

from __future__ import annotations

from ldm_pipe.training.run.config import parse_config, run_script
from ldm_pipe.training.tasks.autoencoder import AutoencoderConfig
from ldm_pipe.training.tasks.autoencoder_run import make_trainer, write_preview


def main(argv: list[str]) -> None:
    """Run one training."""
    config = parse_config(AutoencoderConfig, argv, "Train the autoencoder (first stage).")
    trainer, data = make_trainer(config)
    trainer.fit()
    if trainer.is_main:
        write_preview(config, trainer, data)
        print(data.report)


if __name__ == "__main__":
    run_script(main)
