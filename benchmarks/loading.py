"""Compare loading with diffusers' from_pretrained: a full-size Stable Diffusion 1.5 folder of random weights.

    python benchmarks/loading.py [--only load,first] [--dtypes float16,float32] [--repeats N] [--output FILE]

load   from_pretrained in a fresh process: its own time, that of the process with its imports, and peak memory
first  a fresh process to the end of the first step: the start that a user waits for

The folder (float16 files, 2 GB) is written by this benchmark into a temporary folder and deleted; --model takes another
one. The first run of each side only fills the disk cache and writes byte code. One thread; on a CPU, time is CPU time,
because it does not count what else the machine does; wall time stands beside it, as reading files is waiting too.
`ours` also looks at every number for NaN and infinity while it loads; diffusers does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.against_diffusers import row
from benchmarks.measure import SIDES, Row, compare, machine, markdown, run, write_results

PARTS = ("load", "first")
PROMPT = "red apple"
SIDE = 64  # pixels of the picture whose first step is waited for: the start counts, not the step


def write_model(root: Path) -> None:
    """Write a folder of the shape of Stable Diffusion 1.5: float16, numbers of a deviation of 0.02."""
    import torch

    from autoencoder import AutoencoderKL
    from conditioning import CLIPTextEncoder
    from ldm_pipe.interop.single.clip_vocabulary import clip_tokenizer, tokenizer_folder
    from ldm_pipe.interop.single.families import FAMILIES
    from ldm_pipe.networks import UNet
    from ldm_pipe.pretrained import atomic_write, save_tensors

    family = FAMILIES["sd1"]
    text = family.texts[0]
    generator = torch.Generator().manual_seed(0)
    parts: tuple[tuple[str, Any, Any, dict[str, Any]], ...] = (
        ("unet", UNet, family.unet, {"_class_name": "UNet2DConditionModel"}),
        ("vae", AutoencoderKL, family.vae, {"_class_name": "AutoencoderKL"}),
        ("text_encoder", CLIPTextEncoder, text.config, {}),
    )
    for part, cls, config, head in parts:
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in cls.from_config(config).state_dict().items()}
        tensors = {name: (torch.randn(s, generator=generator) * 0.02).half() for name, s in shapes.items()}
        save_tensors(root / part / f"{cls.weights_name}.safetensors", tensors)
        atomic_write(root / part / "config.json", json.dumps({**head, **config}))
    clip_tokenizer(tokenizer_folder(None, None), text.pad_token).save_pretrained(root / "tokenizer")
    scheduler = {**family.scheduler, "prediction_type": "epsilon"}
    atomic_write(root / "scheduler" / "scheduler_config.json", json.dumps(scheduler))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.38.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", family.scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    atomic_write(root / "model_index.json", json.dumps(index))


def measure_side(args: argparse.Namespace) -> None:
    """Load with one side in this process; print what from_pretrained cost, or end after the first step."""
    import torch

    if args.side == "ours":
        from ldm_pipe import LatentDiffusionPipeline as Pipeline
    else:
        from diffusers import StableDiffusionPipeline as Pipeline  # type: ignore[no-redef]
    cpu, wall = time.process_time(), time.perf_counter()
    pipe: Any = Pipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    report = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    if args.device != "cpu":
        pipe.to(args.device)
    if args.first_step:
        pipe.set_progress_bar_config(disable=True)

        def leave(*_: Any) -> dict[str, Any]:
            sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()
            os._exit(0)  # what the step ended with is what was waited for

        pipe(PROMPT, height=SIDE, width=SIDE, num_inference_steps=2, callback_on_step_end=leave)
    sys.stdout.write(json.dumps(report) + "\n")


def commands(args: argparse.Namespace, dtype: str, *more: str) -> dict[str, list[str]]:
    """Return the command of each side."""
    shared = ["--model", str(args.model), "--dtype", dtype, "--device", args.device, *more]
    return {side: [sys.executable, "-m", "benchmarks.loading", "--side", side, *shared] for side in SIDES}


def load(args: argparse.Namespace) -> list[Row]:
    """Compare from_pretrained."""
    rows = []
    for dtype in args.dtypes.split(","):
        both = commands(args, dtype)
        for command in both.values():
            run(command, threads=args.threads)
        found = compare(both, args.repeats, threads=args.threads)
        rows += [
            row(found, f"load, {dtype}: from_pretrained, CPU time", "s", "report.cpu_s", aim=1.0),
            row(found, f"load, {dtype}: from_pretrained, wall time", "s", "report.wall_s"),
            row(found, f"load, {dtype}: process with imports, CPU time", "s", "cpu_s", aim=1.0),
            row(found, f"load, {dtype}: process with imports, wall time", "s", "wall_s"),
            row(found, f"load, {dtype}: peak memory", "MiB", "peak_mib", aim=1.0),
        ]
    return rows


def first(args: argparse.Namespace) -> list[Row]:
    """Compare the way from nothing to the end of the first step, in the last of the dtypes."""
    dtype = args.dtypes.split(",")[-1]
    found = compare(commands(args, dtype, "--first-step"), args.repeats, threads=args.threads)
    name = f"cold start to first step, {dtype}, {SIDE}x{SIDE}"
    return [
        row(found, f"{name}: CPU time", "s", "cpu_s", aim=0.5),
        row(found, f"{name}: wall time", "s", "wall_s"),
        row(found, f"{name}: peak memory", "MiB", "peak_mib", aim=1.0),
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; default one made for this run")
    parser.add_argument("--only", default=",".join(PARTS), help="some of load,first")
    parser.add_argument("--dtypes", default="float16,float32", help="of the weights in memory")
    parser.add_argument("--repeats", type=int, default=4, help="pairs of runs (default 4, two in each order)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="JSON file for all numbers, versions and hardware")
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process; used by the benchmark itself")
    parser.add_argument("--dtype", default="float16", help="with --side")
    parser.add_argument("--first-step", action="store_true", help="with --side: end after the first step")
    args = parser.parse_args(argv)
    if not set(args.only.split(",")) <= set(PARTS) or args.repeats < 1:
        parser.error(f"--only takes some of {','.join(PARTS)}; --repeats at least 1")
    if args.side and args.model is None:
        parser.error("--side needs --model")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparisons, print the table, write the JSON."""
    args = parse(argv)
    if args.side:
        measure_side(args)
        return 0
    facts = machine()
    facts["command"] = shlex.join([Path(sys.executable).name, *(sys.argv if argv is None else ["-m", __name__, *argv])])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="ldm-pipe-") as folder:
        if args.model is None:
            args.model = Path(folder) / "sd15"
            # in a process of its own: whoever measures must stay small
            run([sys.executable, "-c", f"from benchmarks.loading import *; write_model(Path({str(args.model)!r}))"])
        for part in args.only.split(","):
            sys.stderr.write(f"{part}\n")
            rows += {"load": load, "first": first}[part](args)
    facts["load_average_after"] = machine()["load_average"]
    print(markdown(rows))
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    print(f"\n- `{facts['command']}`, commit {(facts['commit'] or 'unknown')[:10]}, {facts['date']}")
    print(f"- {facts['processor']}, {facts['cores']} cores, {args.threads} thread, device {args.device}")
    print(
        f"- {args.repeats} pairs; load average {facts['load_average']:g} before, {facts['load_average_after']:g} after"
    )
    print(f"- {versions}")
    if args.output:
        write_results(args.output, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
