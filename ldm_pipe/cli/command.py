"""The command `ldm-pipe`: words in, exit code out.

The options are in commands/options.py.
Exit codes: 0 done, 2 wrong input, 3 something missing on this machine, 4 a fault in the run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from ldm_pipe.cli.options import build_parser, dashed
from ldm_pipe.masking import masked_text
from ldm_pipe.printable import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without arguments, run that of the process and end it."""
    _ready_streams()
    code = _run(argv)
    if argv is None:
        _leave(code)
    return code


def _ready_streams() -> None:
    """Make sure that words can be printed: to a closed stream they go nowhere, to an ASCII one escaped."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this; files opened later must not take its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _leave(code: int) -> NoReturn:
    """End the process at once: to take an interpreter with torch apart costs 0.3 s and 60 MB more."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(dashed(sys.argv[1:] if argv is None else argv))
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    shown, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        return _complain("interrupted", "", "Finished pictures are whole.", 130)
    except BrokenPipeError:
        return 0
    except ModuleNotFoundError as error:
        return _fault(args, error, f"the module {error.name} is not installed", "pip install 'ldm-pipe[all]'", 3)
    except Exception as error:  # noqa: BLE001  the border: every error becomes three lines and an exit code
        if hasattr(error, "how_to_fix"):
            return _fault(args, error, error.what, error.how_to_fix, 2, error.where)  # type: ignore[attr-defined]
        what = f"{type(error).__name__}: {error}"
        return _fault(args, error, what, "This is a fault of ldm-pipe: run again with --debug and report it.", 4)
    finally:
        warnings.formatwarning = shown


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Print a warning as users read it, without the line of code it came from."""
    return f"warning: {printable(masked_text(str(message)), lines=True)}\n"


def _fault(args: argparse.Namespace, error: BaseException, what: str, fix: str, code: int, where: str = "") -> int:
    if getattr(args, "debug", False):
        traceback.print_exception(error)
    return _complain(what, where, fix, code)


def _complain(what: str, where: str, fix: str, code: int) -> int:
    """Print what went wrong, where, and what to do."""
    for label, text in (("error", what), ("where", where), ("do", fix)):
        if text:
            shown = printable(masked_text(str(text)), lines=True).replace("\n", "\n       ")
            sys.stderr.write(f"{label + ':':7}{shown}\n")
    return code
