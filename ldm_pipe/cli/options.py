"""The commands and options of `ldm-pipe`.

Only options live here; each command imports what it needs when it runs, so that `ldm-pipe --help` does not import
torch.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ldm_pipe.sampler_table import SAMPLERS

EXAMPLES = """examples:
  ldm-pipe generate "red apple" --seed 7 -n 4 -o out.png --grid
  ldm-pipe generate --prompts prompts.txt --out pictures/
  ldm-pipe img2img "green apple" --image out.png --strength 0.6 -o green.png
  ldm-pipe inpaint "a worm" --image out.png --mask-image mask.png -o worm.png
  ldm-pipe interpolate "red apple" "smiling face" --seed 7 --num-frames 24 -o film.gif
  ldm-pipe invert out.png "red apple" --to "green apple" --variations 3 -o strip.png
  ldm-pipe info out.png
  ldm-pipe export runs/emoji/diffusion exported/
  ldm-pipe convert v1-5-pruned.safetensors sd15/
"""

# Known here too, so that help costs no import of torch; a test keeps them equal to `Spacing`.
SPACINGS = ("leading", "trailing", "linspace", "lcm", "karras", "exponential", "polynomial", "log_snr", "beta")


class _Parser(argparse.ArgumentParser):
    """A parser that tells wrong options in three lines, as every other error is told."""

    def error(self, message: str) -> NoReturn:
        meant = _meant(message, self)
        advice = f"Did you mean {meant}? " if meant else ""
        self.exit(
            2, f"error: {message}\nwhere: {self.prog}\ndo:    {advice}`{self.prog} --help` lists what there is.\n"
        )


def _words_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return all flags and commands of a parser and of those below it."""
    words = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words |= set(action.choices).union(*(_words_of(one) for one in action.choices.values()))
    return words


def _meant(message: str, parser: argparse.ArgumentParser) -> str | None:
    """Guess which flag or command a mistyped one was meant to be."""
    typed = (
        re.findall(r"--[\w-]+", message) if "unrecognized" in message else re.findall(r"choice: '([\w-]+)'", message)
    )
    found = difflib.get_close_matches(typed[0], sorted(_words_of(parser)), 1) if typed else []
    return found[0] if found else None


def dashed(argv: Sequence[str]) -> list[str]:
    """Write flags with dashes that were typed with underscores, as Python and diffusers' examples have them."""
    words, end = list(argv), list(argv).index("--") if "--" in argv else len(argv)
    for i, word in enumerate(words[:end]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            words[i] = flag.replace("_", "-") + equals + value
    return words


def _count(text: str) -> int:
    """Read a whole number from 1, before torch is imported."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no whole number from 1")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Describe all commands and options."""
    parser = _Parser(
        prog="ldm-pipe",
        description="Draw pictures from prompts with latent diffusion models, and look after the models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ldm-pipe {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_draw(commands.add_parser("generate", help="draw pictures from a prompt"), "generate")
    _add_draw(commands.add_parser("img2img", help="change a picture by a prompt"), "img2img")
    _add_draw(commands.add_parser("inpaint", help="paint into the white part of a mask"), "inpaint")
    _add_other(commands.add_parser("draw", help="draw with a model of any kind: without words, by class, enlarging"))
    _add_interpolate(commands.add_parser("interpolate", help="draw the way between prompts, seeds or pictures"))
    _add_invert(commands.add_parser("invert", help="find the noise of a picture and draw with it"))
    _add_export(commands.add_parser("export", help="turn a model or a training run into a diffusers folder"))
    _add_convert(commands.add_parser("convert", help="original single files and ADM checkpoints to folders, and back"))
    _add_info(commands.add_parser("info", help="show the settings inside a picture, or what a model is"))
    _add_data(commands.add_parser("data", help="look after training pictures"))
    _add_plan(commands.add_parser("plan", help="say what a training run will cost before it is started"))
    return parser


def _version() -> str:
    from ldm_pipe import __version__

    return __version__


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="folder, training run or hub id; without it the model that ships with ldm-pipe")
    group.add_argument("--variant", help='weights variant, such as "fp16"')
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--local-files-only", action="store_true", help="never ask the network")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps; without it a GPU if there is one")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights; default float32")
    more: dict[str, Any] = {"action": "append", "default": [], "metavar": "FILE[:SCALE]"}
    group.add_argument("--lora", help="LoRA, DoRA, LoHa or LoKr file; may be given several times", **more)
    more["metavar"] = "FILE[:WORD]"
    group.add_argument("--textual-inversion", "--textual_inversion", help="file of a word to use in prompts", **more)


def _add_draw(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the options of a drawing command, spelled like the arguments of the pipeline."""
    _add_common(parser)
    parser.add_argument("prompt", nargs="*", help="what to draw; several prompts draw several pictures")
    if kind == "generate":
        parser.add_argument(
            "--prompts", metavar="FILE", help=".txt with a prompt per line, or .csv/.jsonl with `prompt`"
        )
    else:
        parser.add_argument("--image", required=True, help="the picture to start from")
        parser.add_argument("--strength", type=float, help="how far to leave it, above 0 and up to 1")
    if kind == "inpaint":
        parser.add_argument("--mask-image", required=True, help="white is painted anew, black is kept exactly")
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", "--out", help="a .png, or a folder ending in /; default: named after the prompt")
    out.add_argument("-n", "--num-images-per-prompt", type=int, default=1, metavar="N")
    out.add_argument("--grid", action="store_true", help="write one sheet of all pictures")
    out.add_argument("--overwrite", action="store_true", help="replace existing files")
    out.add_argument("--batch-size", type=int, default=8, help="most pictures drawn at once (default 8)")
    how = _add_how(parser)
    how.add_argument("--seed", type=int, help="picture i is drawn from seed + i")
    how.add_argument("--deterministic-batch", action="store_true", help="draw one by one: the same bits in any batch")
    _add_model(parser)
    _add_stages(parser, kind)
    parser.set_defaults(run=_run_draw, kind=kind)


def _add_other(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("prompt", nargs="?", help="what to draw, for models that read words")
    parser.add_argument("--class-labels", type=int, nargs="+", metavar="NUMBER", help="for models that draw by class")
    parser.add_argument("--image", help="the small picture, for models that enlarge; the one to change or vary")
    parser.add_argument("--mask-image", help="white is painted anew, for DeepFloyd IF")
    parser.add_argument("--original-image", help="the large picture that --image is of, for IF's stage II")
    parser.add_argument(
        "--strength", type=float, help="how far to leave the picture, above 0 and up to 1, for the same"
    )
    parser.add_argument("--noise-level", type=int, help="how little of the small picture to trust")
    parser.add_argument("-o", "--output", "--out", help="a .png, or a folder ending in /")
    parser.add_argument("-n", "--num-pictures", type=int, default=1, metavar="N", help="of each class, or at all")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--batch-size", type=int, default=8, help="most pictures drawn at once (default 8)")
    _add_how(parser).add_argument("--seed", type=int, help="picture i is drawn from seed + i")
    stages = parser.add_argument_group("of unCLIP, which has three stages")
    for name in ("prior", "decoder", "super-res"):
        stages.add_argument(f"--{name}-num-inference-steps", type=int)
    for name in ("prior", "decoder"):
        stages.add_argument(f"--{name}-guidance-scale", type=float)
    _add_model(parser)
    parser.set_defaults(run=_run_other)


def _add_how(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that all drawing has, spelled like the arguments of the pipeline."""
    how = parser.add_argument_group("drawing (defaults come from the model)")
    how.add_argument("--negative-prompt", help="what not to draw")
    how.add_argument("--num-inference-steps", "--steps", type=_count, dest="num_inference_steps")
    how.add_argument(
        "--guidance-scale", "--cfg", "--cfg-scale", type=float, help="1 is none; more follows the prompt more closely"
    )
    how.add_argument("--guidance-rescale", type=float, help="0 to 1, against overexposure")
    how.add_argument("--height", type=int)
    how.add_argument("--width", type=int)
    how.add_argument("--sampler", help=", ".join(SAMPLERS))
    how.add_argument(
        "--sampler-option", action="append", metavar="NAME=VALUE", help="of the sampler itself, such as order=3"
    )
    how.add_argument("--spacing", help=f'{", ".join(SPACINGS)}, or sections like "ddim25" and "10,15,20"')
    how.add_argument("--eta", type=float, help="noise of ddim: 0 none, 1 as much as ddpm")
    how.add_argument("--thresholding", help="none, static or dynamic")
    how.add_argument("--thresholding-space", help="latent or pixel")
    how.add_argument("--thresholding-percentile", type=float)
    how.add_argument("--thresholding-max-value", type=float)
    how.add_argument("--thresholding-cap", type=float, help="largest value that dynamic thresholding scales down")
    how.add_argument("--prompt-syntax", help="plain (default) or weighted: (red:1.3), AND, [from:to:when], BREAK")
    how.add_argument("--clip-skip", type=int, help="layers of the text encoder to leave out at its end")
    return how


def _add_stages(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add what only some models read."""
    group = parser.add_argument_group("of models that read more than a prompt")
    group.add_argument("--spatial", metavar="FILE", help="a map of the picture's size, for models trained with maps")
    group.add_argument("--class-labels", metavar="CLASS", help="a class by name, for models trained with classes")
    group.add_argument("--depth-map", metavar="FILE", help="a grey picture, white is near, for depth models")
    group.add_argument("--prompt-2", help="for the second text encoder, as SDXL has one")
    group.add_argument("--negative-prompt-2", help="what not to draw, for the second text encoder")
    for name, meaning in (("original", "what SDXL is told the picture had"), ("target", "and what it is to have")):
        group.add_argument(f"--{name}-size", type=int, nargs=2, metavar=("H", "W"), help=meaning)
    group.add_argument("--crops-coords-top-left", type=int, nargs=2, metavar=("TOP", "LEFT"), help="of the crop")
    if kind == "inpaint":
        return
    group.add_argument("--refiner", metavar="MODEL", help="a second model that takes the last steps, as SDXL's refiner")
    group.add_argument("--refiner-start", type=float, default=0.8, help="share of the way that it begins at (0.8)")


def _add_interpolate(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("prompt", nargs="*", help="what to draw at each point of the way; one is kept all along")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="go between the noises of pictures")
    parser.add_argument("--num-frames", "--frames", type=int, dest="num_frames", default=9, help="both ends counted")
    out = _add_film(parser)
    out.add_argument("--batch-size", type=int, default=8, help="most pictures drawn at once (default 8)")
    how = _add_how(parser)
    how.add_argument("--seed", type=int, nargs="+", help="one for the whole way, or one for each point of it")
    _add_model(parser)
    parser.set_defaults(run=_run_interpolate)


def _add_invert(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("image", help="the picture")
    parser.add_argument("prompt", nargs="?", default="", help="what it shows; default nothing")
    parser.add_argument("--to", nargs="+", default=[], metavar="PROMPT", help="draw these from the same noise")
    parser.add_argument(
        "--variations", type=int, default=0, metavar="N", help="draw N relatives, a part of the noise fresh"
    )
    parser.add_argument(
        "--strength", type=float, default=0.3, help="of the variations: 0 the picture, 1 all fresh noise"
    )
    parser.add_argument(
        "--num-refinements", type=int, default=1, help="evaluations more per step, for a truer way back"
    )
    _add_film(parser)
    how = _add_how(parser)
    how.add_argument("--seed", type=int, default=0, help="variation i takes its fresh noise from seed + i (default 0)")
    _add_model(parser)
    parser.set_defaults(run=_run_invert)


def _add_film(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", "--out", help="a .png for a strip, a .gif for a film, or a folder ending in /")
    out.add_argument("--columns", type=int, default=10, help="pictures beside each other in a strip (default 10)")
    out.add_argument("--fps", type=float, default=8.0, help="pictures per second of a film (default 8)")
    out.add_argument("--overwrite", action="store_true", help="replace existing files")
    return out


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("source", help="model folder, training run or hub id; for --format lora a LoRA file or run")
    parser.add_argument("target", help="folder to write, or .safetensors file")
    parser.add_argument(
        "--format",
        choices=("diffusers", "single_file", "lora"),
        default="diffusers",
        help="a diffusers folder, one file for A1111 and ComfyUI, or a LoRA file for them",
    )
    parser.add_argument("--model", help="the model that the LoRA is of, for --format lora; default the shipped one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of all parts")
    parser.add_argument("--variant", help='name part of the weight files, such as "fp16"')
    parser.add_argument("--sampler", help="sampler the folder starts with; default the model's own")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--no-check", action="store_true", help="do not load it with diffusers and compare pictures")
    parser.set_defaults(run=_run_export)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("source", help="a .safetensors, .ckpt or .pt file, or a diffusers folder")
    parser.add_argument("target", help="the folder to write, or the .safetensors file")
    one = parser.add_argument_group("from a single file (Stable Diffusion 1, 2, XL)")
    one.add_argument("--ema", action="store_true", help="take the U-Net's moving averages, where the file has them")
    one.add_argument("--prediction", choices=("eps", "v"), help="what Stable Diffusion 2 files do not say")
    one.add_argument("--like", metavar="FOLDER", help="diffusers folder of the same architecture, for unknown shapes")
    one.add_argument("--tokenizer", metavar="FOLDER", help="CLIP's vocab.json and merges.txt; default open_clip's")
    adm = parser.add_argument_group("from an ADM checkpoint of no published shape")
    heads = adm.add_mutually_exclusive_group()
    heads.add_argument("--head-width", type=int, help="channels of every attention head")
    heads.add_argument("--num-heads", type=int, help="number of heads at every level")
    adm.add_argument("--qkv-order", choices=("per_head", "split"), help="split is use_new_attention_order")
    back = parser.add_argument_group("to a single file")
    back.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights; default theirs")
    back.add_argument("--variant", help='name part of the weight files, such as "fp16"')
    parser.set_defaults(run=_run_convert)


def _add_info(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("path", nargs="?", help="picture, model folder, training run or hub id; default: shipped model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run_info)


def _add_data(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = commands.add_parser("check", help="report bad, doubled, uncaptioned and odd pictures before training")
    _add_common(check)
    check.add_argument("folder", help="of pictures with captions, of parquet files or of tar shards; or one such file")
    check.add_argument("--split", default="train")
    check.add_argument("--image-column", default="image")
    check.add_argument("--caption-column", default="text")
    check.add_argument("--min-side", type=int, default=64, help="pictures with a shorter side are called tiny")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_run_data_check)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("config", help="the YAML file of an autoencoder's or a diffusion model's training")
    parser.add_argument("--no-measure", action="store_true", help="do not time a step")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run_plan)


def _run_draw(args: argparse.Namespace) -> int:
    from ldm_pipe.cli.draw import run

    return run(args)


def _run_other(args: argparse.Namespace) -> int:
    from ldm_pipe.cli.other import run

    return run(args)


def _run_interpolate(args: argparse.Namespace) -> int:
    from ldm_pipe.cli.edit import run_interpolate

    return run_interpolate(args)


def _run_invert(args: argparse.Namespace) -> int:
    from ldm_pipe.cli.edit import run_invert

    return run_invert(args)


def _run_export(args: argparse.Namespace) -> int:
    from ldm_pipe.cli.models import run_export

    return run_export(args)


def _run_convert(args: argparse.Namespace) -> int:
    from ldm_pipe.cli.convert import run_convert

    return run_convert(args)


def _run_info(args: argparse.Namespace) -> int:
    from ldm_pipe.cli.models import run_info

    return run_info(args)


def _run_plan(args: argparse.Namespace) -> int:
    from ldm_pipe.cli.plan import run_plan

    return run_plan(args)


def _run_data_check(args: argparse.Namespace) -> int:
    from ldm_pipe.cli.data import run_check

    return run_check(args)
