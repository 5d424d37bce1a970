"""LoRA files (Hu et al. 2021, arXiv:2106.09685) of diffusers, PEFT and kohya: read, merged into networks, written.

What enters: a file, and the networks that it changes. What leaves: networks whose weights are

    W = W0 + sum_i scale_i (alpha_i / r_i) B_i A_i

and a file that diffusers reads. Names are looked up among the modules of the networks, never guessed from the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.interop.checkpoint import load_checkpoint
from ldm_pipe.interop.ldm_names import rename, unet_modules
from ldm_pipe.pretrained import LdmPipeError, save_tensors
from ldm_pipe.unet import UNet

_KEY = re.compile(
    r"(?P<module>.+?)(?P<glue>\.|_)(?P<role>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up"
    r"|lora_linear_layer\.down|lora_linear_layer\.up)(\.default)?\.weight"
)
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # of text encoders, diffusers 0.14
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


@dataclass(frozen=True)
class LoraLayer:
    """A change of one module's weight: `down` (r, I, ...) and `up` (O, r, ...), scaled by alpha / r."""

    down: Tensor
    up: Tensor
    alpha: float

    def delta(self) -> Tensor:
        """Return the change of the weight, float32, in the weight's shape."""
        down, up = self.down.float(), self.up.float()
        change = (up.flatten(1) @ down.flatten(1)) * (self.alpha / down.shape[0])
        return change.reshape(up.shape[0], *down.shape[1:])


Layers = dict[tuple[str, str], LoraLayer]  # (network, module) -> its change


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the networks of a pipeline by the names that LoRA files give them."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return {"unet": pipe.unet, **dict(zip(names, pipe.text_encoders, strict=False))}


def _modules(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


class _Names:
    """Looks up what a file calls the modules of some networks."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        """Write down every name of every module, in kohya's spelling too."""
        self.modules = {part: _modules(net) for part, net in networks.items()}
        self.flat = {part: {name.replace(".", "_"): name for name in modules} for part, modules in self.modules.items()}
        unet = networks.get("unet")
        if isinstance(unet, UNet):  # kohya trains SDXL under the original names
            original = rename((f"{name}.weight" for name in self.modules["unet"]), unet_modules(unet.spec))
            for ours, theirs in original.items():
                flat = theirs.removesuffix(".weight").replace(".", "_")
                self.flat["unet"].setdefault(flat, ours.removesuffix(".weight"))

    def find(self, text: str) -> tuple[str, str] | None:
        """Return (network, module), or None."""
        for prefix, part in _KOHYA.items():
            if text.startswith(prefix):
                name = self.flat.get(part, {}).get(text.removeprefix(prefix))
                return (part, name) if name else None
        part, _, name = text.partition(".")
        if part not in self.modules:
            part, name = "unet", text
        name = name.replace(".processor", "")
        end = name.rpartition(".")
        spellings = [name, f"text_model.{name}", f"{name}.0", f"{end[0]}.{_OLD.get(end[2], end[2])}"]
        return next(((part, s) for s in spellings if s in self.modules.get(part, {})), None)


def read_lora(path: str | Path, networks: Mapping[str, nn.Module]) -> Layers:
    """Read a LoRA file for given networks.

    Raises: LdmPipeError naming modules that the networks do not have, shapes that do not fit, halves that are missing,
        and kinds of adapters that are not LoRA.
    """
    where, tensors = str(path), load_checkpoint(path)
    foreign = [name for name in tensors if re.search(r"hada_|lokr_|oft_|dora_scale|magnitude_vector|lora_mid", name)]
    if foreign:
        raise LdmPipeError(f"not plain LoRA: {_some(foreign)}", where, "DoRA, LoHa, LoKr and OFT are not known.")
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is not None:
            role = "down" if match["role"].endswith(("A", "down")) else "up"
            halves.setdefault(match["module"], {})[role] = tensor
        elif name.endswith(".alpha") and tensor.numel() == 1:
            alphas[re.sub(r"(_lora|\.lora|\.lora_linear_layer)?(\.down\.weight)?$", "", name[:-6])] = float(tensor)
        else:
            unknown.append(name)
    if unknown:
        raise LdmPipeError(f"tensors of no LoRA: {_some(unknown)}", where, "This is another kind of file.")
    names, layers = _Names(networks), Layers()
    for text, parts in halves.items():
        found = names.find(text)
        if found is None:
            unknown.append(text)
            continue
        if set(parts) != {"down", "up"}:
            raise LdmPipeError(f"{text} has only one half", where, "Fetch the file anew.")
        layer = LoraLayer(parts["down"], parts["up"], alphas.pop(text, float(parts["down"].shape[0])))
        _check(layer, names.modules[found[0]][found[1]], text, where)
        layers[found] = layer
    if unknown:
        what = f"{len(unknown)} modules that this model does not have: {_some(unknown)}"
        raise LdmPipeError(what, where, "The LoRA was trained for another family of models.")
    if not layers:
        raise LdmPipeError("holds no LoRA", where, "Give a LoRA file.")
    return layers


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:10])


def _check(layer: LoraLayer, module: nn.Module, text: str, where: str) -> None:
    down, up, weight = layer.down, layer.up, module.weight
    assert isinstance(weight, Tensor)
    fits = down.shape[0] == up.shape[1] and up.flatten(1).shape[1] == down.shape[0]
    shape = (up.shape[0], *down.shape[1:])
    if not fits or torch.Size(shape).numel() != weight.numel() or shape[:2] != weight.shape[:2]:
        what = f"{text} is {list(up.shape)} by {list(down.shape)}, the weight {list(weight.shape)}"
        raise LdmPipeError(what, where, "The LoRA was trained for another model.")
    if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise LdmPipeError(f"NaN or infinity in {text}", where, "Fetch the file anew.")


class Loras:
    """The LoRAs of a pipeline: any number, each with its scale, merged into the weights or taken out again.

    The weights without them are kept beside, so that `unfuse` and `remove` give back their very bits.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        """Take the networks; `networks_of(pipe)` names those of a pipeline."""
        self.networks = dict(networks)
        self.scales: dict[str, float] = {}
        self.fused = True
        self._layers: dict[str, Layers] = {}
        self._plain: dict[tuple[str, str], Tensor] = {}

    def add(self, path: str | Path, name: str | None = None, scale: float = 1.0) -> str:
        """Load a file and merge it.

        Args:
            name: to speak of it later; None: that of the file.
        Returns: the name.
        Raises: LdmPipeError if the file does not fit, or the name is taken.
        """
        name = name or Path(path).stem
        if name in self._layers:
            raise LdmPipeError(f"there is a LoRA {name!r} already", str(path), "Give it another name.")
        self._layers[name] = read_lora(path, self.networks)
        self.scales[name] = float(scale)
        self._apply()
        return name

    def set_scales(self, **scales: float) -> None:
        """Change how strongly LoRAs act; 0 is not at all."""
        for name, scale in scales.items():
            self._known(name)
            self.scales[name] = float(scale)
        self._apply()

    def remove(self, name: str) -> None:
        """Take one out and forget it."""
        self._known(name)
        del self._layers[name], self.scales[name]
        self._apply()

    def fuse(self) -> None:
        """Merge what was taken out by `unfuse`."""
        self.fused = True
        self._apply()

    def unfuse(self) -> None:
        """Give the networks back their own weights; the LoRAs stay loaded."""
        self.fused = False
        self._apply()

    def _known(self, name: str) -> None:
        if name not in self._layers:
            raise LdmPipeError(f"there is no LoRA {name!r}", "Loras", f"Loaded are {sorted(self._layers)}.")

    @torch.no_grad()
    def _apply(self) -> None:
        """Write every touched weight anew, from its plain value."""
        wanted = {place for layers in self._layers.values() for place in layers}
        for part, module in wanted | set(self._plain):
            weight = self.networks[part].get_submodule(module).weight
            assert isinstance(weight, Tensor)
            plain = self._plain.setdefault((part, module), weight.detach().clone())
            active = [
                (self.scales[name], layers[part, module])
                for name, layers in self._layers.items()
                if self.fused and (part, module) in layers and self.scales[name] != 0.0
            ]
            if not active:
                weight.copy_(plain)
                continue
            total = plain.float()
            for scale, layer in active:
                total = total + scale * layer.delta().reshape(weight.shape).to(weight.device)
            weight.copy_(total)
        for place in set(self._plain) - wanted:
            del self._plain[place]


def save_lora(path: str | Path, layers: Layers) -> None:
    """Write layers as diffusers and PEFT read them, alpha / r multiplied into the second half: there alpha = r."""
    tensors = {}
    for (part, module), layer in layers.items():
        tensors[f"{part}.{module}.lora_A.weight"] = layer.down
        tensors[f"{part}.{module}.lora_B.weight"] = layer.up * (layer.alpha / layer.down.shape[0])
    save_tensors(path, tensors, {"format": "pt"})
