"""Write single files and LoRA files for A1111 and ComfyUI, and prove them: what was written is read again.

What enters: a model, or a LoRA. What leaves: one file whose tensors mean the same, or an error and no file.
"""

from __future__ import annotations

from pathlib import Path

import torch

from autoencoder import AutoencoderKL
from conditioning import CLIPTextEncoder
from ldm_pipe.interop.folders.folder import find_folder, load_parts
from ldm_pipe.interop.folders.index import folders_of
from ldm_pipe.interop.lora.file import WEIGHT_NAME, read_lora, save_lora
from ldm_pipe.interop.lora.forms import tensors_of
from ldm_pipe.interop.single.families import of_folder
from ldm_pipe.interop.single.file import export_single_file, split
from ldm_pipe.networks import UNet
from ldm_pipe.pretrained import LdmPipeError, load_folder_tensors, load_tensors

_REPORT = "This is a fault of ldm-pipe: please report it."


def export_checked_file(
    source: str | Path | None, target: str | Path, *, dtype: torch.dtype, variant: str | None = None
) -> tuple[str, ...]:
    """Write a model as one original file; every tensor of every part is read back and compared bit by bit.

    Args:
        source: as for `LatentDiffusionPipeline.from_pretrained`.
        dtype: of the weights in the file.
    Returns: what readers have to be told, in whole sentences.
    Raises: LdmPipeError with the reason, if a single file cannot hold the model; then there is no file.
    """
    root, target = find_folder(source, variant=variant), Path(target)
    notes = export_single_file(root, target, dtype=dtype, variant=variant)
    try:
        family = of_folder(root)
        found, _ = split(load_tensors(target), family, str(target))
        parts = {"unet": UNet, "vae": AutoencoderKL, **{text.folder: CLIPTextEncoder for text in family.texts}}
        for part, cls in parts.items():
            wanted = cls.rename_keys(load_folder_tensors(root / part, cls.weights_name, variant, dtype=dtype))
            wrong = [name for name, x in wanted.items() if not torch.equal(x, found[part][name])]
            if wrong:
                raise LdmPipeError(f"{part} comes back with other numbers in {wrong[:10]}", str(target), _REPORT)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return notes


def export_checked_lora(source: str | Path, target: str | Path, *, model: str | Path | None = None) -> tuple[str, ...]:
    """Write a LoRA of any layout in kohya's, which A1111 and ComfyUI read; its numbers are read back and compared.

    Args:
        source: a LoRA file, or the folder of a run with diffusers' name for one.
        model: that the LoRA was trained on, for the names; None is the shipped one.
    Raises: LdmPipeError if the LoRA is of another model, or the file cannot be written; then there is no file.
    """
    source, target = Path(source), Path(target)
    if target.exists() or target.suffix != ".safetensors":
        raise LdmPipeError("exists already, or is no .safetensors", str(target), "Name a new .safetensors file.")
    parts = load_parts(find_folder(model))
    networks: dict[str, torch.nn.Module] = {"unet": parts.unet}
    networks |= dict(zip(folders_of(parts), parts.text_encoders, strict=True))
    layers = read_lora(source / WEIGHT_NAME if source.is_dir() else source, networks)
    save_lora(target, layers, layout="kohya", networks=networks)
    again = read_lora(target, networks)
    same = layers.keys() == again.keys() and all(
        layer.alpha == again[place].alpha and all(map(torch.equal, tensors_of(layer), tensors_of(again[place])))
        for place, layer in layers.items()
    )
    if not same:
        target.unlink()
        raise LdmPipeError("the LoRA comes back with other numbers", str(target), _REPORT)
    return ()
