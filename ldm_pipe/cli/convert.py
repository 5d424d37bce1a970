"""The command `convert`: single files and ADM checkpoints to folders, folders to single files or out of pickles."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm_pipe.pretrained import LdmPipeError


def run_convert(args: argparse.Namespace) -> int:
    """Convert in the direction that the source tells: a file becomes a folder, a folder a file."""
    source = Path(args.source)
    if not source.exists():
        raise LdmPipeError("no such file or folder", str(source), "Give a checkpoint file or a model folder.")
    if not source.is_dir():
        notes = _to_folder(args, source)
    elif Path(args.target).suffix == ".safetensors":
        notes = _to_file(args, source)
    else:
        notes = _without_pickles(args, source)
    for note in notes:
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"{args.target}\n")
    return 0


def _without_pickles(args: argparse.Namespace, source: Path) -> tuple[str, ...]:
    """Turn `.bin` parts into safetensors: the one thing that a folder can become a folder for."""
    from ldm_pipe.interop.pickles.convert import convert_folder, has_pickles

    given = ("ema", "prediction", "like", "tokenizer", "head_width", "num_heads", "qkv_order", "dtype", "variant")
    _refuse(args, given, "for files")
    if not has_pickles(source):
        fix = "Name a .safetensors file to write one; `ldm-pipe export` copies a model in another dtype."
        raise LdmPipeError("the folder holds no .bin weights to convert", str(source), fix)
    return convert_folder(source, args.target)


def _to_file(args: argparse.Namespace, source: Path) -> tuple[str, ...]:
    import torch

    from ldm_pipe.interop.single.file import export_single_file

    _refuse(args, ("ema", "prediction", "like", "tokenizer", "head_width", "num_heads", "qkv_order"), "to a folder")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return export_single_file(source, args.target, dtype=dtype, variant=args.variant)


def _to_folder(args: argparse.Namespace, source: Path) -> tuple[str, ...]:
    from ldm_pipe.interop.pickles.checkpoint import load_checkpoint

    _refuse(args, ("dtype", "variant"), "to a single file")
    tensors = load_checkpoint(source)
    adm = ("head_width", "num_heads", "qkv_order")
    single = ("ema", "prediction", "like", "tokenizer")
    from ldm_pipe.interop.single.adm import Heads, import_adm, is_adm

    if is_adm(tensors):
        _refuse(args, single, "for single files")
        heads = None
        if args.head_width or args.num_heads:
            order = args.qkv_order or "per_head"
            heads = Heads(width=args.head_width, count=args.num_heads, order=order)
        return import_adm(source, args.target, heads=heads, tensors=tensors)
    from ldm_pipe.interop.single.file import import_single_file

    _refuse(args, adm, "for ADM checkpoints")
    report = import_single_file(
        source,
        args.target,
        ema=args.ema,
        prediction=args.prediction,
        like=args.like,
        tokenizer=args.tokenizer,
        tensors=tensors,
    )
    return report.notes


def _refuse(args: argparse.Namespace, names: tuple[str, ...], use: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if given:
        raise LdmPipeError(f"{', '.join(given)} have no effect here", "convert", f"They are {use}.")
