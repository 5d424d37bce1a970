"""Model folders of diffusers' smaller pipelines: read into parts, written from parts.

What enters: a folder with `model_index.json`. What leaves: its networks and noise laws, or one clear error. Class names
are looked up in the fixed lists below; nothing in a folder can name code to run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autoencoder import Autoencoder, load_autoencoder
from conditioning import AnyTextEncoder, CLIPTextEncoder, T5TextEncoder
from conditioning.t5 import CLASSES as T5_CLASSES
from conditioning.text import DEEPFLOYD_IF
from ldm_pipe import samplers
from ldm_pipe.drawing.output import Defaults, Thresholding
from ldm_pipe.drawing.placement import read_device, read_dtype
from ldm_pipe.interop.folders.folder import (
    FORMAT_VERSION,
    OWN_FILE,
    config_errors,
    find_folder,
    read_own,
    staged,
    state_dtype,
    unet_layout,
)
from ldm_pipe.interop.pickles.convert import without_pickles
from ldm_pipe.networks import UNet
from ldm_pipe.networks.config_2d import OWN_CLASS_2D
from ldm_pipe.pretrained import LdmPipeError, atomic_write, read_json
from ldm_pipe.schedule import Law
from ldm_pipe.schedule import read as schedule_config

OWN_UNCONDITIONAL = "UnconditionalPipeline"  # by class, or with a network that no pipeline of diffusers draws with
OWN_SUPER_RESOLUTION = "SuperResolutionPipeline"  # in pixels
_UNCLIP = (
    "text_encoder",
    "text_proj",
    "decoder",
    "super_res_first",
    "super_res_last",
    "decoder_scheduler",
    "super_res_scheduler",
)
CLASSES: dict[str, tuple[str, ...]] = {  # the pipelines of diffusers, and the parts they need
    "DDPMPipeline": ("unet", "scheduler"),
    "DDIMPipeline": ("unet", "scheduler"),
    "LDMPipeline": ("unet", "vqvae", "scheduler"),
    OWN_UNCONDITIONAL: ("unet", "scheduler"),
    "IFPipeline": ("unet", "scheduler"),
    "IFImg2ImgPipeline": ("unet", "scheduler"),
    "IFInpaintingPipeline": ("unet", "scheduler"),
    "StableDiffusionUpscalePipeline": ("unet", "vae", "scheduler", "low_res_scheduler"),
    "IFSuperResolutionPipeline": ("unet", "scheduler", "image_noising_scheduler"),
    "IFImg2ImgSuperResolutionPipeline": ("unet", "scheduler", "image_noising_scheduler"),
    "IFInpaintingSuperResolutionPipeline": ("unet", "scheduler", "image_noising_scheduler"),
    "LDMSuperResolutionPipeline": ("unet", "vqvae", "scheduler"),
    OWN_SUPER_RESOLUTION: ("unet", "scheduler"),
    "UnCLIPPipeline": ("prior", "prior_scheduler", *_UNCLIP),
    "UnCLIPImageVariationPipeline": ("image_encoder", *_UNCLIP),
}
PARTS = {
    "unet": ("UNet2DModel", "UNet2DConditionModel", OWN_CLASS_2D),
    "vae": ("AutoencoderKL",),
    "vqvae": ("VQModel", "AutoencoderKL"),
    "prior": ("PriorTransformer",),
    "text_proj": ("UnCLIPTextProjModel",),
    "decoder": ("UNet2DConditionModel",),
    "super_res_first": ("UNet2DModel",),
    "super_res_last": ("UNet2DModel",),
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection", *T5_CLASSES.values()),
    "tokenizer": (
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "T5Tokenizer",
        "T5TokenizerFast",
        "PreTrainedTokenizerFast",
        "TokenizersBackend",  # what transformers 5 calls the former
    ),
}
SCHEDULERS = (
    "scheduler",
    "low_res_scheduler",
    "image_noising_scheduler",
    "prior_scheduler",
    "decoder_scheduler",
    "super_res_scheduler",
)
IGNORED = ("safety_checker", "feature_extractor", "watermarker", "requires_safety_checker", "max_noise_level")


@dataclass(frozen=True)
class Loaded:
    """What a folder holds."""

    index: Mapping[str, Any]
    unet: UNet
    autoencoder: Autoencoder | None  # None: in pixels
    text_encoders: tuple[AnyTextEncoder, ...]
    schedule: Law
    noising: Law | None  # of the picture to enlarge
    defaults: Defaults
    name: str
    own: Mapping[str, Any]


def class_of(root: Path) -> str:
    """Return the `_class_name` of a folder's `model_index.json`, "" where it has none."""
    index = read_json(root / "model_index.json")
    name = index.get("_class_name") if isinstance(index, dict) else None
    return name if isinstance(name, str) else ""


def read_index(root: Path, known: Iterable[str]) -> Mapping[str, Any]:
    """Read `model_index.json`; another pipeline, or anything beyond the classes we build, is refused.

    Raises: LdmPipeError naming the part and the class.
    """
    where, name = str(root / "model_index.json"), class_of(root)
    if name not in tuple(known):
        fix = f"Known are {', '.join(known)}. `ldm_pipe.load_pipeline` finds the class that fits a folder."
        raise LdmPipeError(f"the folder holds a {name!r:.80}", where, fix)
    index = read_json(root / "model_index.json")
    for part, value in index.items():
        if part.startswith("_") or part in IGNORED:
            continue
        class_name = value[1] if isinstance(value, list) and len(value) == 2 else value
        if part in SCHEDULERS:
            if not isinstance(class_name, str) or not class_name.endswith("Scheduler") or not class_name.isidentifier():
                raise LdmPipeError(f"{part} is a {class_name!r:.80}", where, "Known are diffusers' schedulers.")
        elif class_name is None and part in ("text_encoder", "tokenizer"):
            continue  # diffusers' IF is often saved without: prompts come as embeddings then
        elif part not in (*CLASSES[name], "text_encoder", "tokenizer") or class_name not in PARTS[part]:
            listed = ", ".join(PARTS.get(part, tuple(PARTS)))
            raise LdmPipeError(f"the part {part!r:.80} is a {class_name!r:.80}", where, f"Known: {listed}.")
    missing = [part for part in CLASSES[name] if not isinstance(index.get(part), list)]
    if missing:
        raise LdmPipeError(f"the model lacks {missing}", where, "Fetch or export the folder anew.")
    return index


def load(name: str | Path | None, known: Iterable[str], **options: Any) -> Loaded:
    """Load every part of a folder strictly; arguments are those of `opened`."""
    with opened(name, known, **options) as (root, index, named, common):
        return _load(root, index, named, common)


@contextlib.contextmanager
def opened(
    name: str | Path | None,
    known: Iterable[str],
    *,
    torch_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Path, Mapping[str, Any], Path, dict[str, Any]]]:
    """Open a folder for its parts to be read; arguments are those of `LatentDiffusionPipeline.from_pretrained`.

    Args:
        name: a folder, or a model of the hub.
        known: the classes of `model_index.json` that fit.
    Returns: the folder without pickles, its checked index, the folder itself, and what every part is loaded with.
    Raises: LdmPipeError naming file and cause.
    """
    if name is None:
        raise LdmPipeError("no model named", how_to_fix="Give a folder or a hub id.")
    if dtype is not None and torch_dtype is not None and read_dtype(dtype) != read_dtype(torch_dtype):
        raise LdmPipeError(f"dtype {dtype} and torch_dtype {torch_dtype} differ", how_to_fix="Give one of them.")
    chosen, pickles = read_dtype(torch_dtype if dtype is None else dtype), use_safetensors is False
    device = read_device(device)
    source: dict[str, Any] = {"local_files_only": local_files_only, "revision": revision, "pickles": pickles}
    root = find_folder(name, variant=variant, **source)
    with without_pickles(root) if pickles else contextlib.nullcontext(root) as safe:
        yield safe, read_index(root, known), root, {"dtype": chosen, "variant": variant, "device": device}


def _load(root: Path, index: Mapping[str, Any], named: Path, common: Mapping[str, Any]) -> Loaded:
    own = read_own(root)
    laws = {part: read_law(root / part) for part in SCHEDULERS if part in index}
    unet = load_unet(root / "unet", common)
    vae = next((part for part in ("vae", "vqvae") if part in index), None)
    autoencoder: Autoencoder | None = None
    if vae is not None:
        with config_errors(root / vae):
            autoencoder = load_autoencoder(root / vae, **common)
    defaults = Defaults.read(own.get("defaults", {}), str(root / OWN_FILE))
    if defaults.sampler is None:
        asked = schedule_config.sampler_name(laws["scheduler"].config)
        defaults = replace(defaults, sampler=asked if asked in samplers.NAMES else None)
    return Loaded(
        index,
        unet,
        autoencoder,
        _load_texts(root, index, common),
        laws["scheduler"],
        next((law for part, law in laws.items() if part != "scheduler"), None),
        defaults,
        name_of(root, named),
        own,
    )


def _load_texts(root: Path, index: Mapping[str, Any], common: Mapping[str, Any]) -> tuple[AnyTextEncoder, ...]:
    if not isinstance(index.get("text_encoder"), list) or index["text_encoder"][1] is None:
        return ()
    with config_errors(root / "text_encoder"):
        if index["text_encoder"][1].startswith("CLIP"):
            return (CLIPTextEncoder.from_pretrained(root / "text_encoder", tokenizer=root / "tokenizer", **common),)
        return (
            T5TextEncoder.from_pretrained(
                root / "text_encoder", tokenizer=root / "tokenizer", reading=DEEPFLOYD_IF, **common
            ),
        )


def load_part(folder: Path, cls: Any, common: Mapping[str, Any], **more: Any) -> Any:
    """Load one network strictly. Raises: LdmPipeError naming file and cause."""
    with config_errors(folder):
        return cls.from_pretrained(folder, **common, **more)


def load_unet(folder: Path, common: Mapping[str, Any]) -> UNet:
    """Load a U-Net straight into the layout that it draws in."""
    return load_part(folder, UNet, common, memory_format=unet_layout(common["device"], common["dtype"]))


def name_of(root: Path, named: Path) -> str:
    """Return the name of a model: as `ldm_pipe.json` has it, else that of its folder."""
    return str(read_own(root).get("name") or named.resolve().name)[:200]


def read_law(folder: Path) -> Law:
    """Read the noise law of a scheduler's folder."""
    config = read_json(folder / "scheduler_config.json")
    if not isinstance(config, dict):
        raise LdmPipeError("a config must be a JSON object", str(folder / "scheduler_config.json"))
    return schedule_config.read(config)


def scheduler_file(
    law: Law, sampler: str, thresholding: Thresholding | None, *, learned: bool = False
) -> dict[str, Any]:
    """Return the scheduler config for diffusers: the one the law was read from, where it asks for this sampler.

    Args:
        thresholding: of x0, for a config that is made anew.
        learned: whether the network learnt the variance of a step.
    Raises: LdmPipeError with the reason, for what diffusers cannot represent.
    """
    if law.config and schedule_config.sampler_name(law.config) == sampler:
        return dict(law.config)
    config = law.to_config(sampler, for_stable_diffusion=False)
    rule = thresholding or Thresholding()
    if rule.kind == "static" and rule.space == "latent" and "clip_sample" in config:
        config |= {"clip_sample": True, "clip_sample_range": rule.max_value}
    elif rule.kind == "dynamic" and rule.space == "latent" and rule.max_value == 1 and "thresholding" in config:
        cap = {"sample_max_value": min(rule.cap, 1e4)}
        config |= {"thresholding": True, "dynamic_thresholding_ratio": rule.percentile, **cap}
    if learned and sampler == "ddpm":
        config["variance_type"] = "learned_range"
    return config


def index_of(class_name: str, parts: Mapping[str, Any], schedulers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the `model_index.json` of a pipeline.

    Args:
        parts: networks by name; None is left empty, as diffusers does.
        schedulers: their configs by name.
    """
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.38.0"}
    for part, network in parts.items():
        if part == "text_encoder":
            kind = "" if network is None else (network.config.get("architectures") or ["CLIPTextModel"])[0]
            library = getattr(getattr(network, "tokenizer", None), "library", None)
            words = "CLIPTokenizer" if library is None else type(library).__name__
            index["text_encoder"] = ["transformers", kind] if network is not None else [None, None]
            index["tokenizer"] = ["transformers", words] if network is not None else [None, None]
        elif network is not None:
            kind = network.config.get("_class_name") or type(network).class_name
            index[part] = ["ldm_pipe" if kind == OWN_CLASS_2D else "diffusers", kind]
    return {**index, **{part: ["diffusers", config["_class_name"]] for part, config in schedulers.items()}}


def write(
    target: str | Path,
    index: Mapping[str, Any],
    parts: Mapping[str, Any],
    schedulers: Mapping[str, Mapping[str, Any]],
    own: Mapping[str, Any],
    *,
    dtype: Any = None,
    variant: str | None = None,
    further: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a folder whole or not at all: into a staging folder beside the target, then moved over.

    Args:
        own: for `ldm_pipe.json`.
        further: content of other JSON files by their path.
        dtype: of all weights on disk; None keeps that in memory.
    Raises: LdmPipeError if something cannot be written.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise LdmPipeError("is a file, not a folder", str(target), "Choose another folder.")
    options: dict[str, Any] = {"variant": variant, "dtype": read_dtype(dtype) if dtype is not None else None}

    with staged(target) as staging:
        for part, network in parts.items():
            if network is not None:
                network.save_pretrained(staging / part, **options)
            if network is not None and part == "text_encoder":
                state_dtype(staging / part / "config.json")
                network.tokenizer.save_pretrained(staging / "tokenizer")
        files = {f"{part}/scheduler_config.json": config for part, config in schedulers.items()}
        for path, content in {**files, **(further or {}), "model_index.json": index}.items():
            atomic_write(staging / path, json.dumps(content, indent=2) + "\n")
        text = json.dumps({"format_version": FORMAT_VERSION, **own}, indent=2, ensure_ascii=False)
        atomic_write(staging / OWN_FILE, text + "\n")
