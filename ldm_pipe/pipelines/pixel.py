"""From a prompt to pixels, without latents: stage I of DeepFloyd IF.

    prompt --T5--> Condition;  noise --sampler( threshold( guide( U-Net )))--> image

What enters: prompts, and pictures to start from or to paint into. What leaves: small pictures, which `UpscalePipeline`
enlarges (stage II).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditioning import AnyTextEncoder
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.draw import draw_pictures, first_noise
from ldm_pipe.drawing.output import Defaults, FloatDefault, IntDefault, LatentDiffusionOutput
from ldm_pipe.drawing.pixel_space import PixelSpace
from ldm_pipe.drawing.placement import Placement
from ldm_pipe.drawing.request.checks import check_call, check_texts
from ldm_pipe.drawing.request.pictures import check_pictures
from ldm_pipe.drawing.request.request import Request
from ldm_pipe.drawing.request.shared import check_size, or_default
from ldm_pipe.drawing.start import begin_from, fit_start
from ldm_pipe.interop.folders import other
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.adapters import Adapters
from ldm_pipe.pipelines.base import Call
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law

CLASS = "IFPipeline"
CLASSES = (CLASS, "IFImg2ImgPipeline", "IFInpaintingPipeline")  # three calls of the same parts
# With a mask or not: steps, guidance scale and strength where none is asked for, as in diffusers.
_OF_PICTURES: dict[bool, tuple[int, float, float]] = {False: (80, 10.0, 0.7), True: (50, 7.0, 1.0)}


class PixelDiffusionPipeline(Placement, Adapters, Call):
    """Draw pictures from prompts by diffusion on pixels (after Imagen, Saharia et al. 2022, arXiv:2205.11487).

    Args:
        unet: of x_t, t and tokens.
        text_encoders: one, or none: prompts are then given as embeddings.
        schedule: the noise law the U-Net was trained on; its scheduler file says how x0 is thresholded.
        defaults: what the model is best drawn with.
    """

    paints = False  # no channels of the U-Net are for masks

    def __init__(
        self,
        unet: UNet,
        text_encoders: Sequence[AnyTextEncoder],
        schedule: Law,
        *,
        defaults: Defaults | None = None,
        name: str = "",
    ) -> None:
        """Compose the parts; parts that do not belong together are refused."""
        super().__init__(unet, PixelSpace(), text_encoders, schedule, defaults, name)
        spec = unet.spec
        if not spec.reads_tokens or spec.embedding.class_kind != "none":
            what = "the U-Net reads no tokens" if not spec.reads_tokens else "the U-Net reads labels"
            raise LdmPipeError(what, "PixelDiffusionPipeline", "UpscalePipeline is for those that enlarge.")
        if spec.in_channels != 3 or spec.out_channels not in (3, 6):
            what = f"the U-Net maps {spec.in_channels} to {spec.out_channels} channels"
            raise LdmPipeError(what, "PixelDiffusionPipeline", "It must map pictures of 3 channels to 3, or 6.")
        width = spec.token_dim or spec.levels[-1].cross_dim
        for encoder in self.text_encoders:
            if encoder.config.hidden_size != width:
                what = f"the text encoder is {encoder.config.hidden_size} wide, the U-Net takes {width}"
                raise LdmPipeError(what, "PixelDiffusionPipeline", "Use parts that were trained together.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> PixelDiffusionPipeline:
        """Load a folder or a model of the hub: IFPipeline, IFImg2ImgPipeline or IFInpaintingPipeline of diffusers.

        Args:
            options: dtype or torch_dtype, variant, use_safetensors, local_files_only, revision, device: as of
                `LatentDiffusionPipeline.from_pretrained`.
        Raises: LdmPipeError naming file and cause.
        """
        found = other.load(pretrained_model_name_or_path, CLASSES, **options)
        return cls(found.unet, found.text_encoders, found.schedule, defaults=found.defaults, name=found.name)

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | str | None = None, variant: str | None = None
    ) -> None:
        """Write a folder that diffusers draws with too."""
        parts = {"unet": self.unet, "text_encoder": next(iter(self.text_encoders), None)}
        learned = self.unet.spec.out_channels == 6
        rule, sampler = self.defaults.thresholding, self.defaults.sampler or "ddpm"
        laws = {"scheduler": other.scheduler_file(self.schedule, sampler, rule, learned=learned)}
        own = {"name": self.name, "defaults": self.defaults.to_json()}
        index = other.index_of(CLASS, parts, laws)
        other.write(save_directory, index, parts, laws, own, dtype=dtype, variant=variant)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = IntDefault(100),
        timesteps: list[int] | None = None,
        guidance_scale: float = FloatDefault(7.0),
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        seed: int | list[int] | None = None,
        latents: Tensor | None = None,
        sampler: str | Any | None = None,
        spacing: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        thresholding: Any = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_latents: bool = False,
    ) -> LatentDiffusionOutput | tuple[Any, None, None]:
        """Draw pictures; names, order and defaults are those of diffusers' IFPipeline.

        With `image` it does what IFImg2ImgPipeline does, with `mask_image` too what IFInpaintingPipeline does, with
        their defaults of steps and guidance.

        Prompts are read in lower case, as the model was trained. diffusers' `clean_caption` is not here: it takes
        addresses and markup out of captions from the web.

        Args:
            image: the picture to start from, for all prompts or one for each; see `LatentDiffusionPipeline.__call__`.
            mask_image: white is painted anew; black is kept, and shown to the U-Net without noise, as diffusers does.
            strength: how far to leave the picture; None: 0.7, with a mask 1.
            height, width: in pixels; None: those of the U-Net's training, to which the shorter side of a picture is
                brought, the other one to a multiple of 8.
            seed: picture i is drawn from seed + i (or seed[i]), whatever the batch; None draws a seed and tells it.
            latents: unit Gaussian noise to start from, (B, 3, H, W).
            output_type: "pil", "np", "pt" in [0, 1], or "latent": in [-1, 1], as diffusers' "pt" of this pipeline.
            timesteps, sampler, spacing, sampler_options, thresholding: as of LatentDiffusionPipeline.
        Returns: LatentDiffusionOutput, or (images, None, None) for return_dict=False.
        Raises: LdmPipeError naming argument, value and range, before any work.
        """
        request = self._check({name: value for name, value in locals().items() if name != "self"})
        with self.one_at_a_time():
            draw = drawing.noise_source(request)
            cond, uncond = drawing.encode_prompts(self, request)
            eps = first_noise(self, request, draw)
            output = draw_pictures(self, request, eps, draw, cond, uncond, begin_from(self, request))
        return output if return_dict else (output.images, None, None)

    def _check(self, given: dict[str, Any]) -> Request:
        """Settle a call, with the pictures that it starts from."""
        image = given["image"]
        if image is not None:
            steps, scale, strength = _OF_PICTURES[given["mask_image"] is not None]
            if isinstance(given["num_inference_steps"], IntDefault):
                given["num_inference_steps"] = IntDefault(steps)
            if isinstance(given["guidance_scale"], FloatDefault):
                given["guidance_scale"] = FloatDefault(scale)
            given["strength"] = or_default(given["strength"], strength)
            given |= fit_start(self, given, image)
        texts = check_texts(self, given)
        count, each = texts.num_pictures, or_default(given["num_images_per_prompt"], 1)
        image, mask, strength = check_pictures(self, given, count, count // each, None)
        request = check_call(self, given, texts, check_size(given, self.default_size, 1))
        return replace(request, image=image, mask=mask, strength=strength)
