"""Export to diffusers and prove it: write the folder, load it with diffusers, draw from the same latents, compare.

This is the one file of the package that imports diffusers, and only for the proof.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from conditioning import CLIPTextEncoder
from ldm_pipe import samplers
from ldm_pipe.drawing.output import one_of
from ldm_pipe.interop.folders.folder import find_folder, foldable, load_parts
from ldm_pipe.interop.folders.index import DEPTH, LDM, OWN, SD_PIPELINES, XL, XL_PIPELINES, XL_REFINER, pipeline_class
from ldm_pipe.interop.folders.save import save_pipeline
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError

TOLERANCE = 1e-3  # largest difference of two pictures in [0, 1]; both compute in float32, whatever the files hold
CHECK_PROMPT = "red apple"
LDM_LENGTH = 77  # tokens; written out in diffusers' LDMTextToImagePipeline


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        folder: the diffusers folder.
        notes: what diffusers will not know, in whole sentences.
        difference: largest difference of the pictures in [0, 1]; None if it was not compared.
        warnings: what diffusers and transformers said while loading.
    """

    folder: Path
    notes: tuple[str, ...]
    difference: float | None
    warnings: tuple[str, ...] = ()


def check_representable(pipe: LatentDiffusionPipeline, sampler: str) -> tuple[str, ...]:
    """Refuse what no pipeline of diffusers can say; name the defaults that only `ldm_pipe.json` keeps.

    Returns: notes, in whole sentences.
    Raises: LdmPipeError with the reason.
    """
    where = "export to diffusers"
    kind = pipeline_class(pipe.parts())
    if kind == OWN:
        raise LdmPipeError(*_what_is_own(pipe))
    if pipe.schedule.prediction not in ("eps", "x0", "v"):
        what = f"prediction {pipe.schedule.prediction!r} with this noise law"
        raise LdmPipeError(what, where, "diffusers' samplers know epsilon, sample and v_prediction.")
    if pipe.unet.config.out_channels != pipe.autoencoder.latent_channels:
        what = f"the U-Net gives {pipe.unet.config.out_channels} channels: it learnt the variance of the steps"
        raise LdmPipeError(what, where, "diffusers' StableDiffusionPipeline has no use for it; draw with ldm-pipe.")
    if kind == LDM:
        _check_ldm(pipe, sampler)
    foldable(pipe.autoencoder)
    pipe.schedule.to_config(sampler)
    defaults, notes = pipe.defaults, []
    rule = defaults.thresholding
    if rule is not None and rule.kind != "none":
        notes.append(f"{rule.kind} thresholding in {rule.space} space is a default that diffusers does not apply.")
    theirs = {XL: 5.0, XL_REFINER: 5.0, LDM: 1.0}.get(kind, 7.5)
    if defaults.guidance_scale is not None and defaults.guidance_scale != theirs:
        notes.append(f"Pass guidance_scale={defaults.guidance_scale:g} in diffusers; its default is {theirs:g}.")
    if defaults.guidance_rescale:
        notes.append(f"Pass guidance_rescale={defaults.guidance_rescale:g} in diffusers; its default is 0.")
    if defaults.num_inference_steps is not None and defaults.num_inference_steps != 50:
        notes.append(f"Pass num_inference_steps={defaults.num_inference_steps} in diffusers; its default is 50.")
    if defaults.spacing is not None and defaults.spacing != pipe.schedule.spacing:
        notes.append(
            f"The spacing {defaults.spacing!r} is a default of ours; the folder says {pipe.schedule.spacing!r}."
        )
    return tuple(notes)


def _what_is_own(pipe: LatentDiffusionPipeline) -> tuple[str, str, str]:
    """Name what makes a model one of ours alone: the parts of an error."""
    where, nobody = "export to diffusers", "No pipeline of diffusers draws with it as we do."
    if pipe.spatial is not None:
        return f"the U-Net takes {pipe.spatial.channels} channels of maps", where, nobody
    if pipe.labels is not None:
        return f"the U-Net is told one of {pipe.labels.null_label} classes", where, nobody
    others = [type(e).__name__ for e in pipe.text_encoders if not isinstance(e, CLIPTextEncoder)]
    if others:
        return f"the text encoder is a {others[0]}", where, "diffusers' StableDiffusionPipeline reads CLIP's."
    readings = "; ".join(str(encoder.reading) for encoder in pipe.text_encoders)
    return f"{len(pipe.text_encoders)} text encoders, read so: {readings}", where, nobody


def _check_ldm(pipe: LatentDiffusionPipeline, sampler: str) -> None:
    """Refuse what an LDMTextToImagePipeline cannot do, the one of diffusers for a VQModel or LDM's own transformer."""
    where = "export to diffusers as an LDMTextToImagePipeline"
    length = pipe.text_encoders[0].config.get("max_position_embeddings")
    if length != LDM_LENGTH:
        fix = f"diffusers pads prompts to {LDM_LENGTH} tokens there; train with a text encoder of that length."
        raise LdmPipeError(f"the text encoder reads {length} tokens", where, fix)
    if pipe.paints:
        raise LdmPipeError("an inpainting U-Net", where, "diffusers has no such pipeline.")
    if samplers.get(sampler).grid == "fractional":
        raise LdmPipeError(f"sampler {sampler!r}", where, "diffusers scales no latents there: use ddim or dpmpp_2m.")


def export_diffusers(
    source: str | Path | None,
    target: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    sampler: str | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> ExportReport:
    """Turn one of our folders, a training run or a hub model into a diffusers folder.

    Args:
        source: as for `LatentDiffusionPipeline.from_pretrained`.
        dtype: of all parts: a pipeline with parts of different dtypes fails on its first call.
        sampler: which one diffusers starts with; None is the model's own.
        check: load the folder with diffusers, draw one picture from the same latents with both, compare.
    Raises: LdmPipeError with the reason, and no folder is left behind, if the model cannot be represented, the target
        cannot be written, or the pictures differ.
    """
    target = Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise LdmPipeError("exists already", str(target), "Give another folder, or --overwrite.")
    root = find_folder(source)
    if target.resolve() == root.resolve():
        raise LdmPipeError("source and target are the same folder", str(target), "Give another target.")
    pipe = LatentDiffusionPipeline.from_parts(load_parts(root))
    chosen = one_of("sampler", sampler or pipe.defaults.sampler or "ddim", samplers.NAMES)
    notes = check_representable(pipe, chosen)
    existed = target.exists()
    save_pipeline(pipe, target, variant=variant, dtype=dtype, card=None, sampler=chosen)
    if not check:
        return ExportReport(target, notes, None)
    try:
        difference, said = compare_with_diffusers(target, variant=variant)
    except BaseException:
        if not existed:
            shutil.rmtree(target, ignore_errors=True)
        raise
    if not difference <= TOLERANCE:
        if not existed:
            shutil.rmtree(target, ignore_errors=True)
        what = f"diffusers draws another picture: largest difference {difference:.2g}, allowed {TOLERANCE:g}"
        raise LdmPipeError(what, str(target), "This model has something diffusers cannot represent; please report it.")
    return ExportReport(target, notes, difference, said)


@torch.no_grad()
def compare_with_diffusers(
    folder: Path,
    *,
    variant: str | None = None,
    num_steps: int = 5,
    scale: float = 3.0,
) -> tuple[float, tuple[str, ...]]:
    """Draw one picture with diffusers and one with us, from the same folder and latents.

    Returns: their largest difference in [0, 1], and what was said while loading.
    Raises: LdmPipeError if diffusers is not installed, cannot load the folder, or rewrites its scheduler.
    """
    try:
        import diffusers
    except ImportError:
        advice = "pip install diffusers, or export with --no-check."
        raise LdmPipeError(
            "diffusers is not installed, so the export cannot be checked", "export to diffusers", advice
        ) from None
    ours = LatentDiffusionPipeline.from_pretrained(folder, variant=variant)
    ours.set_progress_bar_config(disable=True)
    kind = pipeline_class(ours.parts())
    is_ldm = kind == LDM
    with _listening() as said:
        try:
            load = diffusers.DiffusionPipeline.from_pretrained
            options: dict[str, Any] = {"safety_checker": None} if kind in SD_PIPELINES else {}
            options = {"depth_estimator": None, "feature_extractor": None} if kind == DEPTH else options
            theirs = load(str(folder), variant=variant, local_files_only=True, **options)
        except Exception as error:  # whatever diffusers raises, the export is not good
            raise LdmPipeError(f"diffusers cannot load it: {error}", str(folder)) from error
    theirs.set_progress_bar_config(disable=True)
    if kind in XL_PIPELINES:
        theirs.watermark = None  # ours has none
    written = dict(ours.schedule.config)
    rewritten = [key for key, value in written.items() if theirs.scheduler.config.get(key, value) != value]
    if rewritten:
        raise LdmPipeError(
            f"diffusers rewrites {rewritten} of the scheduler on loading", str(folder), "Please report it."
        )
    call, shape = _call(ours, kind, num_steps, scale)
    settings: dict[str, Any] = {"thresholding": "none", "guidance_rescale": 0.0}
    ours.defaults = replace(ours.defaults, spacing=None)  # the times of the scheduler's file, as diffusers has them
    mine = ours(**call, **settings, generator=torch.Generator().manual_seed(1)).images
    if is_ldm:  # it divides the size by 8 whatever the factor is
        call |= {"height": 8 * shape[2], "width": 8 * shape[3]}
    other = theirs(**call, generator=torch.Generator().manual_seed(1)).images
    return float((mine.float() - other.float()).abs().max()), tuple(dict.fromkeys(said))


def _call(
    pipe: LatentDiffusionPipeline, kind: str, num_steps: int, scale: float
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return a call that both understand, and the shape of its latents."""
    height, width = pipe.default_size
    shape = (1, pipe.autoencoder.latent_channels, height // pipe.factor, width // pipe.factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {
        "prompt": CHECK_PROMPT,
        "height": height,
        "width": width,
        "latents": latents,
        "num_inference_steps": num_steps,
        "guidance_scale": scale,
        "output_type": "pt",
    }
    grey = torch.zeros(1, 3, height, width) + 0.5
    if pipe.paints:
        call |= {"image": grey, "mask_image": torch.ones(1, 1, height, width), "strength": 1.0}
    if kind in (XL_REFINER, DEPTH):  # which start from pictures only
        call = {name: value for name, value in call.items() if name not in ("latents", "height", "width")}
        call |= {"image": grey, "strength": 0.8}
    if kind == DEPTH:
        call["depth_map"] = torch.linspace(0, 1, width).expand(1, height, width)
    return call, shape


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what diffusers and transformers warn of, by `warnings` and by `logging`: the first line of each."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().strip().splitlines()[0])

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += [str(w.message).strip().splitlines()[0] for w in caught]
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
