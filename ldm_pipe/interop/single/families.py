"""What an original single file holds, by family: where its parts lie, and the configs that are not written in it.

What enters: the names and shapes of a checkpoint's tensors, or a diffusers folder. What leaves: a `Family`. Shapes do
not tell everything (heads, the prediction); what they do not tell is taken from the family that they identify, and a
file of no known family is refused rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError, read_json

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SD_PIPELINES = {4: "StableDiffusionPipeline", 9: "StableDiffusionInpaintPipeline"}
XL_PIPELINES = {4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline"}
REFINER = "StableDiffusionXLImg2ImgPipeline"
DEPTH = "StableDiffusionDepth2ImgPipeline"  # read only: the file's depth estimator is no part of ours
# Written out in full: a key left out would be filled in silently by whatever reads the folder.
_LAW: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
_DDIM = {
    "_class_name": "DDIMScheduler",
    **_LAW,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": False,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **_LAW,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
}
_CLIP = {"model_type": "clip_text_model", "vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5}


@dataclass(frozen=True)
class TextPart:
    """One text encoder: its folder, its prefix in the file, its names there, its config, its padding."""

    folder: str
    prefix: str
    open_clip: bool
    config: Mapping[str, Any]
    pad_token: str

    @property
    def projection(self) -> bool:
        """Tell whether it has a projection of the pooled output."""
        return list(self.config.get("architectures") or [])[:1] == ["CLIPTextModelWithProjection"]


@dataclass(frozen=True)
class Family:
    """The parts of a single file and what reads it."""

    name: str
    pipeline: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: tuple[TextPart, ...]
    scheduler: Mapping[str, Any]

    @property
    def is_xl(self) -> bool:
        """Tell whether readers expect SDXL's layout."""
        return self.name.startswith("sdxl")


def _clip(width: int, layers: int, heads: int, activation: str, projection: int, *, pooled: bool) -> dict[str, Any]:
    return {
        **_CLIP,
        "architectures": ["CLIPTextModelWithProjection" if pooled else "CLIPTextModel"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": projection,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _vae(size: int, scaling_factor: float) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": size,
        "scaling_factor": scaling_factor,
    }


_CROSS, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_SD1_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_CROSS, _CROSS, _CROSS, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD2_UNET = {
    **_SD1_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_XL_UNET = {
    **_SD1_UNET,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", _CROSS, _CROSS],
    "up_block_types": [_CROSS_UP, _CROSS_UP, "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_REFINER_UNET = {
    **_XL_UNET,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", _CROSS, _CROSS, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP, "UpBlock2D"],
    "cross_attention_dim": 1280,
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}
_CLIP_L = _clip(768, 12, 12, "quick_gelu", 768, pooled=False)
_CLIP_G = _clip(1280, 32, 20, "gelu", 1280, pooled=True)
_END, _ZERO = "<|endoftext|>", "!"
_PLACES = {  # name: (folder, prefix in the file, OpenCLIP's names, padding) of each text encoder
    "sd1": (("text_encoder", "cond_stage_model.transformer.", False, _END),),
    "sd2": (("text_encoder", "cond_stage_model.model.", True, _ZERO),),
    "sdxl": (
        ("text_encoder", "conditioner.embedders.0.transformer.", False, _END),
        ("text_encoder_2", "conditioner.embedders.1.model.", True, _ZERO),
    ),
    "sdxl-refiner": (("text_encoder_2", "conditioner.embedders.0.model.", True, _ZERO),),
}


def _texts(name: str, configs: Mapping[str, Mapping[str, Any]]) -> tuple[TextPart, ...]:
    places = _PLACES[name]
    return tuple(TextPart(folder, prefix, oc, configs[folder], pad) for folder, prefix, oc, pad in places)


FAMILIES = {
    "sd1": Family(
        "sd1", SD_PIPELINES[4], _SD1_UNET, _vae(512, 0.18215), _texts("sd1", {"text_encoder": _CLIP_L}), _DDIM
    ),
    "sd2": Family(
        "sd2",
        SD_PIPELINES[4],
        _SD2_UNET,
        _vae(768, 0.18215),
        _texts("sd2", {"text_encoder": _clip(1024, 23, 16, "gelu", 512, pooled=False)}),
        _DDIM,
    ),
    "sdxl": Family(
        "sdxl",
        XL_PIPELINES[4],
        _XL_UNET,
        _vae(1024, 0.13025),
        _texts("sdxl", {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G}),
        _EULER,
    ),
    "sdxl-refiner": Family(
        "sdxl-refiner",
        REFINER,
        _REFINER_UNET,
        _vae(1024, 0.13025),
        _texts("sdxl-refiner", {"text_encoder_2": _CLIP_G}),
        _EULER,
    ),
}
_BY_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}


def _token_width(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the width of the tokens that the U-Net's first attention to tokens reads."""
    keys = [key for key in tensors if key.startswith(UNET) and key.endswith(".attn2.to_k.weight")]
    return tensors[min(keys)].shape[1] if keys else None


def detect(tensors: Mapping[str, Tensor], where: str) -> Family:
    """Tell the family of a single file by the names and shapes of its tensors.

    Raises: LdmPipeError if it is no known one; the message says what it looks like.
    """
    first = tensors.get(f"{UNET}input_blocks.0.0.weight")
    if first is None or first.ndim != 4:
        what = f"no {UNET}input_blocks.0.0.weight, the file begins with {sorted(tensors)[:3]}"
        raise LdmPipeError(what, where, "Give an original Stable Diffusion 1, 2 or XL file.")
    name = _BY_WIDTH.get(_token_width(tensors) or 0, "")
    family = FAMILIES.get(name)
    if family is None or family.unet["block_out_channels"][0] != first.shape[0]:
        what = f"a U-Net {first.shape[0]} channels wide that reads tokens {_token_width(tensors)} wide is of no family"
        fix = f"Known: {', '.join(FAMILIES)}. Name a diffusers folder of the same architecture as `like`."
        raise LdmPipeError(what, where, fix)
    return with_channels(family, first.shape[1], where)


def with_channels(family: Family, channels: int, where: str) -> Family:
    """Return the family with another number of input channels: 9 is an inpainting model, 5 SD 2's depth model.

    Raises: LdmPipeError for a number that no pipeline of the family has.
    """
    known = XL_PIPELINES if family.is_xl else SD_PIPELINES
    known = {**known, 5: DEPTH} if family.name == "sd2" else known
    if channels not in known or (family.pipeline == REFINER and channels != 4):
        what = f"the U-Net takes {channels} channels"
        raise LdmPipeError(
            what, where, "4, 9 (inpainting) and SD 2's 5 (depth) are known; pix2pix and upscaler files are not."
        )
    pipeline = family.pipeline if family.pipeline == REFINER else known[channels]
    return replace(family, pipeline=pipeline, unet={**family.unet, "in_channels": channels})


def usual_names(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Give the text encoders of a file the names that most files of its family have.

    SD-Turbo is a Stable Diffusion 2 under sgm's prefix; transformers from 5 on leaves `text_model.` out.
    """
    prefixes: dict[str, str] = {}
    for text in family.texts:
        if family.name == "sd2":
            prefixes["conditioner.embedders.0.model."] = text.prefix
        if not text.open_clip:
            tops = ("embeddings.", "encoder.", "final_layer_norm.")
            prefixes |= {text.prefix + top: f"{text.prefix}text_model.{top}" for top in tops}
    names = {}
    for name in tensors:
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        names[name] = prefixes.get(old, "") + name[len(old) :]
    if len(set(names.values())) < len(names):  # both spellings: left alone, so that the strict check tells it
        return dict(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def with_rows(family: Family, tensors: Mapping[str, Tensor]) -> Family:
    """Return the family with text encoders whose table has as many rows as the file's: learnt words make it longer."""
    texts = []
    for text in family.texts:
        name = "token_embedding.weight" if text.open_clip else "text_model.embeddings.token_embedding.weight"
        table = tensors.get(text.prefix + name)
        rows = text.config["vocab_size"] if table is None else max(len(table), text.config["vocab_size"])
        texts.append(replace(text, config={**text.config, "vocab_size": rows}))
    return replace(family, texts=tuple(texts))


def of_folder(root: Path) -> Family:
    """Read the family of a diffusers folder from its configs.

    Raises: LdmPipeError if no single-file format holds such a model.
    """
    where = str(root)
    index = read_json(root / "model_index.json")
    pipeline = index.get("_class_name") if isinstance(index, dict) else None
    encoders = [part for part in ("text_encoder", "text_encoder_2") if (root / part / "config.json").is_file()]
    configs = {part: read_json(root / part / "config.json") for part in (*encoders, "unet", "vae")}
    law = read_json(root / "scheduler" / "scheduler_config.json")
    if any(not isinstance(config, dict) for config in (*configs.values(), law)):
        raise LdmPipeError("a config must be a JSON object", where)
    if pipeline in (*XL_PIPELINES.values(), REFINER):
        name = "sdxl" if len(encoders) == 2 else "sdxl-refiner"
    elif pipeline in SD_PIPELINES.values():
        name = "sd2" if configs.get("text_encoder", {}).get("hidden_act") == "gelu" else "sd1"
    else:
        fix = "Single files hold SD 1, 2 and XL models; depth models only with an estimator, which is no part of ours."
        raise LdmPipeError(f"the folder holds a {pipeline!r:.80}", where, fix)
    for part, known in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        if configs[part].get("_class_name", known) != known:
            raise LdmPipeError(f"{part} is a {configs[part]['_class_name']}", where, f"A single file holds a {known}.")
    if encoders != [folder for folder, *_ in _PLACES[name]]:
        raise LdmPipeError(f"the text encoders are {encoders}", where, f"Those of {name} are {_PLACES[name]}.")
    return Family(name, str(pipeline), configs["unet"], configs["vae"], _texts(name, configs), law)
