"""Networks that describe pictures, and what they are called: the name stands beside every number.

A kind and a folder enter, a `FeatureNet` leaves; any module becomes one. Weights are read from files on this machine:
nothing here reaches for a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.text import refuse_code
from ldm_pipe.data.cache import module_hash
from ldm_pipe.metrics.retrieval import thumbnails
from ldm_pipe.pretrained import LdmPipeError, load_tensors, resolve_folder

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
KINDS = (
    "pixels[:SIDE], tower:FOLDER, classifier:FOLDER, inception:FOLDER, dinov2:FOLDER, clip:FOLDER, open_clip:NAME@FILE"
)
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class FeatureNet:
    """A network as a feature extractor.

    Attributes:
        name: what the numbers are said to be measured with.
        embed: pictures from 0 to 255, (B, 3, H, W), to vectors (B, D), or to {"vectors", "logits", "spatial"}.
        key: tells features of other weights apart; the name, where there are none.
        is_inception: the network of 2015, with which a Frechet distance is called FID.
        texts: texts to vectors of the same space, for CLIP score.
    """

    name: str
    embed: Callable[[Tensor], Tensor | Outputs]
    key: str = ""
    is_inception: bool = False
    texts: Callable[[Sequence[str]], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        """Describe pictures, uint8 (B, 3, H, W), in float32 on the CPU.

        Raises: LdmPipeError for NaN, or what is no vector per picture.
        """
        found = self.embed(images)
        outputs = {"vectors": found} if isinstance(found, Tensor) else found
        for name, x in outputs.items():
            if x.ndim != 2 or len(x) != len(images):
                what = f"{name} of shape {list(x.shape)} for {len(images)} pictures"
                raise LdmPipeError(what, self.name, "Give one vector per picture: (B, D).")
            if not torch.isfinite(x).all():
                raise LdmPipeError(f"{name} hold NaN or infinity", self.name, "Compute them in float32.")
        return {name: x.float().cpu() for name, x in outputs.items()}

    @property
    def identity(self) -> str:
        """Return name and key: what statistics must agree in."""
        return f"{self.name} {self.key}".strip()


def of_module(name: str, net: nn.Module, prepare: Callable[[Tensor], Tensor] | None = None, **more: Any) -> FeatureNet:
    """Take any module; by default it is given pictures in [-1, 1], and what it returns beyond (B, D) is flattened."""
    parameter = next(net.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    prepare = prepare or (lambda images: images.float() / 127.5 - 1.0)
    net = net.eval()

    def embed(images: Tensor) -> Tensor | Outputs:
        found = net(prepare(images.to(device)))
        return found.flatten(1) if isinstance(found, Tensor) else found

    return FeatureNet(name, embed, module_hash(net)[:12], **more)


def load_features(spec: str, device: str | torch.device = "cpu") -> FeatureNet:
    """Load features by kind and place, such as `inception:weights/inception` or `pixels`.

    Raises: LdmPipeError for kinds that are not known, and weights that are not there or do not fit.
    """
    kind, _, place = spec.partition(":")
    if kind != "pixels" and not place:
        raise LdmPipeError(f"features {spec!r}: no folder is named", "features", f"Known: {KINDS}.")
    match kind:
        case "pixels":
            return _pixels(place or "16")
        case "tower":
            from conditioning.contrastive import ImageTower

            return of_module("own image tower", ImageTower.from_pretrained(place).to(device))
        case "classifier":
            return _classifier(place, device)
        case "inception":
            from ldm_pipe.metrics.inception import InceptionV3

            net = InceptionV3.from_pretrained(place).to(device)
            name = "Inception 2015 pool_3" if net.is_of_2015 else "torchvision Inception"
            return of_module(name, net, lambda images: images, is_inception=net.is_of_2015)
        case "dinov2":
            return _dinov2(place, device)
        case "clip":
            return _clip(place, device)
        case "open_clip":
            return _open_clip(place, device)
    raise LdmPipeError(f"features {spec!r}", "features", f"Known: {KINDS}.")


def resized(images: Tensor, side: int, mean_std: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Resize to a square with a smoothed cubic, to [0, 1], and normalise: (B, 3, side, side)."""
    unit = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
    mean, std = (torch.tensor(part, device=images.device).reshape(1, 3, 1, 1) for part in mean_std)
    return (unit - mean) / std


def _pixels(place: str) -> FeatureNet:
    if not place.isdecimal() or not 1 <= int(place) <= 1024:
        raise LdmPipeError(
            f"features 'pixels:{place}'", "features", "Give the side of the thumbnails, such as pixels:16."
        )
    side = int(place)
    return FeatureNet(f"pixels {side}x{side}", lambda images: thumbnails(images.float() / 127.5 - 1.0, side))


def _classifier(place: str, device: str | torch.device) -> FeatureNet:
    from ldm_pipe.networks.classifier import ADMClassifier

    net = ADMClassifier.from_pretrained(place).to(device)
    side = int(net.config["sample_size"])

    def embed(images: Tensor) -> Outputs:
        x = F.interpolate(images.to(device).float(), (side, side), mode="bilinear", antialias=True) / 127.5 - 1.0
        logits = net(x, 0.0)
        return {"vectors": logits, "logits": logits}

    return FeatureNet("own classifier", embed, module_hash(net)[:12])


def _from_transformers(kind: str, place: str, device: str | torch.device) -> tuple[Any, Path]:
    """Load a folder of transformers strictly: a weight that is missing would be random."""
    import transformers

    root = resolve_folder(place, local_files_only=True)
    try:
        options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        net, report = getattr(transformers, kind).from_pretrained(root, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise LdmPipeError(f"no {kind} can be loaded ({reason})", str(root), "Fetch the folder anew.") from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        raise LdmPipeError(f"{len(missing)} weights are missing, such as {missing[0]}", str(root), f"Give a {kind}.")
    return net.to(device).eval(), root


def _dinov2(place: str, device: str | torch.device) -> FeatureNet:
    net, _ = _from_transformers("Dinov2Model", place, device)

    def embed(images: Tensor) -> Tensor:
        return net(pixel_values=resized(images.to(device), 224, IMAGENET)).pooler_output

    return FeatureNet("DINOv2", embed, module_hash(net)[:12])


def _clip(place: str, device: str | torch.device) -> FeatureNet:
    net, root = _from_transformers("CLIPModel", place, device)
    side = net.config.vision_config.image_size

    def embed(images: Tensor) -> Tensor:
        pooled = net.vision_model(pixel_values=resized(images.to(device), side, CLIP)).pooler_output
        return F.normalize(net.visual_projection(pooled), dim=1)

    def texts(words: Sequence[str]) -> Tensor:
        from transformers import AutoTokenizer

        refuse_code(Path(root))
        tokenizer = AutoTokenizer.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        length = net.config.text_config.max_position_embeddings
        call = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        with torch.no_grad():
            pooled = net.text_model(**tokenizer(list(words), **call).to(device)).pooler_output
            return F.normalize(net.text_projection(pooled), dim=1).float().cpu()

    return FeatureNet("CLIP", embed, module_hash(net)[:12], texts=texts)


def _open_clip(place: str, device: str | torch.device) -> FeatureNet:
    name, _, file = place.partition("@")
    if not file or not Path(file).is_file():
        raise LdmPipeError(f"no weights {file!r}", f"open_clip {name}", "Give open_clip:NAME@FILE, a safetensors file.")
    import open_clip

    if name not in open_clip.list_models():
        raise LdmPipeError(f"open_clip knows no {name!r}", "features", "open_clip.list_models() tells which it knows.")
    net: Any = open_clip.create_model(name, pretrained=None)
    try:
        net.load_state_dict(load_tensors(file, finite=True), strict=True)
    except RuntimeError as error:
        raise LdmPipeError(f"the weights do not fit {name}", file, "Give the file of this model.") from error
    net = net.to(device).eval()
    visual: Any = net.visual
    side = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size

    def embed(images: Tensor) -> Tensor:
        return net.encode_image(resized(images.to(device), side, CLIP), normalize=True)

    def texts(words: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return net.encode_text(open_clip.get_tokenizer(name)(list(words)).to(device), normalize=True).float().cpu()

    return FeatureNet(f"open_clip {name}", embed, module_hash(net)[:12], texts=texts)
