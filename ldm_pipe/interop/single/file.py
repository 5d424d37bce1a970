"""Original single files (CompVis, sgm): turned into diffusers folders and back, tensor by tensor, nothing approximated.

What enters: one `.safetensors` or `.ckpt`, or a folder. What leaves: the other, with the same numbers in the same
dtype. No network is run, and none is asked: the configs are those of the family (`families.py`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder import AutoencoderKL
from conditioning import CLIPTextEncoder
from ldm_pipe.interop.pickles.checkpoint import emas, load_checkpoint
from ldm_pipe.interop.single.clip_names import from_open_clip, to_open_clip
from ldm_pipe.interop.single.clip_vocabulary import clip_tokenizer, tokenizer_folder
from ldm_pipe.interop.single.families import (
    DEPTH,
    SD_PIPELINES,
    UNET,
    VAE,
    Family,
    TextPart,
    detect,
    of_folder,
    usual_names,
    with_channels,
    with_rows,
)
from ldm_pipe.interop.single.ldm_names import rename, squeezed, unet_modules, vae_modules
from ldm_pipe.networks import UNet
from ldm_pipe.networks.config import read_config
from ldm_pipe.pretrained import (
    LdmPipeError,
    PretrainedModule,
    atomic_write,
    check_tensors,
    load_folder_tensors,
    load_tensors,
    save_tensors,
    sync_folder,
)
from ldm_pipe.pretrained.files import new_folder

REST = "single_file.safetensors"  # what the file has beyond the folder's parts: OpenCLIP's last layer, for the way back
# What follows from the config, or is of no use for drawing.
_LEFT_OUT = re.compile(
    r"(model_ema\.|embedding_manager\.|first_stage_model\.loss\.|.*\.position_ids$|(v_pred|ztsnr|scale_factor|logvar|lvlb_weights)$"
    r"|betas$|alphas_cumprod|(sqrt|log)_|posterior_|denoiser\.sigmas$|cond_stage_model\.logit_scale$)"
)


@dataclass(frozen=True)
class ImportReport:
    """What an import did: the folder, its family, and what the user should know, in whole sentences."""

    folder: Path
    family: str
    notes: tuple[str, ...]


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take out what has a prefix, without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name[len(prefix) :]: tensors.pop(name) for name in names}


def _on_meta(cls: type[PretrainedModule], config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return cls.from_config(config)


def _names(module: nn.Module, modules: Mapping[str, str]) -> dict[str, str]:
    return rename(module.state_dict(), modules)


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {our key: original key} of a U-Net."""
    return _names(_on_meta(UNet, config), unet_modules(read_config(config)))


def vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {our key: original key} of a KL autoencoder."""
    blocks = len(config["block_out_channels"]), config["layers_per_block"]
    return _names(_on_meta(AutoencoderKL, config), vae_modules(*blocks))


def _renamed(tensors: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Give tensors our names; those that no name leads to keep their own, so that a strict check reports them."""
    ours = {key: tensors.pop(name) for key, name in names.items() if name in tensors}
    for key, tensor in ours.items():
        if squeezed(key) and tensor.ndim == 4:
            ours[key] = tensor[:, :, 0, 0]
    return {**ours, **tensors}


def split(tensors: Mapping[str, Tensor], family: Family, where: str) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Sort a single file's tensors into the parts of a folder, under our names, each checked strictly.

    Returns: {part: tensors}, and what only the way back needs.
    Raises: LdmPipeError naming missing, unexpected and misshapen tensors.
    """
    rest = {name: tensor for name, tensor in tensors.items() if not _LEFT_OUT.match(name)}
    parts = {"unet": _renamed(_take(rest, UNET), unet_names(family.unet))}
    check_tensors(_on_meta(UNet, family.unet), parts["unet"], f"{where}, unet")
    parts["vae"] = _renamed(_take(rest, VAE), vae_names(family.vae))
    check_tensors(_on_meta(AutoencoderKL, family.vae), parts["vae"], f"{where}, vae")
    beyond: dict[str, Tensor] = {}
    for text in family.texts:
        own = _take(rest, text.prefix)
        if text.open_clip:
            own, more = from_open_clip(own, text.config["num_hidden_layers"], projection=text.projection)
            beyond.update({text.prefix + name: tensor for name, tensor in more.items()})
        check_tensors(_on_meta(CLIPTextEncoder, text.config), own, f"{where}, {text.folder}")
        parts[text.folder] = own
    if rest:
        first = ", ".join(sorted(rest)[:10])
        raise LdmPipeError(f"{len(rest)} tensors belong to no part: {first}", where, f"It is no plain {family.name}.")
    return parts, beyond


def join(parts: Mapping[str, Mapping[str, Tensor]], beyond: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Give the parts of a folder the names and shapes of a single file: the inverse of `split`."""
    theirs = {UNET + name: parts["unet"][key] for key, name in unet_names(family.unet).items()}
    for key, name in vae_names(family.vae).items():
        tensor = parts["vae"][key]
        theirs[VAE + name] = tensor[:, :, None, None] if squeezed(key) else tensor
    for text in family.texts:
        own = dict(parts[text.folder])
        own = to_open_clip(own, text.config["num_hidden_layers"]) if text.open_clip else own
        theirs.update({text.prefix + name: tensor for name, tensor in own.items()})
    prefixes = tuple(text.prefix for text in family.texts)
    return {**theirs, **{name: tensor for name, tensor in beyond.items() if name.startswith(prefixes)}}


def _prediction(tensors: Mapping[str, Tensor], family: Family, given: str | None, where: str) -> str:
    """Return diffusers' word for the prediction; Stable Diffusion 2 files do not say which they learnt."""
    words = {"eps": "epsilon", "v": "v_prediction"}
    if given is not None and given not in words:
        raise LdmPipeError(f"prediction {given!r}", where, 'Known: "eps" and "v".')
    if "v_pred" in tensors:
        return "v_prediction"
    if given is None and family.name == "sd2" and family.scheduler.get("prediction_type") is None:
        what = "Stable Diffusion 2 files do not say what the network predicts"
        raise LdmPipeError(what, where, 'Say it: prediction "eps" (the 512 base models) or "v" (the 768 ones).')
    return words[given] if given is not None else str(family.scheduler.get("prediction_type") or "epsilon")


def import_single_file(
    source: str | Path,
    target: str | Path,
    *,
    ema: bool = False,
    prediction: str | None = None,
    like: str | Path | None = None,
    tokenizer: str | Path | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> ImportReport:
    """Turn an original single file into a diffusers folder; every tensor keeps its numbers and its dtype.

    Args:
        ema: take the U-Net's moving averages, where the file has them.
        prediction: "eps" or "v", where the file does not say.
        like: a diffusers folder of the same architecture, for files of no known family.
        tokenizer: a folder with CLIP's `vocab.json` and `merges.txt`; None takes `like`'s, or open_clip's.
        tensors: those of the source, where it has been read already.
    Raises: LdmPipeError naming file, tensor and cause; nothing is left behind.
    """
    source, target, where = Path(source), Path(target), str(source)
    if target.exists():
        raise LdmPipeError("exists already", str(target), "Give another folder.")
    tensors = load_checkpoint(source) if tensors is None else tensors
    first = tensors.get(f"{UNET}input_blocks.0.0.weight")
    if like is not None and first is not None:
        family = with_channels(of_folder(Path(like)), first.shape[1], where)
    else:
        family = detect(tensors, where)
    tensors = usual_names(tensors, family)
    family = with_rows(family, tensors)
    word = _prediction(tensors, family, prediction, where)
    scheduler = {**family.scheduler, "prediction_type": word}
    if "ztsnr" in tensors:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    family = replace(family, scheduler=scheduler)
    notes = []
    if ema:
        tensors |= emas(tensors, UNET)
    elif any(name.startswith("model_ema.") for name in tensors):
        notes.append("The file also holds moving averages of the U-Net; ema=True takes those.")
    if any(name.startswith("embedding_manager.") for name in tensors):
        notes.append("The file's embedding_manager stays behind: load learnt words as files of their own.")
    if family.pipeline == DEPTH:
        _take(tensors, "depth_model.")
        notes.append("The depth estimator stays behind: draw with depth_map=.")
    parts, beyond = split(tensors, family, where)
    words = tokenizer_folder(tokenizer, like)
    _write(target, family, parts, beyond, words)
    return ImportReport(target, family.name, tuple(notes))


def _write(
    target: Path, family: Family, parts: Mapping[str, Mapping[str, Tensor]], beyond: Mapping[str, Tensor], words: Any
) -> None:
    """Write all parts into a staging folder, then rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = new_folder(target)
    try:
        for part, config, known in (
            ("unet", family.unet, "UNet2DConditionModel"),
            ("vae", family.vae, "AutoencoderKL"),
        ):
            save_tensors(staging / part / "diffusion_pytorch_model.safetensors", parts[part])
            _json(staging / part / "config.json", {"_class_name": known, **config})
        for text in family.texts:
            save_tensors(staging / text.folder / "model.safetensors", parts[text.folder])
            _json(staging / text.folder / "config.json", {**text.config, "dtype": "float32"})
            clip_tokenizer(words, text.pad_token).save_pretrained(staging / _tokenizer_name(text))
        if beyond:
            save_tensors(staging / REST, beyond)
        _json(staging / "scheduler" / "scheduler_config.json", family.scheduler)
        _json(staging / "model_index.json", _index(family))
        staging.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _tokenizer_name(text: TextPart) -> str:
    return text.folder.replace("text_encoder", "tokenizer")


def _json(path: Path, value: Mapping[str, Any]) -> None:
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def _index(family: Family) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": family.pipeline,
        "_diffusers_version": "0.38.0",
        "scheduler": ["diffusers", family.scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    for text in family.texts:
        kind = "CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"
        index |= {text.folder: ["transformers", kind], _tokenizer_name(text): ["transformers", "CLIPTokenizer"]}
    if family.pipeline == DEPTH:
        del index["image_encoder"]
        return {**index, "depth_estimator": [None, None]}
    if not family.is_xl:
        return {**index, "safety_checker": [None, None], "requires_safety_checker": False}
    if family.name == "sdxl":
        return {**index, "force_zeros_for_empty_prompt": True}
    absent = {"text_encoder": [None, None], "tokenizer": [None, None]}
    return {**index, **absent, "requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}


def check_readable(family: Family, where: str) -> tuple[str, ...]:
    """Refuse what a reader of single files would assume wrongly; say what it has to be told.

    Raises: LdmPipeError with the reason.
    """
    vae, law = family.vae, family.scheduler
    factor = 0.13025 if family.is_xl else 0.18215
    if vae.get("scaling_factor", 0.18215) != factor or vae.get("shift_factor") or vae.get("latents_mean"):
        what = f"the latents are scaled by {vae.get('scaling_factor')}; readers of {family.name} files assume {factor}"
        raise LdmPipeError(what, where, "A single file has no place for another scale; export a diffusers folder.")
    wanted = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    other = {key: law.get(key) for key, value in wanted.items() if law.get(key) != value}
    if other:
        what = f"the noise law has {other}; readers of {family.name} files assume {wanted}"
        raise LdmPipeError(what, where, "A single file has no place for another law; export a diffusers folder.")
    if law.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise LdmPipeError(f"prediction {law['prediction_type']!r}", where, "Readers know epsilon and v_prediction.")
    if law.get("prediction_type") == "v_prediction" and not family.is_xl:
        return ("Readers must be told that this model predicts v: the file has no place for it.",)
    return ()


def guessed_otherwise(tensors: Mapping[str, Tensor], family: Family) -> tuple[str, ...]:
    """Say so where ComfyUI will guess wrongly what a Stable Diffusion 2 file predicts.

    It takes a spread above 0.09 of one bias for v (ComfyUI 0.3.64, `SD20.model_type`; trained models keep to it).
    """
    bias = tensors.get(f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias")
    if family.name != "sd2" or family.pipeline != SD_PIPELINES[4] or bias is None:
        return ()
    guess = "v_prediction" if float(bias.float().std(correction=0)) > 0.09 else "epsilon"
    if guess == family.scheduler.get("prediction_type", "epsilon"):
        return ()
    return (f"ComfyUI will take this model for one that predicts {guess}: its node ModelSamplingDiscrete mends it.",)


def export_single_file(
    source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None, variant: str | None = None
) -> tuple[str, ...]:
    """Write a diffusers folder as one original file that ComfyUI, A1111 and diffusers read.

    Args:
        dtype: of the weights in the file; None keeps theirs.
        variant: reads the folder's `*.fp16.safetensors`, for "fp16".
    Returns: what readers have to be told, in whole sentences.
    Raises: LdmPipeError if a single file cannot hold the model, or a part is damaged.
    """
    source, target = Path(source), Path(target)
    if target.exists() or target.suffix != ".safetensors":
        raise LdmPipeError("exists already, or is no .safetensors", str(target), "Name a new .safetensors file.")
    family = of_folder(source)
    notes = check_readable(family, str(source))
    parts = {
        part: cls.rename_keys(load_folder_tensors(source / part, name, variant))
        for part, cls, name in (
            ("unet", UNet, "diffusion_pytorch_model"),
            ("vae", AutoencoderKL, "diffusion_pytorch_model"),
            *((text.folder, CLIPTextEncoder, "model") for text in family.texts),
        )
    }
    for part, cls, config in (
        ("unet", UNet, family.unet),
        ("vae", AutoencoderKL, family.vae),
        *((text.folder, CLIPTextEncoder, text.config) for text in family.texts),
    ):
        check_tensors(_on_meta(cls, config), parts[part], str(source / part))
    beyond = load_tensors(source / REST) if (source / REST).is_file() else {}
    tensors = join(parts, beyond, family)
    notes += guessed_otherwise(tensors, family)
    if dtype is not None:
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    if family.is_xl and family.scheduler.get("prediction_type") == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)
        if family.scheduler.get("rescale_betas_zero_snr"):
            tensors["ztsnr"] = torch.zeros(0)
    save_tensors(target, tensors, {"format": "pt"})
    return notes
