"""Arguments of the evaluations that draw pictures.

What enters: a parser. What leaves: the same with more kinds. This file measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Run = Callable[..., None]


def add_drawing_kinds(kinds: Any, retrieval: Run, sheet_of: Run, likeness: Run) -> list[argparse.ArgumentParser]:
    """Add the evaluations that draw what captions ask for to a parser's kinds; what runs each is given."""
    retrieve = kinds.add_parser("retrieval", help="how often the nearest drawing is of the right concept")
    style = kinds.add_parser("style", help="retrieval among the flat drawings, and how flat the pictures look")
    style.add_argument("--classifier", default="runs/emoji/style", help="folder; fitted there if it is not there yet")
    sheet = kinds.add_parser("sheet", help="one labelled sheet of uncurated pictures")
    like = kinds.add_parser("likeness", help="nearness to training drawings (memorisation), and sharpness")
    like.add_argument("--num_prompts", type=int, default=100, help="captions, chosen by hash (default 100)")
    like.add_argument("--image_tower", help="folder of the network for the perceptual distance")
    like.set_defaults(run=likeness)
    retrieve.set_defaults(run=retrieval, classifier=None)
    style.set_defaults(run=retrieval)
    sheet.set_defaults(run=sheet_of)
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
