"""Measure a model: how well the autoencoder rebuilds drawings, how often the right thing is drawn, how likely data are.

    python scripts/evaluate.py autoencoder --model runs/emoji/autoencoder/vae --output runs/emoji/evaluation/autoencoder
    python scripts/evaluate.py retrieval --guidance_scale 1 2 3 4 5 7 10 --output runs/emoji/evaluation/retrieval
    python scripts/evaluate.py style --lora runs/emoji/finetune/lora.safetensors --output runs/emoji/evaluation/style
    python scripts/evaluate.py sheet --output docs/images
    python scripts/evaluate.py likeness --output runs/emoji/evaluation/likeness
    python scripts/evaluate.py mask --model runs/emoji/diffusion_mask --output runs/emoji/evaluation/mask
    python scripts/evaluate.py inversion --output runs/emoji/evaluation/inversion
    python scripts/evaluate.py bits --model runs/emoji/diffusion --output runs/emoji/evaluation/bits
    python scripts/evaluate.py metrics --features pixels --output runs/emoji/evaluation/metrics

What enters: a model (default: the one that ships) and the drawings. What leaves: `results.json` with command, model
hash, hardware and time, sheets of pictures, a plot, and rows for docs/results.md on the standard output.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from tqdm import tqdm

from autoencoder import Autoencoder, load_autoencoder
from conditioning.contrastive import ImageTower
from ldm_pipe.cli.paths import OutputError, check_folder
from ldm_pipe.data.cache import module_hash
from ldm_pipe.data.dataset import Records, load_records
from ldm_pipe.data.images import make_grid, to_pil, to_tensor
from ldm_pipe.metrics.command import add_metrics
from ldm_pipe.metrics.inversion import measure_inversion
from ldm_pipe.metrics.likelihood import default_num_steps, measure_bits
from ldm_pipe.metrics.likeness import report_likeness
from ldm_pipe.metrics.mask import measure_masks
from ldm_pipe.metrics.reconstruction import report_reconstruction
from ldm_pipe.metrics.report import image_batches, plot_rates, save_picture, write_results
from ldm_pipe.metrics.retrieval import chosen_by_hash, concept_ranks, hit_rate, standard_error, thumbnails
from ldm_pipe.metrics.style import StyleClassifier, load_or_fit
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule.process import Variance
from ldm_pipe.training.run.config import DataConfig, run_script
from ldm_pipe.training.tasks.beside import read_masks

NOTO, FLAT = "data/emoji/data/noto", "data/emoji/data/twemoji"
PLAIN = {"is_skin_tone_variant": False, "is_gender_variant": False, "is_flag": False}
SEED = 0
NUM_SHEET = 16
NUM_PAIRS = 24


def build_parser() -> argparse.ArgumentParser:
    """Describe the evaluations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(title="evaluations", metavar="KIND", required=True)
    rebuild = kinds.add_parser("autoencoder", help="likeness of reconstructions, spectrum of latents, use of codes")
    rebuild.add_argument("--model", help="autoencoder folder, or any model; default: the shipped one")
    rebuild.add_argument("--validation_file", default=f"{NOTO}/validation.parquet", help="drawings never trained on")
    rebuild.add_argument("--image_tower", help="folder of the network for perceptual and Frechet distance")
    rebuild.add_argument("--resolution", type=int, help="side of the pictures; default: the model's")
    rebuild.add_argument("--num_images", type=int, help="only the first so many of each set (a quick look)")
    rebuild.set_defaults(run=run_autoencoder)
    retrieve, style, sheet, like = add_drawing_kinds(kinds)
    bits = kinds.add_parser("bits", help="bound on the bits per dimension of the validation drawings' latents")
    bits.add_argument("--model", help="folder, training run or hub id; default: the shipped model")
    bits.add_argument("--validation_file", default=f"{NOTO}/validation.parquet", help="drawings never trained on")
    bits.add_argument("--num_images", type=int, help="only the first so many (a quick look)")
    bits.add_argument("--num_steps", type=int, help="steps of the chain; default: all levels, 1000 in continuous time")
    bits.add_argument("--variance", choices=get_args(Variance), help="default: learned, else fixed_small")
    bits.add_argument("--bin_width", type=float, help="measure a code of latents rounded to this; default: a density")
    bits.set_defaults(run=run_bits)
    invert = kinds.add_parser("inversion", help="how exactly the model's own pictures come back from their noise")
    invert.add_argument("--model", help="folder, training run or hub id; default: the shipped model")
    invert.add_argument("--num_prompts", type=int, default=16, help="captions, chosen by hash (default 16)")
    invert.add_argument("--num_inference_steps", type=int, default=50, help="up, and as many down (default 50)")
    invert.add_argument("--num_refinements", type=int, nargs="+", default=[0, 1, 4], help="per step (default 0 1 4)")
    invert.set_defaults(run=run_inversion, sampler=None, guidance_scale=None)
    mask = kinds.add_parser("mask", help="how well a model that takes masks keeps to them")
    mask.add_argument("--model", required=True, help="folder or training run")
    mask.add_argument("--num_prompts", type=int, default=60, help="captions, chosen by hash (default 60)")
    mask.add_argument("--num_inference_steps", type=int, default=20, help="default 20")
    mask.add_argument("--guidance_scale", type=float, nargs="+", default=[4.0], help="default 4")
    mask.set_defaults(run=run_mask, sampler=None)
    add_metrics(kinds)
    for one in (rebuild, retrieve, style, sheet, like, invert, mask):
        where = FLAT if one is style else NOTO
        one.add_argument("--train_file", default=f"{where}/train.parquet", help="parquet file of the drawings")
    for one in (rebuild, retrieve, style, sheet, like, bits, invert, mask):
        one.add_argument("--batch_size", type=int, default=20, help="pictures at once (default 20)")
        one.add_argument("--device", help="default: a GPU if there is one")
        one.add_argument("--output", required=True, type=Path, help="folder for results.json and the pictures")
    return parser


def add_drawing_kinds(kinds: Any) -> list[argparse.ArgumentParser]:
    """Describe the evaluations that draw what captions ask for."""
    retrieve = kinds.add_parser("retrieval", help="how often the nearest drawing is of the right concept")
    style = kinds.add_parser("style", help="retrieval among the flat drawings, and how flat the pictures look")
    style.add_argument("--classifier", default="runs/emoji/style", help="folder; fitted there if it is not there yet")
    sheet = kinds.add_parser("sheet", help="one labelled sheet of uncurated pictures")
    like = kinds.add_parser("likeness", help="nearness to training drawings (memorisation), and sharpness")
    like.add_argument("--num_prompts", type=int, default=100, help="captions, chosen by hash (default 100)")
    like.add_argument("--image_tower", help="folder of the network for the perceptual distance")
    like.set_defaults(run=run_likeness)
    retrieve.set_defaults(run=run_retrieval, classifier=None)
    style.set_defaults(run=run_retrieval)
    sheet.set_defaults(run=run_sheet)
    for one in (retrieve, style):
        one.add_argument("--num_prompts", type=int, default=400, help="captions, chosen by hash (default 400)")
        one.add_argument("--answer_column", default="concept", help="what the nearest drawing must share (concept)")
    for one in (retrieve, style, sheet, like):
        one.add_argument("--lora", nargs="+", default=[], help="LoRA files or folders to draw with")
        one.add_argument("--prompt_suffix", default="", help="words put behind every prompt, such as ', <flat>'")
        one.add_argument("--model", help="folder, training run or hub id; default: the shipped model")
        one.add_argument("--prompt_column", default="caption", help="for a model of labels: their column")
        one.add_argument("--num_inference_steps", type=int, help="default: the model's")
        one.add_argument("--sampler", help="ddim, ddpm, euler or dpmpp_2m; default: the model's")
        how = (
            {"nargs": "+", "help": "one, or several to compare"}
            if one in (retrieve, style)
            else {"help": "default: the model's"}
        )
        one.add_argument("--guidance_scale", type=float, **how)  # pyright: ignore[reportArgumentType]
    return [retrieve, style, sheet, like]


def load_plain(path: str) -> Records:
    """Read the drawings that are no skin tone, gender or flag variant."""
    return load_records(path, caption_column="caption", filters=PLAIN)


# -- autoencoder -------------------------------------------------------------------------------------------------


def load_any_autoencoder(name: str | None) -> Autoencoder:
    """Load an autoencoder folder, or the autoencoder of a whole model."""
    if name is not None and (Path(name) / "config.json").is_file():
        return load_autoencoder(name)
    return LatentDiffusionPipeline.from_pretrained(name).autoencoder


def run_autoencoder(args: argparse.Namespace, device: torch.device) -> None:
    """Measure reconstructions of the validation drawings and of the plain training drawings."""
    began = time.perf_counter()
    autoencoder = load_any_autoencoder(args.model).to(device)
    resolution = args.resolution or int(autoencoder.config.get("sample_size") or 64)
    if resolution < 11 or resolution % autoencoder.factor:
        what = f"resolution is {resolution}"
        raise LdmPipeError(what, "autoencoder", f"Use a multiple of {autoencoder.factor}, at least 11.")
    tower = ImageTower.from_pretrained(args.image_tower) if args.image_tower else None
    sets = {
        "validation drawings": load_records(args.validation_file, caption_column="caption"),
        "plain training drawings": load_plain(args.train_file),
    }
    results: dict[str, Any] = {}
    print("| set | drawings | PSNR (dB) | SSIM | perceptual | Frechet | KL (nats) | codes used | perplexity |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, records in sets.items():
        records = records.select(range(min(len(records), args.num_images or len(records))))
        report, shown = report_reconstruction(
            autoencoder, image_batches(records, resolution, args.batch_size, name),
            features=tower.features if tower else None, embed=tower, num_shown=NUM_PAIRS,
        )  # fmt: skip
        results[name] = {"num_drawings": len(records), **report.to_json()}
        print(f"| {name} | {len(records)} | {' | '.join(report.cells())} |", flush=True)
        path = args.output / f"{name.replace(' ', '-')}.png"
        save_picture(make_grid([to_pil(picture) for picture in shown], min(12, len(shown))), path)
    size = sum(p.numel() for p in autoencoder.parameters())
    facts = {"model": args.model, "autoencoder_hash": module_hash(autoencoder), "resolution": resolution}
    write_results(args.output, device, {**facts, "num_parameters": size, "results": results}, began)


# -- pictures from prompts ---------------------------------------------------------------------------------------


def load_model(args: argparse.Namespace, device: torch.device) -> LatentDiffusionPipeline:
    """Load the pipeline that draws."""
    pipe = LatentDiffusionPipeline.from_pretrained(args.model)
    for file in getattr(args, "lora", []):
        pipe.load_lora_weights(file)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def draw(
    pipe: LatentDiffusionPipeline, prompts: list[str], args: argparse.Namespace, scale: float | None
) -> list[Image.Image]:
    """Draw one picture per prompt, each from the same seed (a prompt that comes again: from the next one)."""
    seeds = [SEED + prompts[:number].count(prompt) for number, prompt in enumerate(prompts)]
    given = {"guidance_scale": scale, "num_inference_steps": args.num_inference_steps, "sampler": args.sampler}
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    pictures: list[Image.Image] = []
    with tqdm(total=len(prompts), desc="pictures" if scale is None else f"guidance {scale:g}") as bar:
        for first in range(0, len(prompts), args.batch_size):
            part = prompts[first : first + args.batch_size]
            pictures += pipe(part, seed=seeds[first : first + len(part)], **arguments).images
            bar.update(len(part))
    return pictures


def asked(records: Records, num: int) -> list[int]:
    """Return the rows of the captions that are asked for: those with the lowest sha256 of their id."""
    return chosen_by_hash([str(name) for name in records.column("id")], num)


def drawing_facts(args: argparse.Namespace, pipe: LatentDiffusionPipeline) -> dict[str, Any]:
    """Tell the model and the settings of the pictures."""
    hashes = {name: module_hash(module) for name, module in pipe.components.items()}
    return {
        "model": args.model,
        "lora": getattr(args, "lora", []),
        "model_hash": pipe.model_hash,
        "hashes": hashes,
        "seed": SEED,
        "num_inference_steps": args.num_inference_steps or pipe.defaults.num_inference_steps or 50,
        "sampler": args.sampler or pipe.defaults.sampler or "ddim",
    }


def read_prompts(args: argparse.Namespace, records: Records, rows: list[int]) -> list[str]:
    """Return what is asked for."""
    texts = records.column(args.prompt_column)
    return [texts[row] + args.prompt_suffix for row in rows]


def load_style(args: argparse.Namespace, pipe: LatentDiffusionPipeline) -> StyleClassifier | None:
    """Load the classifier of the evaluation, or fit it to drawings rebuilt by the model's autoencoder."""
    if args.classifier is None:
        return None
    side, vae = pipe.defaults.height or 64, pipe.autoencoder
    found = load_or_fit(args.classifier, lambda x: vae.decode(vae.encode(x.to(vae.device))), Path(FLAT).parent, side)
    print(f"style classifier on unseen drawings, and on those rebuilt: {found.config['drawings']}, ", end="")
    print(found.config["rebuilt"])
    return found


def run_retrieval(args: argparse.Namespace, device: torch.device) -> None:
    """Draw what captions ask for, and look for the right concept among the drawings nearest to each picture."""
    began = time.perf_counter()
    records = load_plain(args.train_file)
    rows = asked(records, args.num_prompts)
    captions, concepts = [records.captions[row] for row in rows], records.column(args.answer_column)
    prompts, wanted = read_prompts(args, records, rows), [concepts[row] for row in rows]
    pipe = load_model(args, device)
    references = torch.cat([thumbnails(to_tensor(records.image(row))[None]) for row in range(len(records))])
    scales = sorted(set(args.guidance_scale)) if args.guidance_scale else [pipe.defaults.guidance_scale or 7.5]
    columns = {"prompt_column": args.prompt_column, "answer_column": args.answer_column}
    judge = load_style(args, pipe)
    facts = {**drawing_facts(args, pipe), **columns, "num_prompts": len(prompts), "num_drawings": len(records)}
    facts |= {"prompt_suffix": args.prompt_suffix, "classifier": judge and dict(judge.config)}
    results = []
    print(f"{len(prompts)} prompts, {len(records)} drawings, {facts['sampler']}, {facts['num_inference_steps']} steps")
    print("| guidance | top 1 | top 5 | standard errors | seconds | style |\n|---|---|---|---|---|---|")
    for scale in scales:
        start = time.perf_counter()
        pictures = draw(pipe, prompts, args, scale)
        seconds = time.perf_counter() - start
        vectors = torch.cat([thumbnails(to_tensor(picture)[None]) for picture in pictures])
        ranks = concept_ranks(vectors, wanted, references, concepts)
        first, five = hit_rate(ranks, 1), hit_rate(ranks, 5)
        style = judge and round(float(judge(torch.stack([to_tensor(picture) for picture in pictures])).mean()), 4)
        errors = [round(standard_error(rate, len(prompts)), 4) for rate in (first, five)]
        row = {"guidance_scale": scale, "top1": first, "top5": five, "standard_errors": errors, "style": style}
        results.append({**row, "seconds": round(seconds, 1), "ranks": dict(zip(captions, ranks.tolist(), strict=True))})
        told = f"| {scale:g} | {first:.3f} | {five:.3f} | {errors[0]:.3f}, {errors[1]:.3f} | {seconds:.0f} |"
        print(f"{told} {'-' if style is None else style} |", flush=True)
        save_picture(make_grid(pictures, 20), args.output / f"pictures-{scale:g}.png")
        write_results(args.output, device, {**facts, "results": results}, began)
    plot_rates(results, args.output / "guidance.png", f"{len(prompts)} prompts, {len(records)} drawings")


def run_sheet(args: argparse.Namespace, device: torch.device) -> None:
    """Draw the first 16 of the retrieval's captions as one labelled sheet; small pictures are enlarged."""
    began = time.perf_counter()
    records = load_plain(args.train_file)
    rows = asked(records, NUM_SHEET)
    captions = [records.captions[row] for row in rows]
    prompts = read_prompts(args, records, rows)
    pipe = load_model(args, device)
    pictures = draw(pipe, prompts, args, args.guidance_scale)
    if pictures[0].width < 128:
        factor = 128 // pictures[0].width
        pictures = [p.resize((factor * p.width, factor * p.height), Image.Resampling.BICUBIC) for p in pictures]
    path = args.output / "sheet.png"
    save_picture(make_grid(pictures, 8, labels=captions), path)
    scale = args.guidance_scale or pipe.defaults.guidance_scale or 7.5
    facts = {**drawing_facts(args, pipe), "guidance_scale": scale, "prompts": prompts}
    write_results(args.output, device, facts, began)
    print(path)


def run_likeness(args: argparse.Namespace, device: torch.device) -> None:
    """Draw captions from two seeds; compare with all training drawings, and with the autoencoder's reconstructions."""
    began = time.perf_counter()
    records, pipe = load_plain(args.train_file), load_model(args, device)
    rows = asked(records, args.num_prompts)
    prompts = read_prompts(args, records, rows)
    drawn = draw(pipe, prompts * 2, args, args.guidance_scale)  # a prompt that comes again is drawn from another seed
    first, second = torch.stack([to_tensor(picture) for picture in drawn]).chunk(2)
    drawings = torch.cat(list(image_batches(records, first.shape[-1], args.batch_size, "drawings")))
    features = ImageTower.from_pretrained(args.image_tower).features if args.image_tower else None
    found = report_likeness(first, second, drawings, rows, pipe.autoencoder, features)
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    write_results(args.output, device, {**drawing_facts(args, pipe), "prompts": prompts, "results": found}, began)


def run_inversion(args: argparse.Namespace, device: torch.device) -> None:
    """Draw pictures, walk up to their noise with DDIM and down again without guidance, and compare."""
    began = time.perf_counter()
    records = load_plain(args.train_file)
    prompts = [records.captions[row] for row in asked(records, args.num_prompts)]
    pipe = load_model(args, device)
    pictures = draw(pipe, prompts, args, None)
    rows, sheets = [], list(pictures)
    print("| refinements | evaluations up | latent RMSE | PSNR, dB | worst | PSNR to the picture, dB | noise std |")
    print("|---|---|---|---|---|---|---|")
    for number in args.num_refinements:
        found = measure_inversion(pipe, pictures, prompts, num_steps=args.num_inference_steps, num_refinements=number)
        row = {
            "num_refinements": number,
            "evaluations": args.num_inference_steps * (number + 1),
            "latent_rmse": round(float(found.latent_rmse.square().mean().sqrt()), 5),
            "psnr": round(float(found.psnr.mean()), 2),
            "worst_psnr": round(float(found.psnr.min()), 2),
            "picture_psnr": round(float(found.picture_psnr.mean()), 2),
            "noise_std": round(float(found.noise_std.mean()), 4),
        }
        rows.append(row)
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
        sheets += found.images
    save_picture(make_grid(sheets, len(prompts)), args.output / "inversion.png")
    write_results(args.output, device, {**drawing_facts(args, pipe), "prompts": prompts, "results": rows}, began)


def run_mask(args: argparse.Namespace, device: torch.device) -> None:
    """Draw captions in their own masks and in those of others, and measure how far the drawings fill them."""
    began = time.perf_counter()
    records, pipe = load_plain(args.train_file), load_model(args, device)
    rows = asked(records, args.num_prompts)
    data = DataConfig(mask_column="mask", resolution=pipe.defaults.height or 64)
    masks, prompts = torch.cat(read_masks(records, data, rows)), [records.captions[row] for row in rows]
    results = []
    print("| guidance | own mask | mask of another | no mask | masks of two drawings |\n|---|---|---|---|---|")
    for scale in args.guidance_scale:
        call = {"guidance_scale": scale, "num_inference_steps": args.num_inference_steps, "seed": SEED}
        report = measure_masks(pipe, prompts, masks, batch_size=args.batch_size, **call)
        found = {name: round(getattr(report, name), 4) for name in ("own", "swapped", "unasked", "chance")}
        results.append({"guidance_scale": scale, **found})
        print(f"| {scale:g} | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |", flush=True)
        lines = (masks, report.own_images, masks.roll(-1, dims=0), report.swapped_images)
        shown = [to_pil(2 * one - 1) for line in lines for one in line.expand(-1, 3, -1, -1)[:NUM_SHEET]]
        save_picture(make_grid(shown, min(NUM_SHEET, len(prompts))), args.output / f"masks-{scale:g}.png")
    write_results(args.output, device, {**drawing_facts(args, pipe), "prompts": prompts, "results": results}, began)


# -- likelihood --------------------------------------------------------------------------------------------------


def run_bits(args: argparse.Namespace, device: torch.device) -> None:
    """Measure the bound on the bits per dimension of drawings that were never trained on; see `measure_bits`."""
    began = time.perf_counter()
    pipe = load_model(args, device)
    records = load_records(args.validation_file, caption_column="caption")
    records = records.select(range(min(len(records), args.num_images or len(records))))
    settings = {"num_steps": args.num_steps or default_num_steps(pipe), "variance": args.variance}
    settings |= {"bin_width": args.bin_width, "seed": SEED}
    with tqdm(total=len(records), desc="bits/dim") as bar:
        done = lambda num: bar.update(num - bar.n)  # noqa: E731
        results = measure_bits(pipe, records, **settings, batch_size=args.batch_size, progress=done)
    what = "differential entropy of the latents" if args.bin_width is None else "code of the rounded latents"
    facts = {"model": args.model, "model_hash": pipe.model_hash, "num_drawings": len(records), "bounds": what}
    write_results(args.output, device, {**facts, **settings, "results": results}, began)
    print(f"upper bound on the {what}, {len(records)} drawings, {settings['num_steps']} steps")
    print("| bits/dim | prior | steps | decoder |\n|---|---|---|---|")
    print("| " + " | ".join(f"{results[name]:.4f}" for name in ("bits_per_dim", "prior", "steps", "decoder")) + " |")


def main(argv: list[str]) -> None:
    """Run one evaluation."""
    args = build_parser().parse_args(argv)
    for name in ("batch_size", "num_images", "num_prompts", "num_inference_steps", "num_steps"):
        value = getattr(args, name, None)
        if isinstance(value, int) and value < 1:
            raise LdmPipeError(f"--{name} is {value}", how_to_fix="Use a whole number from 1.")
    try:
        check_folder(args.output)
    except OutputError as error:
        raise LdmPipeError(error.what, error.where, "Choose another --output.") from error
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run: Callable[[argparse.Namespace, torch.device], None] = args.run
    run(args, device)


if __name__ == "__main__":
    run_script(main)
