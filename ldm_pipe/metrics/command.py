"""`scripts/evaluate.py metrics`: a model or its pictures against a reference, in one table, JSON, sheet and plot.

What enters: parsed arguments. What leaves: files below `--output`, and the table on the standard output. Pictures and
features are kept in shards below it, so that the command goes on where it was stopped, on any number of processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.data.dataset import load_records
from ldm_pipe.data.images import make_grid, to_pil
from ldm_pipe.metrics.described import Described, Processes, describe, in_shards, open_reference, save_statistics
from ldm_pipe.metrics.features import KINDS, FeatureNet, load_features
from ldm_pipe.metrics.measure import HEADER, Number, measure
from ldm_pipe.metrics.neighbours import Arithmetic
from ldm_pipe.metrics.pictures import Pictures, open_pictures, save_npz
from ldm_pipe.metrics.report import save_picture, write_results
from ldm_pipe.metrics.retrieval import chosen_by_hash
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError, atomic_write
from ldm_pipe.training.run.figures import figure_png, subplots

NOTO = "data/emoji/data/noto/train.parquet"
PLAIN = {"is_skin_tone_variant": False, "is_gender_variant": False, "is_flag": False}
NUM_SHOWN = 64
CURVES = ("KID x 1000", "MIND", "precision, k = 3", "recall, k = 3", "coverage, k = 5", "authenticity")


def add_metrics(kinds: Any) -> None:
    """Describe the sub-commands `metrics` and `inception`."""
    parser = kinds.add_parser("metrics", help="KID, MIND, FID, precision, recall, memorisation, ... with intervals")
    parser.add_argument("--model", help="folder, training run or hub id that draws; default: the shipped model")
    parser.add_argument("--samples", help="pictures in place of a model: .npz (arr_0), folder or parquet")
    parser.add_argument("--reference", help=".npz, folder, parquet or statistics; default: Noto's plain drawings")
    parser.add_argument("--training", help="what the model has seen, for memorisation; default: the reference")
    parser.add_argument("--prompts", type=Path, help="text file, one per line; default: the reference's captions")
    parser.add_argument("--caption_column", default="caption", help="of the reference (caption)")
    parser.add_argument("--num", type=int, help="pictures (1000, or all samples)")
    parser.add_argument("--resolution", type=int, help="resize the pictures of tables and folders to this side")
    parser.add_argument("--features", nargs="+", default=["pixels"], help=KINDS)
    parser.add_argument("--guidance_scale", type=float, nargs="+", help="one, or several for a curve")
    parser.add_argument("--num_inference_steps", type=int, nargs="+", help="one, or several for a curve")
    parser.add_argument("--sampler", help="default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; picture i has seed + i (0)")
    parser.add_argument("--distances", choices=get_args(Arithmetic), default="exact", help="of precision and recall")
    parser.add_argument("--num_bootstraps", type=int, default=1000, help="resampled sets for the intervals (1000)")
    parser.add_argument("--save_statistics", type=Path, help="also write the samples' statistics, .safetensors or .npz")
    parser.add_argument("--save_samples", type=Path, help="also write the pictures drawn as .npz (arr_0)")
    parser.set_defaults(run=run_metrics)
    convert = kinds.add_parser("inception", help="convert classify_image_graph_def.pb, or a .pth, to a folder")
    convert.add_argument("--source", required=True, help="the file; TensorFlow is not needed")
    convert.set_defaults(run=run_inception)
    for one in (parser, convert):
        one.add_argument("--batch_size", type=int, default=20, help="pictures at once (default 20)")
        one.add_argument("--device", help="default: a GPU if there is one")
        one.add_argument("--output", required=True, type=Path, help="folder for what is written")


def run_inception(args: argparse.Namespace, device: torch.device) -> None:
    """Convert Inception's weights."""
    del device
    from ldm_pipe.metrics.inception_weights import import_inception

    net = import_inception(args.source, args.output)
    kind = "of 2015: --features inception:" if net.is_of_2015 else "of torchvision (its distance is no FID): inception:"
    sys.stdout.write(f"Inception {kind}{args.output}\n")


def run_metrics(args: argparse.Namespace, device: torch.device) -> None:
    """Draw or read pictures, describe them, measure, and write everything down."""
    began, processes = time.perf_counter(), Processes.join()
    if processes.num > 1 and device.type == "cuda":
        device = torch.device("cuda", processes.rank % torch.cuda.device_count())
    check(args)
    nets = [load_features(spec, device) for spec in args.features]
    sets, facts = sample_sets(args, device, processes)
    folder = args.output / "features"
    results: list[dict[str, Any]] = []
    for setting, pictures in sets:
        rows: list[Number] = []
        for net in nets:
            samples = describe(pictures, net, folder, batch_size=args.batch_size, processes=processes)
            reference = read_side(args, args.reference, net, folder, processes)
            training = read_side(args, args.training, net, folder, processes) if args.training else None
            if processes.rank == 0:
                texts = net.texts(pictures.captions) if net.texts and pictures.captions else None
                rows += compare(args, net, samples, reference, training, texts)
        results.append({**setting, "num": len(pictures), "numbers": [row.to_json() for row in rows]})
        if processes.rank == 0:
            title = ", ".join(f"{name} {value}" for name, value in setting.items())
            table = "\n".join("| " + " | ".join(row.cells()) + " |" for row in rows)
            sys.stdout.write(f"\n{pictures.name}{': ' if title else ''}{title}\n\n{HEADER}\n{table}\n")
            name = "-".join(f"{value:g}" for value in setting.values()) or "samples"
            save_sheet(pictures, args.output / f"sheet-{name}.png")
            if args.save_samples:
                save_npz(args.save_samples, pictures.read(range(len(pictures))))
            write_results(args.output, device, {**facts, "results": results}, began)
    if processes.rank == 0 and len(results) > 1:
        plot_curves(results, args.output / "curves.png")
    processes.wait()


def check(args: argparse.Namespace) -> None:
    """Refuse settings that do not fit each other, before any work."""
    drawn = {
        name: getattr(args, name) for name in ("guidance_scale", "num_inference_steps", "sampler", "prompts", "model")
    }
    if args.samples and any(value is not None for value in drawn.values()):
        given = [f"--{name}" for name, value in drawn.items() if value is not None]
        raise LdmPipeError(
            f"{', '.join(given)} have no effect on --samples", "metrics", "Leave them out, or --samples."
        )
    if args.num is not None and args.num < 4:
        raise LdmPipeError(f"--num is {args.num}", "metrics", "At least 4 pictures are needed for 3 neighbours.")
    if args.num_bootstraps < 0 or args.num_bootstraps == 1:
        raise LdmPipeError(f"--num_bootstraps is {args.num_bootstraps}", "metrics", "Use 0 for none, or at least 2.")
    if any(steps < 1 for steps in args.num_inference_steps or []):
        raise LdmPipeError("--num_inference_steps is below 1", "metrics", "Use whole numbers from 1.")
    several = len(args.guidance_scale or [0]) * len(args.num_inference_steps or [0]) > 1
    if several and (args.save_statistics or args.save_samples):
        raise LdmPipeError("--save_statistics and --save_samples write one set", "metrics", "Give one setting.")


def compare(
    args: argparse.Namespace, net: FeatureNet, samples: Described, reference: Described,
    training: Described | None, texts: Tensor | None,
) -> list[Number]:  # fmt: skip
    """Measure one set in one kind of features."""
    if args.save_statistics:
        path = args.save_statistics
        several = len(args.features) > 1
        save_statistics(path.with_stem(f"{path.stem}-{net.name.replace(' ', '-')}") if several else path, samples)
    call = {"num_bootstraps": args.num_bootstraps, "arithmetic": args.distances}
    return measure(samples, reference, net, training=training, texts=texts, **call)


def read_side(
    args: argparse.Namespace, source: str | None, net: FeatureNet, folder: Path, processes: Processes
) -> Described:
    """Describe a reference; None is Noto's plain drawings."""
    where = source if source is not None else open_pictures(NOTO, side=args.resolution, filters=PLAIN)
    call = {"side": args.resolution, "batch_size": args.batch_size, "processes": processes}
    return open_reference(where, net, folder, **call)


# -- pictures --------------------------------------------------------------------------------------------------------


def sample_sets(
    args: argparse.Namespace, device: torch.device, processes: Processes
) -> tuple[list[tuple[dict[str, Any], Pictures]], dict[str, Any]]:
    """Return every set of samples with its setting, and the facts about all of them."""
    common = {"reference": args.reference or NOTO, "training": args.training, "features": args.features}
    if args.samples:
        pictures = open_pictures(args.samples, side=args.resolution, caption_column=args.caption_column)
        return [({}, pictures.first(args.num))], {"samples": args.samples, **common}
    prompts = read_prompts(args)
    pipe = LatentDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(device)
    scales = args.guidance_scale or [pipe.defaults.guidance_scale or 7.5]
    steps = args.num_inference_steps or [pipe.defaults.num_inference_steps or 50]
    sampler = args.sampler or pipe.defaults.sampler or "ddim"
    facts = {"model": args.model, "model_hash": pipe.model_hash, "sampler": sampler, "seed": args.seed, **common}
    facts["num_inference_steps"] = steps
    sets = []
    for scale in scales:
        for num in steps:
            call = {"guidance_scale": scale, "num_inference_steps": num, "sampler": sampler}
            setting = {**({"guidance_scale": scale} if len(scales) > 1 or len(steps) == 1 else {})}
            setting |= {"num_inference_steps": num} if len(steps) > 1 else {}
            sets.append((setting, draw(pipe, prompts, call, args, processes)))
    return sets, facts


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Read what is asked for: lines of a file in order, or captions of the reference, chosen by hash.

    Raises: LdmPipeError if there are none.
    """
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise LdmPipeError("the file does not exist", str(args.prompts), "Give a text file, one prompt per line.")
        lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        lines = captions(args.reference, args.caption_column)
    if not lines:
        raise LdmPipeError("there are no prompts", "metrics", "Give --prompts FILE, one per line.")
    num = args.num or min(1000, len(lines))
    return [lines[i % len(lines)] for i in range(num)]


def captions(source: str | None, column: str) -> list[str]:
    """Return the captions of a reference in the order of the sha256 of their ids, as in the other evaluations."""
    if source is not None and Path(source).suffix in (".npz", ".safetensors"):
        return []
    records = load_records(source or NOTO, caption_column=column, filters=None if source else PLAIN)
    ids = [str(name) for name in records.column("id")] if "id" in records.column_names else records.ids
    return [records.captions[row] for row in chosen_by_hash(ids, len(ids))]


def draw(
    pipe: LatentDiffusionPipeline,
    prompts: list[str],
    call: dict[str, Any],
    args: argparse.Namespace,
    processes: Processes,
) -> Pictures:
    """Draw one picture per prompt, picture i with seed + i; those that are there already are kept."""

    def make(rows: range) -> dict[str, Tensor]:
        found = []
        for first in range(rows.start, rows.stop, args.batch_size):
            part = range(first, min(first + args.batch_size, rows.stop))
            seeds = [args.seed + row for row in part]
            images = pipe([prompts[row] for row in part], seed=seeds, **call).images
            found += [torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1) for image in images]
        return {"images": torch.stack(found)}

    said = json.dumps([pipe.model_hash, prompts, args.seed, call], sort_keys=True)
    key = hashlib.sha256(said.encode()).hexdigest()[:24]
    # Shards as large as a batch: what is drawn is kept as soon as it is there.
    images = in_shards(args.output / "pictures" / key, len(prompts), make, processes, args.batch_size)["images"]
    return Pictures(
        args.model or "shipped model", len(images), lambda rows: images[rows.start : rows.stop], key, prompts
    )


# -- what is left ------------------------------------------------------------------------------------------------------


def save_sheet(pictures: Pictures, path: Path) -> None:
    """Write the first pictures as one sheet: uncurated."""
    shown = pictures.read(range(min(NUM_SHOWN, len(pictures)))).float() / 127.5 - 1
    save_picture(make_grid([to_pil(image) for image in shown], 16), path)


def plot_curves(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the numbers over what was varied, with their intervals."""
    names = [name for name in ("guidance_scale", "num_inference_steps") if len({row.get(name) for row in results}) > 1]
    across = names[0]
    figure, axes = subplots(2, 3, figsize=(10, 5.5), squeeze=False)
    for axis, metric in zip(axes.flat, CURVES, strict=True):
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for row in results:
            for number in row["numbers"]:
                if number["metric"] != metric:
                    continue
                rest = ", ".join(f"{name} {row[name]:g}" for name in names[1:])
                one = number["estimate"]
                ends = [one["value"] if end is None else end for end in (one["low"], one["high"])]
                lines.setdefault(f"{number['features']} {rest}".strip(), []).append((row[across], one["value"], *ends))
        for label, points in lines.items():
            x, y, low, high = zip(*sorted(points), strict=True)
            axis.plot(x, y, "o-", label=label, markersize=3)
            axis.fill_between(x, low, high, alpha=0.2)
        axis.set(title=metric, xlabel=across.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    atomic_write(path, figure_png(figure, dpi=110))
