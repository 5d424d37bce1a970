"""The config of a fine-tuning run, and the flags that users of diffusers' examples type.

What enters: a YAML file and flags. What leaves: a checked FinetuneConfig. This file knows no networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.objectives import objective as objectives
from ldm_pipe.training.run.config import DataConfig, OptimConfig, TrainConfig
from ldm_pipe.training.tasks.diffusion import DiffusionConfig

Method = Literal["full", "lora", "textual_inversion"]
CAPTION, WORD = "{caption}", "{word}"
TEMPLATES = {
    "object": ("{word}", "a picture of {word}", "a drawing of {word}", "one {word}", "a small {word}"),
    "style": ("{caption}, {word}", "{caption} in the style of {word}", "{word}, {caption}"),
}


class FinetuneConfig(TrainConfig):
    """One fine-tuning run; names and meanings are those of diffusers' training examples where these have one."""

    output_dir: str = "runs/finetune"
    use_ema: bool = False
    data: DataConfig = DataConfig(caption_column="text")
    pretrained_model_name_or_path: str | None = Field(
        None, description="folder, training run or hub id; none: the shipped emoji model"
    )
    revision: str | None = None
    variant: str | None = None
    cache_dir: str = Field("runs/cache", description="latents and text embeddings are computed once and kept here")
    cache_latents: bool = Field(True, description="false: pictures are encoded in every step, as for inpainting")
    method: Method = "full"

    train_parts: tuple[str, ...] = Field(
        ("all",),
        description="of method full: all, cross_attention, attention, or patterns such as up_blocks.*",
    )
    train_text_encoder: bool = False
    rank: int = Field(4, ge=1, description="of method lora")
    lora_alpha: float | None = Field(None, gt=0, description="the change is scaled by lora_alpha / rank; none: rank")
    lora_targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="ends of the names of the U-Net's layers that get a LoRA"
    )
    placeholder_token: str | None = Field(None, description="the new word of method textual_inversion")
    initializer_token: str | None = Field(None, description="what the new word means at the start")
    num_vectors: int = Field(1, ge=1, le=64, description="token vectors of the new word")
    learnable_property: Literal["object", "style"] = "object"

    instance_prompt: str | None = Field(None, description="DreamBooth: the caption of every picture")
    with_prior_preservation: bool = False
    class_prompt: str | None = None
    class_data_dir: str | None = Field(None, description="pictures of the class; none: <output_dir>/class_images")
    num_class_images: int = Field(100, ge=1, description="missing ones are drawn by the model before training")
    sample_batch_size: int = Field(4, ge=1, description="class pictures drawn at once")
    prior_loss_weight: float = Field(1.0, ge=0)

    inpainting: bool = Field(False, description="widen the U-Net's input for a mask and the known part, learn to fill")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = Field(
        None, description="what the U-Net learns to predict; none: what it predicts already"
    )
    zero_terminal_snr: bool = Field(False, description="rescale the schedule so that its last level is pure noise")

    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="share of captions replaced by the empty prompt, for guidance"
    )
    caption_template: str | None = Field(
        None, description="how a caption is written, such as '{caption}, flat style'; {word} is the new word"
    )
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting; 5.0 is customary")
    loss_type: objectives.LossType = "l2"
    noise_offset: float = Field(0.0, ge=0)
    input_perturbation: float = Field(0.0, ge=0)
    enable_xformers_memory_efficient_attention: bool = False
    allow_tf32: bool = False

    validation_prompts: tuple[str, ...] = ()
    num_validation_images: int = Field(1, ge=1, description="per prompt, of seeds 0, 1, ...")
    validation_guidance_scale: float | None = Field(None, description="none: the model's default")
    validation_num_inference_steps: int = Field(25, ge=1)

    num_train_epochs: int | None = Field(
        None, ge=1, description="times through the pictures, instead of max_train_steps"
    )
    scale_lr: bool = Field(False, description="multiply the learning rate by batch size, accumulation and processes")

    @field_validator("data", mode="before")
    @classmethod
    def _caption_column_of_habit(cls, value: Any) -> Any:
        return {"caption_column": "text", **value} if isinstance(value, dict) else value

    @property
    def is_dreambooth(self) -> bool:
        """Tell whether all pictures share one caption."""
        return self.instance_prompt is not None

    @property
    def trains_tokens(self) -> bool:
        """Tell whether text encoders run in every step, because something in them is trained."""
        return self.train_text_encoder or self.method == "textual_inversion"

    @property
    def reads_captions(self) -> bool:
        """Tell whether the data set's own captions are used."""
        return not self.is_dreambooth and any(CAPTION in template for template in self.templates)

    @property
    def templates(self) -> tuple[str, ...]:
        """Return how captions are written, one variant of a picture's caption each."""
        if self.instance_prompt is not None:
            return (self.instance_prompt,)
        if self.caption_template is not None:
            return (self.caption_template,)
        return TEMPLATES[self.learnable_property] if self.method == "textual_inversion" else (CAPTION,)

    def loss_config(self) -> DiffusionConfig:
        """Return what the diffusion loss reads of this config."""
        return DiffusionConfig(
            output_dir=self.output_dir, seed=self.seed, caption_dropout=self.caption_dropout, snr_gamma=self.snr_gamma,
            loss_type=self.loss_type, noise_offset=self.noise_offset, input_perturbation=self.input_perturbation,
        )  # fmt: skip


def check_config(config: FinetuneConfig) -> None:
    """Refuse settings that mean nothing together.

    Raises: LdmPipeError naming them.
    """
    inversion, full = config.method == "textual_inversion", config.method == "full"
    rules = (
        (not config.data.train_data_dir.strip(), "no pictures are named", "Name them: --train_data_dir my_pictures."),
        (inversion and not config.placeholder_token, "method textual_inversion without a placeholder_token",
         "Name the new word: --placeholder_token '<my-thing>'."),
        (inversion and not config.initializer_token, "method textual_inversion without an initializer_token",
         "Name a word to start from: --initializer_token toy."),
        (not inversion and config.placeholder_token, f"placeholder_token with method {config.method}",
         "Add --method textual_inversion."),
        (inversion and config.is_dreambooth, "instance_prompt with method textual_inversion",
         "Leave it out; captions are written by caption_template."),
        (inversion and config.train_text_encoder, "train_text_encoder with method textual_inversion",
         "Only the new word is trained there."),
        (not full and config.train_parts != ("all",), f"train_parts with method {config.method}",
         "Choose layers of a LoRA by lora_targets."),
        (not full and config.inpainting, f"inpainting with method {config.method}",
         "The widened input layer needs --method full."),
        (config.with_prior_preservation and not (config.class_prompt and config.is_dreambooth),
         "with_prior_preservation without instance_prompt and class_prompt",
         "For instance --instance_prompt 'a sks dog' --class_prompt 'a dog'."),
        (config.with_prior_preservation and config.data.streaming, "with_prior_preservation with data.streaming",
         "A few pictures need no stream."),
        (config.class_prompt and not config.with_prior_preservation, "class_prompt without with_prior_preservation",
         "Add --with_prior_preservation."),
        (inversion and not all(WORD in template for template in config.templates),
         f"caption_template {config.caption_template!r} does not hold {WORD}", "Write where the new word stands."),
        (not inversion and any(WORD in template for template in config.templates),
         f"caption_template holds {WORD}, but method {config.method} learns no word", "Leave it out."),
    )  # fmt: skip
    for wrong, what, how_to_fix in rules:
        if wrong:
            raise LdmPipeError(what, "config", how_to_fix)


def resolve(config: FinetuneConfig, num_rows: int, processes: int) -> FinetuneConfig:
    """Put the steps of `num_train_epochs` and the learning rate of `scale_lr` in, as diffusers' examples count them.

    Raises: LdmPipeError for epochs of a stream, whose length nobody knows.
    """
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    changes: dict[str, Any] = {}
    if config.num_train_epochs is not None:
        if not num_rows:
            raise LdmPipeError("num_train_epochs with data.streaming", "config", "Give --max_train_steps.")
        changes["max_train_steps"] = config.num_train_epochs * math.ceil(num_rows / batch)
    if config.scale_lr:
        rate = config.optim.learning_rate * batch
        changes["optim"] = config.optim.model_copy(update={"learning_rate": rate})
    return config.model_copy(update=changes)


# Flags of diffusers' examples that have no counterpart of the same name, and what to do instead.
_UPLOAD = "Upload the result when it is there: `hf upload NAME <output_dir>/pipeline`."
_NO_WORKERS = "Leave it out: latents are computed once and kept, so that no step waits for pictures."
_CLASSIC = "Leave it out: `num_cycles` and `power` belong to schedules that are not here (constant, linear, cosine)."
COUNTERPARTS = {
    "push_to_hub": _UPLOAD, "hub_model_id": _UPLOAD, "hub_token": _UPLOAD, "hub_private_repo": _UPLOAD,
    "dataloader_num_workers": _NO_WORKERS, "lr_num_cycles": _CLASSIC, "lr_power": _CLASSIC,
    "logging_dir": "TensorBoard's files lie in <output_dir>.",
    "tracker_project_name": "Use --report_to wandb; the project is set by WANDB_PROJECT.",
    "validation_epochs": "Use --validation_steps.", "save_steps": "Use --checkpointing_steps.",
    "local_rank": "Leave it out: `accelerate launch` or `torchrun` tells each process its number.",
    "non_ema_revision": "Use --revision.", "tokenizer_name": "The tokenizer is that of the model.",
    "pretrained_vae_model_name_or_path": "The autoencoder is that of the model.",
    "prior_generation_precision": "Leave it out: class pictures are drawn in float32.",
    "pre_compute_text_embeddings": "Leave it out: they are computed once wherever no text encoder is trained.",
    "set_grads_to_none": "Leave it out: gradients are always set to None.",
    "offset_noise": "Use --noise_offset 0.1.", "dream_training": "It is not here.",
    "text_encoder_lr": "Use --learning_rate.",
    "image_interpolation_mode": "Leave it out: pictures are scaled by Lanczos, or by whole box averages.",
    "save_as_full_pipeline": "Leave it out: <output_dir>/pipeline is always written.",
    "repeats": "Use --max_train_steps: pictures repeat as long as there are steps.",
    "ema_decay_type": "Use --ema_decay.", "foreach_ema": "Leave it out.", "offload_ema": "Leave it out.",
    "noise_scheduler": "Use --prediction_type and --zero_terminal_snr.",
}  # fmt: skip


ALIASES = {
    "instance_data_dir": ["--data.train_data_dir"],
    "dataset_name": ["--data.train_data_dir"],
    "validation_prompt": ["--validation_prompts"],
    "use_8bit_adam": ["--optim.optimizer", "adamw_8bit"],
}


def help_text() -> str:
    """Describe the script, and the flags that the list below spells otherwise."""
    flat = [f"--{name}" for model in (OptimConfig, DataConfig) for name in model.model_fields]
    also = ", ".join(f"--{name}" for name in ALIASES)
    return (
        "Fine-tune a text-to-image model. Flags of the groups optim and data may be written without the group, as "
        f"diffusers' examples have them: {', '.join(flat)}. Also understood: {also}."
    )


def flat_flags(argv: Sequence[str]) -> list[str]:
    """Write flags of diffusers' examples as this config nests them: `--learning_rate` is `--optim.learning_rate`."""
    groups = {"optim": set(OptimConfig.model_fields), "data": set(DataConfig.model_fields)}
    names = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    if {"num_train_epochs", "max_train_steps"} <= names:
        raise LdmPipeError("num_train_epochs and max_train_steps", "command line", "Give one of them.")
    words: list[str] = []
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            words.append(word)
            continue
        if name in COUNTERPARTS:
            raise LdmPipeError(f"there is no --{name} here", "command line", COUNTERPARTS[name])
        if name in ALIASES:
            flag, *rest = ALIASES[name]
            words += [flag + equals + value, *rest]
            continue
        bare = name.removeprefix("no_")
        group = next(
            (g for g, names in groups.items() if bare in names and bare not in FinetuneConfig.model_fields), ""
        )
        words.append(f"--{group}.{name}{equals}{value}" if group else f"--{name}{equals}{value}")
    return words
