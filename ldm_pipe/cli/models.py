"""The commands about models and pictures: info and export."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ldm_pipe.cli.paths import OutputError
from ldm_pipe.printable import printable

SHIPPED_NAME = "emoji"  # `generate` draws with it where no model is named
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def run_info(args: argparse.Namespace) -> int:
    """Show what a picture was drawn with, or what a model consists of."""
    path = args.path
    is_picture = path is not None and (Path(path).is_file() or path.lower().endswith(PICTURES))
    facts = picture_facts(path) if is_picture else model_facts(path)
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return 0
    for key, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        text = printable(text, lines=True).replace("\n", "\n  ")  # a second line cannot pass for another fact
        sys.stdout.write(f"{printable(str(key))}: {text}\n")
    return 0


def picture_facts(path: str) -> dict[str, Any]:
    """Read the settings inside a picture, and the command that draws it again."""
    from ldm_pipe.drawing.png_info import read_png_info

    if not Path(path).is_file():
        raise OutputError("no such picture", path, "Give an existing file.")
    try:
        info = read_png_info(path)
    except Exception as error:  # noqa: BLE001  damaged files make Pillow raise almost anything
        raise OutputError(
            f"not a readable picture ({error})", path, "Give a PNG drawn by ldm-pipe or a web interface."
        ) from None
    if info is None:
        raise OutputError(
            "the picture holds no settings", path, "They are kept in PNG files only, and lost by most editors."
        )
    prompt, negative = (printable(text, lines=True) for text in (info.prompt, info.negative_prompt))
    settings = {key: printable(value) for key, value in info.settings.items()}
    facts = {"prompt": prompt, "negative prompt": negative, **settings}
    command = redraw_command(prompt, negative, settings)
    return {key: value for key, value in facts.items() if value != ""} | ({"again": command} if command else {})


def redraw_command(prompt: str, negative: str, settings: dict[str, str]) -> str | None:
    """Write the command that draws a picture again; None where the seed or a starting picture is unknown.

    The model is told by its name, which is a folder's where that lies in the current one.
    """
    from ldm_pipe.drawing.png_info import sampler_from_label

    more = (
        "Denoising strength", "Map", "Handed over at", "Handed on at", "Negative sizes", "Refiner", "Enlarging steps",
        "Pipeline",
    )  # fmt: skip
    if "Seed" not in settings or settings.get("Spacing") == "custom" or any(name in settings for name in more):
        return None
    width, _, height = settings.get("Size", "").partition("x")
    rule = (settings.get("Thresholding", "").split() + [None] * 5)[:5]
    options = {
        "--model": None if settings.get("Model") in (None, SHIPPED_NAME) else settings["Model"],
        "--seed": settings["Seed"],
        "--negative-prompt": negative or None,
        "--num-inference-steps": settings.get("Steps"),
        "--guidance-scale": settings.get("CFG scale"),
        "--guidance-rescale": settings.get("Guidance rescale"),
        "--sampler": sampler_from_label(settings["Sampler"]) if "Sampler" in settings else None,
        "--spacing": settings.get("Spacing"),
        "--eta": settings.get("Eta"),
        "--width": None if "Pictures" in settings else width or None,
        "--height": None if "Pictures" in settings else height or None,
        "--thresholding": rule[0],
        "--thresholding-space": rule[1],
        "--thresholding-percentile": rule[2],
        "--thresholding-max-value": rule[3],
        "--thresholding-cap": rule[4],
        "--clip-skip": settings.get("Clip skip"),
        "--prompt-syntax": settings.get("Prompt syntax"),
        "--prompt-2": settings.get("Second prompt"),
        "--negative-prompt-2": settings.get("Second negative prompt"),
        "-n": settings.get("Pictures"),
    }
    words = ["ldm-pipe", "generate", prompt]
    for name, value in options.items():
        words += [name, value] if value else []
    sizes = settings.get("Sizes", "").split()
    if len(sizes) == 6:
        words += ["--original-size", *sizes[:2], "--crops-coords-top-left", *sizes[2:4], "--target-size", *sizes[4:]]
    for option in ("Lora", "Textual inversion"):
        for value in filter(None, settings.get(option, "").split("; ")):
            words += [f"--{option.lower().replace(' ', '-')}", value]
    for option in settings.get("Sampler options", "").split():
        words += ["--sampler-option", option]
    return shlex.join(words) + (" --grid" if "Pictures" in settings else "")


def model_facts(name: str | None) -> dict[str, Any]:
    """Describe a model from its configs and the headers of its weight files; no weights are read."""
    from ldm_pipe.interop.folders.folder import check_index, find_folder, read_own
    from ldm_pipe.interop.folders.index import encoder_folders, part_names
    from ldm_pipe.interop.folders.other import class_of
    from ldm_pipe.pipelines.load import KINDS
    from ldm_pipe.pretrained import read_json

    root = find_folder(name, local_files_only=name is None)
    for classes, pipeline in KINDS:
        if class_of(root) in classes:
            return _facts_of_another(root, class_of(root), pipeline.__name__)
    index, own = check_index(root), read_own(root)
    places = {part: part_names(index).get(part, part) for part in ("unet", "vae", *encoder_folders(index))}
    unet, vae = (read_json(root / places[part] / "config.json") for part in ("unet", "vae"))
    scheduler = read_json(root / "scheduler" / "scheduler_config.json")
    factor = 2 ** (len(vae.get("block_out_channels", ())) - 1)
    side = unet.get("sample_size")
    return {
        "model": own.get("name", root.name),
        "folder": str(root),
        "kind": index["_class_name"],
        "parameters": {part: _count(root / place) for part, place in places.items()},
        "factor": factor,
        "latent channels": vae.get("latent_channels"),
        "size": side * factor if isinstance(side, int) else side,
        "prediction": scheduler.get("prediction_type", "epsilon"),
        "noise law": scheduler.get("beta_schedule"),
        "scheduler": scheduler.get("_class_name"),
        "defaults": own.get("defaults", {}),
        "golden sample": "yes" if "golden_sample" in own else "no",
        "model hash": own.get("model_hash", "unknown"),
    }


def _facts_of_another(root: Path, kind: str, pipeline: str) -> dict[str, Any]:
    """Describe a model that another pipeline than LatentDiffusionPipeline draws with."""
    from ldm_pipe.interop.folders.folder import read_own
    from ldm_pipe.pretrained import read_json

    parts = sorted(path.parent.name for path in root.glob("*/config.json"))
    laws = sorted(path.parent.name for path in root.glob("*/scheduler_config.json"))
    configs = {part: read_json(root / part / "config.json") for part in parts}
    schedulers = {law: read_json(root / law / "scheduler_config.json") for law in laws}
    return {
        "model": read_own(root).get("name", root.name),
        "folder": str(root),
        "kind": kind,
        "draws with": f"ldm_pipe.pipelines.{pipeline}, `ldm-pipe draw`",
        "parameters": {part: _count(root / part) for part in parts},
        "size of a sample": {
            part: config["sample_size"] for part, config in configs.items() if "sample_size" in config
        },
        "prediction": {law: config.get("prediction_type", "epsilon") for law, config in schedulers.items()},
        "scheduler": {law: config.get("_class_name") for law, config in schedulers.items()},
    }


def _count(folder: Path) -> int:
    """Count the numbers in a part's weight files from their headers; of several variants the first counts."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    from ldm_pipe.pretrained import LdmPipeError

    files = sorted(folder.glob("*.safetensors"))
    variants = [f for f in files if "-of-" in f.name] or files[:1]
    total = 0
    for path in variants:
        try:
            with safe_open(str(path), framework="pt") as file:
                total += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise LdmPipeError(f"not a whole safetensors file ({error})", str(path), "Fetch it anew.") from None
    return total


def run_export(args: argparse.Namespace) -> int:
    """Write the format that was asked for, and read it again in the same command."""
    given = {
        "--sampler": (args.sampler, ("diffusers",)),
        "--variant": (args.variant, ("diffusers", "single_file")),
        "--overwrite": (args.overwrite, ("diffusers",)),
        "--no-check": (args.no_check, ("diffusers",)),
        "--model": (args.model, ("lora",)),
    }
    idle = [name for name, (value, formats) in given.items() if value and args.format not in formats]
    if idle:
        raise OutputError(f"{', '.join(idle)} have no effect with --format {args.format}", "export", "Leave them out.")
    if args.format == "diffusers":
        return _export_folder(args)
    from ldm_pipe.pipelines.export_files import export_checked_file, export_checked_lora

    if args.format == "lora":
        notes = export_checked_lora(args.source, args.target, model=args.model)
    else:
        import torch

        dtype = getattr(torch, args.dtype)
        notes = export_checked_file(args.source, args.target, dtype=dtype, variant=args.variant)
    for note in notes:
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"{args.target}\n")
    return 0


def _export_folder(args: argparse.Namespace) -> int:
    """Write a diffusers folder and print how far its pictures are from ours."""
    import torch

    from ldm_pipe.pipelines.export import export_diffusers

    report = export_diffusers(
        args.source,
        args.target,
        dtype=getattr(torch, args.dtype),
        variant=args.variant,
        sampler=args.sampler,
        overwrite=args.overwrite,
        check=not args.no_check,
    )
    for note in report.notes:
        sys.stdout.write(f"note: {note}\n")
    for line in report.warnings:
        sys.stdout.write(f"diffusers said: {line}\n")
    if report.difference is not None:
        sys.stdout.write(
            f"largest difference of the pictures, ours and diffusers', in [0, 1]: {report.difference:.2g}\n"
        )
    sys.stdout.write(f"{report.folder}\n")
    return 0
