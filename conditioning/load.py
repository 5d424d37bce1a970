"""A text encoder folder -> the encoder of its kind.

What enters: a folder. What leaves: one of our text encoders. Kinds are told by the config; nothing in a folder can name
code to run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conditioning.clip import CLIPTextEncoder
from conditioning.label import LabelEncoder
from conditioning.openclip import THEIR_CONFIG, OpenCLIPTextEncoder
from conditioning.t5 import CLASSES, T5TextEncoder
from conditioning.transformer import TransformerTextEncoder
from ldm_pipe.pretrained import LdmPipeError, read_json

AnyTextEncoder = CLIPTextEncoder | OpenCLIPTextEncoder | T5TextEncoder | TransformerTextEncoder | LabelEncoder


def load_text_encoder(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> AnyTextEncoder:
    """Load a component folder, or the `text_encoder` of a larger one, with whichever encoder wrote it.

    Raises: LdmPipeError for a kind that is not known, and as the encoders do.
    """
    root = Path(folder)
    if not (root / "config.json").is_file() and (root / "text_encoder").is_dir():
        root = root / "text_encoder"
    common: dict[str, Any] = {"dtype": dtype, "device": device, "variant": variant}
    if (root / THEIR_CONFIG).is_file():
        return OpenCLIPTextEncoder.from_pretrained(root, **common)
    config = read_json(root / "config.json")
    kind = config.get("model_type") or config.get("_class_name")
    match kind:
        case "clip_text_model":
            return CLIPTextEncoder.from_pretrained(root, **common)
        case "ldmbert":
            return TransformerTextEncoder.from_pretrained(root, **common)
        case OpenCLIPTextEncoder.class_name:
            return OpenCLIPTextEncoder.from_pretrained(root, **common)
        case LabelEncoder.class_name:
            return LabelEncoder.from_pretrained(root, **common)
        case _ if kind in CLASSES:
            return T5TextEncoder.from_pretrained(root, **common)
    known = ["clip_text_model", "ldmbert", OpenCLIPTextEncoder.class_name, LabelEncoder.class_name, *CLASSES]
    raise LdmPipeError(f"the text encoder is a {kind!r:.80}", str(root), f"Known: {', '.join(known)}.")
