"""A model folder in diffusers' layout plus `ldm_pipe.json`: read into parts, written from parts.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/  ldm_pipe.json  README.md

diffusers reads such a folder as a StableDiffusionPipeline and ignores `ldm_pipe.json`, which keeps what diffusers has
no place for. With a VQ autoencoder it is an LDMTextToImagePipeline, and two parts are called `vqvae/` and `bert/`.
Class names are looked up in the fixed lists below; nothing in a folder can name code to run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autoencoder import Autoencoder, AutoencoderKL, VQModel, load_autoencoder
from conditioning import AnyTextEncoder, CLIPTextEncoder, ClipTokenizer, load_text_encoder
from ldm_pipe import law_file, samplers, schedule_config
from ldm_pipe.outputs import Defaults
from ldm_pipe.pretrained import LdmPipeError, atomic_write, read_json, resolve_folder
from ldm_pipe.schedule import Law
from ldm_pipe.unet import UNet

SHIPPED = Path(__file__).parent.parent / "assets" / "emoji"
FORMAT_VERSION = 1
OWN_FILE = "ldm_pipe.json"
RUN_PIPELINE = "pipeline"  # the folder inside a training run
LDM = "LDMTextToImagePipeline"
OWN = "LatentDiffusionPipeline"  # with a text encoder that no pipeline of diffusers reads as we do
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", LDM, OWN)
LDM_NAMES = {"vae": "vqvae", "text_encoder": "bert"}  # what this pipeline calls our parts
PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "VQModel"),
    "text_encoder": (
        "CLIPTextModel",
        "T5EncoderModel",
        "MT5EncoderModel",
        "UMT5EncoderModel",
        "LDMBertModel",
        "OpenCLIPTextEncoder",
        "LabelEncoder",
    ),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast", "LibraryTokenizer", "OpenClipTokenizer", "ClassNames"),
}
IGNORED = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


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


def find_folder(
    name: str | Path | None, *, variant: str | None = None, local_files_only: bool = False, revision: str | None = None
) -> Path:
    """Find a model: the shipped one for None, a local folder, the pipeline inside a training run, or a hub id.

    Raises: LdmPipeError saying where it was looked for.
    """
    if name is None:
        if not (SHIPPED / "model_index.json").is_file():
            raise LdmPipeError("this installation ships no model", str(SHIPPED), "Name one: from_pretrained('folder').")
        return SHIPPED
    if not str(name).strip() or "\0" in str(name):
        raise LdmPipeError(f"the model name is {str(name)!r}", how_to_fix="Give a folder or a hub id.")
    dot = f".{variant}" if variant else ""
    patterns = ["*.json", "README.md", "tokenizer/*", "scheduler/*"]
    for part, file in (WEIGHTS | {name: WEIGHTS[part] for part, name in LDM_NAMES.items()}).items():
        patterns += [f"{part}/config.json", f"{part}/{file}{dot}.safetensors", f"{part}/{file}{dot}-*.safetensors"]
        patterns += [f"{part}/{file}.safetensors.index{dot}.json"]
    root = resolve_folder(name, local_files_only=local_files_only, revision=revision, allow_patterns=patterns)
    for place in (root, root / RUN_PIPELINE):
        if (place / "model_index.json").is_file():
            return place
    present = sorted(p.name for p in root.iterdir())[:12]
    raise LdmPipeError(
        f"no model_index.json, only {present}", str(root), "Give a model folder or a finished training run."
    )


def check_index(root: Path) -> Mapping[str, Any]:
    """Read `model_index.json`; anything beyond the classes we build is refused.

    Raises: LdmPipeError naming the part and the class.
    """
    where = str(root / "model_index.json")
    index = read_json(root / "model_index.json")
    if not isinstance(index, dict) or index.get("_class_name") not in PIPELINES:
        found = index.get("_class_name") if isinstance(index, dict) else type(index).__name__
        raise LdmPipeError(f"the folder holds a {found!r:.80}", where, f"Known are {', '.join(PIPELINES)}.")
    ours = {name: part for part, name in part_names(index).items()}
    index = {ours.get(name, name): value for name, value in index.items()}
    for part, value in index.items():
        if part.startswith("_") or part in IGNORED:
            continue
        class_name = value[1] if isinstance(value, list) and len(value) == 2 else value
        if part == "scheduler":
            if not isinstance(class_name, str) or not class_name.endswith("Scheduler") or not class_name.isidentifier():
                raise LdmPipeError(f"scheduler is a {class_name!r:.80}", where, "Known are diffusers' schedulers.")
        elif part not in PARTS or class_name not in PARTS[part]:
            known = ", ".join(PARTS.get(part, tuple(PARTS)))
            raise LdmPipeError(f"the part {part!r:.80} is a {class_name!r:.80}", where, f"Known: {known}.")
    missing = [part for part in (*PARTS, "scheduler") if not isinstance(index.get(part), list)]
    if missing:
        raise LdmPipeError(f"the model lacks {missing}", where, "Fetch or export the folder anew.")
    return index


def part_names(index: Mapping[str, Any]) -> dict[str, str]:
    """Return what the pipeline of an index calls the parts that have another name there."""
    return LDM_NAMES if index.get("_class_name") == LDM else {}


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


def load_parts(root: Path, *, dtype: torch.dtype | None = None, variant: str | None = None) -> Parts:
    """Load every part of a folder strictly, all in one dtype (None: float32).

    Raises: LdmPipeError naming file and cause.
    """
    index = check_index(root)
    names = part_names(index)
    vae, text = (root / names.get(part, part) for part in ("vae", "text_encoder"))
    own = read_own(root)
    scheduler = read_json(root / "scheduler" / "scheduler_config.json")
    if not isinstance(scheduler, dict):
        raise LdmPipeError("a config must be a JSON object", str(root / "scheduler" / "scheduler_config.json"))
    defaults = Defaults.read(own.get("defaults", {}), str(root / OWN_FILE))
    if defaults.sampler is None:
        named = schedule_config.sampler_name(scheduler)
        defaults = replace(defaults, sampler=named if named in samplers.NAMES else None)
    common: dict[str, Any] = {"dtype": dtype, "variant": variant}
    with _config_errors(root / "unet"):
        unet = UNet.from_pretrained(root / "unet", **common)
        unet.to(memory_format=torch.channels_last)  # convolutions over such weights are faster, but for training
    with _config_errors(vae):
        autoencoder = load_autoencoder(vae, **common)
    with _config_errors(text):
        if index["_class_name"] == OWN:
            text_encoder = load_text_encoder(text, **common)
        else:
            text_encoder = CLIPTextEncoder.from_pretrained(text, tokenizer=root / "tokenizer", **common)
    parts = Parts(
        unet=unet,
        autoencoder=autoencoder,
        text_encoders=(text_encoder,),
        schedule=schedule_config.read(scheduler),
        defaults=defaults,
        golden=own.get("golden_sample"),
        name=str(own.get("name") or root.resolve().name)[:200],
        model_hash=str(own["model_hash"])[:64] if own.get("model_hash") else None,
    )
    check_fit(parts, str(root))
    return parts


@contextlib.contextmanager
def _config_errors(part: Path) -> Iterator[None]:
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
    if unet.in_channels not in (channels, 2 * channels + 1):
        what = f"the U-Net takes {unet.in_channels} channels, the autoencoder has {channels} latent channels"
        raise LdmPipeError(what, where, f"It must take {channels}, or {2 * channels + 1} for inpainting.")
    if unet.out_channels not in (channels, 2 * channels):  # twice: it also predicts the variance
        what = f"the U-Net gives {unet.out_channels} channels, the autoencoder has {channels} latent channels"
        raise LdmPipeError(what, where, "Use parts that were trained together.")
    width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
    wanted = unet.get("cross_attention_dim")
    if isinstance(wanted, int) and parts.text_encoders and width != wanted and unet.get("encoder_hid_dim") is None:
        what = f"the text encoder is {width} wide, the U-Net takes {wanted}"
        raise LdmPipeError(what, where, "Use parts that were trained together.")
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
    if len(parts.text_encoders) != 1 or parts.text_encoders[0].tokenizer is None:
        raise LdmPipeError(
            f"{len(parts.text_encoders)} text encoders", str(target), "The folder holds one, with its tokenizer."
        )
    text_encoder, tokenizer = parts.text_encoders[0], parts.text_encoders[0].tokenizer
    scheduler = _scheduler(parts.schedule, sampler)
    index = _index(parts, str(scheduler["_class_name"]))
    vae, text = (part_names(index).get(part, part) for part in ("vae", "text_encoder"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise LdmPipeError(
            f"cannot be written ({error.strerror or error})", str(target), "Choose another folder."
        ) from error
    try:
        parts.unet.save_pretrained(staging / "unet", variant=variant, dtype=dtype)
        foldable(parts.autoencoder).save_pretrained(staging / vae, variant=variant, dtype=dtype)
        text_encoder.save_pretrained(staging / text, variant=variant, dtype=dtype)
        _state_dtype(staging / text / "config.json")
        tokenizer.save_pretrained(staging / "tokenizer")
        atomic_write(staging / "scheduler" / "scheduler_config.json", _json(scheduler))
        atomic_write(staging / "model_index.json", _json(index))
        atomic_write(staging / "README.md", card)
        own = {"format_version": FORMAT_VERSION, **own}
        atomic_write(staging / OWN_FILE, _json(own))
        atomic_write(staging / OWN_FILE, _json({**own, "golden_sample": golden(staging, variant)}))
        os.chmod(staging, 0o777 & ~_umask())
        _move_over(staging, target)
    except OSError as error:
        raise LdmPipeError(
            f"cannot be written ({error.strerror or error})", str(target), "Choose another folder."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
    return law_file.write(law)


def _state_dtype(path: Path) -> None:
    """State float32 as the dtype to load in: transformers 5 would take the file's, diffusers takes float32."""
    config = read_json(path)
    config.pop("torch_dtype", None)
    atomic_write(path, _json({**config, "dtype": "float32"}))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


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


def _index(parts: Parts, scheduler: str) -> dict[str, Any]:
    shared = {
        "_diffusers_version": "0.38.0",
        "scheduler": ["diffusers", scheduler],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    encoder = parts.text_encoders[0]
    if not isinstance(encoder, CLIPTextEncoder) or not isinstance(encoder.tokenizer, ClipTokenizer):
        kind = (encoder.config.get("architectures") or [type(encoder).__name__])[0]
        words = "CLIPTokenizer" if isinstance(encoder.tokenizer, ClipTokenizer) else type(encoder.tokenizer).__name__
        own = {"text_encoder": ["conditioning", kind], "tokenizer": ["conditioning", words]}
        vae = {"vae": ["diffusers", type(parts.autoencoder).__name__]}
        return {"_class_name": OWN, **shared, **own, **vae}
    if isinstance(parts.autoencoder, VQModel):
        ldm = {"bert": ["transformers", "CLIPTextModel"], "vqvae": ["diffusers", "VQModel"]}
        return {"_class_name": LDM, **shared, **ldm}
    inpainting = parts.unet.config.in_channels != parts.autoencoder.latent_channels
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
        **shared,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
