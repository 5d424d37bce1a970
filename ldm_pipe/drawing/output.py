"""What a pipeline returns, and what a model folder says about its own use.

This file knows the names and limits of settings, not how a picture is drawn.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ldm_pipe import samplers
from ldm_pipe.drawing.png_info import PngInfo, sampler_label
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule.spacing import Spacing

if TYPE_CHECKING:
    from conditioning import Condition
    from ldm_pipe.drawing.request.request import Request

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
THRESHOLDING_KINDS = ("none", "static", "dynamic")
THRESHOLDING_SPACES = ("latent", "pixel")
MAX_SIDE = 16_384
MAX_PICTURES = 4_096


class IntDefault(int):
    """A default of `__call__` that stands for the model's own, when the model has one."""


class FloatDefault(float):
    """A default of `__call__` that stands for the model's own, when the model has one."""


@dataclass
class LatentDiffusionOutput:
    """The pictures of one call.

    Attributes:
        images: a list of PIL pictures, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or latents (B, C, h,
            w).
        nsfw_content_detected: None, as no safety checker runs.
        seeds: the seed that draws picture i again; None where a generator was given.
        latents: what the pictures were decoded from, (B, C, h, w), where `return_latents=True` asked for it.
        infos: the settings of picture i, as they are written into PNG files.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    seeds: list[int] | None = None
    latents: torch.Tensor | None = None
    infos: list[PngInfo] = field(default_factory=list)

    def to_tuple(self) -> tuple[Any, list[bool] | None]:
        """Return what `return_dict=False` returns: (images, nsfw_content_detected)."""
        return self.images, self.nsfw_content_detected


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """Check a whole number. Raises: LdmPipeError naming argument, value and range."""
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise LdmPipeError(f"{name} is {value!r:.80}", how_to_fix=f"use a whole number from {low} to {high}")
    return number


def real_number(name: str, value: Any, low: float, high: float) -> float:
    """Check a finite number. Raises: LdmPipeError naming argument, value and range."""
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not low <= number <= high:
        raise LdmPipeError(f"{name} is {value!r:.80}", how_to_fix=f"use a number from {low:g} to {high:g}")
    return float(number)


def one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    """Check a name. Raises: LdmPipeError listing the known ones."""
    if not isinstance(value, str) or value not in known:
        raise LdmPipeError(f"{name} is {value!r:.80}", how_to_fix=f"use one of {', '.join(known)}")
    return value


def warn_ignored(name: str, why: str) -> None:
    """Warn of a setting without effect, at the line of the call."""
    warnings.warn(f"{name} has no effect: {why}", stacklevel=callers_level())


_ROOT = Path(__file__).parents[2]
# Where a frame is not the user's: our packages, and torch, whose no_grad stands around every call.
_INNER = (*(f"{_ROOT / name}{os.sep}" for name in ("ldm_pipe", "autoencoder", "conditioning")), torch.__path__[0])


def callers_level() -> int:
    """Return the `stacklevel` that makes a warning of the calling function name the line outside of our packages.

    However deep the check stands: what a user can change is the line of the call.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame, level = frame.f_back, level + 1
    return level


@dataclass(frozen=True)
class Thresholding:
    """How each estimate of x0 is kept in range; see `ldm_pipe.guidance.thresholding`."""

    kind: str = "none"
    percentile: float = 0.995
    max_value: float = 1.0
    space: str = "latent"
    cap: float = math.inf

    @classmethod
    def of_scheduler(cls, config: Mapping[str, Any]) -> Thresholding | None:
        """Read the `thresholding` of a diffusers scheduler config, whatever its class; None if it asks for none.

        `clip_sample` plays no role: diffusers' StableDiffusionPipeline turns it off, too.

        Raises: LdmPipeError naming the key.
        """
        if not config.get("thresholding"):
            return None
        ratio = real_number("dynamic_thresholding_ratio", config.get("dynamic_thresholding_ratio", 0.995), 0.0, 1.0)
        cap = real_number("sample_max_value", config.get("sample_max_value", 1.0), 1e-3, 1e4)
        return cls("dynamic", ratio, cap=cap) if cap > 1 else cls("static")  # a cap of 1 leaves the clip to [-1, 1]

    @classmethod
    def read(cls, value: Any) -> Thresholding:
        """Read a kind's name, a mapping of fields, or None for none.

        Raises: LdmPipeError naming the field and what is allowed.
        """
        if value is None or isinstance(value, Thresholding):
            return value or cls()
        if isinstance(value, str):
            return cls(one_of("thresholding", value, THRESHOLDING_KINDS))
        if not isinstance(value, Mapping):
            raise LdmPipeError(f"thresholding is {value!r}", how_to_fix=f"use one of {', '.join(THRESHOLDING_KINDS)}")
        known = tuple(f.name for f in fields(cls))
        for name in value:
            one_of("a field of thresholding", name, known)
        return cls(
            one_of("thresholding kind", value.get("kind", "static"), THRESHOLDING_KINDS),
            real_number("thresholding percentile", value.get("percentile", cls.percentile), 0.0, 1.0),
            real_number("thresholding max_value", value.get("max_value", cls.max_value), 1e-3, 1e4),
            one_of("thresholding space", value.get("space", cls.space), THRESHOLDING_SPACES),
            math.inf if value.get("cap") is None else real_number("thresholding cap", value["cap"], 1e-3, 1e4),
        )


@dataclass(frozen=True)
class Defaults:
    """What a model is best drawn with; stored in its `ldm_pipe.json`. None leaves the pipeline's own default."""

    sampler: str | None = None
    spacing: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    thresholding: Thresholding | None = None
    height: int | None = None
    width: int | None = None

    @classmethod
    def read(cls, value: Any, where: str = "defaults") -> Defaults:
        """Read the `defaults` of an `ldm_pipe.json`. Raises: LdmPipeError naming the field."""
        if not isinstance(value, Mapping):
            raise LdmPipeError(f"defaults must be an object, not {type(value).__name__}", where)
        unknown = sorted(set(value) - {f.name for f in fields(cls)})
        if unknown:
            raise LdmPipeError(f"unknown defaults {unknown}", where, "Update ldm_pipe, or remove them.")
        given = {name: item for name, item in value.items() if item is not None}
        checks = {
            "sampler": lambda v: one_of("sampler", v, samplers.NAMES),
            "spacing": lambda v: one_of("spacing", v, get_args(Spacing)),
            "num_inference_steps": lambda v: whole_number("num_inference_steps", v, 1, 1_000_000),
            "guidance_scale": lambda v: real_number("guidance_scale", v, 0.0, 1000.0),
            "guidance_rescale": lambda v: real_number("guidance_rescale", v, 0.0, 1.0),
            "thresholding": Thresholding.read,
            "height": lambda v: whole_number("height", v, 1, MAX_SIDE),
            "width": lambda v: whole_number("width", v, 1, MAX_SIDE),
        }
        return cls(**{name: checks[name](item) for name, item in given.items()})

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        if self.thresholding is not None and self.thresholding.cap == math.inf:
            del values["thresholding"]["cap"]  # JSON has no infinity
        return values


def picture_infos(
    request: Request, model: str, model_hash: str | None, more: Mapping[str, str] | None = None
) -> list[PngInfo]:
    """Describe each picture of a request in the customary words; what is at its default is left out.

    Args:
        more: further settings, such as the LoRAs.
    """
    sampling, rule = request.sampling, request.thresholding
    common = {
        "Steps": sampling.steps.num_steps,
        "Sampler": sampler_label(sampling.name),
        "CFG scale": f"{request.guidance_scale:g}",
    }
    threshold = f"{rule.kind} {rule.space} {rule.percentile:g} {rule.max_value:g}"
    sizes, null_sizes = _numbers(request.beside), _numbers(request.beside_null)
    further = {
        "Model hash": model_hash,
        "Model": model or None,
        "Spacing": sampling.spacing,
        "Eta": f"{sampling.eta:g}" if sampling.eta else None,
        "Sampler options": " ".join(f"{name}={value}" for name, value in sampling.options.items()) or None,
        "Guidance": None if request.guidance is None else getattr(request.guidance, "__name__", "own"),
        "Guidance rescale": f"{request.guidance_rescale:g}" if request.guidance_rescale else None,
        "Thresholding": None if rule.kind == "none" else threshold + ("" if rule.cap == math.inf else f" {rule.cap:g}"),
        "Clip skip": request.clip_skip,
        "Prompt syntax": request.syntax,
        "Denoising strength": None if request.image is None and request.z0 is None else f"{request.strength:g}",
        "Sizes": sizes,
        "Negative sizes": None if null_sizes == sizes else null_sizes,
        "Map": None if request.beside is None or request.beside.spatial is None else "given",
        "Handed over at": None if request.begin is None else f"{request.begin:g}",
        "Handed on at": None if request.end is None else f"{request.end:g}",
        **(more or {}),
    }
    infos = []
    for i in range(request.num_pictures):
        seed = None if request.seeds is None else request.seeds[i]
        settings = {**common, "Seed": seed, "Size": f"{request.width}x{request.height}", **further}
        settings["Class"] = _class_number(request, i)
        settings["Second prompt"] = request.prompts_2[i] if request.prompts_2 else None
        settings["Second negative prompt"] = request.negatives_2[i] if request.negatives_2 else None
        told = {name: str(value) for name, value in settings.items() if value is not None}
        infos.append(PngInfo(request.prompts[i] if request.prompts else "", request.negatives[i], told))
    return infos


def _class_number(request: Request, i: int) -> int | None:
    """Return the class told beside the text of a picture, None for none."""
    labels = [None if one is None else one.labels for one in (request.beside, request.beside_null)]
    if labels[0] is None or labels[1] is None or labels[0].ndim != 1:
        return None
    own, null = (int(value[i]) for value in labels)
    return None if own == null else own


def _numbers(beside: Condition | None) -> str | None:
    """Write what SDXL is told of sizes; a call tells the same of every picture."""
    if beside is None or beside.labels is None or beside.labels.ndim != 2:
        return None
    return " ".join(f"{value:g}" for value in beside.labels[0].tolist())
