"""From noise to picture without words: unconditional, or by class; in pixels or in latents.

    class --Condition--> ;  noise --sampler(denoise)--> z;  z --autoencoder, or nothing--> image

What enters: how many pictures, or their classes. What leaves: pictures. DDPM, DDIM and LDM folders of diffusers, and
openai's ADM.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import Autoencoder
from conditioning import Condition
from ldm_pipe import guidance
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.draw import Wrap, draw_pictures, first_noise, with_wrapped
from ldm_pipe.drawing.output import Defaults, FloatDefault, IntDefault, LatentDiffusionOutput, real_number
from ldm_pipe.drawing.pixel_space import PixelSpace
from ldm_pipe.drawing.placement import Placement
from ldm_pipe.drawing.request.checks import check_call, check_labels, check_scale, no_texts
from ldm_pipe.drawing.request.request import Request
from ldm_pipe.drawing.request.shared import check_size
from ldm_pipe.guidance.classifier import Classifier
from ldm_pipe.interop.folders import other
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.base import Call
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law

CLASSES = ("DDPMPipeline", "DDIMPipeline", "LDMPipeline", other.OWN_UNCONDITIONAL)
NUM_STEPS = {"DDPMPipeline": 1000}  # what diffusers' pipelines take; the others 50


class UnconditionalPipeline(Placement, Call):
    """Draw pictures with a U-Net that reads no words (DDPM, arXiv:2006.11239; LDM, arXiv:2112.10752; ADM, 2105.05233).

    Args:
        unet: of x_t and t, and of a class where it has any.
        schedule: the noise law the U-Net was trained on.
        autoencoder: latents <-> pixels; None: the U-Net works on pixels.
        null_label: the class that means none, where the U-Net learnt one: guidance needs it.
        defaults: what the model is best drawn with.
    """

    def __init__(
        self,
        unet: UNet,
        schedule: Law,
        autoencoder: Autoencoder | PixelSpace | None = None,
        *,
        null_label: int | None = None,
        defaults: Defaults | None = None,
        name: str = "",
    ) -> None:
        """Compose the parts; parts that do not belong together are refused."""
        space = PixelSpace(unet.spec.in_channels) if autoencoder is None else autoencoder
        super().__init__(unet, space, (), schedule, defaults, name)
        self.null_label = null_label
        channels, kind = space.latent_channels, unet.spec.embedding.class_kind
        if unet.spec.reads_tokens or kind not in ("none", "table", "timestep"):
            what = "the U-Net reads tokens" if unet.spec.reads_tokens else f"the U-Net reads classes as {kind}"
            raise LdmPipeError(what, "UnconditionalPipeline", "Use `ldm_pipe.load_pipeline`, or another class.")
        if unet.spec.in_channels != channels or unet.spec.out_channels not in (channels, 2 * channels):
            what = f"the U-Net maps {unet.spec.in_channels} to {unet.spec.out_channels} channels, x has {channels}"
            raise LdmPipeError(what, "UnconditionalPipeline", "A U-Net that also reads a picture enlarges it.")
        if null_label is not None:
            check_labels([null_label], 1, self.num_classes, "null_label")

    @property
    def num_classes(self) -> int:
        """Return how many rows the U-Net's table of classes has, the null included; 0 where it has none."""
        return self.unet.spec.embedding.num_classes

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> UnconditionalPipeline:
        """Load a folder or a model of the hub: DDPMPipeline, DDIMPipeline or LDMPipeline of diffusers, or ours.

        Args:
            options: dtype or torch_dtype, variant, use_safetensors, local_files_only, revision, device: as of
                `LatentDiffusionPipeline.from_pretrained`.
        Raises: LdmPipeError naming file and cause.
        """
        found = other.load(pretrained_model_name_or_path, CLASSES, **options)
        defaults = found.defaults
        if defaults.num_inference_steps is None:
            defaults = replace(defaults, num_inference_steps=NUM_STEPS.get(found.index["_class_name"]))
        null = found.own.get("null_label")
        return cls(found.unet, found.schedule, found.autoencoder, null_label=null, defaults=defaults, name=found.name)

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | str | None = None, variant: str | None = None
    ) -> None:
        """Write a folder that diffusers draws with too; with classes, each part of it is one of diffusers'.

        Raises: LdmPipeError naming what has no place in such a folder.
        """
        latent = not isinstance(self.autoencoder, PixelSpace)
        parts = {"unet": self.unet, **({"vqvae": self.autoencoder} if latent else {})}
        sampler = self.defaults.sampler or "ddim"
        if not latent and sampler not in ("ddpm", "ddim"):
            warnings.warn(
                f"diffusers will draw with ddim: none of its pipelines in pixels takes {sampler}", stacklevel=2
            )
            sampler = "ddim"
        learned = self.unet.spec.out_channels != self.unet.spec.in_channels
        config = other.scheduler_file(self.schedule, sampler, self.defaults.thresholding, learned=learned)
        theirs = "LDMPipeline" if latent else "DDPMPipeline" if sampler == "ddpm" else "DDIMPipeline"
        plain = self.num_classes == 0 and self.unet.config.get("_class_name") == "UNet2DModel"
        index = other.index_of(theirs if plain else other.OWN_UNCONDITIONAL, parts, {"scheduler": config})
        own = {"name": self.name, "null_label": self.null_label, "defaults": self.defaults.to_json()}
        other.write(save_directory, index, parts, {"scheduler": config}, own, dtype=dtype, variant=variant)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = IntDefault(50),
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = FloatDefault(1.0),
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        seed: int | list[int] | None = None,
        latents: Tensor | None = None,
        sampler: str | Any | None = None,
        spacing: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        thresholding: Any = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_latents: bool = False,
    ) -> LatentDiffusionOutput | tuple[Any]:
        """Draw pictures; names, order and defaults of the first arguments are those of diffusers' LDMPipeline.

        Args:
            batch_size: how many pictures; with several class_labels, as many as these.
            class_labels: one class for all pictures, or one for each; needed where the U-Net has classes.
            guidance_scale: w of null + w (class - null); 1 is none. Needs `pipe.null_label`.
            classifier: maps (x_t, t) to logits (B, K) of the classes, for guidance by its gradient (arXiv:2105.05233).
            classifier_scale: s of there; the sampler ddpm is guided by algorithm 1, all others by algorithm 2.
            seed: picture i is drawn from seed + i (or seed[i]), whatever the batch; None draws a seed and tells it.
            latents: unit Gaussian noise to start from, in the shape of z.
            sampler, spacing, sampler_options, thresholding: as of LatentDiffusionPipeline.
        Returns: LatentDiffusionOutput, or (images,) for return_dict=False.
        Raises: LdmPipeError naming argument, value and range, before any work.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        cond, uncond, count = self._conditions(given)
        size = check_size(given, self.default_size, self.factor)
        request = check_call(self, given, no_texts(count, check_scale(self, given)), size)
        if classifier is not None:
            labels = check_labels(class_labels, count, self.num_classes, "class_labels (for the classifier)")
            scale = real_number("classifier_scale", classifier_scale, 0.0, 1000.0)
            request = with_wrapped(request, self._steer(request, classifier, labels.to(self.device), scale))
        with self.one_at_a_time():
            draw = drawing.noise_source(request)
            output = draw_pictures(self, request, first_noise(self, request, draw), draw, cond, uncond)
        return output if return_dict else (output.images,)

    def _steer(self, request: Request, classifier: Classifier, labels: Tensor, scale: float) -> Wrap:
        """Return what guides a denoiser by a classifier, in the form that the sampler asks for."""
        common: dict[str, Any] = {"classifier": classifier, "labels": labels, "scale": scale, "schedule": self.schedule}
        if request.sampling.name != "ddpm":
            return lambda denoise, _: guidance.classifier_score(denoise, **common)
        variance = request.sampling.options.get("variance")
        return lambda denoise, steps: guidance.classifier_mean(denoise, **common, steps=steps, variance=variance)

    def _conditions(self, given: dict[str, Any]) -> tuple[Condition, Condition | None, int]:
        """Settle the classes of the pictures, and how many there are."""
        labels, scale, count = given["class_labels"], check_scale(self, given), given["batch_size"]
        if isinstance(labels, (list, tuple)) or (isinstance(labels, Tensor) and labels.ndim > 0):
            if count not in (1, len(labels)):
                raise LdmPipeError(f"{len(labels)} class_labels for batch_size {count}", how_to_fix="leave one out")
            count = len(labels)
        if self.unet.spec.embedding.class_kind == "none":
            if labels is not None and given["classifier"] is None:
                raise LdmPipeError("class_labels for a U-Net without classes", how_to_fix="leave them out")
            if scale > 1:
                raise LdmPipeError(f"guidance_scale is {scale:g}", how_to_fix="without classes there is no guidance")
            return Condition(), None, count
        rows = check_labels(labels, count, self.num_classes).to(self.device)
        if scale <= 1:
            return Condition(labels=rows), None, count
        if self.null_label is None:
            advice = "set pipe.null_label to the class that means none, if the U-Net learnt one"
            raise LdmPipeError(f"guidance_scale is {scale:g}, but no null class is known", how_to_fix=advice)
        return Condition(labels=rows), Condition(labels=torch.full_like(rows, self.null_label)), count
