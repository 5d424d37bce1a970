"""`model_index.json`: which pipeline a folder holds, and which one a set of parts is.

What enters: a folder's index, or parts. What leaves: checked class names, or an index that diffusers reads. Class names
are looked up in the fixed lists below; nothing in a folder can name code to run. This file reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoencoder import VQModel
from conditioning import AnyTextEncoder, CLIPTextEncoder, ClipTokenizer, TransformerTextEncoder
from conditioning.text import SD1, SDXL, SDXL_2, LibraryTokenizer
from ldm_pipe.networks import UNet
from ldm_pipe.pretrained import LdmPipeError, read_json

if TYPE_CHECKING:
    from ldm_pipe.interop.folders.folder import Parts

LDM = "LDMTextToImagePipeline"
OWN = "LatentDiffusionPipeline"  # with what no pipeline of diffusers reads as we do
DEPTH = "StableDiffusionDepth2ImgPipeline"
XL, XL_REFINER = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
XL_PIPELINES = (XL, XL_REFINER, "StableDiffusionXLInpaintPipeline")
SD_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
PIPELINES = (*SD_PIPELINES, DEPTH, *XL_PIPELINES, LDM, OWN)
_IF_CALLS = ("", "Img2Img", "Inpainting")
OTHER_PIPELINES = {  # of diffusers: which class of ours draws with the folder
    **dict.fromkeys(("DDPMPipeline", "DDIMPipeline", "LDMPipeline"), "ldm_pipe.pipelines.UnconditionalPipeline"),
    **{f"IF{call}Pipeline": "ldm_pipe.pipelines.PixelDiffusionPipeline" for call in _IF_CALLS},
    "StableDiffusionUpscalePipeline": "ldm_pipe.pipelines.UpscalePipeline",
    **{f"IF{call}SuperResolutionPipeline": "ldm_pipe.pipelines.UpscalePipeline" for call in _IF_CALLS},
    "LDMSuperResolutionPipeline": "ldm_pipe.pipelines.SuperResolutionPipeline",
    "UnCLIPPipeline": "ldm_pipe.pipelines.UnCLIPPipeline",
    "UnCLIPImageVariationPipeline": "ldm_pipe.pipelines.UnCLIPImageVariationPipeline",
}
LDM_NAMES = {"vae": "vqvae", "text_encoder": "bert"}  # what this pipeline calls our parts
PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "VQModel"),
    "text_encoder": (
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "T5EncoderModel",
        "MT5EncoderModel",
        "UMT5EncoderModel",
        "LDMBertModel",
        "OpenCLIPTextEncoder",
        "LabelEncoder",
    ),
    "tokenizer": (
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "BertTokenizer",
        "BertTokenizerFast",
        "LibraryTokenizer",
        "OpenClipTokenizer",
        "ClassNames",
    ),
}
IGNORED = (
    "safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker", "depth_estimator",
    "add_watermarker",
)  # fmt: skip
XL_FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
MAX_ENCODERS = 4
SECOND = "text_encoder_2"
NUMBERS, NUMBERS_SCORE = 6, 5  # that an SDXL U-Net reads: sizes and crop, or sizes, crop and aesthetic score


def check_index(root: Path) -> Mapping[str, Any]:
    """Read `model_index.json`; anything beyond the classes we build is refused.

    Returns: the index with our names of the parts.
    Raises: LdmPipeError naming the part and the class.
    """
    where = str(root / "model_index.json")
    index = read_json(root / "model_index.json")
    found = index.get("_class_name") if isinstance(index, dict) else type(index).__name__
    if not isinstance(index, dict) or found not in PIPELINES:
        other = OTHER_PIPELINES.get(found) if isinstance(found, str) else None
        advice = (
            f"{other}.from_pretrained and `ldm-pipe draw` draw with it."
            if other
            else f"Known are {', '.join(PIPELINES)}."
        )
        raise LdmPipeError(f"the folder holds a {found!r:.80}", where, advice)
    ours = {name: part for part, name in part_names(index).items()}
    index = {ours.get(name, name): value for name, value in index.items()}
    for part, value in index.items():
        if not (part.startswith("_") or part in IGNORED):
            _check_entry(part, value, found, where)
    names = encoder_folders(index)
    required = ("unet", "vae", "scheduler", *(names or ("text_encoder",)))
    missing = [part for part in required if not isinstance(index.get(part), list)]
    missing += [name for name in map(tokenizer_folder, names) if not isinstance(index.get(name), list)]
    if missing:
        raise LdmPipeError(f"the model lacks {missing}", where, "Fetch or export the folder anew.")
    allowed = {XL: (("text_encoder", SECOND),), OWN: (names,)}
    pairs = allowed.get(str(found), (("text_encoder", SECOND), (SECOND,)) if found in XL_PIPELINES else None)
    if names not in (pairs or (("text_encoder",),)):
        raise LdmPipeError(f"the text encoders are {list(names)}", where, f"That is no {found}.")
    return index


def _check_entry(part: str, value: Any, pipeline: str, where: str) -> None:
    """Check one line of an index."""
    class_name = value[1] if isinstance(value, list) and len(value) == 2 else value
    if part == "scheduler":
        if not isinstance(class_name, str) or not class_name.endswith("Scheduler") or not class_name.isidentifier():
            raise LdmPipeError(f"scheduler is a {class_name!r:.80}", where, "Known are diffusers' schedulers.")
        return
    if pipeline in XL_PIPELINES:
        if part in XL_FLAGS and isinstance(value, bool):
            return
        if part in ("text_encoder", "tokenizer") and value == [None, None]:
            return
    stem, _, number = part.rpartition("_")
    several = number.isdecimal() and 2 <= int(number) <= MAX_ENCODERS and str(int(number)) == number
    base = stem if several and stem in ("text_encoder", "tokenizer") else part
    if base not in PARTS or class_name not in PARTS[base]:
        known = ", ".join(PARTS.get(base, tuple(PARTS)))
        raise LdmPipeError(f"the part {part!r:.80} is a {class_name!r:.80}", where, f"Known: {known}.")


def encoder_folders(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return our names of the text encoders that an index holds, the first one first."""
    names = ["text_encoder", *(f"text_encoder_{i}" for i in range(2, MAX_ENCODERS + 1))]
    return tuple(name for name in names if isinstance(index.get(name), list) and index[name] != [None, None])


def tokenizer_folder(encoder: str) -> str:
    """Return the folder of an encoder's tokenizer: `tokenizer_2` of `text_encoder_2`."""
    return encoder.replace("text_encoder", "tokenizer")


def part_names(index: Mapping[str, Any]) -> dict[str, str]:
    """Return what the pipeline of an index calls the parts that have another name there."""
    return LDM_NAMES if index.get("_class_name") == LDM else {}


def pooled_width(encoders: Sequence[AnyTextEncoder]) -> int:
    """Return the width of the pooled vector that several encoders make together."""
    widths = {"none": (), "pooled": ("hidden_size",), "projected": ("projection_dim", "embed_dim")}
    found = 0
    for encoder in encoders:
        names = widths[encoder.reading.pooled]
        found += next((encoder.config[name] for name in names if name in encoder.config), 0)
    return found


def num_numbers(unet: UNet, encoders: Sequence[AnyTextEncoder]) -> int:
    """Return how many numbers the U-Net reads beside the pooled vector: 6 for SDXL, 5 for its refiner, else 0.

    Raises: LdmPipeError if the pooled vector of the encoders leaves room for neither.
    """
    spec = unet.spec.embedding
    if not spec.number_dim or not encoders:
        return NUMBERS if spec.number_dim else 0
    pooled = pooled_width(encoders)
    for count in (NUMBERS, NUMBERS_SCORE):
        if spec.vector_dim == pooled + count * spec.number_dim:
            return count
    what = f"the U-Net reads a vector {spec.vector_dim} wide, the text encoders give {pooled}"
    advice = f"With {NUMBERS} or {NUMBERS_SCORE} numbers of {spec.number_dim} each it must be that wide."
    raise LdmPipeError(what, "pooled vector", advice)


def pipeline_class(parts: Parts) -> str:
    """Return the pipeline of diffusers that reads these parts as we do, or `OWN` if none does."""
    encoders, channels = parts.text_encoders, parts.autoencoder.latent_channels
    if parts.labels is not None:
        return OWN
    inpainting = parts.unet.config.in_channels == 2 * channels + 1 and parts.spatial is None
    if _is_ldm_bert(parts):
        return LDM
    if not all(isinstance(e, CLIPTextEncoder) and isinstance(e.tokenizer, ClipTokenizer) for e in encoders):
        return OWN
    readings = tuple(encoder.reading for encoder in encoders)
    numbers = num_numbers(parts.unet, encoders)
    if parts.spatial is not None:
        return DEPTH if parts.spatial.kind == "depth" and readings == (SD1,) and not numbers else OWN
    if numbers == NUMBERS and readings == (SDXL, SDXL_2):
        return "StableDiffusionXLInpaintPipeline" if inpainting else XL
    if numbers == NUMBERS_SCORE and readings == (SDXL_2,) and not inpainting:
        return XL_REFINER
    if numbers or readings != (SD1,):
        return OWN
    if isinstance(parts.autoencoder, VQModel):
        return LDM
    return "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"


def _is_ldm_bert(parts: Parts) -> bool:
    """Tell whether this is LDM's own text-to-image model: its transformer over BERT's words."""
    if len(parts.text_encoders) != 1 or parts.spatial is not None or num_numbers(parts.unet, parts.text_encoders):
        return False
    encoder = parts.text_encoders[0]
    words = encoder.tokenizer
    is_bert = isinstance(words, LibraryTokenizer) and type(words.library).__name__.startswith("BertTokenizer")
    return isinstance(encoder, TransformerTextEncoder) and is_bert and encoder.reading == SD1


def folders_of(parts: Parts) -> tuple[str, ...]:
    """Return our names of the folders that the text encoders are written to."""
    if pipeline_class(parts) == XL_REFINER:
        return (SECOND,)
    return ("text_encoder", *(f"text_encoder_{i + 1}" for i in range(1, len(parts.text_encoders))))


def write_index(parts: Parts, scheduler: str) -> dict[str, Any]:
    """Return the index of parts, with our names of them, for `part_names` to change."""
    name = pipeline_class(parts)
    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": "0.38.0",
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(parts.autoencoder).__name__],
    }
    for folder, encoder in zip(folders_of(parts), parts.text_encoders, strict=True):
        index |= {folder: _encoder_entry(name, encoder), tokenizer_folder(folder): _tokenizer_entry(name, encoder)}
    nobody: list[Any] = [None, None]
    if name in XL_PIPELINES:
        index |= {"feature_extractor": nobody, "image_encoder": nobody}
        index |= {XL_FLAGS[0]: parts.zero_empty_prompt}
        if name != XL:
            index |= {XL_FLAGS[1]: name == XL_REFINER}
        return index | ({"text_encoder": nobody, "tokenizer": nobody} if name == XL_REFINER else {})
    if name == DEPTH:
        return index | {"depth_estimator": nobody, "feature_extractor": nobody}
    if name in SD_PIPELINES:
        index |= {"feature_extractor": nobody, "image_encoder": nobody, "safety_checker": nobody}
        index |= {"requires_safety_checker": False}
    return index


def _encoder_entry(pipeline: str, encoder: AnyTextEncoder) -> list[str]:
    if isinstance(encoder, CLIPTextEncoder) and pipeline != OWN:  # as it is read, whatever else its folder holds
        projected = encoder.reading.pooled == "projected"
        return ["transformers", "CLIPTextModelWithProjection" if projected else "CLIPTextModel"]
    kind = (encoder.config.get("architectures") or [type(encoder).__name__])[0]
    return ["conditioning" if pipeline == OWN else "latent_diffusion", kind]


def _tokenizer_entry(pipeline: str, encoder: AnyTextEncoder) -> list[str]:
    words = encoder.tokenizer
    if isinstance(words, ClipTokenizer):
        kind = "CLIPTokenizer"
    elif isinstance(words, LibraryTokenizer) and pipeline == LDM:
        kind = "BertTokenizer"
    else:
        kind = type(words).__name__
    return ["conditioning" if pipeline == OWN else "transformers", kind]
