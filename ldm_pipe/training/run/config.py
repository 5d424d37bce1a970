"""Run configs: one complete YAML per experiment, read strictly, overridden by flags.

What enters: `--config file.yaml --key value ...`. What leaves: a frozen pydantic model with every value known.
Unknown keys, wrong types and wrong choices are refused with the path of the key.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from ldm_pipe.masking import masked_text
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.printable import printable

MAX_YAML_BYTES = 1 << 20


class StrictModel(BaseModel):
    """Frozen, no unknown keys, no silent conversion (YAML's `1e-4` is a string and is refused)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataConfig(StrictModel):
    """Where the pictures come from."""

    train_data_dir: str = Field("", description="needed: parquet file or folder, or image folder with captions")
    image_column: str = "image"
    caption_column: str | None = Field("caption", description="null: no captions are needed (autoencoder)")
    keywords_column: str | None = None
    mask_column: str | None = Field(None, description="a map that the diffusion model is given beside the text")
    label_column: str | None = Field(None, description="a class that the diffusion model is told beside the text")
    concept_column: str | None = Field(None, description="rows are drawn with weight 1 / (rows of the same concept)")
    exclude_columns: tuple[str, ...] = Field((), description="boolean columns; rows where one is true are left out")
    resolution: int = Field(64, ge=8)
    center_crop: bool = Field(True, description="false: crops are drawn at random")
    num_crops: int = Field(1, ge=1, description="random crops of each picture that are kept when latents are cached")
    random_flip: bool = False
    aspect_ratio_buckets: bool = Field(False, description="train pictures of like shape together, cropping little")
    bucket_step: int = Field(64, ge=1, description="sides of the buckets are multiples of this")
    max_aspect_ratio: float = Field(2.0, ge=1, description="of the buckets, longer to shorter side")
    dataset_config_name: str | None = Field(None, description="configuration of a data set by name")
    streaming: bool = Field(False, description="read forward without holding or caching the set; split by process")
    null_captions: Literal["skip", "empty"] = Field("skip", description="rows without caption: leave out, or keep")
    check_images: bool = Field(True, description="decode every picture once before the training")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="stop if more of the rows cannot be used")
    max_train_samples: int | None = Field(None, ge=1)


class OptimConfig(StrictModel):
    """The optimiser, warm-up and decay counted in optimiser steps."""

    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        "adamw", description="adamw_8bit needs bitsandbytes; adafactor keeps row and column means only, and no momentum"
    )
    learning_rate: float = Field(1e-4, gt=0, lt=math.inf)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_steps: int = Field(100, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.99, ge=0, lt=1)
    adam_weight_decay: float = Field(0.01, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)


class TrainConfig(StrictModel):
    """What every training run needs; the run configs of the scripts extend it."""

    output_dir: str
    seed: int = Field(0, ge=0)
    max_train_steps: int = Field(1000, ge=1)
    train_batch_size: int = Field(32, ge=1, description="pictures per process and forward pass")
    gradient_accumulation_steps: int = Field(1, ge=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    use_ema: bool = True
    ema_decay: float = Field(0.999, ge=0, lt=1)
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    checkpointing_steps: int = Field(500, ge=1)
    checkpoints_total_limit: int = Field(2, ge=2)
    resume_from_checkpoint: str | None = Field(None, description="latest | auto | a checkpoint folder")
    allow_config_change: bool = Field(False, description="resume although harmless values of the config differ")
    validation_steps: int = Field(500, ge=1)
    max_nonfinite_steps: int = Field(10, ge=1, description="stop after so many steps in a row with NaN or infinity")
    on_save_error: Literal["stop", "continue"] = Field("stop", description="when a checkpoint cannot be written")
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    num_threads: int | None = Field(None, ge=1, description="CPU threads per process; None leaves it to torch")


ConfigT = TypeVar("ConfigT", bound=TrainConfig)


def _depth(value: Any, limit: int = 16) -> int:
    if limit == 0 or not isinstance(value, (dict, list)):
        return 1
    children = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(child, limit - 1) for child in children), default=0)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping of sane size, without aliases (an alias bomb is small on disk and huge when walked).

    Raises: LdmPipeError naming the file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > MAX_YAML_BYTES:
            raise LdmPipeError(f"larger than {MAX_YAML_BYTES} bytes", str(path), "This is not a run config.")
        if any(isinstance(event, yaml.events.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise LdmPipeError(
                "YAML aliases (*name) are not allowed in a run config", str(path), "Write the value out."
            )
        value = yaml.safe_load(text)
    except FileNotFoundError:
        raise LdmPipeError("the file does not exist", str(path)) from None
    # A date that is none (2001-13-45) is a ValueError, `!!timestamp x` an AttributeError, a list as key a TypeError.
    except (OSError, ValueError, AttributeError, TypeError, LookupError, yaml.YAMLError, RecursionError) as error:
        if isinstance(error, LdmPipeError):
            raise
        raise LdmPipeError(f"cannot be read as YAML ({error})", str(path)) from None
    if not isinstance(value, dict) or _depth(value) > 8:
        raise LdmPipeError("a run config is a mapping of at most 8 levels", str(path))
    return value


def _listed(error: pydantic.ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        came = item.get("input")
        hint = (
            " (YAML reads 1e-4 as text: write 1.0e-4)"
            if isinstance(came, str) and "e" in came and _is_number(came)
            else ""
        )
        lines.append(f"{key}: {item['msg']}, got {came!r}{hint}")
    return "; ".join(lines)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def build_config(model: type[ConfigT], values: dict[str, Any], where: str) -> ConfigT:
    """Check a mapping against a config model.

    Raises: LdmPipeError listing every bad key with its path, what came and what is allowed.
    """
    try:
        return model.model_validate(_tuples(values))
    except pydantic.ValidationError as error:
        raise LdmPipeError(_listed(error), where, "See the config class for the keys it knows.") from None


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def parse_config(model: type[ConfigT], argv: Sequence[str], description: str) -> ConfigT:
    """Read `--config file.yaml` and let any value be overridden by a flag (`--optim.learning_rate 1e-4`, `--seed 3`).

    Raises: LdmPipeError for a bad file; a bad flag ends the process with tyro's explanation.
    """
    import tyro

    rest, path = [part for word in argv for part in _split_config(word)], None
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 >= len(rest):
            raise LdmPipeError("--config needs a file", "command line")
        path = rest[at + 1]
        del rest[at : at + 2]
    if path is None:
        return tyro.cli(model, args=rest, description=description, use_underscores=True)
    default = build_config(model, read_yaml(path), path)
    return tyro.cli(model, default=default, args=rest, description=description, use_underscores=True)


def _split_config(word: str) -> list[str]:
    return ["--config", word[len("--config=") :]] if word.startswith("--config=") else [word]


def dump_config(config: StrictModel) -> str:
    """Write the resolved config as YAML that `parse_config` reads back to the same value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


# May change between save and resume without changing the shape of the run's mathematics.
HARMLESS = frozenset({
    "output_dir", "resume_from_checkpoint", "allow_config_change", "checkpointing_steps", "checkpoints_total_limit",
    "validation_steps", "report_to", "num_threads", "torch_compile", "gradient_checkpointing", "max_nonfinite_steps",
    "on_save_error",
})  # fmt: skip


def default_values(model: type[TrainConfig]) -> dict[str, Any]:
    """Return the defaults of a config; keys that have none are absent."""
    return model.model_construct().model_dump(mode="json")


def config_changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, path: str = ""
) -> list[str]:
    """List the differences of two resolved configs as `key: saved -> now`, harmless keys left out.

    Args:
        saved: of an earlier run.
        now: of this one.
        defaults: what a key counts as that the earlier run did not know.
        path: in front of every key, for parts of a config.
    """
    lines: list[str] = []
    for key in sorted(saved.keys() | now.keys()):
        name = f"{path}{key}"
        default = (defaults or {}).get(key)
        a, b = saved.get(key, default), now.get(key)
        if name in HARMLESS or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += config_changes(a, b, default if isinstance(default, dict) else None, f"{name}.")
        else:
            lines.append(f"{name}: {a!r} -> {b!r}")
    return lines


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main with the command line; bad input is three lines and exit code 2, not a traceback."""
    try:
        main(sys.argv[1:])
    except LdmPipeError as error:
        lines = [f"error: {error.what}", error.where and f"where: {error.where}", error.how_to_fix]
        shown = [printable(masked_text(line), lines=True) for line in lines if line]
        print("\n".join(shown), file=sys.stderr)  # noqa: T201  (the scripts' voice)
        sys.exit(2)
