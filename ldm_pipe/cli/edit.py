"""The commands that edit with noise: interpolate and invert.

What enters: parsed options. What leaves: one strip (PNG) or film (GIF) with its settings inside. Paths are checked
before torch is imported.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe.cli.draw import call_arguments, check_picture, load_pipeline, write_whole
from ldm_pipe.cli.paths import OutputError, OutputPlan, check_space

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_pipe.drawing.png_info import PngInfo
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

FILMS = (".png", ".gif")
MIN_SIDE = 128  # smaller pictures are enlarged, so that their labels can be read
# of drawing, not of the way to the noise
ONLY_DRAWN = ("sampler", "sampler_options", "eta", "guidance_scale", "guidance_rescale", "negative_prompt")


def run_interpolate(args: argparse.Namespace) -> int:
    """Draw the frames between prompts, seeds or pictures, and print the path of the strip or film."""
    for path in args.image:
        check_picture(path)
    prompts, seeds = args.prompt or [""], args.seed or []
    if max(len(prompts), len(seeds), len(args.image)) < 2:
        example = 'Example: ldm-pipe interpolate "red apple" "smiling face" --seed 7'
        raise OutputError(
            "one point is no way", "ldm-pipe interpolate", f"Give two prompts, seeds or pictures. {example}"
        )
    plan, arguments = _prepare(args), call_arguments(argparse.Namespace(**{**vars(args), "image": None}))
    pipe = load_pipeline(args)
    latents = None
    if args.image:
        upwards = {name: value for name, value in arguments.items() if name not in ONLY_DRAWN}
        latents = pipe.invert(args.image, prompts if len(prompts) > 1 else prompts[0], **upwards).latents
        arguments |= {"height": latents.shape[2] * pipe.factor, "width": latents.shape[3] * pipe.factor}
    drawn = pipe.interpolate(
        prompts,
        num_frames=args.num_frames,
        seed=seeds or None,
        latents=latents,
        batch_size=args.batch_size,
        **arguments,
    )
    labels = _labels(args, len(drawn.images))
    info = drawn.infos[0]
    settings = {name: value for name, value in info.settings.items() if name != "Frame"}
    _write_film(args, plan, drawn.images, labels, replace(info, settings={**settings, "Frames": str(len(labels))}))
    return 0


def _labels(args: argparse.Namespace, count: int) -> list[str]:
    """Name the frames that lie at a point of the way, by what differs from point to point."""
    if len(args.prompt) > 1:
        points = args.prompt
    else:
        points = [Path(path).name for path in args.image] or [f"seed {seed}" for seed in args.seed]
    labels = [""] * count
    for i, point in enumerate(points):
        labels[round(i * (count - 1) / (len(points) - 1))] = point
    return labels


def run_invert(args: argparse.Namespace) -> int:
    """Redraw a picture from its own noise, with other prompts and a little fresh noise where asked for."""
    check_picture(args.image)
    if args.variations < 0:
        raise OutputError(f"--variations is {args.variations}", "ldm-pipe invert", "Use a whole number from 0.")
    plan, arguments = (
        _prepare(args),
        call_arguments(argparse.Namespace(**{**vars(args), "image": None, "strength": None})),
    )
    pipe = load_pipeline(args)
    images, info = _edited(pipe, args, arguments)
    labels = ["picture", f"redrawn: {args.prompt}", *args.to, *["variation"] * args.variations]
    _write_film(args, plan, images, labels, info)
    return 0


def _edited(
    pipe: LatentDiffusionPipeline, args: argparse.Namespace, arguments: dict[str, Any]
) -> tuple[list[Image], PngInfo]:
    """Return the picture, what its noise gives, and what is made of that; says how far the second is from the first."""
    from ldm_pipe.data.images import to_pil
    from ldm_pipe.drawing.pixels import load_images
    from ldm_pipe.metrics.inversion import inversion_psnr

    upwards = {name: value for name, value in arguments.items() if name not in ONLY_DRAWN}
    found = pipe.invert(args.image, args.prompt, num_refinements=args.num_refinements, **upwards)
    rows, columns = (side * pipe.factor for side in found.latents.shape[2:])
    sized = {**arguments, "height": rows, "width": columns, "seed": args.seed}
    downwards = {
        **upwards,
        "height": rows,
        "width": columns,
        "sampler": "ddim",
        "guidance_scale": 1.0,
        "seed": args.seed,
    }
    back = pipe(args.prompt, latents=found.latents, return_latents=True, **downwards)
    exact = inversion_psnr(pipe, found.encoded, back.latents)
    sys.stderr.write(f"the way back differs from what the autoencoder keeps by {float(exact[0]):.1f} dB PSNR\n")
    images = [to_pil(load_images(args.image, (rows, columns))[0] * 2 - 1), *back.images]
    if args.to:
        noise = found.latents.expand(len(args.to), -1, -1, -1)
        images += pipe(args.to, latents=noise, **sized).images
    if args.variations:
        more = {"strength": args.strength, "num_images_per_prompt": args.variations}
        images += pipe.vary(args.image, args.prompt, num_refinements=args.num_refinements, **more, **sized).images
    settings = {name: value for name, value in back.infos[0].settings.items() if name != "Seed"}
    told = {"Inversion PSNR": f"{float(exact[0]):.1f}", "Refinements": str(args.num_refinements)}
    return images, replace(back.infos[0], settings={**settings, **told, "Frames": str(len(images))})


def _prepare(args: argparse.Namespace) -> OutputPlan:
    """Check what can be checked without torch."""
    if not (args.columns >= 1 and 0 < args.fps <= 100):
        raise OutputError("--columns must be at least 1, --fps above 0 and up to 100")
    plan = OutputPlan.make(args.output, count=1, overwrite=args.overwrite, suffixes=FILMS)
    check_space(plan.folder, 10_000_000)
    return plan


def _write_film(
    args: argparse.Namespace, plan: OutputPlan, images: Sequence[Image], labels: Sequence[str], info: PngInfo
) -> None:
    """Write a labelled strip, or a film, with the settings inside."""
    from PIL.Image import Resampling

    from ldm_pipe.data.images import make_grid
    from ldm_pipe.drawing.png_info import gif_bytes, png_bytes

    factor = math.ceil(MIN_SIDE / min(images[0].size))
    size = (factor * images[0].width, factor * images[0].height)
    images = [image.resize(size, Resampling.BICUBIC) if factor > 1 else image for image in images]
    path = plan.path(0, 1, prompt=info.prompt, seed=None)
    if path.suffix.lower() == ".gif":
        write_whole(path, gif_bytes(images, info, args.fps))
        return
    strip = make_grid(images, min(args.columns, len(images)), labels=labels)
    settings = {**info.settings, "Size": f"{strip.width}x{strip.height}"}
    write_whole(path, png_bytes(strip, replace(info, settings=settings)))
