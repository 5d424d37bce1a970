"""Check what a call tells the U-Net beside its prompts: SDXL's sizes and scores, maps, depth.

What enters: what the caller gave. What leaves: a Condition for the prompt and one for the negative prompt, a row per
picture, or one LdmPipeError before any work. This file runs no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conditioning import Condition
from conditioning.joined import join_all
from conditioning.sizes import check_pair, score_condition, size_condition
from ldm_pipe.drawing.output import real_number
from ldm_pipe.drawing.pixels import load_maps
from ldm_pipe.interop.folders.index import NUMBERS_SCORE, num_numbers
from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

SIZES = ("original_size", "crops_coords_top_left", "target_size")
SCORE, NEGATIVE_SCORE = 6.0, 2.5  # aesthetic scores where none are asked for, as diffusers has them
MAX_SCORE = 100.0

Beside = tuple[Condition | None, Condition | None]


def check_beside(
    pipe: LatentDiffusionPipeline, given: Mapping[str, Any], count: int, num_prompts: int, size: tuple[int, int]
) -> Beside:
    """Check sizes and maps for `count` pictures of a height and width.

    Returns: what is joined to the conditions of the prompts, and of the negative prompts.
    """
    sizes = tuple(None if one is None else one.repeat(count) for one in _check_sizes(pipe, given, size))
    classes = _check_classes(pipe, given, count, num_prompts)
    maps = _check_maps(pipe, given, count, num_prompts, size)

    def joined(conditions: tuple[Condition | None, ...]) -> Condition | None:
        found = [condition for condition in conditions if condition is not None]
        return join_all(found) if found else None

    said, null = zip(sizes, classes, maps, strict=True)
    return joined(said), joined(null)


def default_sizes(pipe: LatentDiffusionPipeline, size: tuple[int, int]) -> Condition | None:
    """Return what is said of sizes or classes where nothing is asked for, one row; None for a U-Net that reads none."""
    if pipe.labels is not None:
        return pipe.labels.condition([None])
    return _check_sizes(pipe, dict.fromkeys(_names()), size)[0]


def _names() -> tuple[str, ...]:
    sizes = (*SIZES, "aesthetic_score")
    return (*sizes, *(f"negative_{name}" for name in sizes))


def _check_sizes(pipe: LatentDiffusionPipeline, given: Mapping[str, Any], size: tuple[int, int]) -> Beside:
    """Settle the numbers of SDXL: one row each.

    What is not said of the negative prompt is what is said of the prompt; only its crop is (0, 0) where anything else
    is said, as in diffusers, whose image to image with sizes keeps the crop.
    """
    count = num_numbers(pipe.unet, pipe.text_encoders)
    scored = count == NUMBERS_SCORE
    useless = () if count else _names()
    if count:
        useless = tuple(name for name in _names() if ("target" if scored else "aesthetic") in name)
    for name in useless:
        if given[name] is not None:
            what = "reads a score instead" if scored else "reads sizes, but no score" if count else "reads no sizes"
            raise LdmPipeError(f"{name} is given, but this model {what}", how_to_fix=f"leave {name} out")
    if not count:
        return None, None

    def pair(name: str, default: tuple[int, int]) -> tuple[int, int]:
        return default if given[name] is None else check_pair(name, given[name], least=0 if "crop" in name else 1)

    original, crop, target = (pair(name, (0, 0) if "crop" in name else size) for name in SIZES)
    other = any(given[name] is not None for name in _names() if name.startswith("negative_"))
    other = scored or (other and given.get("image") is None)
    null_crop = pair("negative_crops_coords_top_left", (0, 0) if other else crop)
    null_original = pair("negative_original_size", original)
    if not scored:
        null_target = pair("negative_target_size", target)
        return size_condition([original], [crop], [target]), size_condition([null_original], [null_crop], [null_target])

    def score(name: str, default: float) -> float:
        return real_number(name, default if given[name] is None else given[name], -MAX_SCORE, MAX_SCORE)

    scores = score("aesthetic_score", SCORE), score("negative_aesthetic_score", NEGATIVE_SCORE)
    return (
        score_condition([original], [crop], [scores[0]]),
        score_condition([null_original], [null_crop], [scores[1]]),
    )


def _check_classes(pipe: LatentDiffusionPipeline, given: Mapping[str, Any], count: int, num_prompts: int) -> Beside:
    """Read `class_labels`: names or numbers, one for all or one for each prompt; None is no class."""
    asked = given["class_labels"]
    if pipe.labels is None:
        if asked is not None:
            raise LdmPipeError("class_labels is given, but this model knows no classes", how_to_fix="leave it out")
        return None, None
    labels = list(asked) if isinstance(asked, (list, tuple)) else [asked]
    if len(labels) not in (1, num_prompts):
        what = f"{len(labels)} class_labels for {num_prompts} prompts"
        raise LdmPipeError(what, how_to_fix="give one for all, or one for each")
    condition = pipe.labels.condition(labels).repeat(count // len(labels))
    return condition, pipe.labels.null(condition)


def _check_maps(
    pipe: LatentDiffusionPipeline, given: Mapping[str, Any], count: int, num_prompts: int, size: tuple[int, int]
) -> Beside:
    """Read `spatial` or `depth_map`, whichever the model takes, and bring it to the latents."""
    takes = pipe.spatial
    mine = None if takes is None else "depth_map" if takes.kind == "depth" else "spatial"
    for name in ("spatial", "depth_map"):
        if given[name] is not None and name != mine:
            what = f"this model takes {mine}" if mine else "this model takes no map"
            raise LdmPipeError(f"{name} is given, but {what}", how_to_fix=f"leave {name} out")
    if takes is None or mine is None:
        return None, None
    latent_size = (size[0] // pipe.factor, size[1] // pipe.factor)
    if mine == "depth_map":
        maps = _read_depth(given[mine])
    elif given[mine] is None:
        none = Condition(spatial=torch.zeros(count, takes.channels, *latent_size))
        return none, none
    else:
        maps = load_maps(given[mine], takes.channels)
        if tuple(maps.shape[2:]) not in (size, latent_size):
            what = f"{mine} is {maps.shape[3]}x{maps.shape[2]}"
            allowed = f"{size[1]}x{size[0]} as the picture, or {latent_size[1]}x{latent_size[0]} as its latents"
            raise LdmPipeError(what, how_to_fix=f"give {allowed}")
    if maps.shape[0] not in (1, num_prompts, count):
        what = f"{maps.shape[0]} maps in {mine} for {num_prompts} prompts"
        raise LdmPipeError(what, how_to_fix="give one for all, or one for each")
    condition = takes.condition(maps.repeat_interleave(count // maps.shape[0], dim=0), latent_size)
    return condition, takes.null(condition)


def _read_depth(value: Any) -> Tensor:
    """Read a depth map, a grey picture or (B, H, W) of any unit as in diffusers, to (B, 1, H, W)."""
    advice = "give a tensor (B, H, W) of any unit; depth is estimated by a model of your own, such as DPT"
    if value is None:
        raise LdmPipeError("depth_map is missing, and this model needs one", how_to_fix=advice)
    if isinstance(value, (str, Path)) or hasattr(value, "getbands"):
        return load_maps(value, 1, "depth_map")
    depth = value if isinstance(value, Tensor) else None
    if hasattr(value, "__array_interface__"):
        import numpy as np

        depth = torch.from_numpy(np.array(value, dtype=np.float32))
    if depth is None or depth.ndim not in (2, 3) or 0 in depth.shape or depth.is_complex():
        shape = tuple(depth.shape) if depth is not None else type(value).__name__
        raise LdmPipeError(f"depth_map is {shape}", how_to_fix=advice)
    depth = depth.detach().cpu().float()
    return depth[None, None] if depth.ndim == 2 else depth[:, None]  # (B, 1, H, W)
