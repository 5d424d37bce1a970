"""Adapter files (LoRA, DoRA, LoHa, LoKr) of diffusers, PEFT, kohya and LyCORIS: read for given networks, written.

What enters: a file, and the networks that it changes. What leaves: what it changes in each of their modules, or a file.
Names are looked up among the modules of the networks, never guessed from the text; nothing in a file is left unread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm_pipe.interop.folders.index import folders_of
from ldm_pipe.interop.lora.forms import AnyLayer, Layers, LohaLayer, LokrLayer, LoraLayer, delta_shape, fits, tensors_of
from ldm_pipe.interop.pickles.checkpoint import PICKLES, load_checkpoint
from ldm_pipe.interop.single.ldm_names import rename, unet_modules
from ldm_pipe.networks import UNet
from ldm_pipe.pretrained import LdmPipeError, read_json, read_metadata, save_tensors

__all__ = ["AnyLayer", "Layers", "LohaLayer", "LokrLayer", "LoraLayer", "networks_of", "read_lora", "save_lora"]

WEIGHT_NAME = "pytorch_lora_weights.safetensors"  # diffusers' name of a LoRA in a folder
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PICKLE = "adapter_model.bin"
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's config in the header of the file
_ROLES = {
    "lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up", "lora.down": "down", "lora.up": "up",
    "lora_linear_layer.down": "down", "lora_linear_layer.up": "up", "lora_mid": "core", "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude", "hada_w1_a": "a1", "hada_w1_b": "b1", "hada_w2_a": "a2", "hada_w2_b": "b2",
    "hada_t1": "core1", "hada_t2": "core2", "lokr_w1": "w1", "lokr_w1_a": "w1a", "lokr_w1_b": "w1b", "lokr_w2": "w2",
    "lokr_w2_a": "w2a", "lokr_w2_b": "w2b", "lokr_t2": "core",
}  # fmt: skip
_KEY = re.compile(
    rf"(?P<module>.+?)[._](?P<role>{'|'.join(re.escape(r) for r in sorted(_ROLES, key=len, reverse=True))})"
    r"(\.default)?(\.weight)?"
)
_ALPHA = re.compile(r"(?P<module>.+?)(_lora|\.lora|\.lora_linear_layer)?(\.down\.weight)?\.alpha")
_KRON = ({"w1", "w2"}, {"w1a", "w1b", "w2"}, {"w1", "w2a", "w2b"}, {"w1a", "w1b", "w2a", "w2b"})
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # of text encoders, diffusers 0.14
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
# ComfyUI's own: the U-Net under its original names, text encoders by what they are.
_COMFY = {
    "diffusion_model.": ("unet",), "model.diffusion_model.": ("unet",),
    "text_encoders.clip_l.transformer.": ("text_encoder",), "text_encoders.clip_h.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",), "clip_l.transformer.": ("text_encoder",),
    "clip_h.transformer.": ("text_encoder",), "clip_g.transformer.": ("text_encoder_2",),
}  # fmt: skip


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the networks of a pipeline by the names that LoRA files give them: those of their folders."""
    folders = folders_of(pipe.parts()) if hasattr(pipe, "parts") else ("text_encoder",)[: len(pipe.text_encoders)]
    return {"unet": pipe.unet, **dict(zip(folders, pipe.text_encoders, strict=True))}


def _modules(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def _originals(unet: UNet, names: Iterable[str]) -> dict[str, str]:
    """Return {our module: its original name}; kohya trains SDXL under these."""
    found = rename((f"{name}.weight" for name in names), unet_modules(unet.spec))
    return {ours.removesuffix(".weight"): theirs.removesuffix(".weight") for ours, theirs in found.items()}


class _Names:
    """Looks up what a file calls the modules of some networks."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        """Write down every name of every module, in kohya's spelling too."""
        self.modules = {part: _modules(net) for part, net in networks.items()}
        self.flat = {part: {name.replace(".", "_"): name for name in modules} for part, modules in self.modules.items()}
        unet = networks.get("unet")
        if isinstance(unet, UNet):
            for ours, theirs in _originals(unet, self.modules["unet"]).items():
                self.flat["unet"].setdefault(theirs.replace(".", "_"), ours)
        self.only: str | None = None  # the network of names that do not say theirs

    def find(self, text: str) -> tuple[str, str] | None:
        """Return (network, module), or None."""
        for prefix, part in _KOHYA.items():
            if text.startswith(prefix):
                part = "text_encoder_2" if prefix == "lora_te_" and part not in self.flat else part  # SDXL's refiner
                name = self.flat.get(part, {}).get(text.removeprefix(prefix))
                return (part, name) if name else None
        for prefix, parts in _COMFY.items():
            if text.startswith(prefix):
                name = self.flat.get(parts[0], {}).get(text.removeprefix(prefix).replace(".", "_"))
                return (parts[0], name) if name else None
        bare = text.removeprefix("base_model.model.")  # a folder of PEFT holds one network and does not say which
        part, _, name = bare.partition(".")
        parts = [part] if part in self.modules else list(self.modules) if self.only is None else [self.only]
        name = (name.removeprefix("base_model.model.") if part in self.modules else bare).replace(".processor", "")
        end = name.rpartition(".")
        spellings = [name, f"text_model.{name}", f"{name}.0", f"{end[0]}.{_OLD.get(end[2], end[2])}"]
        return next(((p, s) for p in parts for s in spellings if s in self.modules.get(p, {})), None)

    def choose(self, pieces: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Find the network of names that do not say theirs: the first that has them all, in the shapes of the file.

        Both text encoders of SDXL have a `text_model.encoder.layers.0`.
        """
        unsaid = {text: own for text, own in pieces.items() if self._is_unsaid(text)}
        for part in self.modules if unsaid else ():
            self.only = part
            if all(self._has(text, own) for text, own in unsaid.items()):
                return
        self.only = None

    def _is_unsaid(self, text: str) -> bool:
        first = text.removeprefix("base_model.model.").partition(".")[0]
        return first not in self.modules and not text.startswith((*_KOHYA, *_COMFY))

    def _has(self, text: str, own: Mapping[str, Tensor]) -> bool:
        found = self.find(text)
        if found is None:
            return False
        weight = self.modules[found[0]][found[1]].weight
        try:
            layer = _layer(own, None, None, found[1], text)
        except LdmPipeError:
            return True  # told later, by name
        return isinstance(weight, Tensor) and fits(layer, weight)


@dataclass(frozen=True)
class _Config:
    """What PEFT's config says of the alphas of one network, where the file itself holds none."""

    fields: Mapping[str, Any]

    def alpha(self, module: str, rank: int) -> float:
        """Return the alpha of a module, by `alpha_pattern`, else `lora_alpha` (LoHa, LoKr: `alpha`), else r."""
        alpha = self.fields.get("lora_alpha", self.fields.get("alpha", rank))
        for pattern, value in (self.fields.get("alpha_pattern") or {}).items():
            if not re.fullmatch(r"\^?[\w.]+\$?", pattern):  # PEFT takes any regular expression
                fix = "Save the LoRA with plain module names there."
                raise LdmPipeError(f"alpha_pattern {pattern!r:.80} in its config", "LoRA", fix)
            if f".{module}".endswith(f".{pattern.strip('^$')}"):
                alpha = value
        return float(alpha) * (sqrt(rank) if self.fields.get("use_rslora") else 1.0)  # there alpha / sqrt(r)


def read_lora(path: str | Path | Mapping[str, Tensor], networks: Mapping[str, nn.Module]) -> Layers:
    """Read an adapter for given networks: a file, a folder of PEFT, or the tensors of one.

    Raises: LdmPipeError naming modules that the networks do not have, shapes that do not fit, factors that are missing,
        and tensors of adapters that are not known.
    """
    if isinstance(path, Mapping):
        where, tensors, configs = "LoRA", dict(path), {}
    else:
        file = Path(path)
        if (file / PEFT_CONFIG).is_file():
            file /= PEFT_PICKLE if (file / PEFT_PICKLE).is_file() and not (file / PEFT_NAME).is_file() else PEFT_NAME
        where, tensors, configs = str(path), load_checkpoint(file), _configs(file)
    pieces: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name.startswith("bundle_emb."):  # words, which the pipeline teaches
            continue
        if match := _KEY.fullmatch(name):
            per_output = match["role"] == "lora_magnitude_vector"  # PEFT's are always; LyCORIS' tell it by their shape
            pieces.setdefault(match["module"], {})[_ROLES[match["role"]]] = tensor.flatten() if per_output else tensor
        elif (match := _ALPHA.fullmatch(name)) and tensor.numel() == 1:
            alphas[match["module"]] = float(tensor)
        else:
            unknown.append(name)
    if unknown:
        fix = "Known are LoRA, DoRA, LoHa and LoKr; not OFT, IA3, norms or whole differences."
        raise LdmPipeError(f"{len(unknown)} tensors of no known adapter: {_some(unknown)}", where, fix)
    names, layers, foreign = _Names(networks), Layers(), []
    names.choose(pieces)
    for text, own in pieces.items():
        found = names.find(text)
        if found is None:
            foreign.append(text)
            continue
        config = configs.get(found[0]) or configs.get("")
        layer = _layer(own, alphas.pop(text, None), config, found[1], f"{where}, {text}")
        _check(layer, names.modules[found[0]][found[1]], text, where)
        layers[found] = layer
    if foreign:
        what = f"{len(foreign)} modules that this model does not have: {_some(foreign)}"
        raise LdmPipeError(what, where, "The LoRA was trained for another family of models.")
    if alphas or not layers:
        what = f"alphas without an adapter: {_some(alphas)}" if alphas else "holds no LoRA"
        raise LdmPipeError(what, where, "Give a whole LoRA file.")
    return layers


def _configs(file: Path) -> dict[str, _Config]:
    """Read PEFT's config of each network: from the header of the file, or beside it (under "")."""
    if (file.parent / PEFT_CONFIG).is_file() and file.name in (PEFT_NAME, PEFT_PICKLE):
        value = read_json(file.parent / PEFT_CONFIG)
        return {"": _Config(value if isinstance(value, dict) else {})}
    text = "" if file.suffix in PICKLES else read_metadata(file).get(METADATA, "")
    if not text:
        return {}
    try:
        value = json.loads(text)
        rows = [(*key.partition("."), field) for key, field in value.items()]
    except (ValueError, RecursionError, AttributeError):
        raise LdmPipeError(f"{METADATA} in its header is no JSON object", str(file), "Fetch the file anew.") from None
    parts = {part for part, dot, *_ in rows if dot}
    return {part: _Config({key: field for p, dot, key, field in rows if dot and p == part}) for part in parts}


def _layer(own: Mapping[str, Tensor], alpha: float | None, config: _Config | None, module: str, where: str) -> AnyLayer:
    """Put the factors of one module together."""
    roles, extra = set(own), {name: own[name] for name in ("core", "core1", "core2", "magnitude") if name in own}
    factors = roles - set(extra)
    layer: AnyLayer
    if factors == {"down", "up"} and extra.keys() <= {"core", "magnitude"}:
        layer = LoraLayer(own["down"], own["up"], 1.0, **extra)
    elif factors == {"a1", "b1", "a2", "b2"} and "core" not in extra and ("core1" in extra) == ("core2" in extra):
        layer = LohaLayer(own["a1"], own["b1"], own["a2"], own["b2"], 1.0, **extra)
    elif factors in _KRON and extra.keys() <= ({"magnitude"} if "w2" in own else {"core", "magnitude"}):
        w1, w2 = (own[w] if w in own else (own[f"{w}a"], own[f"{w}b"]) for w in ("w1", "w2"))
        layer = LokrLayer(w1, w2, 1.0, **extra)
    else:
        raise LdmPipeError(f"has only {sorted(roles)}: a part is missing", where, "Fetch the file anew.")
    if layer.rank is None:  # two whole factors: LyCORIS scales them by 1 whatever its alpha, PEFT by alpha / r
        scale = config.alpha(module, 1) / config.fields.get("r", 1) if config else 1.0
        return replace(layer, w2=own["w2"] * scale)
    if alpha is None:
        alpha = float(layer.rank) if config is None else config.alpha(module, layer.rank)
    return replace(layer, alpha=alpha)


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:10])


def _check(layer: AnyLayer, module: nn.Module, text: str, where: str) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not fits(layer, weight):
        shape = delta_shape(layer)
        what = f"{text} is {list(shape) if shape else 'of factors that do not fit'}, the weight {list(weight.shape)}"
        raise LdmPipeError(what, where, "The LoRA was trained for another model.")
    if not all(bool(torch.isfinite(x).all()) for x in tensors_of(layer)):
        raise LdmPipeError(f"NaN or infinity in {text}", where, "Fetch the file anew.")


def save_lora(
    path: str | Path,
    layers: Layers,
    *,
    layout: Literal["diffusers", "kohya"] = "diffusers",
    networks: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write layers: as diffusers and PEFT read them, or as A1111 and ComfyUI do.

    diffusers' layout holds plain LoRA and DoRA, alpha / r multiplied into the second half: there alpha = r. kohya's
    layout holds every form and its alphas; with two text encoders (SDXL) it calls the U-Net's modules by their original
    names.

    Args:
        networks: needed by kohya's layout, for the names.
    Raises: LdmPipeError for a form that the layout does not have.
    """
    if layout == "kohya":
        if networks is None:
            raise LdmPipeError("no networks are given", str(path), "kohya's names are those of the networks.")
        save_tensors(path, _kohya(layers, networks))
        return
    tensors = {}
    for (part, module), layer in layers.items():
        name = f"{part}.{module}"
        if not isinstance(layer, LoraLayer) or layer.core is not None:
            what = f"{name} is a {type(layer).__name__}, which diffusers does not read for these models"
            raise LdmPipeError(what, str(path), "Write it in kohya's layout.")
        tensors[f"{name}.lora_A.weight"] = layer.down
        tensors[f"{name}.lora_B.weight"] = layer.up * (layer.alpha / layer.rank)
        if layer.magnitude is not None:
            if layer.magnitude.shape[0] != layer.up.shape[0]:
                what = f"the magnitudes of {name} are those of its inputs"
                raise LdmPipeError(what, str(path), "diffusers has them of the outputs; write kohya's layout.")
            kernel = [1, -1, 1, 1] if layer.up.ndim == 4 else [-1]
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude.reshape(kernel)
    save_tensors(path, tensors)


_SPELLED = {
    "down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale", "a1": "hada_w1_a", "b1": "hada_w1_b",
    "a2": "hada_w2_a", "b2": "hada_w2_b", "core1": "hada_t1", "core2": "hada_t2", "w1": "lokr_w1", "w2": "lokr_w2",
}  # fmt: skip


def _kohya(layers: Layers, networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Give layers kohya's names and LyCORIS' shapes.

    A magnitude per output, a vector in PEFT, stands there with the weight's number of axes, (O, 1, ...): ComfyUI and
    A1111 take its first axis for the outputs only so.
    """
    unet, two = networks.get("unet"), "text_encoder_2" in networks
    both = two and "text_encoder" in networks
    first, second = ("lora_te1_", "lora_te2_") if both else ("lora_te_", "lora_te_")
    prefixes = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": second}
    originals = _originals(unet, _modules(unet)) if two and isinstance(unet, UNet) else {}
    tensors: dict[str, Tensor] = {}
    for (part, module), layer in layers.items():
        name = prefixes[part] + (originals.get(module, module) if part == "unet" else module).replace(".", "_")
        spelled = {**_SPELLED, "core": "lokr_t2" if isinstance(layer, LokrLayer) else "lora_mid.weight"}
        for role, ending in spelled.items():
            value = getattr(layer, role, None)
            if isinstance(value, tuple):
                tensors |= {f"{name}.{ending}_{letter}": x for letter, x in zip("ab", value, strict=True)}
            elif role == "magnitude" and value is not None and value.ndim == 1:
                weight: Any = networks[part].get_submodule(module).weight
                tensors[f"{name}.{ending}"] = value.reshape(-1, *[1] * (weight.ndim - 1))
            elif value is not None:
                tensors[f"{name}.{ending}"] = value
        tensors[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
    return tensors
