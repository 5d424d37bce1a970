"""The commands about training pictures: data check."""

from __future__ import annotations

import argparse
import json
import sys

TITLES = ("bad", "duplicates", "uncaptioned", "tiny", "odd", "skipped")


def run_check(args: argparse.Namespace) -> int:
    """Report what is wrong with a folder of pictures; the exit code is 2 if anything is."""
    from ldm_pipe.data.check import check_folder

    report = check_folder(
        args.folder,
        args.split,
        image_column=args.image_column,
        caption_column=args.caption_column,
        min_side=args.min_side,
    )
    if args.json:
        facts = {
            "rows": report.num_rows,
            "good": report.num_good,
            **{title: getattr(report, title) for title in TITLES},
            "converted": dict(report.odd_modes),
            "captions_per_picture": dict(report.num_captions),
            "sizes": {f"{width}x{height}": count for (width, height), count in report.sizes.items()},
        }
        sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(f"{report}\n")
    return 0 if report.ok else 2
