"""Model folders with `.bin` weights: turned into the same folder with safetensors.

What enters: a folder. What leaves: another one, with the same numbers under the same names. Each pickle is opened by
the process of unpickle.py; the process that draws reads safetensors only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ldm_pipe.interop.pickles.checkpoint import load_checkpoint
from ldm_pipe.pretrained import LdmPipeError, atomic_write, check_links, read_json, safe_child, save_tensors

# diffusers' and transformers' names, with a variant or the number of a shard after them
_WEIGHTS = re.compile(
    r"(?P<name>diffusion_pytorch_model|pytorch_model|model)(?P<more>[.-].+)?\.bin(?P<index>\.index.*)?"
)
_COPIED = (".json", ".txt", ".md", ".model", ".safetensors")
NOT_READ = ("safety_checker", "feature_extractor", "image_encoder")  # of a folder that is only drawn with


def safe_name(name: str) -> str | None:
    """Return what a file of `.bin` weights, a shard or an index is called as safetensors; None for other files."""
    match = _WEIGHTS.fullmatch(name)
    if match is None or (match["index"] and not match["index"].endswith(".json")):
        return None
    stem = "model" if match["name"] == "pytorch_model" else match["name"]
    return f"{stem}{match['more'] or ''}.safetensors{match['index'] or ''}"


def convert_folder(source: str | Path, target: str | Path, *, leave_out: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Write a folder with safetensors in the place of `.bin` weights; what is safetensors already is kept.

    Args:
        leave_out: parts that are not taken over.
    Returns: what was left behind, in whole sentences.
    Raises: LdmPipeError if the target exists, nothing is to be converted, or a pickle is damaged or wants to run code;
        then nothing is left behind.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise LdmPipeError("exists already", str(target), "Give another folder.")
    check_links(source)
    files = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    files = [file for file in files if file.parts[0] not in leave_out]
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    notes = []
    try:
        for file in files:
            new = safe_name(file.name)
            place = staging / file
            if new is not None and not (source / file).with_name(new).is_file():
                _convert_file(source / file, safe_child(place.parent, new, str(file)))
            elif file.suffix in _COPIED and not _is_index_of_pickles(file.name):
                place.parent.mkdir(parents=True, exist_ok=True)
                _copy(source / file, place)
            elif new is None:
                notes.append(f"{file} was left behind: no part of a model.")
        os.chmod(staging, 0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return tuple(notes)


def _is_index_of_pickles(name: str) -> bool:
    return safe_name(name) is not None


def _convert_file(source: Path, target: Path) -> None:
    if source.suffix == ".json":
        index = read_json(source)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict):
            raise LdmPipeError("its weight_map does not say which file holds which tensor", str(source))
        renamed = {key: safe_name(str(name)) or str(name) for key, name in places.items()}
        atomic_write(target, json.dumps({**index, "weight_map": renamed}, indent=2) + "\n")
        return
    save_tensors(target, load_checkpoint(source))


def _copy(source: Path, target: Path) -> None:
    """Link a large file where the disk can, else copy it."""
    if source.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


@contextlib.contextmanager
def without_pickles(folder: Path) -> Iterator[Path]:
    """Give a folder of the same name with safetensors only, for as long as it is read."""
    with tempfile.TemporaryDirectory(prefix="ldm-pipe-") as place:
        target = Path(place) / (folder.resolve().name or "model")
        convert_folder(folder, target, leave_out=NOT_READ)
        yield target


def has_pickles(folder: Path) -> bool:
    """Tell whether parts of a model folder are `.bin` files."""
    return any(safe_name(path.name) for path in folder.glob("*/*.bin"))
