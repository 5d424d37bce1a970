"""Read a checkpoint of other software: safetensors, or a pickle of tensors that may name nothing to run.

What enters: a path. What leaves: {name: tensor}, as they are in the file, on the CPU. Pickles are opened by unpickle.py
in a process of its own, without network and without this one's environment; here only safetensors are read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError, load_tensors, read_metadata

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_UNPICKLE = Path(__file__).with_name("unpickle.py")
_PASSED_ON = ("PATH", "SYSTEMROOT", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # no tokens, no proxies


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` file; `state_dict` inside is opened.

    Raises: LdmPipeError if the file is missing, damaged, wants to run code, or holds no tensors.
    """
    path = Path(path)
    if path.suffix not in PICKLES:
        return load_tensors(path)
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
    """Read a pickle of tensors and plain values; classes that it names are refused, not imported.

    Raises: LdmPipeError if the file is missing, damaged or wants more than tensors.
    """
    if not path.is_file():
        raise LdmPipeError("the file does not exist", str(path))
    with tempfile.TemporaryDirectory(prefix="ldm-pipe-") as folder:
        target = Path(folder) / "tensors.safetensors"
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        env = {**passed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(_UNPICKLE), str(path.absolute()), str(target)]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise _refusal(path, done.stdout, done.stderr)
        tensors = load_tensors(target)
        return _restored(json.loads(read_metadata(target)["structure"]), tensors)


def _refusal(path: Path, answer: str, trace: str) -> LdmPipeError:
    """Turn the answer of the process into one error."""
    try:
        kind, text = json.loads(answer.strip().splitlines()[-1])
    except (IndexError, ValueError):
        reason = (trace.strip().splitlines() or ["it ended without a word"])[-1][:200]
        return LdmPipeError(
            f"the process that reads pickles failed ({reason})", str(path), "Is there room on the disk?"
        )
    reason = text.replace("WeightsUnpickler error: ", "").split("\n")
    if kind != "UnpicklingError":
        return LdmPipeError(f"not a whole checkpoint ({reason[0][:200]})", str(path), "Fetch it anew.")
    named = next((line for line in reason if "GLOBAL" in line or "nsupported" in line), reason[0])[:200]
    fix = "Only tensors are read from pickles. Find the model as safetensors."
    return LdmPipeError(f"the pickle wants more than tensors ({named.strip()})", str(path), fix)


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `unpickle.flatten`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: _restored(inner, tensors) for name, inner in content}
    return [_restored(inner, tensors) for inner in content]


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
