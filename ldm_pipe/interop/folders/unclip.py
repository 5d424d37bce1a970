"""The networks of unCLIP that lead from the CLIP embedding of a picture to its pixels: checked, read, written.

What enters: a folder, or parts. What leaves: parts that fit together, or a folder's files. Drawing is in
unclip_stages.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conditioning import CLIPImageEncoder, CLIPTextEncoder
from conditioning.image import MEAN, STD
from conditioning.text import KARLO
from ldm_pipe.drawing.request.checks import thresholding_of
from ldm_pipe.interop.folders import other
from ldm_pipe.networks import UNet
from ldm_pipe.networks.text_projection import UnCLIPTextProjModel
from ldm_pipe.pretrained import LdmPipeError, read_json
from ldm_pipe.schedule import Law, NoiseSchedule
from ldm_pipe.schedule import read as schedule_config

# Where diffusers 0.42 finds the class. It cannot read what it writes itself, "diffusers", nor what earlier versions
# wrote, "unclip"; we read all three.
_PLACE = "diffusers.pipelines.deprecated.unclip.text_proj"
_ADVICE = 'It knows NoiseSchedule("squaredcos_cap_v2", spacing="linspace") of eps or x0, with ddpm.'


@dataclass(frozen=True)
class UnCLIPParts:
    """The networks and laws that lead from an embedding to pixels.

    Attributes:
        text_encoder: CLIP's, with its projection, read as Karlo reads it.
        text_proj: what the decoder is told of embeddings and tokens.
        decoder: to small pictures.
        super_res_first, super_res_last: to large ones; the second takes the last step.
        decoder_schedule, super_res_schedule: the noise laws that these were trained on.
    """

    text_encoder: CLIPTextEncoder
    text_proj: UnCLIPTextProjModel
    decoder: UNet
    super_res_first: UNet
    super_res_last: UNet
    decoder_schedule: Law
    super_res_schedule: Law

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together.

        Raises: LdmPipeError naming the two widths.
        """
        text, proj, decoder = self.text_encoder.config, self.text_proj.config, self.decoder.spec
        if self.text_encoder.reading != KARLO:
            raise refuse("the text encoder is not read as conditioning.text.KARLO")
        width, time_dim = decoder.levels[0].cross_dim, decoder.embedding.time_dim
        fits = {
            "the projection of the text encoder": (text.projection_dim, proj.clip_embeddings_dim),
            "the tokens of the text encoder": (text.hidden_size, proj.clip_embeddings_dim),
            "the tokens of the decoder": (width, proj.cross_attention_dim),
            "the time embedding of the decoder": (time_dim, proj.time_embed_dim),
        }
        for name, (found, wanted) in fits.items():
            if found != wanted:
                raise refuse(f"{name} is {found} wide, text_proj has {wanted}")
        if decoder.embedding.class_kind != "identity" or decoder.in_channels != 3 or decoder.out_channels not in (3, 6):
            raise refuse("the decoder does not map pictures to pictures by a vector beside t")
        for net in (self.super_res_first, self.super_res_last):
            if net.spec.in_channels != 6 or net.spec.out_channels not in (3, 6) or net.spec.reads_tokens:
                raise refuse("super resolution must read x_t beside a picture of 3 channels, and nothing else")
        for name in ("decoder", "super_res_first"):
            if not isinstance(getattr(self, name).config.get("sample_size"), int):
                raise refuse(f"the config of {name} names no sample_size")

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Return the networks by the names of their folders."""
        return {name: value for name, value in self._all() if isinstance(value, nn.Module)}

    @property
    def laws(self) -> dict[str, Law]:
        """Return the laws by the names of their folders."""
        return {f"{n.removesuffix('_schedule')}_scheduler": v for n, v in self._all() if not isinstance(v, nn.Module)}

    def _all(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def refuse(what: str) -> LdmPipeError:
    """Return the error for parts that do not fit."""
    return LdmPipeError(what, "unCLIP", "Use parts that were trained together.")


def load_parts(root: Path, common: Mapping[str, Any]) -> UnCLIPParts:
    """Read what both kinds of folder hold.

    Raises: LdmPipeError naming file and cause.
    """

    def network(part: str, cls: Any, **more: Any) -> Any:
        return other.load_part(root / part, cls, common, **more)

    return UnCLIPParts(
        network("text_encoder", CLIPTextEncoder, tokenizer=root / "tokenizer", reading=KARLO),
        network("text_proj", UnCLIPTextProjModel),
        **{part: other.load_unet(root / part, common) for part in ("decoder", "super_res_first", "super_res_last")},
        decoder_schedule=other.read_law(root / "decoder_scheduler"),
        super_res_schedule=other.read_law(root / "super_res_scheduler"),
    )


def scheduler_file(law: Law, *, learned: bool = False) -> dict[str, Any]:
    """Return the config of diffusers' `UnCLIPScheduler`, the only one that its unCLIP pipelines step with.

    Args:
        learned: whether the network learnt the variance of a step.
    Raises: LdmPipeError with the reason, where that class does something else.
    """
    if law.config.get("_class_name") == "UnCLIPScheduler":
        return dict(law.config)
    rule, where = thresholding_of(law.config), "diffusers' unCLIP"
    sampler = schedule_config.sampler_name(law.config) or "ddpm"
    plain = isinstance(law, NoiseSchedule) and law.trained_betas is None and law.ramp is None
    if sampler != "ddpm" or rule.kind == "dynamic" or not plain or law.zero_terminal_snr:
        raise LdmPipeError(f"{type(law).__name__} with {sampler} and thresholding {rule.kind}", where, _ADVICE)
    if law.beta_schedule != "squaredcos_cap_v2" or law.spacing != "linspace" or law.prediction not in ("eps", "x0"):
        what = f"beta_schedule {law.beta_schedule}, spacing {law.spacing}, prediction {law.prediction}"
        raise LdmPipeError(what, where, _ADVICE)
    return {
        "_class_name": "UnCLIPScheduler",
        "_diffusers_version": "0.42.1",
        "num_train_timesteps": law.num_train_timesteps,
        "beta_schedule": law.beta_schedule,
        "prediction_type": "epsilon" if law.prediction == "eps" else "sample",
        "variance_type": "learned_range" if learned else "fixed_small_log",
        "clip_sample": rule.kind == "static",
        "clip_sample_range": rule.max_value,
    }


def write_parts(
    target: str | Path,
    class_name: str,
    parts: UnCLIPParts,
    network: tuple[str, Any],
    laws: Mapping[str, Law],
    name: str,
    *,
    dtype: torch.dtype | str | None,
    variant: str | None,
) -> None:
    """Write a folder, whole or not at all.

    Args:
        network: the folder and the network that only this pipeline has.
        laws: by their folders.
        name: of the model.
    Raises: LdmPipeError naming what has no place in such a folder.
    """
    learned = {"decoder_scheduler": parts.decoder.spec.out_channels == 6}
    learned["super_res_scheduler"] = parts.super_res_first.spec.out_channels == 6
    configs = {part: scheduler_file(law, learned=learned.get(part, False)) for part, law in laws.items()}
    networks = {**parts.networks, network[0]: network[1]}
    known = {part: net for part, net in networks.items() if part != "image_encoder"}
    index, further = other.index_of(class_name, known, configs), {}
    index["text_proj"] = [_PLACE, UnCLIPTextProjModel.class_name]
    if "image_encoder" in networks:
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        further["feature_extractor/preprocessor_config.json"] = preprocessor(networks["image_encoder"])
    other.write(target, index, networks, configs, {"name": name}, dtype=dtype, variant=variant, further=further)


def preprocessor(encoder: CLIPImageEncoder) -> dict[str, Any]:
    """Return what transformers' `CLIPImageProcessor` is told, to do as the encoder does itself."""
    side = encoder.config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def check_preprocessor(root: Path, encoder: CLIPImageEncoder) -> None:
    """Refuse a folder that prepares pictures in another way than the encoder does.

    Raises: LdmPipeError naming the key.
    """
    path = root / "feature_extractor" / "preprocessor_config.json"
    config = read_json(path) if path.is_file() else {}
    for key, wanted in preprocessor(encoder).items():
        found = config.get(key, wanted) if isinstance(config, dict) else None
        if isinstance(wanted, dict) and isinstance(found, int):  # as earlier versions wrote
            found = dict.fromkeys(wanted, found)
        if key != "image_processor_type" and found != wanted:
            raise LdmPipeError(
                f"{key} is {found!r:.80}", str(path), f"The image encoder is shown pictures by {wanted}."
            )
