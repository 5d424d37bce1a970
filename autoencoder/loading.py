"""Load an autoencoder of either kind: the folder's `config.json` says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from autoencoder.kl import AutoencoderKL
from autoencoder.vq import VQModel
from ldm_pipe.pretrained import read_json, resolve_folder

Autoencoder: TypeAlias = AutoencoderKL | VQModel


def load_autoencoder(folder: str | Path, *, subfolder: str | None = None, **options: Any) -> Autoencoder:
    """Load an `AutoencoderKL` or a `VQModel`, as `from_pretrained` of either does.

    Args:
        options: dtype, device, variant, local_files_only, revision.
    Raises: LdmPipeError if the folder holds another class, or as `from_pretrained` does.
    """
    patterns = [f"{subfolder}/*"] if subfolder else None
    sources = {name: options[name] for name in ("local_files_only", "revision") if name in options}
    root = resolve_folder(folder, allow_patterns=patterns, **sources)
    config = read_json((root / subfolder if subfolder else root) / "config.json")
    is_vq = isinstance(config, dict) and config.get("_class_name") == VQModel.class_name
    return (VQModel if is_vq else AutoencoderKL).from_pretrained(folder, subfolder=subfolder, **options)
