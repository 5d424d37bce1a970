"""From a small picture to a large one without words: in latents as LDM does it, or in pixels, by class, as ADM.

    small picture --beside x_t-->  U-Net(x_t, t, class)  --autoencoder, or nothing--> image

What enters: pictures, and their classes where the U-Net has any. What leaves: larger pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import Autoencoder
from conditioning import Condition
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.draw import draw_pictures, first_noise
from ldm_pipe.drawing.output import Defaults, IntDefault, LatentDiffusionOutput
from ldm_pipe.drawing.pixel_space import PixelSpace
from ldm_pipe.drawing.placement import Placement
from ldm_pipe.drawing.request.checks import check_call, check_labels, check_small, fit_small, no_texts
from ldm_pipe.interop.folders import other
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.base import Call
from ldm_pipe.pipelines.upscale import with_scale
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law

CLASS = "LDMSuperResolutionPipeline"
CLASSES = (CLASS, other.OWN_SUPER_RESOLUTION)


class SuperResolutionPipeline(Placement, Call):
    """Enlarge pictures (LDM, arXiv:2112.10752, section 4.4; ADM, arXiv:2105.05233, section 5.2).

    In latents the small picture lies beside them as it is, so that the result is `factor` times as large; in pixels it
    is enlarged bilinearly to the size of the result first.

    Args:
        unet: of x_t beside the small picture, t, and a class where it has any.
        autoencoder: latents <-> pixels, whose latents are not scaled, as in diffusers; None: the U-Net works on pixels.
        schedule: the noise law the U-Net was trained on.
        defaults: what the model is best drawn with.
    """

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder | None,
        schedule: Law,
        *,
        defaults: Defaults | None = None,
        name: str = "",
    ) -> None:
        """Compose the parts; parts that do not belong together are refused."""
        space = PixelSpace() if autoencoder is None else autoencoder
        super().__init__(unet, space, (), schedule, defaults, name)
        channels, spec = space.latent_channels, unet.spec
        if spec.reads_tokens or spec.embedding.class_kind not in ("none", "table"):
            what = "the U-Net reads tokens" if spec.reads_tokens else "the U-Net reads no classes, but vectors"
            raise LdmPipeError(what, "SuperResolutionPipeline", "UpscalePipeline enlarges by a prompt.")
        if channels != 3 or spec.in_channels != 6 or spec.out_channels not in (3, 6):
            what = f"the U-Net maps {spec.in_channels} to {spec.out_channels} channels, x has {channels}"
            raise LdmPipeError(what, "SuperResolutionPipeline", "It must map 6 to 3 (6 with a variance), of 3.")

    @property
    def in_pixels(self) -> bool:
        """Tell whether the U-Net works on pixels."""
        return isinstance(self.autoencoder, PixelSpace)

    @property
    def num_classes(self) -> int:
        """Return how many classes the U-Net knows."""
        return self.unet.spec.embedding.num_classes

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> SuperResolutionPipeline:
        """Load a folder or a model of the hub: LDMSuperResolutionPipeline of diffusers, or ours.

        An autoencoder is read with a scale of 1, whatever the folder says: neither the training nor diffusers scales.

        Args:
            options: dtype or torch_dtype, variant, use_safetensors, local_files_only, revision, device: as of
                `LatentDiffusionPipeline.from_pretrained`.
        Raises: LdmPipeError naming file and cause.
        """
        found = other.load(pretrained_model_name_or_path, CLASSES, **options)
        autoencoder = None if found.autoencoder is None else with_scale(found.autoencoder, 1.0)
        return cls(found.unet, autoencoder, found.schedule, defaults=found.defaults, name=found.name)

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | str | None = None, variant: str | None = None
    ) -> None:
        """Write a folder that diffusers draws with too, if it is in latents and without classes.

        Raises: LdmPipeError naming what has no place in such a folder.
        """
        if not self.in_pixels and self.autoencoder.scaling_factor != 1:
            what = f"the autoencoder's scaling_factor is {self.autoencoder.scaling_factor:g}"
            raise LdmPipeError(what, str(save_directory), "diffusers' pipeline scales no latents: train with 1.")
        parts = {"unet": self.unet, **({} if self.in_pixels else {"vqvae": self.autoencoder})}
        sampler, learned = self.defaults.sampler or "ddim", self.unet.spec.out_channels == 6
        law = other.scheduler_file(self.schedule, sampler, self.defaults.thresholding, learned=learned)
        own = {"name": self.name, "defaults": self.defaults.to_json()}
        plain = not self.in_pixels and self.num_classes == 0
        index = other.index_of(CLASS if plain else other.OWN_SUPER_RESOLUTION, parts, {"scheduler": law})
        other.write(save_directory, index, parts, {"scheduler": law}, own, dtype=dtype, variant=variant)

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        batch_size: int = 1,
        num_inference_steps: int = IntDefault(100),
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
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
        """Enlarge pictures; names, order and defaults are those of diffusers' LDMSuperResolutionPipeline.

        Args:
            image: one or several small pictures; see `LatentDiffusionPipeline.__call__`.
            batch_size: of one picture, how many large ones to draw.
            class_labels: one class for all, or one for each; needed where the U-Net has classes.
            height, width: of the result, in pixels; only of a model in pixels: others multiply by `pipe.factor`.
            seed: picture i is drawn from seed + i (or seed[i]), whatever the batch; None draws a seed and tells it.
            latents: unit Gaussian noise to start from, in the shape of z.
            sampler, spacing, sampler_options, thresholding: as of LatentDiffusionPipeline.
        Returns: LatentDiffusionOutput, or (images,) for return_dict=False.
        Raises: LdmPipeError naming argument, value and range, before any work.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        small = check_small(image, None if batch_size == 1 else no_texts(batch_size).num_pictures)
        small, size = fit_small(self, small, given, align_corners=False)
        labels = self._labels(class_labels, len(small))
        request = check_call(self, given, no_texts(len(small)), size)
        with self.one_at_a_time():
            draw = drawing.noise_source(request)
            eps = first_noise(self, request, draw)
            cond = Condition(spatial=small.to(self.device, self.dtype), labels=labels)
            output = draw_pictures(self, request, eps, draw, cond, None)
        return output if return_dict else (output.images,)

    def _labels(self, labels: Any, count: int) -> Tensor | None:
        if self.num_classes:
            return check_labels(labels, count, self.num_classes).to(self.device)
        if labels is not None:
            raise LdmPipeError("class_labels for a U-Net without classes", how_to_fix="leave them out")
        return None
