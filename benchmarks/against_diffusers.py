"""Compare with diffusers: same folder, same noise, same steps, in one run, both orders (A B, B A, ...).

    python benchmarks/against_diffusers.py [--model FOLDER] [--only cold,warm,train] [--repeats N] [--output FILE]

cold   one whole command, from nothing to a PNG: CPU time, wall time, peak memory
warm   pictures per second of a loaded pipeline, at batch 1 and 8, and peak memory
train  pictures per second of a training step on cached latents and embeddings, and peak memory

Every measurement has a process of its own with one thread; on a CPU, time is CPU time, because it does not count what
else the machine does. What counts is the ratio of two runs that followed each other.
"""

from __future__ import annotations

import argparse
import array
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import ROOT, SIDES, Row, Usage, compare, environment, machine, markdown, run, write_results

SHIPPED = ROOT / "ldm_pipe" / "assets" / "emoji"
PARTS = ("cold", "warm", "train")
PROMPT, SEED = "red apple", 7


def column(usages: Sequence[Usage], name: str) -> tuple[float, ...]:
    """Return one number of each process: a field of Usage, or of its report as `report.name`."""
    if name.startswith("report."):
        return tuple(float(usage.report[name[7:]]) for usage in usages)
    return tuple(float(getattr(usage, name)) for usage in usages)


def row(found: Mapping[str, Sequence[Usage]], name: str, unit: str, field: str, **aim: Any) -> Row:
    """Make a line of the table of one number of both sides."""
    return Row(name, unit, column(found["ours"], field), column(found["diffusers"], field), **aim)


def rates(found: Mapping[str, Sequence[Usage]], name: str, field: str, batch: int, aim: float | None) -> Row:
    """Make a line of pictures per second from seconds per batch."""
    ours, theirs = (tuple(batch / s for s in column(found[side], field)) for side in SIDES)
    return Row(name, "/s", ours, theirs, aim, "more")


def cold(args: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Compare whole commands; the first run of each only fills the disk cache and writes byte code."""
    script = shutil.which("ldm-pipe", path=str(Path(sys.executable).parent))
    program = [script] if script else [sys.executable, "-m", "ldm_pipe.cli"]
    pictures = {side: folder / f"cold-{side}.png" for side in SIDES}
    commands = {
        "ours": [
            *program, "generate", PROMPT, "--model", args.model, "--num-inference-steps", str(args.steps),
            "--guidance-scale", str(args.scale), "--seed", str(SEED), "--device", args.device, "--sampler", "ddim",
            "--overwrite", "-o", str(pictures["ours"]),
        ],
        "diffusers": [
            sys.executable, str(ROOT / "benchmarks" / "draw_with_diffusers.py"), args.model, PROMPT, str(args.steps),
            str(args.scale), str(SEED), args.device, str(pictures["diffusers"]),
        ],
    }  # fmt: skip
    for command in commands.values():
        run(command, threads=args.threads)
    found = compare(commands, args.repeats, threads=args.threads)
    rows = [
        row(found, "cold: command to PNG, CPU time", "s", "cpu_s", aim=0.5),
        row(found, "cold: command to PNG, wall time", "s", "wall_s"),
        row(found, "cold: command to PNG, peak memory", "MiB", "peak_mib", aim=0.6),
    ]
    levels = png_difference(*(path.read_bytes() for path in pictures.values()))
    return rows, {"cold: largest difference of the pictures, in levels of 255": levels}


def warm(args: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Compare loaded pipelines."""
    rows: list[Row] = []
    checks: dict[str, Any] = {}
    for batch, aim in ((1, 1.2), (8, None)):
        pictures = {side: folder / f"warm-{batch}-{side}.f32" for side in SIDES}
        shared = ["--model", args.model, "--device", args.device, "--batch", str(batch), "--steps", str(args.steps)]
        shared += ["--scale", str(args.scale), "--calls", str(args.calls if batch > 1 else 3 * args.calls)]
        commands = {
            side: [sys.executable, "-m", "benchmarks.draw_warm", "--side", side, *shared, "--pictures", str(path)]
            for side, path in pictures.items()
        }
        found = compare(commands, args.repeats, threads=args.threads)
        name = f"warm, batch {batch}"
        field = "report.cpu_s" if args.device == "cpu" else "report.wall_s"
        rows.append(rates(found, f"{name}: pictures per {'CPU ' * (args.device == 'cpu')}second", field, batch, aim))
        rows += memory(found, name)
        key = f"{name}: largest difference of the pictures, in [0, 1]"
        checks[key] = float_difference(*(path.read_bytes() for path in pictures.values()))
    return rows, checks


def train(args: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Compare training steps."""
    shared = ["--model", args.model, "--device", args.device, "--batch", str(args.train_batch)]
    shared += ["--steps", str(args.train_steps), "--threads", str(args.threads)]
    commands = {side: [sys.executable, "-m", "benchmarks.train_steps", "--side", side, *shared] for side in SIDES}
    found = compare(commands, args.repeats, threads=args.threads)
    name = f"train, batch {args.train_batch}"
    field = "report.cpu_s" if args.device == "cpu" else "report.wall_s"
    rows = [rates(found, f"{name}: pictures per {'CPU ' * (args.device == 'cpu')}second", field, args.train_batch, 1.0)]
    losses = {f"{name}: mean loss, {side}": column(found[side], "report.loss")[-1] for side in SIDES}
    return [*rows, *memory(found, name)], losses


def memory(found: Mapping[str, Sequence[Usage]], name: str) -> list[Row]:
    """Make the lines of peak memory, of the process and, where there is one, of the GPU."""
    rows = [row(found, f"{name}: peak memory", "MiB", "peak_mib", aim=1.0)]
    if all("device_mib" in usage.report for usages in found.values() for usage in usages):
        rows.append(row(found, f"{name}: peak memory of the GPU", "MiB", "report.device_mib", aim=1.0))
    return rows


def float_difference(a: bytes, b: bytes) -> float:
    """Return the largest difference of two files of float32."""
    one, two = array.array("f"), array.array("f")
    one.frombytes(a)
    two.frombytes(b)
    if len(one) != len(two):
        raise RuntimeError(f"the two sides drew {len(one)} and {len(two)} numbers")
    return max(abs(x - y) for x, y in zip(one, two, strict=True))


def png_difference(a: bytes, b: bytes) -> int:
    """Return the largest difference of the pixels of two PNG files, through Pillow in a process of its own."""
    code = (
        "import io, sys; from PIL import Image, ImageChops; n = int(sys.argv[1]); data = sys.stdin.buffer.read();"
        "pair = [Image.open(io.BytesIO(part)).convert('RGB') for part in (data[:n], data[n:])];"
        "assert pair[0].size == pair[1].size, [p.size for p in pair];"
        "print(max(high for _, high in ImageChops.difference(*pair).getextrema()))"
    )
    command = [sys.executable, "-c", code, str(len(a))]
    return int(subprocess.run(command, input=a + b, capture_output=True, check=True).stdout)


def has_gpu() -> bool:
    """Ask torch in a process of its own, so that this one stays small."""
    code = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(1))
    return done.stdout.strip() == "True"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options; what is left open comes from the model's own defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="model folder; default the shipped one")
    parser.add_argument("--only", default=",".join(PARTS), help="some of cold,warm,train")
    parser.add_argument("--repeats", type=int, default=4, help="pairs of runs (default 4, two in each order)")
    parser.add_argument("--output", type=Path, help="JSON file for all numbers, versions and hardware")
    parser.add_argument("--device", help="cpu or cuda; default a GPU if there is one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of DDIM; default the model's")
    parser.add_argument("--scale", type=float, help="of guidance; default the model's")
    parser.add_argument("--calls", type=int, default=2, help="timed calls per process at batch 8; thrice at batch 1")
    parser.add_argument("--train-batch", type=int, default=32)
    parser.add_argument("--train-steps", type=int, default=6, help="timed steps per process")
    args = parser.parse_args(argv)
    args.parts = args.only.split(",")
    if not set(args.parts) <= set(PARTS) or args.repeats < 1:
        parser.error(f"--only takes some of {','.join(PARTS)}; --repeats at least 1")
    model = Path(args.model).expanduser().resolve()
    if not (model / "model_index.json").is_file():
        parser.error(f"no model in {model}: give a model folder as --model")
    own = model / "ldm_pipe.json"
    defaults = json.loads(own.read_text(encoding="utf-8")).get("defaults", {}) if own.is_file() else {}
    args.model = str(model)
    args.steps = args.steps or defaults.get("num_inference_steps") or 50
    args.scale = defaults.get("guidance_scale") or 7.5 if args.scale is None else args.scale
    args.device = args.device or ("cuda" if has_gpu() else "cpu")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparisons, print the table, write the JSON."""
    args = parse(argv)
    facts = machine()
    weights = (Path(args.model) / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    facts["model"] = {
        "folder": args.model,
        "unet_mib": round(len(weights) / 2**20, 1),
        "unet_crc32": zlib.crc32(weights),
    }
    facts["settings"] = {name: getattr(args, name) for name in ("device", "threads", "steps", "scale", "repeats")}
    facts["command"] = shlex.join([Path(sys.executable).name, *(sys.argv if argv is None else ["-m", __name__, *argv])])
    del weights
    rows: list[Row] = []
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            print(part, file=sys.stderr)
            measured, checked = {"cold": cold, "warm": warm, "train": train}[part](args, Path(folder))
            rows += measured
            checks |= checked
    facts["load_average_after"] = machine()["load_average"]
    print(report(rows, checks, facts))
    if args.output:
        write_results(args.output, rows, {**facts, "checks": checks})
    return 0


def report(rows: Sequence[Row], checks: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Write table, checks and circumstances as Markdown."""
    settings = facts["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        markdown(rows),
        "",
        *(f"- {name}: {value:.2g}" for name, value in checks.items()),
        f"- `{facts['command']}`, commit {(facts['commit'] or 'unknown')[:10]}, {facts['date']}",
        f"- {facts['processor']}, {facts['cores']} cores, {settings['threads']} thread, device {settings['device']}",
        f"- DDIM, {settings['steps']} steps, guidance {settings['scale']:g}; {settings['repeats']} pairs",
        f"- load average {facts['load_average']:g} before and {facts['load_average_after']:g} after (1 is ours alone)",
        f"- {versions}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
