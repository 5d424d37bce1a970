"""A model folder in diffusers' layout plus `ldm_pipe.json`: read into parts, written from parts.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/  ldm_pipe.json  README.md

diffusers reads such a folder as a StableDiffusionPipeline and ignores `ldm_pipe.json`, which keeps what diffusers has
no place for. index.py holds the other kinds: with a VQ autoencoder it is an LDMTextToImagePipeline, and two parts are
called `vqvae/` and `bert/`; SDXL has `text_encoder_2/` and `tokenizer_2/`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autoencoder import Autoencoder, AutoencoderKL, load_autoencoder
from conditioning import AnyTextEncoder, CLIPTextEncoder, load_text_encoder
from conditioning.label import LabelInput
from conditioning.spatial import SpatialInput
from conditioning.text import SDXL, SDXL_2
from ldm_pipe import samplers
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.interop.folders.index import (
    DEPTH,
    LDM_NAMES,
    NUMBERS_SCORE,
    OWN,
    SECOND,
    XL_FLAGS,
    XL_PIPELINES,
    check_index,
    encoder_folders,
    folders_of,
    num_numbers,
    part_names,
    tokenizer_folder,
    write_index,
)
from ldm_pipe.networks import UNet
from ldm_pipe.pretrained import LdmPipeError, atomic_write, check_links, read_json, resolve_folder
from ldm_pipe.schedule import Law, own_file
from ldm_pipe.schedule import read as schedule_config
from ldm_pipe.schedule.keys import version_of

SHIPPED = Path(__file__).parents[2] / "assets" / "emoji"
FORMAT_VERSION = 1
OWN_FILE = "ldm_pipe.json"
RUN_PIPELINE = "pipeline"  # the folder inside a training run
ZERO_KEY = "zero_empty_prompt"  # in ldm_pipe.json, where the index has no place for it
XL_GUIDANCE = 5.0  # guidance scale of diffusers' SDXL pipelines where none is asked for
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# What diffusers would fill in silently, drawing other pictures: part, class, key, since when its files hold it.
DECIDING = (
    ("unet", "UNet2DConditionModel", "attention_head_dim", (0, 2)),
    ("vae", "AutoencoderKL", "scaling_factor", (0, 13)),
)
OF_UNCLIP = ("prior", "text_proj", "decoder", "super_res_first", "super_res_last")


@dataclass(frozen=True)
class Parts:
    """What a folder holds, loaded."""

    unet: UNet
    autoencoder: Autoencoder
    text_encoders: tuple[AnyTextEncoder, ...]
    schedule: Law
    defaults: Defaults
    golden: Any = None
    name: str = ""
    model_hash: str | None = None
    spatial: SpatialInput | None = None  # maps that the U-Net takes beside the latents
    labels: LabelInput | None = None  # classes that the U-Net knows beside the text
    zero_empty_prompt: bool = False  # without a negative prompt, embeddings of zeros stand for it


def find_folder(
    name: str | Path | None,
    *,
    variant: str | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    pickles: bool = False,
) -> Path:
    """Find a model: the shipped one for None, a local folder, the pipeline inside a training run, or a hub id.

    Args:
        pickles: also take `.bin` weights from the hub.
    Raises: LdmPipeError saying where it was looked for, or which link leads out of the folder.
    """
    if name is None:
        if not (SHIPPED / "model_index.json").is_file():
            raise LdmPipeError("this installation ships no model", str(SHIPPED), "Name one: from_pretrained('folder').")
        return SHIPPED
    if not str(name).strip() or "\0" in str(name):
        raise LdmPipeError(f"the model name is {str(name)!r}", how_to_fix="Give a folder or a hub id.")
    if Path(name).expanduser().is_file():
        fix = "Load a single file with LatentDiffusionPipeline.from_single_file(path), or turn it into a folder once: "
        raise LdmPipeError("is a file, not a folder", str(name), f"{fix}ldm-pipe convert {name} NEW_FOLDER.")
    dot = f".{variant}" if variant else ""
    patterns = ["*.json", "README.md", "tokenizer/*", f"{tokenizer_folder(SECOND)}/*", "scheduler/*"]
    named = {name: WEIGHTS[part] for part, name in LDM_NAMES.items()} | {SECOND: WEIGHTS["text_encoder"]}
    named |= {**dict.fromkeys(OF_UNCLIP, WEIGHTS["unet"]), "image_encoder": "model"}
    for part, file in (WEIGHTS | named).items():
        patterns += [f"{part}/config.json", f"{part}/{file}{dot}.safetensors", f"{part}/{file}{dot}-*.safetensors"]
        patterns += [f"{part}/{file}.safetensors.index{dot}.json"]
    if pickles:
        patterns += [f"*/*model{dot}.bin", f"*/*model{dot}-*.bin", f"*/*model.bin.index{dot}.json"]
    root = resolve_folder(name, local_files_only=local_files_only, revision=revision, allow_patterns=patterns)
    for place in (root, root / RUN_PIPELINE):
        if (place / "model_index.json").is_file():
            check_links(place)
            return place
    present = sorted(p.name for p in root.iterdir())[:12]
    raise LdmPipeError(
        f"no model_index.json, only {present}", str(root), "Give a model folder or a finished training run."
    )


def read_own(root: Path) -> dict[str, Any]:
    """Read `ldm_pipe.json`; a folder without one is a plain diffusers folder.

    Raises: LdmPipeError if a newer version wrote it.
    """
    path = root / OWN_FILE
    if not path.is_file():
        return {}
    own = read_json(path)
    version = own.get("format_version") if isinstance(own, dict) else None
    if version != FORMAT_VERSION:
        raise LdmPipeError(f"format_version is {version!r}, known is {FORMAT_VERSION}", str(path), "Update ldm_pipe.")
    return own


def load_parts(
    root: Path,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    device: str | torch.device = "cpu",
) -> Parts:
    """Load every part of a folder strictly, all in one dtype (None: float32), each tensor straight to the device.

    Raises: LdmPipeError naming file and cause.
    """
    index = check_index(root)
    vae = root / part_names(index).get("vae", "vae")
    own = read_own(root)
    scheduler = read_json(root / "scheduler" / "scheduler_config.json")
    if not isinstance(scheduler, dict):
        raise LdmPipeError("a config must be a JSON object", str(root / "scheduler" / "scheduler_config.json"))
    defaults = Defaults.read(own.get("defaults", {}), str(root / OWN_FILE))
    if defaults.sampler is None:
        named = schedule_config.sampler_name(scheduler)
        defaults = replace(defaults, sampler=named if named in samplers.NAMES else None)
    if not own and index["_class_name"] in XL_PIPELINES:
        defaults = replace(defaults, guidance_scale=XL_GUIDANCE)
    common: dict[str, Any] = {"dtype": dtype, "variant": variant, "device": device}
    _check_deciding(root)
    with config_errors(root / "unet"):
        unet = UNet.from_pretrained(root / "unet", memory_format=unet_layout(device, dtype), **common)
    with config_errors(vae):
        autoencoder = load_autoencoder(vae, **common)
    encoders = tuple(_load_encoder(root, index, name, common) for name in encoder_folders(index))
    parts = Parts(
        unet=unet,
        autoencoder=autoencoder,
        text_encoders=encoders,
        schedule=schedule_config.read(scheduler),
        defaults=defaults,
        golden=own.get("golden_sample"),
        name=str(own.get("name") or root.resolve().name)[:200],
        model_hash=str(own["model_hash"])[:64] if own.get("model_hash") else None,
        spatial=_spatial(index, own, str(root / OWN_FILE)),
        labels=LabelInput.read(own["labels"], str(root / OWN_FILE)) if "labels" in own else None,
        zero_empty_prompt=bool(index.get(XL_FLAGS[0], own.get(ZERO_KEY, index["_class_name"] in XL_PIPELINES))),
    )
    check_fit(parts, str(root))
    scored = num_numbers(unet, encoders) == NUMBERS_SCORE
    if index.get(XL_FLAGS[1], scored) != scored:
        what = f"{XL_FLAGS[1]} is {not scored}, the U-Net is of the other kind"
        raise LdmPipeError(what, str(root / "model_index.json"), "Fetch or export the folder anew.")
    return parts


def _check_deciding(root: Path) -> None:
    """Refuse configs without the one key that no tensor's shape tells.

    Raises: LdmPipeError naming file and key.
    """
    for part, kind, key, since in DECIDING:
        path = root / part / "config.json"
        config = read_json(path) if path.is_file() else {"_class_name": None}
        if not isinstance(config, dict):
            raise LdmPipeError("a config must be a JSON object", str(path))
        version = version_of(config.get("_diffusers_version"))
        if config.get("_class_name", kind) == kind and key not in config and (version is None or version >= since):
            raise LdmPipeError(f"the key {key!r} is missing", str(path), "Add it with the value of the training.")


def unet_layout(device: str | torch.device, dtype: torch.dtype | None) -> torch.memory_format:
    """Choose how a U-Net's weights lie: convolutions over channels-last ones are faster, but for training.

    Halves on the CPU stay in the mapped file; drawing with them there is rare, and slow in any layout.
    """
    halves = torch.device(device).type == "cpu" and dtype in (torch.float16, torch.bfloat16)
    return torch.contiguous_format if halves else torch.channels_last


def _load_encoder(root: Path, index: Mapping[str, Any], name: str, common: Mapping[str, Any]) -> AnyTextEncoder:
    """Load one text encoder with its tokenizer; a pipeline of diffusers says which of its states are read."""
    kind = str(index["_class_name"])
    folder = root / part_names(index).get(name, name)
    with config_errors(folder):
        if kind == OWN or index[name][1] == "LDMBertModel":
            return load_text_encoder(folder, **common)
        reading = (SDXL_2 if name == SECOND else SDXL) if kind in XL_PIPELINES else None
        words = root / tokenizer_folder(name)
        return CLIPTextEncoder.from_pretrained(folder, tokenizer=words, reading=reading, **common)


def _spatial(index: Mapping[str, Any], own: Mapping[str, Any], where: str) -> SpatialInput | None:
    """Read which maps the model takes beside its latents."""
    if index["_class_name"] == DEPTH:
        return SpatialInput(1, "depth")
    return SpatialInput.read(own["spatial"], where) if "spatial" in own else None


@contextlib.contextmanager
def config_errors(part: Path) -> Iterator[None]:
    """Turn what a senseless config makes torch raise (sizes of 2^31, text for numbers) into one clear error."""
    try:
        yield
    except (RuntimeError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, MemoryError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise LdmPipeError(
            f"cannot be built from its config: {reason}", str(part), "Fetch or export the folder anew."
        ) from error


def check_fit(parts: Parts, where: str = "pipeline") -> None:
    """Refuse parts that do not belong together: latent channels, text width, context length.

    Raises: LdmPipeError naming both numbers.
    """
    unet, vae = parts.unet.config, parts.autoencoder
    channels = vae.latent_channels
    allowed = (channels + parts.spatial.channels,) if parts.spatial else (channels, 2 * channels + 1)
    if unet.in_channels not in allowed:
        what = f"the U-Net takes {unet.in_channels} channels, the autoencoder has {channels} latent channels"
        advice = f"It must take {channels}, or {2 * channels + 1} for inpainting."
        if parts.spatial:
            advice = f"With {parts.spatial.channels} channels of maps it must take {allowed[0]}."
        raise LdmPipeError(what, where, advice)
    if unet.out_channels not in (channels, 2 * channels):  # twice: it also predicts the variance
        what = f"the U-Net gives {unet.out_channels} channels, the autoencoder has {channels} latent channels"
        raise LdmPipeError(what, where, "Use parts that were trained together.")
    width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
    wanted = unet.get("cross_attention_dim")
    if isinstance(wanted, int) and parts.text_encoders and width != wanted and unet.get("encoder_hid_dim") is None:
        what = f"the text encoder is {width} wide, the U-Net takes {wanted}"
        raise LdmPipeError(what, where, "Use parts that were trained together.")
    rows = None if parts.labels is None else parts.labels.null_label + 1
    if unet.get("num_class_embeds") != rows:
        what = f"the U-Net has a table of {unet.get('num_class_embeds')} classes, {rows} are named, none included"
        raise LdmPipeError(what, where, "Give labels: one name for each row of the table but the last.")
    num_numbers(parts.unet, parts.text_encoders)
    for encoder in parts.text_encoders:
        if encoder.tokenizer is not None and len(encoder.tokenizer) > encoder.config.vocab_size:
            what = f"the tokenizer has {len(encoder.tokenizer)} tokens, the text encoder {encoder.config.vocab_size}"
            raise LdmPipeError(what, where, "Use the tokenizer that the text encoder was trained with.")


def foldable(autoencoder: Autoencoder) -> Autoencoder:
    """Return the autoencoder in the form diffusers' pipeline reads: a latent shift folded into its 1x1 convolutions.

    Raises: LdmPipeError if there are no convolutions to fold it into.
    """
    config = autoencoder.config
    if not isinstance(autoencoder, AutoencoderKL) or not (
        config.get("shift_factor") or config.get("latents_mean") or config.get("latents_std")
    ):
        return autoencoder
    folded = copy.deepcopy(autoencoder)
    folded.fold_latent_shift()
    return folded


def write_folder(
    parts: Parts,
    target: Path,
    *,
    sampler: str,
    dtype: torch.dtype | None,
    variant: str | None,
    own: Mapping[str, Any],
    card: str,
    golden: Callable[[Path, str | None], dict[str, Any]],
) -> None:
    """Write all parts into a staging folder beside the target, then move them over; `ldm_pipe.json` moves last.

    Args:
        golden: draws the golden sample of a folder and variant.
    Raises: LdmPipeError if something cannot be written, or is no diffusers model.
    """
    if not parts.text_encoders or any(encoder.tokenizer is None for encoder in parts.text_encoders):
        what = f"{len(parts.text_encoders)} text encoders, not all with a tokenizer"
        raise LdmPipeError(what, str(target), "The folder holds at least one, each with its tokenizer.")
    scheduler = _scheduler(parts.schedule, sampler)
    index = write_index(parts, str(scheduler["_class_name"]))
    theirs = part_names(index)
    if index["_class_name"] == DEPTH:
        advice = "diffusers' pipeline asks for depth_estimator= and feature_extractor= when it loads the folder"
        warnings.warn(f"the depth estimator is no part of ours and is not written: {advice}", stacklevel=4)
    with staged(target) as staging:
        parts.unet.save_pretrained(staging / "unet", variant=variant, dtype=dtype)
        foldable(parts.autoencoder).save_pretrained(staging / theirs.get("vae", "vae"), variant=variant, dtype=dtype)
        for name, encoder in zip(folders_of(parts), parts.text_encoders, strict=True):
            text = staging / theirs.get(name, name)
            encoder.save_pretrained(text, variant=variant, dtype=dtype)
            state_dtype(text / "config.json")
            encoder.tokenizer.save_pretrained(staging / tokenizer_folder(name))
        atomic_write(staging / "scheduler" / "scheduler_config.json", _json(scheduler))
        atomic_write(
            staging / "model_index.json", _json({theirs.get(part, part): item for part, item in index.items()})
        )
        atomic_write(staging / "README.md", card)
        own = {"format_version": FORMAT_VERSION, **own}
        atomic_write(staging / OWN_FILE, _json(own))
        atomic_write(staging / OWN_FILE, _json({**own, "golden_sample": golden(staging, variant)}))


def _scheduler(law: Law, sampler: str) -> dict[str, Any]:
    """Return diffusers' scheduler config: of the sampler, of another one on this law, or else a file of our own."""
    refused = []
    for name in dict.fromkeys((sampler, "ddim", "euler")):
        try:
            config = law.to_config(name)
        except LdmPipeError as error:
            refused.append(error.what)
            continue
        if refused:
            warnings.warn(f"diffusers will draw with {name}: {refused[0]}", stacklevel=2)
        return config
    warnings.warn(f"diffusers cannot read this model: {refused[0]}", stacklevel=2)
    return own_file.write(law)


def state_dtype(path: Path) -> None:
    """State float32 as the dtype to load in: transformers 5 would take the file's, diffusers takes float32."""
    config = read_json(path)
    config.pop("torch_dtype", None)
    atomic_write(path, _json({**config, "dtype": "float32"}))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside the target, and move it over the target where the block ends well.

    Raises: LdmPipeError if something cannot be written.
    """
    staging = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    try:
        staging.mkdir(parents=True)
        yield staging
        _move_over(staging, target)
    except OSError as error:
        raise LdmPipeError(
            f"cannot be written ({error.strerror or error})", str(target), "Choose another folder."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_over(staging: Path, target: Path) -> None:
    """Rename the staging folder to the target, or move file by file into a target that exists."""
    if not target.exists():
        staging.rename(target)
        return
    files = sorted((p for p in staging.rglob("*") if p.is_file()), key=lambda p: (p.name == OWN_FILE, p))
    (target / OWN_FILE).unlink(missing_ok=True)  # its golden sample speaks of the weights that are about to go
    for file in files:
        place = target / file.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
