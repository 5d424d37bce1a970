"""Words of a command line as they may be written down: tokens, keys and passwords are left out.

Enters: the words. Leaves: the same with `***` where a secret stood. This file imports nothing but the standard library.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping

HIDDEN = "***"
_NAMES = r"(?:token|secret|passw(?:or)?d|passwd|pwd|(?:api|access|private|wandb|secret)[-_]?key|auth|credentials?)"
_OPTION = re.compile(rf"-{{1,2}}(?:[\w.-]*[-_.])?{_NAMES}(?:[-_]?\d+)?", re.IGNORECASE)
_WORD_OPTION = re.compile(r"(?:placeholder|initializer|instance|class|pad|eos|bos|unk|mask)[-_]token$", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"((?:^|[^\w])(?:[\w.-]*[-_.])?{_NAMES}[\"']?\s*[=:]\s*[\"']?)(?!//)[^\s&;,\"']+", re.IGNORECASE
)
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_QUERY = re.compile(
    r"([?&;#](?:[\w.-]*(?:token|key|secret|password|passwd|pwd|sig|signature|auth|credential))=)[^&\s#]+", re.IGNORECASE
)
_SHAPES = re.compile(
    r"\bhf_\w{6,}|\bapi_org_\w{6,}|\bgh[pousr]_\w{10,}|\bgithub_pat_\w{10,}|\bglpat-[\w-]{10,}|\bsk-[\w-]{10,}"
    r"|\bAKIA[0-9A-Z]{12,}|\bxox[abprs]-[\w-]{8,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|\b(?i:bearer) +[\w.~+/-]{8,}=*"
)
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY", re.IGNORECASE)


def masked(words: Iterable[str], environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the words of a command without the secrets in them.

    Hidden are the value of an option with the name of a secret (`--hub_token X`, `--token=X`), user and password in an
    address, secret parts of its query, words of the known forms of tokens (`hf_...`), and what a variable of the
    environment with the name of a secret holds.
    """
    environ = os.environ if environ is None else environ
    known = {value for name, value in environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= 8}
    shown, secret_follows = [], False
    for word in words:
        if secret_follows and not word.startswith("--"):
            shown.append(HIDDEN)
            secret_follows = False
            continue
        name, equals, _ = word.partition("=")
        secret_follows = False
        if _OPTION.fullmatch(name) and not _WORD_OPTION.search(name):  # a word of a prompt is no secret
            secret_follows = not equals
            shown.append(name + (equals and f"={HIDDEN}"))
        else:
            shown.append(masked_text(word, known))
    return shown


def masked_text(text: str, known: Iterable[str] = ()) -> str:
    """Take secrets out of one text.

    Args:
        known: secrets to be taken out wherever they stand.
    """
    for secret in known:
        text = text.replace(secret, HIDDEN)
    text = _SHAPES.sub(HIDDEN, text)
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", text)


def masked_command(command: str) -> str:
    """Take secrets out of a command that is one text, as earlier versions noted it."""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        return masked_text(command)
    return shlex.join(masked(words))
