"""Fine-tune a text-to-image model: all of it, chosen parts, a LoRA, DreamBooth, or a new word (textual inversion).

    accelerate launch scripts/finetune.py --train_data_dir my_pictures --output_dir runs/mine [--method lora]
    accelerate launch scripts/finetune.py --config configs/emoji/finetune-lora-r4-all.yaml [--any_value X]

Without `--pretrained_model_name_or_path` the shipped emoji model is fine-tuned. Flags have the names and meanings of
diffusers' training examples. Writes `<output_dir>/pipeline`, which `LatentDiffusionPipeline.from_pretrained` and
diffusers read; beside it the LoRA file or the learnt word, checkpoints, TensorBoard and sheets of validation prompts.
See docs/training.md.
"""

from __future__ import annotations

from ldm_pipe.training.run.config import parse_config, run_script
from ldm_pipe.training.tasks.finetune.config import FinetuneConfig, flat_flags, help_text
from ldm_pipe.training.tasks.finetune.run import load_model, make_trainer


def main(argv: list[str]) -> None:
    """Run one fine-tuning."""
    config = parse_config(FinetuneConfig, flat_flags(argv), help_text())
    trainer, _ = make_trainer(load_model(config), config)
    trainer.fit()


if __name__ == "__main__":
    run_script(main)
