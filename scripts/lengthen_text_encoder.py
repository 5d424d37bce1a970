"""Copy a trained CLIP text encoder into one that reads more tokens, without training it.

diffusers' LDMTextToImagePipeline, the one that draws from prompts with a `VQModel`, pads every prompt to 77 tokens. A
diffusion model on VQ latents that shall be exported has to be trained with a text encoder of that length:

    python scripts/lengthen_text_encoder.py --text_encoder runs/emoji/clip --output runs/emoji/clip-77

What enters: a folder with `text_encoder/` and `tokenizer/`. What leaves: another such folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conditioning import CLIPTextEncoder
from conditioning.lengthen import lengthened
from conditioning.text import tokenizer_of
from ldm_pipe.training.run.config import run_script


def main(argv: list[str]) -> None:
    """Lengthen one text encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_encoder", required=True, help="folder holding text_encoder/ and tokenizer/")
    parser.add_argument("--length", type=int, default=77, help="tokens per prompt (default 77)")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    args = parser.parse_args(argv)
    encoder = lengthened(CLIPTextEncoder.from_pretrained(args.text_encoder), args.length)
    encoder.save_pretrained(args.output / "text_encoder")
    tokenizer_of(encoder).save_pretrained(args.output / "tokenizer")  # type: ignore[union-attr]
    print(f"{args.output}: reads {encoder.max_length} tokens")


if __name__ == "__main__":
    run_script(main)
