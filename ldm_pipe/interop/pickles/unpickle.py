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
import struct
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

    def __init__(self, *_: Any) -> None:
        """Take whatever comes."""

    def __setstate__(self, _: Any) -> None:
        """Keep nothing."""


class Parameters:
    """Stands in for torch's ParameterDict: the files of words of textual inversion's own code hold one."""

    def __setstate__(self, state: Any) -> None:
        """Keep the tensors."""
        own = state.get("_parameters") if isinstance(state, dict) else None
        self.tensors = dict(own) if isinstance(own, dict) else {}


class Kind:
    """Stands in for numpy's dtype: the letter and number that name it, and the order of its bytes."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        """Keep the name."""
        self.name, self.order = str(name), "<"

    def __setstate__(self, state: Any) -> None:
        """Keep the order."""
        self.order = ">" if isinstance(state, tuple) and state[1:2] == (">",) else "<"


def number(kind: Any, raw: Any = b"") -> int | float | bool | None:
    """Stand in for numpy's maker of single numbers (a loss, a step count); of other kinds there is nothing."""
    letter = _NUMBERS.get(kind.name) if isinstance(kind, Kind) else None
    if letter is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(letter):
        return None
    return struct.unpack(kind.order + letter, raw)[0]


_NUMBERS = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H",
    "u1": "B", "b1": "?",
}  # fmt: skip
# What lies beside the weights in many files; numpy moved its modules in version 2.
STAND_INS: list[Any] = [(Nothing, name) for name in LIGHTNING]
STAND_INS += [
    (Parameters, "torch.nn.modules.container.ParameterDict"),
    (Kind, "numpy.dtype"),
    (Nothing, "numpy.ndarray"),
]
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    STAND_INS += [(number, f"{_module}.scalar"), (Nothing, f"{_module}._reconstruct")]


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
    if isinstance(value, Parameters):
        value = value.tensors
    if isinstance(value, dict):
        return {"dict": [[str(k), flatten(v, tensors)] for k, v in value.items() if k not in UNUSED]}
    if isinstance(value, (list, tuple)):
        return {"list": [flatten(v, tensors) for v in value]}
    return value if isinstance(value, (str, int, float, bool)) else None


def convert(source: str, target: str) -> None:
    """Read a pickle by torch's reader of tensors and plain values, and write what it holds."""
    import torch
    from safetensors.torch import save_file

    with torch.serialization.safe_globals(STAND_INS):
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
