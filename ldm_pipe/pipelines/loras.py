"""LoRAs merged into the weights of networks, and back to the bit: W = W0 + sum of changes.

What enters: networks and the tensors of LoRAs. What leaves: the same networks with other weights. Files are read
and written by interop/lora.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.interop.lora.file import Layers, read_lora
from ldm_pipe.interop.lora.forms import changed
from ldm_pipe.pretrained import LdmPipeError

Weight = float | Mapping[str, float]  # for all networks, or {"unet": 0.5, "text_encoder": 1.0}


@dataclass
class Adapter:
    """One LoRA: its layers, how strongly it acts on each network, and whether it acts at all."""

    layers: Layers
    weight: Weight = 1.0
    active: bool = True
    fused: float | None = None  # the further factor of `fuse`

    def scale(self, part: str) -> float:
        """Return the factor of its changes of one network."""
        if not self.active:
            return 0.0
        weight = self.weight if isinstance(self.weight, (int, float)) else self.weight.get(part, 1.0)
        return float(weight) * (1.0 if self.fused is None else self.fused)


@dataclass
class Loras:
    """The LoRAs of some networks: any number, each with its weight, merged into the weights of the modules.

        W = W0 + sum_i weight_i change_i(W0)

    in float32, rounded once to the dtype of W. The touched W0 are kept beside, on the CPU, so that taking LoRAs out
    again gives back their very bits.
    """

    networks: dict[str, nn.Module]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    enabled: bool = True
    _plain: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def add(self, source: str | Path | Mapping[str, Tensor], name: str, weight: Weight = 1.0) -> None:
        """Load a file (or its tensors) and merge it.

        Raises: LdmPipeError if it does not fit or the name is taken; then nothing has changed.
        """
        if not name or name in self.adapters:
            raise LdmPipeError(f"there is a LoRA {name!r} already", str(source)[:200], "Give it another name.")
        self._check_weight(name, weight)
        self.adapters[name] = Adapter(read_lora(source, self.networks), weight)
        self._apply()

    def set(self, weights: Mapping[str, Weight]) -> None:
        """Let these LoRAs act with these weights, and no others; fused ones stay as they are.

        Raises: LdmPipeError for an unknown or fused name, or a weight that is no number.
        """
        for name, weight in weights.items():
            if self._known(name).fused is not None:
                raise LdmPipeError(f"the LoRA {name!r} is fused", "set_adapters", "Call unfuse_lora() first.")
            self._check_weight(name, weight)
        for name, adapter in self.adapters.items():
            if adapter.fused is None:
                adapter.active = name in weights
                adapter.weight = weights.get(name, adapter.weight)
        self._apply()

    def enable(self, enabled: bool) -> None:
        """Let the LoRAs that are not fused act, or none of them."""
        self.enabled = enabled
        self._apply()

    def fuse(self, factor: float = 1.0, names: Sequence[str] | None = None) -> None:
        """Fix LoRAs (None: the active ones) at their weight times a factor, until `unfuse`."""
        if not math.isfinite(factor):
            raise LdmPipeError(f"lora_scale is {factor}", "fuse_lora", "Use a finite number.")
        chosen = [name for name, adapter in self.adapters.items() if adapter.active] if names is None else names
        found = [self._known(name) for name in chosen]
        if not found or not self.enabled:
            raise LdmPipeError("no LoRA is active", "fuse_lora", "Load one, or enable_lora().")
        for adapter in found:
            adapter.fused = factor if adapter.fused is None else adapter.fused
        self._apply()

    def unfuse(self) -> None:
        """Undo `fuse`: the LoRAs act with their own weights, which can be changed again."""
        for adapter in self.adapters.values():
            adapter.fused = None
        self._apply()

    def delete(self, names: Sequence[str]) -> None:
        """Take LoRAs out and forget them.

        Raises: LdmPipeError for an unknown or fused name; then nothing has changed.
        """
        if any(self._known(name).fused is not None for name in names):
            raise LdmPipeError(f"one of {list(names)} is fused", "delete_adapters", "Call unfuse_lora() first.")
        for name in names:
            del self.adapters[name]
        self._apply()

    def unload(self) -> None:
        """Forget all: those that are fused stay in the weights for good, as in diffusers, the others leave."""
        self.delete([name for name, adapter in self.adapters.items() if adapter.fused is None])
        self.adapters.clear()
        self._plain.clear()
        self.enabled = True

    def _known(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise LdmPipeError(f"there is no LoRA {name!r}", "LoRA", f"Loaded are {sorted(self.adapters)}.")
        return self.adapters[name]

    def _check_weight(self, name: str, weight: Any) -> None:
        numbers = weight.values() if isinstance(weight, Mapping) else [weight]
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            raise LdmPipeError(f"the weight of {name!r} is {weight!r:.80}", "LoRA", "Use a number, or one by network.")
        if isinstance(weight, Mapping) and not weight.keys() <= self.networks.keys():
            fix = f"Known are {sorted(self.networks)}; weights by block are not."
            raise LdmPipeError(f"weights of {sorted(weight)} for {name!r}", "LoRA", fix)

    @torch.no_grad()
    def _apply(self) -> None:
        """Write every touched weight anew, from its plain value."""
        wanted = {place for adapter in self.adapters.values() for place in adapter.layers}
        for part, module in sorted(wanted | set(self._plain)):
            weight = self.networks[part].get_submodule(module).weight
            assert isinstance(weight, Tensor)
            place = (part, module)
            if place not in self._plain:
                self._plain[place] = weight.detach().to("cpu", copy=True)
            plain = self._plain[place]
            active = [
                (adapter.scale(part), adapter.layers[place])
                for adapter in self.adapters.values()
                if place in adapter.layers and (self.enabled or adapter.fused is not None) and adapter.active
            ]
            if not active:
                weight.copy_(plain)
                continue
            first = plain.to(weight.device).float()
            total = first
            for scale, layer in active:
                total = total + changed(layer, first, scale)
            weight.copy_(total)
        for place in set(self._plain) - wanted:
            del self._plain[place]
