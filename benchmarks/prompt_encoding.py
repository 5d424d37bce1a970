"""What a prompt costs: CPU time to encode it, and the share of a step that keeping keys and values saves.

    python -m benchmarks.prompt_encoding [--model FOLDER] [--width 768 --layers 12] [--repeats 9] [--output FILE]

Prompt and negative prompt are encoded by us and by diffusers' `encode_prompt`, with the same random tower of the given
size and the tokenizer of the model, in one process and one thread, by turns. The U-Net of the model is evaluated with
the tokens' keys and values kept over the steps, computed anew, and by diffusers. It takes a minute of CPU.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, interleave, machine, markdown, write_results
from conditioning import CLIPTextEncoder, ClipTokenizer, encode_weighted
from ldm_pipe.interop.folders.folder import SHIPPED
from ldm_pipe.networks import UNet

PROMPTS = ("a red apple on a table", "blurry, dark")
Call = Callable[[], object]


def encoders(model: Path, width: int, layers: int) -> tuple[dict[str, Call], Call]:
    """Return both sides' encoding of a prompt and a negative prompt, and ours through the prompt grammar."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = ClipTokenizer.from_pretrained(model / "tokenizer")
    config = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "hidden_act": "quick_gelu", "eos_token_id": tokenizer.end_id,
        "max_position_embeddings": tokenizer.max_length or 77, "pad_token_id": tokenizer.pad_id,
    }  # fmt: skip
    encoder = CLIPTextEncoder(config, tokenizer).eval()
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        reference = CLIPTextModel.from_pretrained(folder).eval()
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(model / "vae")
    pipe: Any = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=reference, tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer"), unet=unet,
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    positive, negative = PROMPTS
    sides: dict[str, Call] = {
        "ours": lambda: encoder.encode([positive, negative]).tokens,
        "diffusers": lambda: torch.cat(pipe.encode_prompt(positive, "cpu", 1, True, negative)),
    }
    return sides, lambda: encode_weighted([encoder], [positive, negative], num_steps=30)


def steps(model: Path, size: int) -> tuple[dict[str, Call], Call]:
    """Return both sides' evaluation of the U-Net, and ours without anything kept."""
    import diffusers

    unet = UNet.from_pretrained(model / "unet")
    reference: Any = diffusers.UNet2DConditionModel.from_pretrained(model / "unet").eval()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, unet.config.in_channels, size, size, generator=draw)
    tokens, t = torch.randn(2, 77, unet.config.cross_attention_dim, generator=draw), torch.tensor(500.0)
    kept = unet.keep_tokens(tokens)
    unet(x, t, tokens=kept)
    sides: dict[str, Call] = {
        "ours": lambda: unet(x, t, tokens=kept),
        "diffusers": lambda: reference(x, t, encoder_hidden_states=tokens).sample,
    }
    return sides, lambda: unet(x, t, tokens=tokens)


def measure(name: str, sides: dict[str, Call], extra: Call, repeats: int) -> tuple[Row, float]:
    """Measure both sides by turns in milliseconds of CPU, and how the extra call compares with ours (median ratio)."""
    found: dict[str, list[float]] = {**{side: [] for side in sides}, "extra": []}
    for call in (*sides.values(), extra):
        call()
    for _, side in interleave(repeats):
        calls = {side: sides[side], **({"extra": extra} if side == "ours" else {})}
        for key, call in calls.items():
            began = time.process_time()
            call()
            found[key].append((time.process_time() - began) * 1e3)
    ratio = statistics.median(a / b for a, b in zip(found["extra"], found["ours"], strict=True))
    return Row(name, "ms", tuple(found["ours"]), tuple(found["diffusers"]), aim=1.0), ratio


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of a StableDiffusionPipeline")
    parser.add_argument("--width", type=int, default=768, help="of the text tower; 768 is Stable Diffusion 1's")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of calls")
    parser.add_argument("--output", type=Path, help="JSON file for all numbers, versions and hardware")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table, write the JSON."""
    args = parse(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    words = sys.argv[1:] if argv is None else argv
    facts = machine() | {"command": shlex.join(["python", "-m", "benchmarks.prompt_encoding", *words])}
    name = f"prompt and negative prompt, tower {args.width} x {args.layers}"
    encoding, parsed = measure(name, *encoders(args.model, args.width, args.layers), args.repeats)
    step, anew = measure(f"U-Net, latents {args.size} x {args.size}", *steps(args.model, args.size), args.repeats)
    print(markdown([encoding, step]))
    print(f"\nthrough the prompt grammar: {parsed:.3f} of the plain encoding")
    print(f"keys and values kept save {1 - 1 / anew:.1%} of a step")
    if args.output:
        write_results(args.output, (encoding, step), {**facts, "grammar_ratio": parsed, "kept_saves": 1 - 1 / anew})
    return 0


if __name__ == "__main__":
    sys.exit(main())
