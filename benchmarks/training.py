"""Compare fine-tuning with diffusers' training examples: time of a step and peak memory, in one run.

    python benchmarks/training.py --output runs/benchmarks/training.json
    python benchmarks/training.py --shape sd15 --method lora --batch 1 --steps 3 --repeats 1 --latents 32
    python benchmarks/training.py --shape sd15 --method full --batch 1 --steps 2 --latents 32 --optimizer adafactor

With AdamW the last one needs 7 GB more, two numbers for each of 860 million weights.

Both sides train the same model on the same pictures with the same settings, each in processes of its own, one after the
other in changing order. The CPU time of one thread is what counts: on a shared machine the wall time tells nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import SIDES, Row, compare, machine, markdown

# what is compared: (words, ours on cached inputs, theirs on cached inputs, what the ratio of times should be)
PAIRS = {
    "tiny": (("as users start both", True, False, 1 / 1.2), ("encoding in every step", False, False, 1.0),
             ("both on cached inputs", True, True, 1.0)),
    "sd15": (("both on cached inputs", True, True, 1.0),),
}  # fmt: skip


def main() -> None:
    """Measure every combination that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(PAIRS), default="tiny")
    parser.add_argument("--method", choices=("full", "lora"), nargs="+", default=["full", "lora"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--latents", type=int, default=64, help="side of the latents of the sd15 shape")
    parser.add_argument("--optimizer", choices=("adamw", "adafactor"), default="adamw", help="of both sides")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    shared = ["--shape", args.shape, "--batch", str(args.batch), "--steps", str(args.steps)]
    shared += ["--threads", str(args.threads), "--latents", str(args.latents)]
    shared += ["--optimizer", args.optimizer, *["--gradient-checkpointing"] * args.gradient_checkpointing]
    rows = []
    for method in args.method:
        for words, ours, theirs, aim in PAIRS[args.shape]:
            caches = {"ours": ours, "diffusers": theirs}
            commands = {
                side: [
                    sys.executable, "-m", "benchmarks.finetune_steps", "--side", side, *shared, "--method", method,
                    "--cache" if caches[side] else "--no-cache",
                ]
                for side in SIDES
            }  # fmt: skip
            found = compare(commands, args.repeats, threads=args.threads)
            name = f"{args.shape}, {method}, {words}"
            times = {side: tuple(usage.report["cpu_s"] for usage in found[side]) for side in SIDES}
            peaks = {side: tuple(usage.peak_mib for usage in found[side]) for side in SIDES}
            rows.append(Row(f"{name}: a step", "s CPU", times["ours"], times["diffusers"], aim))
            rows.append(Row(f"{name}: peak memory", "MiB", peaks["ours"], peaks["diffusers"], 1.0))
    print(markdown(rows))
    if args.output:
        lines = [{"name": r.name, "ours": r.ours, "diffusers": r.diffusers, "ratio": r.ratio} for r in rows]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": " ".join(sys.argv), "machine": machine(), "rows": lines}
        args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
