"""From a small picture and a prompt to a large one: Stable Diffusion's x4 upscaler, and stage II of DeepFloyd IF.

    picture + noise of a chosen level --beside x_t-->  U-Net(x_t, t, prompt, level)  --autoencoder, or nothing--> image

What enters: prompts and pictures. What leaves: pictures. The level tells the U-Net how little of the small picture to
trust (cascaded diffusion, Ho et al. 2021, arXiv:2106.15282, section 4.2).
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
from conditioning import AnyTextEncoder, Condition
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.draw import draw_pictures, first_noise
from ldm_pipe.drawing.output import Defaults, FloatDefault, IntDefault, LatentDiffusionOutput, whole_number
from ldm_pipe.drawing.pixel_space import PixelSpace
from ldm_pipe.drawing.placement import Placement
from ldm_pipe.drawing.request.checks import check_call, check_small, check_texts, fit_small
from ldm_pipe.drawing.request.pictures import check_pictures
from ldm_pipe.drawing.request.request import Request
from ldm_pipe.drawing.request.shared import or_default
from ldm_pipe.drawing.start import begin_from, fit_start
from ldm_pipe.interop.folders import other
from ldm_pipe.networks import UNet
from ldm_pipe.noise import Draw
from ldm_pipe.pipelines.adapters import Adapters
from ldm_pipe.pipelines.base import Call
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, NoiseSchedule
from ldm_pipe.schedule.process import q_sample

LATENT, PIXEL = "StableDiffusionUpscalePipeline", "IFSuperResolutionPipeline"
SCALING_FACTOR = 0.08333  # diffusers' pipeline sets it, whatever the autoencoder's folder says
MAX_NOISE_LEVEL = 350
NOISINGS = {LATENT: "low_res_scheduler", PIXEL: "image_noising_scheduler"}
CLASSES = (LATENT, PIXEL, "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline")
OF_PICTURES = ("original_image", "mask_image", "strength")


class UpscalePipeline(Placement, Adapters, Call):
    """Enlarge pictures as a prompt says (x4 upscaler: arXiv:2112.10752, section 4.4; IF II: after arXiv:2205.11487).

    In latents the small picture lies beside them as it is, so that the result is `factor` times as large; in pixels it
    is enlarged bilinearly to the size of the result first.

    Args:
        unet: of x_t beside the small picture, t, tokens, and the level of the picture's noise as a label.
        autoencoder: latents <-> pixels; None: the U-Net works on pixels.
        text_encoders: one, or none: prompts are then given as embeddings.
        schedule: the noise law the U-Net was trained on.
        noising: the noise law of the small picture.
        max_noise_level: the highest level that a call may ask for.
        defaults: what the model is best drawn with; untouched arguments are those of diffusers' pipelines.
    """

    paints = False  # no channels of the U-Net are for masks

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder | PixelSpace | None,
        text_encoders: Sequence[AnyTextEncoder],
        schedule: Law,
        noising: NoiseSchedule,
        *,
        max_noise_level: int | None = None,
        defaults: Defaults | None = None,
        name: str = "",
    ) -> None:
        """Compose the parts; parts that do not belong together are refused."""
        space = PixelSpace() if autoencoder is None else autoencoder
        super().__init__(unet, space, text_encoders, schedule, defaults, name)
        self.noising = noising
        limit = noising.num_train_timesteps - 1
        given = limit if max_noise_level is None else max_noise_level
        self.max_noise_level = whole_number("max_noise_level", given, 0, limit)
        channels, kind = space.latent_channels, unet.spec.embedding.class_kind
        if unet.spec.in_channels != channels + 3 or unet.spec.out_channels not in (channels, 2 * channels):
            what = f"the U-Net maps {unet.spec.in_channels} to {unet.spec.out_channels} channels, x has {channels}"
            raise LdmPipeError(what, "UpscalePipeline", "It must read x and a picture of 3 channels.")
        if kind not in ("table", "timestep") or (kind == "table" and unet.spec.embedding.num_classes <= limit):
            what = f"the U-Net has {unet.spec.embedding.num_classes} noise levels ({kind})"
            raise LdmPipeError(what, "UpscalePipeline", f"It must know the {limit + 1} of the small picture's law.")

    @property
    def in_pixels(self) -> bool:
        """Tell whether the U-Net works on pixels."""
        return isinstance(self.autoencoder, PixelSpace)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> UpscalePipeline:
        """Load a folder or a model of the hub: StableDiffusionUpscalePipeline, or one of IF's stage II.

        Args:
            options: dtype or torch_dtype, variant, use_safetensors, local_files_only, revision, device: as of
                `LatentDiffusionPipeline.from_pretrained`.
        Raises: LdmPipeError naming file and cause.
        """
        found = other.load(pretrained_model_name_or_path, CLASSES, **options)
        if not isinstance(found.noising, NoiseSchedule):
            raise LdmPipeError("the law of the small picture's noise is not discrete", found.name)
        vae = found.autoencoder
        if vae is not None and vae.scaling_factor != SCALING_FACTOR:
            what = f"scaling_factor {vae.scaling_factor:g} of the autoencoder is read as {SCALING_FACTOR}"
            warnings.warn(f"{what}, as in diffusers' x4 upscaler, the one with which it was trained", stacklevel=2)
            vae = with_scale(vae, SCALING_FACTOR)
        told = found.index.get("max_noise_level")
        return cls(
            found.unet,
            vae,
            found.text_encoders,
            found.schedule,
            found.noising,
            max_noise_level=MAX_NOISE_LEVEL if told is None and vae is not None else told,
            defaults=found.defaults,
            name=found.name,
        )

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | str | None = None, variant: str | None = None
    ) -> None:
        """Write a folder that diffusers draws with too.

        Raises: LdmPipeError naming what has no place in such a folder.
        """
        if len(self.text_encoders) != 1 and not self.in_pixels:
            raise LdmPipeError(f"{len(self.text_encoders)} text encoders", str(save_directory), "It must have one.")
        if not self.in_pixels and self.autoencoder.scaling_factor != SCALING_FACTOR:
            what = f"the autoencoder's scaling_factor is {self.autoencoder.scaling_factor:g}"
            raise LdmPipeError(what, str(save_directory), f"diffusers' pipeline reads every one as {SCALING_FACTOR}.")
        kind = PIXEL if self.in_pixels else LATENT
        sampler = self.defaults.sampler or "ddim"
        learned = self.unet.spec.out_channels == 2 * self.autoencoder.latent_channels
        laws = {
            "scheduler": other.scheduler_file(self.schedule, sampler, self.defaults.thresholding, learned=learned),
            NOISINGS[kind]: other.scheduler_file(self.noising, "ddpm", None),
        }
        vae = {} if self.in_pixels else {"vae": self.autoencoder}
        parts = {"unet": self.unet, **vae, "text_encoder": next(iter(self.text_encoders), None)}
        index = other.index_of(kind, parts, laws)
        if not self.in_pixels:
            index["max_noise_level"] = self.max_noise_level
        own = {"name": self.name, "defaults": self.defaults.to_json()}
        other.write(save_directory, index, parts, laws, own, dtype=dtype, variant=variant)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        noise_level: int | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = None,
        seed: int | list[int] | None = None,
        sampler: str | Any | None = None,
        spacing: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        thresholding: Any = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_latents: bool = False,
        original_image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
    ) -> LatentDiffusionOutput | tuple[Any, None]:
        """Enlarge pictures; names and order are those of diffusers' StableDiffusionUpscalePipeline.

        Args:
            image: the small picture, one for all prompts or one for each; see `LatentDiffusionPipeline.__call__`.
            num_inference_steps, guidance_scale, noise_level: None: the model's, else as in diffusers 75, 9 and 20 in
                latents, 50, 4 and 250 in pixels.
            noise_level: how much noise is laid over the small picture, from 0 to `pipe.max_noise_level`.
            height, width: of the result, in pixels; only of a model in pixels: others multiply by `pipe.factor`.
            seed: picture i is drawn from seed + i (or seed[i]), whatever the batch; None draws a seed and tells it.
            original_image, mask_image, strength: of a model in pixels, the large picture to start from or paint into,
                as diffusers' IFImg2ImgSuperResolutionPipeline and IFInpaintingSuperResolutionPipeline do; `image` is
                what stage I made of it. strength None: 0.8.
            prompt, negative_prompt, prompt_embeds, sampler, thresholding, ...: as of LatentDiffusionPipeline.
        Returns: LatentDiffusionOutput, or (images, None) for return_dict=False.
        Raises: LdmPipeError naming argument, value and range, before any work.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        request, small, level = self._check(given)
        with self.one_at_a_time():
            draw = drawing.noise_source(request)
            eps, low = self._noises(request, small, level, draw)
            beside = Condition(spatial=low.to(self.dtype), labels=torch.full((len(low),), level, device=self.device))
            cond, uncond = drawing.encode_prompts(self, request)
            cond, uncond = (c if c is None else c.join(beside) for c in (cond, uncond))
            assert cond is not None
            output = draw_pictures(self, request, eps, draw, cond, uncond, begin_from(self, request))
        return output if return_dict else (output.images, None)

    def _check(self, given: dict[str, Any]) -> tuple[Request, Tensor, int]:
        """Settle a call: the request, the small pictures in [-1, 1], (B, 3, h, w), and the level of their noise."""
        original, painting = given["original_image"], given["mask_image"] is not None
        if not self.in_pixels and any(given[name] is not None for name in OF_PICTURES):
            raise LdmPipeError(f"{', '.join(OF_PICTURES)}: this model works on latents", how_to_fix="leave them out")
        if original is None and painting:
            raise LdmPipeError("mask_image without original_image", how_to_fix="give the large picture to paint into")
        steps, scale, level = (50, 4.0, 250) if self.in_pixels else (75, 9.0, 20)
        if painting:
            steps, level = 100, 0
        if original is not None:
            given |= {"strength": or_default(given["strength"], 0.8), **fit_start(self, given, original)}
        if given["num_inference_steps"] is None:
            given["num_inference_steps"] = IntDefault(steps)
        if given["guidance_scale"] is None:
            given["guidance_scale"] = FloatDefault(scale)
        level = min(level, self.max_noise_level) if given["noise_level"] is None else given["noise_level"]
        level = whole_number("noise_level", level, 0, self.max_noise_level)
        texts = check_texts(self, given)
        count, groups = texts.num_pictures, texts.num_pictures // (given["num_images_per_prompt"] or 1)
        small, size = fit_small(self, check_small(given["image"], count, groups), given, align_corners=True)
        start = {**given, "image": original}
        image, mask, strength = check_pictures(self, start, count, groups, None)
        request = check_call(self, given, texts, size)
        return replace(request, image=image, mask=mask, strength=strength), small, level

    def _noises(self, request: Request, small: Tensor, level: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """Draw the first noise, and lay noise over the small picture; draws come in diffusers' order."""
        eps = first_noise(self, request, draw) if self.in_pixels else None
        alpha, sigma = (float(x) for x in self.noising.alpha_sigma(torch.tensor(float(level), dtype=torch.float64)))
        low = q_sample(small.to(self.device), draw(small.shape).to(self.device), alpha, sigma)
        return (first_noise(self, request, draw) if eps is None else eps), low


def with_scale(autoencoder: Autoencoder, scaling_factor: float) -> Autoencoder:
    """Return the same weights under another scale of the latents."""
    with torch.device("meta"):
        changed = type(autoencoder).from_config({**autoencoder.config, "scaling_factor": scaling_factor})
    changed.load_state_dict(autoencoder.state_dict(), assign=True, strict=True)
    return changed.eval()
