"""An original single file as a folder, for as long as it is read.

What enters: a file. What leaves: a temporary folder in diffusers' layout with the same numbers.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from ldm_pipe.interop.single.file import import_single_file
from ldm_pipe.pretrained import LdmPipeError


@contextlib.contextmanager
def as_folder(
    path: str | Path,
    *,
    ema: bool = False,
    prediction: str | None = None,
    like: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Iterator[Path]:
    """Give a folder of the file's name; arguments and errors are those of `import_single_file`."""
    source = Path(path).expanduser()
    if not source.is_file():
        what = "is a folder" if source.is_dir() else "no such file"
        fix = "Load folders and models of the hub with from_pretrained." if source.is_dir() else "Check the path."
        raise LdmPipeError(what, str(source), fix)
    with tempfile.TemporaryDirectory(prefix="ldm-pipe-") as place:
        target = Path(place) / (source.stem or "model")
        report = import_single_file(source, target, ema=ema, prediction=prediction, like=like, tokenizer=tokenizer)
        for note in report.notes:
            warnings.warn(f"{source.name}: {note}", stacklevel=4)
        yield target
