"""What a pipeline learns from small files: LoRAs merged into its weights, and new words, under diffusers' names.

What enters: files. What leaves: the same networks with other weights, and back to the bit. Reading and writing of files
is in interop/lora.py and interop/textual_inversion.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning import CLIPTextEncoder
from ldm_pipe.interop.lora.file import WEIGHT_NAME, Layers, networks_of, read_lora, save_lora
from ldm_pipe.interop.lora.forms import changed
from ldm_pipe.interop.lora.words import forget_words, load_word
from ldm_pipe.pretrained import LdmPipeError, resolve_folder, safe_child

Weight = float | Mapping[str, float]  # for all networks, or {"unet": 0.5, "text_encoder": 1.0}
WORD_NAME = "learned_embeds.safetensors"  # diffusers' name of a word in a folder


@dataclass
class _Adapter:
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
    adapters: dict[str, _Adapter] = field(default_factory=dict)
    enabled: bool = True
    _plain: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def add(self, source: str | Path | Mapping[str, Tensor], name: str, weight: Weight = 1.0) -> None:
        """Load a file (or its tensors) and merge it.

        Raises: LdmPipeError if it does not fit or the name is taken; then nothing has changed.
        """
        if not name or name in self.adapters:
            raise LdmPipeError(f"there is a LoRA {name!r} already", str(source)[:200], "Give it another name.")
        self._check_weight(name, weight)
        self.adapters[name] = _Adapter(read_lora(source, self.networks), weight)
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

    def _known(self, name: str) -> _Adapter:
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


class Adapters:
    """LoRAs and new words of a pipeline, by the names that diffusers' pipelines have for them."""

    text_encoders: tuple[Any, ...]
    _loras: Loras | None = None
    _words: dict[str, str] | None = None  # loaded, and their files

    @property
    def loras(self) -> Loras:
        """Return the LoRAs of the pipeline's networks."""
        if self._loras is None:
            self._loras = Loras(networks_of(self))
        return self._loras

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> None:
        """Load a LoRA, DoRA, LoHa or LoKr file of diffusers, PEFT, kohya or LyCORIS; it acts at once, with weight 1.

        Unlike in diffusers, it is merged into the weights (those without it are kept), so that drawing costs nothing
        more; and a file with anything that would be left unread is refused.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder or hub id with one, or its tensors.
            adapter_name: to speak of it later; None: `default_0`, `default_1`, ...
            weight_name: of the file in the folder; None: diffusers' name, or the only one there.
        Raises: LdmPipeError naming what does not fit; then nothing has changed.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping):
            options = {"subfolder": subfolder, "local_files_only": local_files_only, "revision": revision}
            source = _find(source, weight_name, WEIGHT_NAME, **options)
        self.loras.add(source, adapter_name or f"default_{len(self.loras.adapters)}")

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] | None = None
    ) -> None:
        """Let exactly these LoRAs act, with one weight for all, one for each, or 1; a weight may differ by network."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = adapter_weights if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        if len(given) != len(names) or len(set(names)) != len(names):
            raise LdmPipeError(
                f"{len(given)} weights for {names}", "set_adapters", "Give each name once, with a weight."
            )
        self.loras.set({name: 1.0 if w is None else w for name, w in zip(names, given, strict=True)})

    def get_active_adapters(self) -> list[str]:
        """Return the names of the LoRAs that act, or would if they were not disabled."""
        return [name for name, adapter in self.loras.adapters.items() if adapter.active]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of the LoRAs of each network."""
        found: dict[str, list[str]] = {}
        for name, adapter in self.loras.adapters.items():
            for part in dict.fromkeys(part for part, _ in adapter.layers):
                found.setdefault(part, []).append(name)
        return found

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take LoRAs out and forget them."""
        self.loras.delete([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def disable_lora(self) -> None:
        """Give the networks back their own weights, to the bit; the LoRAs stay loaded."""
        self.loras.enable(False)

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self.loras.enable(True)

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Fix the active LoRAs at their weights times `lora_scale`; `unload_lora_weights` then leaves them in.

        Before and after, with a scale of 1, the weights are the same to the bit: the LoRAs are merged all the time.
        """
        self.loras.fuse(lora_scale, adapter_names)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the LoRAs act with their own weights again."""
        self.loras.unfuse()

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs: the networks have their own weights again, to the bit, and those of fused LoRAs."""
        self.loras.unload()

    def save_lora_weights(
        self, save_directory: str | Path, adapter_name: str | None = None, *, weight_name: str = WEIGHT_NAME
    ) -> None:
        """Write one of the loaded LoRAs as diffusers and PEFT read it.

        Args:
            adapter_name: which; None: the only one.
        Raises: LdmPipeError if it is unknown, or a form that diffusers does not read.
        """
        loaded = self.loras.adapters
        if adapter_name is None and len(loaded) == 1:
            (adapter_name,) = loaded
        if adapter_name not in loaded:
            what = f"there is no LoRA {adapter_name!r}"
            raise LdmPipeError(what, "save_lora_weights", f"Name one of {sorted(loaded)}.")
        target = safe_child(Path(save_directory), weight_name, "weight_name")
        save_lora(target, loaded[adapter_name].layers)

    def adapter_settings(self) -> dict[str, str]:
        """Return what a picture's settings say of LoRAs that act and of words, as `ldm-pipe generate` takes them."""
        loras = self.loras.adapters.items() if self._loras is not None and self._loras.enabled else ()
        told = {
            "Lora": "; ".join(f"{name}:{_weight(adapter)}" for name, adapter in loras if adapter.active),
            "Textual inversion": "; ".join(f"{path}:{word}" for word, path in (self._words or {}).items()),
        }
        return {name: text for name, text in told.items() if text}

    # New words

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | Path | Sequence[str | Path],
        token: str | Sequence[str] | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> None:
        """Teach all text encoders words from files of diffusers or A1111, one word per file.

        Args:
            pretrained_model_name_or_path: a file, a folder or hub id with one, or a list of them.
            token: as written in prompts, one for each file; None takes the file's.
            weight_name: of the file in the folder; None: diffusers' name, or the only one there.
        Raises: LdmPipeError if a word is taken or of another family.
        """
        one = isinstance(pretrained_model_name_or_path, (str, Path))
        paths = [pretrained_model_name_or_path] if one else list(pretrained_model_name_or_path)  # type: ignore[arg-type]
        tokens = [token] * len(paths) if token is None or isinstance(token, str) else list(token)
        if len(tokens) != len(paths) or (isinstance(token, str) and len(paths) > 1):
            what = f"{len(paths)} files and {len(tokens) if not isinstance(token, str) else 1} tokens"
            raise LdmPipeError(what, "load_textual_inversion", "Give one token for each file, or none.")
        options = {"subfolder": subfolder, "local_files_only": local_files_only, "revision": revision}
        for path, name in zip(paths, tokens, strict=True):
            file = _find(path, weight_name, WORD_NAME, **options)  # type: ignore[arg-type]
            word = load_word(self._word_encoders(), file, name)
            self._words = {**(self._words or {}), word: str(path)}

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forget words that were loaded; None: all. The tables are what they were, to the bit."""
        names = [tokens] if isinstance(tokens, str) else None if tokens is None else list(tokens)
        for encoder in self._word_encoders():
            forget_words(encoder, names)
        kept = (self._words or {}).items()
        self._words = {} if names is None else {word: path for word, path in kept if word not in names}

    def _word_encoders(self) -> list[CLIPTextEncoder]:
        encoders = [encoder for encoder in self.text_encoders if isinstance(encoder, CLIPTextEncoder)]
        if len(encoders) != len(self.text_encoders) or not encoders:
            kinds = [type(encoder).__name__ for encoder in self.text_encoders]
            raise LdmPipeError(
                f"the text encoders are {kinds}", "textual inversion", "Only CLIP's learn words from files."
            )
        return encoders


def _weight(adapter: _Adapter) -> str:
    """Write a weight as one number, or by network."""
    factor = 1.0 if adapter.fused is None else adapter.fused
    if isinstance(adapter.weight, Mapping):
        return "/".join(f"{part}={weight * factor:g}" for part, weight in adapter.weight.items())
    return f"{adapter.weight * factor:g}"


def _find(
    name: str | Path,
    weight_name: str | None,
    usual: str,
    *,
    subfolder: str | None,
    local_files_only: bool,
    revision: str | None,
) -> Path:
    """Find the file of an adapter: the path itself, or in a folder or hub snapshot the named, usual or only one.

    Raises: LdmPipeError saying what is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".safetensors", ".bin", ".pt"):
        raise LdmPipeError("no such file", str(path), "Give the path of an existing one, a folder, or a hub id.")
    folder = resolve_folder(name, local_files_only=local_files_only, revision=revision)
    folder = safe_child(folder, subfolder, "subfolder") if subfolder else folder
    if weight_name is not None:
        return safe_child(folder, weight_name, str(folder))
    if (folder / "adapter_config.json").is_file():  # PEFT's own
        return folder
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    chosen = [path for path in found if path.name == usual] or found
    if len(chosen) != 1:
        there = [path.name for path in found][:10]
        raise LdmPipeError(f"the file is not named and there are {there}", str(folder), "Name one as weight_name.")
    return chosen[0]
