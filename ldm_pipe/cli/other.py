"""The command `draw`: with a model of any kind, also without words, by class, or from a small picture to a large one.

What enters: parsed options. What leaves: PNG files with their settings inside, each written whole or not at all.
"""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from ldm_pipe.cli.draw import call_arguments, check_picture, seeds_of, write_picture
from ldm_pipe.cli.paths import OutputError, OutputPlan

OF_STAGES = (
    "noise_level", "original_image", "prior_num_inference_steps", "decoder_num_inference_steps",
    "super_res_num_inference_steps", "prior_guidance_scale", "decoder_guidance_scale",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Draw what the options ask for and print the path of each picture."""
    if args.num_pictures < 1 or args.batch_size < 1:
        raise OutputError("-n and --batch-size must be at least 1", "ldm-pipe draw")
    if args.lora or args.textual_inversion:
        raise OutputError("--lora and --textual-inversion", "ldm-pipe draw", "`ldm-pipe generate` takes them.")
    for path in (args.image, args.mask_image, args.original_image):
        check_picture(path)
    labels = [label for label in args.class_labels or () for _ in range(args.num_pictures)]
    count = len(labels) or args.num_pictures
    plan = OutputPlan.make(args.output, count=count, overwrite=args.overwrite)
    pipe = _load(args)
    arguments = call_arguments(args)
    arguments |= {name: getattr(args, name) for name in OF_STAGES if getattr(args, name) is not None}
    known = inspect.signature(type(pipe).__call__).parameters
    given = {**arguments, **({"prompt": 0} if args.prompt else {}), **({"class_labels": 0} if labels else {})}
    unknown = [f"--{name.replace('_', '-')}" for name in given if name not in known]
    if unknown:
        taken = [f"--{name.replace('_', '-')}" for name in known if hasattr(args, name) and name != "prompt"]
        advice = f"Leave it out; this model takes {', '.join(taken)}."
        raise OutputError(f"{', '.join(unknown)} for a {type(pipe).__name__}", str(args.model), advice)
    seeds = seeds_of(args.seed, count)
    for start in range(0, count, args.batch_size):
        part = slice(start, min(start + args.batch_size, count))
        number = part.stop - part.start
        call: dict[str, Any] = {**arguments, "seed": seeds[part]}
        call |= {"prompt": [args.prompt] * number} if args.prompt else {}
        call |= {"class_labels": labels[part]} if labels else {}
        call |= {"batch_size": number} if "batch_size" in known else {}
        if "num_images_per_prompt" in known and "prompt" not in known:
            call["num_images_per_prompt"] = number
        drawn: Any = pipe(**call)
        for i, image in enumerate(drawn.images, start=start):
            path = plan.path(i, count, prompt=args.prompt or pipe.name, seed=seeds[i])
            write_picture(path, image, drawn.infos[i - start])
    return 0


def _load(args: argparse.Namespace) -> Any:
    import torch

    from ldm_pipe import load_pipeline

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = {"revision": args.revision, "local_files_only": args.local_files_only}
    pipe = load_pipeline(args.model, dtype=args.dtype, variant=args.variant, device=device, **source)
    pipe.set_progress_bar_config(disable=args.quiet or None)
    return pipe
