"""The weights of one component folder: one safetensors file, a variant of it, or shards.

What enters: a folder. What leaves: its tensors, or one clear error. This file knows no networks and no hub.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_pipe.pretrained.files import LdmPipeError, check_links, load_tensors, read_json, safe_child


def load_folder_tensors(
    folder: Path,
    weights_name: str,
    variant: str | None = None,
    **target: Any,
) -> dict[str, Tensor]:
    """Read the weights of one component: one safetensors file, or shards with their index.

    A part that has no files of the variant, in a model of which another part has, is read without it, with a warning.

    Args:
        target: device, dtype, memory_format, finite and mapped, as for `load_tensors`.
    Raises: LdmPipeError if there is no such file, or more than one candidate; pickles are named but not read.
    """
    check_links(folder)
    found = _candidates(folder, weights_name, variant)
    if not found and variant and _model_has(folder.parent, variant):
        found = _candidates(folder, weights_name, None)
        if found:
            warnings.warn(f"{folder.name} has no variant {variant!r}: {found[0].name} is read", stacklevel=2)
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise LdmPipeError(f"there are {names}", str(folder), "Keep one of them: it is not said which one counts.")
    if not found:
        raise _no_weights(folder, weights_name, variant)
    if found[0].suffix == ".safetensors":
        return load_tensors(found[0], **target)
    return _load_shards(found[0], **target)


def _candidates(folder: Path, weights_name: str, variant: str | None) -> list[Path]:
    dot = f".{variant}" if variant else ""
    names = (
        f"{weights_name}{dot}.safetensors",
        f"{weights_name}.safetensors.index{dot}.json",
        f"{weights_name}{dot}.safetensors.index.json",
    )
    return [path for name in dict.fromkeys(names) if (path := safe_child(folder, name, str(folder))).is_file()]


def _model_has(root: Path, variant: str) -> bool:
    endings = (f".{variant}.safetensors", f".index.{variant}.json", f".{variant}.safetensors.index.json")
    return (root / "model_index.json").is_file() and any(path.name.endswith(endings) for path in root.glob("*/*"))


def _no_weights(folder: Path, weights_name: str, variant: str | None) -> LdmPipeError:
    """Say what is there instead, and what to do."""
    present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not present:
        return LdmPipeError("the folder is missing or empty", str(folder), "Fetch or export it anew.")
    pickles = [name for name in present if name.endswith(".bin")]
    pattern = rf"{re.escape(weights_name)}\.([^.]+)\.safetensors|.*\.safetensors\.index\.([^.]+)\.json"
    variants = sorted({m[1] or m[2] for name in present if (m := re.fullmatch(pattern, name))})
    fix = "Give a folder with safetensors weights, or another `variant`."
    if variants:
        fix = f"Name a variant: {', '.join(map(repr, variants))}."
    elif pickles:
        fix = (
            "Pickles can run code and are not read here: turn the model into safetensors once with `ldm-pipe convert "
            "FOLDER NEW_FOLDER`, or let the pipeline do it each time with use_safetensors=False."
        )
    dot = f".{variant}" if variant else ""
    return LdmPipeError(f"no {weights_name}{dot}.safetensors there, only {present}", str(folder), fix)


def _load_shards(index: Path, **target: Any) -> dict[str, Tensor]:
    """Read shards; each must hold exactly what the index says.

    Raises: LdmPipeError naming the first ten tensors that are missing or too many.
    """
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise LdmPipeError("its weight_map does not say which file holds which tensor", str(index), "Fetch it anew.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        shard = load_tensors(safe_child(index.parent, name, str(index)), **target)
        wrong = sorted(shard.keys() ^ {key for key, file in places.items() if file == name})
        if wrong:
            what = f"{name} and its index differ in {len(wrong)} tensors: {', '.join(wrong[:10])}"
            raise LdmPipeError(what, str(index), "Fetch all shards anew.")
        tensors |= shard
    return tensors
