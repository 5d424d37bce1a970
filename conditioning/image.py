"""Pictures -> CLIP image embeddings -> Condition.

What enters: images in [-1, 1]. What leaves: a pooled vector, one token, or a token per patch. transformers is imported
when a network is built, not before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.condition import Condition
from ldm_pipe.pretrained import (
    FrozenConfig,
    LdmPipeError,
    atomic_write,
    check_sizes,
    check_tensors,
    load_folder_tensors,
    read_json,
    resolve_folder,
    save_tensors,
)

ImageSlot = Literal["pooled", "token", "patches"]
_SIZES = {"num_hidden_layers": 256, "hidden_size": 16384, "intermediate_size": 1 << 17, "num_attention_heads": 256}
_SIZES |= {"image_size": 4096, "patch_size": 4096, "projection_dim": 16384}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPImageEncoder(nn.Module):
    """CLIP's image tower with its projection (Radford et al. 2021, arXiv:2103.00020, sec. 2.4).

    Args:
        model: `CLIPVisionModelWithProjection` of transformers.
        slot: "pooled" (Karlo, unCLIP: Condition.pooled), "token" (image variations: one token), "patches" (the
            penultimate states, as IP-Adapter Plus reads them).
    """

    def __init__(self, model: nn.Module, slot: ImageSlot = "pooled") -> None:
        """Hold the network."""
        super().__init__()
        if slot not in get_args(ImageSlot):
            raise LdmPipeError(f"slot is {slot!r}", "CLIPImageEncoder", f"Known: {get_args(ImageSlot)}.")
        library: Any = model.config
        self.model, self.slot = model, slot
        self.config = FrozenConfig({**library.to_dict(), "slot": slot})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], slot: ImageSlot = "pooled") -> CLIPImageEncoder:
        """Build from fields of CLIPVisionConfig, with random weights."""
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        check_sizes(config, _SIZES, where="image encoder config", required=False)
        fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "slot")}
        return cls(CLIPVisionModelWithProjection(CLIPVisionConfig(**fields)).eval(), slot)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        subfolder: str | None = None,
        slot: ImageSlot | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> CLIPImageEncoder:
        """Load a folder of a CLIPVisionModelWithProjection strictly.

        Args:
            slot: None is the stored one, else "pooled".
        Raises: LdmPipeError naming what is missing, unexpected, misshapen or not finite.
        """
        root = resolve_folder(folder, local_files_only=local_files_only, revision=revision)
        root = root / subfolder if subfolder else root
        config = read_json(root / "config.json")
        if config.get("model_type") != "clip_vision_model":
            raise LdmPipeError(f"model_type is {config.get('model_type')!r}", str(root), "Give a clip_vision_model.")
        encoder = cls.from_config(config, slot or config.get("slot", "pooled"))
        names = encoder.model.state_dict()
        tensors = {
            _own_name(name, names): value
            for name, value in load_folder_tensors(root, "model", variant).items()
            if not name.endswith("embeddings.position_ids")
        }
        check_tensors(encoder.model, tensors, str(root))
        encoder.model.load_state_dict(tensors, strict=True)
        return encoder.to(device, dtype or torch.float32).eval()

    def save_pretrained(
        self, folder: str | Path, *, variant: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write `config.json` and the weights with the prefix `vision_model.`, which transformers 4 and 5 both read."""
        tensors = {
            name if name.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{name}":
            value.to(dtype) if dtype and value.is_floating_point() else value
            for name, value in self.model.state_dict().items()
        }  # fmt: skip
        config = {**self.config, "architectures": ["CLIPVisionModelWithProjection"], "dtype": "float32"}
        save_tensors(Path(folder) / f"model{f'.{variant}' if variant else ''}.safetensors", tensors)
        text = json.dumps(config, indent=2, sort_keys=True, default=str)
        atomic_write(Path(folder) / "config.json", text + "\n")

    def preprocess(self, image: Tensor) -> Tensor:
        """Resize the shorter side, crop the middle, normalise.

        Args:
            image: in [-1, 1], shape (B, 3, H, W).
        """
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise LdmPipeError(f"the image is {list(image.shape)}", "CLIPImageEncoder", "Give a tensor (B, 3, H, W).")
        side, (rows, columns) = self.config.image_size, image.shape[2:]
        scale = side / min(rows, columns)
        size = (max(side, int(rows * scale)), max(side, int(columns * scale)))
        unit = F.interpolate((image.float() + 1) / 2, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        mean, std = (torch.tensor(value, device=image.device).reshape(1, 3, 1, 1) for value in (MEAN, STD))
        return (unit[:, :, top : top + side, left : left + side] - mean) / std

    def encode(self, image: Tensor) -> Condition:
        """Encode images in [-1, 1], shape (B, 3, H, W)."""
        weight = next(self.parameters())
        pixels = self.preprocess(image).to(weight)
        output = self.model(pixels, output_hidden_states=self.slot == "patches")
        if self.slot == "patches":
            return Condition(tokens=output.hidden_states[-2])
        vectors = output.image_embeds  # (B, P)
        return Condition(pooled=vectors) if self.slot == "pooled" else Condition(tokens=vectors[:, None])

    def null(self, condition: Condition) -> Condition:
        """Return the condition of no picture: zeros, as image variations and unCLIP were trained with."""
        return Condition(**{name: torch.zeros_like(value) for name, value in condition.slots().items()})


def _own_name(name: str, names: Mapping[str, Tensor]) -> str:
    """Map the keys of transformers 4 (`vision_model.`) and 5 to those of the version installed."""
    if name in names:
        return name
    bare = name.removeprefix("vision_model.")
    return bare if bare in names else f"vision_model.{name}"
