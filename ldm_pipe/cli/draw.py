"""The commands that draw: generate, img2img and inpaint.

What enters: parsed options. What leaves: PNG files with their settings inside, each written whole or not at all.
Paths are checked before torch is imported.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe.cli.job import refuse_other_settings, write_note
from ldm_pipe.cli.paths import OutputError, OutputPlan, check_folder, check_space, slug

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_pipe.drawing.output import LatentDiffusionOutput
    from ldm_pipe.drawing.png_info import PngInfo
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

MAX_PROMPTS_BYTES = 100_000_000
PASSED_ON = (
    "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "height", "width", "sampler",
    "spacing", "eta", "clip_skip", "strength", "prompt_syntax", "spatial", "class_labels", "depth_map",
    "prompt_2", "negative_prompt_2", "original_size", "target_size", "crops_coords_top_left",
)  # fmt: skip


SETTINGS_BESIDE = ("variant", "revision", "dtype", "lora", "textual_inversion", "refiner")  # of a job's pictures
FURTHER = 1 << 62  # bit of a seed
SECOND_PROMPTS = ("prompt_2", "negative_prompt_2")


@dataclass(frozen=True)
class Job:
    """One prompt of a prompts file: where its pictures go and what they are drawn from."""

    prompt: str
    negative_prompt: str | None
    seed: int
    paths: tuple[Path, ...]


def run(args: argparse.Namespace) -> int:
    """Draw what the options ask for and print the path of each picture."""
    file = getattr(args, "prompts", None)
    if bool(args.prompt) == bool(file):
        state = "both a prompt and --prompts" if file else "no prompt"
        raise OutputError(state, f"ldm-pipe {args.kind}", f'Example: ldm-pipe {args.kind} "red apple"')
    if args.num_images_per_prompt < 1 or args.batch_size < 1:
        raise OutputError("-n and --batch-size must be at least 1", f"ldm-pipe {args.kind}")
    for name in ("image", "mask_image", "spatial", "depth_map"):
        check_picture(getattr(args, name, None))
    return _run_file(args, file) if file else _run_prompts(args)


def check_picture(path: str | None) -> None:
    """Raise OutputError if a picture to start from is no file."""
    if path is not None and not Path(path).is_file():
        raise OutputError("no such picture", path, "Give an existing file.")


def load_pipeline(args: argparse.Namespace) -> LatentDiffusionPipeline:
    """Load the model the options name, on the device and in the dtype they name."""
    import torch

    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipe = LatentDiffusionPipeline.from_pretrained(
        args.model, dtype=dtype, variant=args.variant, revision=args.revision, local_files_only=args.local_files_only
    )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=args.quiet or None)
    if device != "cpu":
        pipe.to(device)
    load_adapters(pipe, args.lora, args.textual_inversion)
    return pipe


def load_adapters(pipe: LatentDiffusionPipeline, loras: Sequence[str], words: Sequence[str]) -> None:
    """Load FILE[:SCALE] and FILE[:WORD]; a LoRA is named as it was typed, so that the picture says how to get it again.

    Raises: OutputError for a scale that is no number.
    """
    weights: dict[str, float] = {}
    for text in loras:
        path, tail = split_tail(text)
        try:
            weights[path] = float(tail or 1.0)
        except ValueError:
            raise OutputError(f"the scale of --lora is {tail!r:.80}", text, "Write FILE or FILE:0.8.") from None
        pipe.load_lora_weights(path, path)
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))
    for text in words:
        path, word = split_tail(text)
        pipe.load_textual_inversion(path, word)


def split_tail(text: str) -> tuple[str, str | None]:
    """Split FILE:TAIL; a path that exists as it stands has no tail."""
    path, colon, tail = text.rpartition(":")
    return (text, None) if not colon or Path(text).exists() or "/" in tail or "\\" in tail else (path, tail)


def load_refiner(args: argparse.Namespace) -> LatentDiffusionPipeline | None:
    """Load the model that takes the last steps, if one is named."""
    name = getattr(args, "refiner", None)
    if name is None:
        return None
    return load_pipeline(argparse.Namespace(**{**vars(args), "model": name, "lora": [], "textual_inversion": []}))


def draw(
    pipe: LatentDiffusionPipeline,
    refiner: LatentDiffusionPipeline | None,
    args: argparse.Namespace,
    call: dict[str, Any],
) -> LatentDiffusionOutput:
    """Draw with one model, or down to a share of the way with it and from there with another."""
    if refiner is None:
        return pipe(**call)  # type: ignore[return-value]
    first: Any = pipe(**{**call, "denoising_end": args.refiner_start, "output_type": "latent"})
    left = (
        "image",
        "mask_image",
        "strength",
        "spatial",
        "class_labels",
        "depth_map",
        "target_size",
        "height",
        "width",
        *SECOND_PROMPTS,
    )
    rest = {name: value for name, value in call.items() if name not in left}
    rest["seed"] = [seed ^ FURTHER for seed in first.seeds]  # other noise than the first model began with
    last: Any = refiner(**rest, latents=first.images, denoising_start=args.refiner_start)
    infos = [replace(info, settings={**info.settings, "Refiner": refiner.name or args.refiner}) for info in first.infos]
    return replace(last, infos=infos, seeds=first.seeds)


def call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the options that are arguments of the pipeline; what was not given is left to the model."""
    given = {name: getattr(args, name, None) for name in PASSED_ON}
    arguments = {name: value for name, value in given.items() if value is not None}
    thresholding = {
        "kind": args.thresholding,
        "space": args.thresholding_space,
        "percentile": args.thresholding_percentile,
        "max_value": args.thresholding_max_value,
        "cap": args.thresholding_cap,
    }
    thresholding = {name: value for name, value in thresholding.items() if value is not None}
    if thresholding and "kind" not in thresholding:
        raise OutputError(
            "a --thresholding-... option without --thresholding", "", "Add --thresholding static or dynamic."
        )
    if thresholding:
        arguments["thresholding"] = thresholding
    if args.sampler_option:
        arguments["sampler_options"] = sampler_options(args.sampler_option)
    if getattr(args, "deterministic_batch", False):
        arguments["deterministic_batch"] = True
    for name in ("image", "mask_image"):
        if getattr(args, name, None) is not None:
            arguments[name] = getattr(args, name)
    return arguments


def sampler_options(words: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE words; values are JSON, or else text. Raises: OutputError naming the word."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier() or name in options:
            raise OutputError(f"--sampler-option {word!r:.80}", "", "Write each once, as NAME=VALUE.")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _run_prompts(args: argparse.Namespace) -> int:
    count = len(args.prompt) * args.num_images_per_prompt
    plan = OutputPlan.make(args.output, count=1 if args.grid else count, overwrite=args.overwrite)
    arguments = call_arguments(args)
    pipe, refiner = load_pipeline(args), load_refiner(args)
    height, width = arguments.get("height") or pipe.default_size[0], arguments.get("width") or pipe.default_size[1]
    check_space(plan.folder, height * width * 3 * count + 4096)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images_per_prompt)]
    seeds = seeds_of(args.seed, count)
    images: list[Image] = []
    infos: list[PngInfo] = []
    for start in range(0, count, args.batch_size):
        part = slice(start, start + args.batch_size)
        drawn = draw(pipe, refiner, args, {**arguments, "prompt": prompts[part], "seed": seeds[part]})
        images += drawn.images
        infos += drawn.infos
        if not args.grid:
            for i, image in enumerate(drawn.images, start=start):
                path = plan.path(i, count, prompt=prompts[i], seed=seeds[i])
                write_picture(path, image, drawn.infos[i - start])
    if args.grid:
        from ldm_pipe.data.images import make_grid

        columns = max(args.num_images_per_prompt if len(args.prompt) > 1 else round(count**0.5 + 0.49), 1)
        sheet = make_grid(images, columns)
        settings = {**infos[0].settings, "Pictures": str(count), "Size": f"{sheet.width}x{sheet.height}"}
        path = plan.path(0, 1, prompt=args.prompt[0], seed=seeds[0])
        write_picture(path, sheet, replace(infos[0], settings=settings))
    return 0


def seeds_of(seed: int | None, count: int) -> list[int]:
    """Return the seed of each picture; without one, a fresh one to count on from."""
    import secrets

    if seed is not None and seed < 0:
        raise OutputError(f"--seed is {seed}", "", "Use a whole number from 0.")
    first = secrets.randbelow(2**32) if seed is None else seed
    return list(range(first, first + count))


def write_picture(path: Path, image: Image, info: PngInfo) -> None:
    """Write one picture with its settings, whole or not at all, and print its path."""
    from ldm_pipe.drawing.png_info import png_bytes

    write_whole(path, png_bytes(image, info))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and print its path."""
    from ldm_pipe.pretrained import atomic_write

    atomic_write(path, data)
    sys.stdout.write(f"{path}\n")
    sys.stdout.flush()


def read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    """Read prompts from .txt (one per line), .csv or .jsonl (`prompt`, and if wanted `negative_prompt` and `seed`).

    Raises: OutputError naming file and line.
    """
    if not path.is_file():
        raise OutputError("no such file", str(path), "Give a .txt, .csv or .jsonl file as --prompts.")
    if path.stat().st_size > MAX_PROMPTS_BYTES:
        raise OutputError(f"larger than {MAX_PROMPTS_BYTES} bytes", str(path), "Split the file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines(keepends=True)))
        elif path.suffix.lower() in (".jsonl", ".json"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error, RecursionError) as error:
        raise OutputError(f"cannot be read ({error})", str(path), "Write it in UTF-8, one prompt per line.") from None
    if not rows:
        raise OutputError("holds no prompts", str(path))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise OutputError(f"row {number} has no `prompt`", str(path), "Every row needs one.")
        try:
            seed = None if row.get("seed") in (None, "") else int(row["seed"])
        except (TypeError, ValueError):
            raise OutputError(
                f"row {number}: seed is {row['seed']!r}", str(path), "Use a whole number from 0."
            ) from None
        yield {"prompt": row["prompt"], "negative_prompt": row.get("negative_prompt") or None, "seed": seed}


def plan_jobs(args: argparse.Namespace, file: str) -> list[Job]:
    """Name every picture of a prompts file: by row, picture and prompt, so that a second run finds what is there."""
    folder = Path(args.output or "pictures")
    count = args.num_images_per_prompt
    jobs = []
    for i, row in enumerate(read_prompts(Path(file))):
        seed = row["seed"] if row["seed"] is not None else (args.seed or 0) + i * count
        if seed < 0:
            raise OutputError(f"row {i + 1}: seed is {seed}", file, "Use a whole number from 0.")
        paths = tuple(folder / f"{i:05d}-{slug(row['prompt'])}-{seed + j}.png" for j in range(count))
        jobs.append(Job(row["prompt"], row["negative_prompt"], seed, paths))
    check_folder(folder)
    return jobs


def job_settings(args: argparse.Namespace, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Collect all that decides about the pictures of a prompts file but the file itself."""
    settings = {name: getattr(args, name, None) or None for name in SETTINGS_BESIDE}
    settings |= {"model": args.model or "the shipped one", "seed": args.seed or 0, "n": args.num_images_per_prompt}
    if args.refiner is not None:
        settings["refiner_start"] = args.refiner_start
    return {name: value for name, value in {**settings, **arguments}.items() if value is not None}


def _run_file(args: argparse.Namespace, file: str) -> int:
    """Draw the pictures of a prompts file that do not exist yet.

    The pictures of one prompt are always drawn as one batch, so that a run that was interrupted ends in the same bytes.
    """
    if args.grid:
        raise OutputError("--grid does not go with --prompts", file, "Leave one of them out.")
    jobs = plan_jobs(args, file)
    arguments = call_arguments(args)
    settings, folder = job_settings(args, arguments), Path(args.output or "pictures")
    if args.overwrite:
        write_note(folder, settings)
    else:
        refuse_other_settings(folder, settings, jobs)
    todo = [job for job in jobs if args.overwrite or not all(path.exists() for path in job.paths)]
    sys.stderr.write(f"{len(jobs)} prompts, {len(jobs) - len(todo)} already drawn\n")
    if not todo:
        return 0
    pipe, refiner = load_pipeline(args), load_refiner(args)
    for one in (pipe, *([refiner] if refiner else ())):
        one.set_progress_bar_config(disable=True)
    from tqdm import tqdm

    for job in tqdm(todo, unit="prompt", disable=args.quiet or None):
        own = dict(arguments) if job.negative_prompt is None else {**arguments, "negative_prompt": job.negative_prompt}
        for start in range(0, len(job.paths), args.batch_size):
            paths = job.paths[start : start + args.batch_size]
            if not args.overwrite and all(path.exists() for path in paths):
                continue
            seeds = [job.seed + start + j for j in range(len(paths))]
            own |= {"prompt": job.prompt, "num_images_per_prompt": len(paths), "seed": seeds}
            drawn = draw(pipe, refiner, args, own)
            for j, path in enumerate(paths):
                if args.overwrite or not path.exists():
                    write_picture(path, drawn.images[j], drawn.infos[j])
    return 0
