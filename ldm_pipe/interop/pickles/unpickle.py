"""The program that reads a pickle: tensors and plain values only, in a process of its own, without network.

    python unpickle.py SOURCE TARGET

What enters: a checkpoint of torch. What leaves: a safetensors file with all its tensors, numbered, and in its header
what stood where; or the reason, as one line of JSON. It imports nothing of ours, and torch once the network is cut.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from typing import Any, NoReturn

# Lightning writes the classes of its callbacks as keys; an empty stand-in takes their place, nothing is imported.
LIGHTNING = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # of Linux' unshare(2)
UNUSED = ("optimizer_states", "lr_schedulers", "callbacks", "loops")  # of Lightning; as large as the weights


class Nothing:
    """Stands in for classes that a checkpoint names but its tensors do not need."""


def cut_network() -> str:
    """Leave the network for good, by the kernel where it can, else by closing Python's sockets; returns which."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None) if sys.platform == "linux" else None
    if unshare is not None and (unshare(_NEW_NET) == 0 or unshare(_NEW_USER | _NEW_NET) == 0):
        return "kernel"

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError("no network here")

    socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse  # type: ignore[method-assign]
    return "python"


def flatten(value: Any, tensors: dict[str, Any]) -> Any:
    """Put tensors aside under numbers and return the rest as JSON: {"tensor": n}, {"dict": [[k, v]]}, {"list": []}."""
    import torch

    if isinstance(value, torch.Tensor):
        number = str(len(tensors))
        tensors[number] = value.detach()
        return {"tensor": number}
    if isinstance(value, dict):
        return {"dict": [[str(k), flatten(v, tensors)] for k, v in value.items() if k not in UNUSED]}
    if isinstance(value, (list, tuple)):
        return {"list": [flatten(v, tensors) for v in value]}
    return value if isinstance(value, (str, int, float, bool)) else None


def convert(source: str, target: str) -> None:
    """Read a pickle by torch's reader of tensors and plain values, and write what it holds."""
    import torch
    from safetensors.torch import save_file

    stand_ins: list[Any] = [(Nothing, name) for name in LIGHTNING]
    with torch.serialization.safe_globals(stand_ins):
        try:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(source, map_location="cpu", weights_only=True)  # of before torch 1.6
    tensors: dict[str, Any] = {}
    structure = json.dumps(flatten(content, tensors))
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        if whole.data_ptr() in seen or whole.untyped_storage().nbytes() != whole.nbytes:
            whole = whole.clone()  # safetensors takes no shared memory
        seen.add(whole.data_ptr())
        tensors[name] = whole
    save_file(tensors, target, {"format": "pt", "structure": structure})


def main() -> int:
    """Convert one file; on failure print [name of the error, its text]."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    cut_network()
    try:
        convert(*sys.argv[1:])
    except Exception as error:  # noqa: BLE001  (damaged files make the reader raise almost anything)
        sys.stdout.write(json.dumps([type(error).__name__, str(error)[:4000]]) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
