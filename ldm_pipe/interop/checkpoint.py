"""Read a checkpoint of other software: safetensors, or a pickle of tensors that may name nothing to run.

What enters: a path. What leaves: {name: tensor}, as they are in the file, on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError, load_tensors

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Lightning writes the classes of its callbacks as keys; an empty stand-in takes their place, nothing is imported.
_LIGHTNING = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)


class _Nothing:
    """Stands in for classes that a checkpoint names but its tensors do not need."""


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` file; `state_dict` inside is opened.

    Raises: LdmPipeError if the file is missing, damaged, wants to run code, or holds no tensors.
    """
    path = Path(path)
    if path.suffix not in PICKLES:
        return load_tensors(path)
    if not path.is_file():
        raise LdmPipeError("the file does not exist", str(path))
    content = unpickle(path)
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise LdmPipeError(f"holds a {type(content).__name__}, no named tensors", str(path), "This is no checkpoint.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise LdmPipeError("holds no tensors", str(path), "This is no checkpoint.")
    return tensors


def unpickle(path: Path) -> Any:
    """Read a pickle of tensors and plain values; classes that it names are refused, not imported."""
    stand_ins: list[Any] = [(_Nothing, name) for name in _LIGHTNING]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (damaged files make the reader raise almost anything)
        reason = str(error).replace("WeightsUnpickler error: ", "").split("\n")
        if type(error).__name__ != "UnpicklingError":
            raise LdmPipeError(f"not a whole checkpoint ({reason[0][:200]})", str(path), "Fetch it anew.") from None
        named = next((line for line in reason if "GLOBAL" in line or "nsupported" in line), reason[0])[:200]
        fix = "Only tensors are read from pickles. Find the model as safetensors."
        raise LdmPipeError(f"the pickle wants more than tensors ({named.strip()})", str(path), fix) from None


def emas(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix of `model.` as Lightning's EMA has them: its names are ours without dots.

    Raises: LdmPipeError if one has no EMA.
    """
    found = {}
    for name in tensors:
        if name.startswith(prefix):
            ema = "model_ema." + name.removeprefix("model.").replace(".", "")
            if ema not in tensors:
                raise LdmPipeError(f"{name} has no EMA", "single file", "Take the plain weights: leave out `ema`.")
            found[name] = tensors[ema]
    return found
