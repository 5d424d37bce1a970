"""From prompt to picture: the three stages, composed.

    prompt --conditioning--> Condition;  noise --sampler(denoise)--> z;  z --autoencoder--> image

What enters: prompts and settings in the words of diffusers' StableDiffusionPipeline. What leaves: pictures. Arguments
are checked in request.py; folders are read and written in interop/folder.py; the parts of a stage are put together in
drawing.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import Autoencoder
from conditioning import AnyTextEncoder, Condition
from conditioning.label import LabelInput
from conditioning.spatial import SpatialInput
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.editing import Editing
from ldm_pipe.drawing.output import (
    Defaults,
    FloatDefault,
    IntDefault,
    LatentDiffusionOutput,
    Thresholding,
    picture_infos,
)
from ldm_pipe.drawing.placement import Placement, read_device, read_dtype
from ldm_pipe.drawing.prompting import plan_prompts
from ldm_pipe.drawing.request.request import Request, check_request
from ldm_pipe.guidance.pair import Guidance
from ldm_pipe.interop.folders.folder import Parts, check_fit, find_folder, load_parts
from ldm_pipe.interop.pickles.convert import without_pickles
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.adapters import Adapters
from ldm_pipe.pipelines.base import Call
from ldm_pipe.pipelines.replace import encode_both, replace_parts
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law


class LatentDiffusionPipeline(Editing, Adapters, Placement, Call):
    """Draw pictures from prompts with a latent diffusion model (Rombach et al. 2022, arXiv:2112.10752).

    The object is read-only during a call: several threads may draw from one pipeline at once.

    Args:
        unet: predicts from noisy latents.
        autoencoder: latents <-> pixels.
        text_encoders: prompts -> tokens; several are joined along the channels.
        schedule: the noise law the U-Net was trained on.
        defaults: what the model is best drawn with.
        spatial: the maps that the U-Net takes beside the latents.
        labels: the classes that the U-Net knows beside the text.
        zero_empty_prompt: whether embeddings of zeros stand for a negative prompt that is not given, as in SDXL.
    """

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        text_encoders: Sequence[AnyTextEncoder],
        schedule: Law,
        *,
        defaults: Defaults | None = None,
        name: str = "",
        model_hash: str | None = None,
        spatial: SpatialInput | None = None,
        labels: LabelInput | None = None,
        zero_empty_prompt: bool = False,
    ) -> None:
        """Compose the parts; parts that do not belong together are refused."""
        super().__init__(unet, autoencoder, text_encoders, schedule, defaults, name)
        self.model_hash = model_hash
        self.spatial, self.labels, self.zero_empty_prompt = spatial, labels, zero_empty_prompt
        check_fit(self.parts())

    @classmethod
    def from_parts(cls, parts: Parts) -> LatentDiffusionPipeline:
        """Compose what a folder holds."""
        return cls(**{field.name: getattr(parts, field.name) for field in fields(parts) if field.name != "golden"})

    def parts(self) -> Parts:
        """Return what a folder of this pipeline would hold."""
        return Parts(**{field.name: getattr(self, field.name) for field in fields(Parts) if field.name != "golden"})

    # Files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        unet: UNet | None = None,
        vae: Autoencoder | None = None,
        text_encoder: AnyTextEncoder | None = None,
        scheduler: Any = None,
    ) -> LatentDiffusionPipeline:
        """Load the shipped model (None), a folder, a training run, or a model of the hub.

        A stored golden sample is replayed (float32 on the CPU), so that a wrong part is noticed before it draws.

        Args:
            dtype: of all weights in memory (`torch_dtype` is the same); None is float32.
            variant: "fp16" reads the files named `*.fp16.safetensors`.
            use_safetensors: False takes `.bin` parts too: a process of its own, without network, turns them into
                safetensors in a temporary folder (tensors only; code in them never runs). Else they are refused.
            device: that the weights are read to, without a copy on the CPU.
            unet, vae, text_encoder, scheduler: in place of the folder's (text_encoder: of its first); checked for fit.
        Raises: LdmPipeError naming file and cause.
        """
        if dtype is not None and torch_dtype is not None and read_dtype(dtype) != read_dtype(torch_dtype):
            raise LdmPipeError(f"dtype {dtype} and torch_dtype {torch_dtype} differ", how_to_fix="Give one of them.")
        chosen = read_dtype(dtype if dtype is not None else torch_dtype)
        device = read_device(device)
        root = find_folder(
            pretrained_model_name_or_path,
            variant=variant,
            local_files_only=local_files_only,
            revision=revision,
            pickles=use_safetensors is False,
        )
        with without_pickles(root) if use_safetensors is False else contextlib.nullcontext(root) as safe:
            parts = load_parts(safe, dtype=chosen, variant=variant, device=device)
        own = {"unet": unet, "autoencoder": vae}
        if text_encoder is not None:
            own["text_encoders"] = (text_encoder, *parts.text_encoders[1:])
        own = {name: part for name, part in own.items() if part is not None}
        parts = replace(parts, **own, **({"golden": None, "model_hash": None} if own else {}))
        pipe = cls.from_parts(parts)
        if parts.golden is not None and chosen == torch.float32 and pipe.device.type == "cpu":
            from ldm_pipe.drawing.golden import check_golden

            check_golden(pipe, parts.golden, str(root))
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        ema: bool = False,
        prediction: str | None = None,
        like: str | Path | None = None,
        tokenizer: str | Path | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
    ) -> LatentDiffusionPipeline:
        """Load an original single file (Stable Diffusion 1, 2, XL), turned into a temporary folder each time.

        Args:
            ema: take the U-Net's moving averages, where the file has them.
            prediction: "eps" or "v", where the file does not say, as those of Stable Diffusion 2.
            like: a diffusers folder of the same architecture, for files of no known family.
            tokenizer: a folder with CLIP's `vocab.json` and `merges.txt`; None takes `like`'s, or open_clip's.
        Raises: LdmPipeError naming file, tensor and cause.
        """
        from ldm_pipe.interop.from_file import as_folder

        with as_folder(path, ema=ema, prediction=prediction, like=like, tokenizer=tokenizer) as folder:
            return cls.from_pretrained(folder, torch_dtype=torch_dtype, dtype=dtype, device=device)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        card: Mapping[str, str] | None = None,
    ) -> None:
        """Write a folder that this pipeline and diffusers' StableDiffusionPipeline both read.

        Args:
            safe_serialization: False (pickle) is refused.
            variant: name part of the weight files, such as "fp16".
            dtype: of all weights on disk; None keeps the U-Net's.
            card: facts for the model card: data, steps, commit, metrics, licence.
        """
        if not safe_serialization:
            raise LdmPipeError("safe_serialization=False", how_to_fix="Weights are written as safetensors only.")
        from ldm_pipe.interop.folders.save import save_pipeline

        kept = read_dtype(dtype) if dtype else self.dtype
        save_pipeline(self, Path(save_directory), variant=variant, dtype=kept, card=card)

    @property
    def vae(self) -> Autoencoder:
        """Return the autoencoder, by diffusers' name."""
        return self.autoencoder

    @vae.setter
    def vae(self, autoencoder: Autoencoder) -> None:
        self.put(autoencoder=autoencoder)

    def put(self, **parts: Any) -> None:
        """Replace parts of the pipeline by others, all at once: `pipe.put(unet=..., autoencoder=...)`.

        Raises: LdmPipeError if they do not belong together, or while LoRAs are merged into those that go; then nothing
            has changed.
        """
        replace_parts(self, parts)
        self._loras = self.model_hash = None

    @property
    def text_encoder(self) -> AnyTextEncoder | None:
        """Return the first text encoder, by diffusers' name."""
        return self.text_encoders[0] if self.text_encoders else None

    @text_encoder.setter
    def text_encoder(self, encoder: AnyTextEncoder) -> None:
        self.put(text_encoders=(encoder, *self.text_encoders[1:]))

    @property
    def tokenizer(self) -> Any:
        """Return the first text encoder's tokenizer, by diffusers' name."""
        return None if self.text_encoder is None else self.text_encoder.tokenizer

    @property
    def paints(self) -> bool:
        """Return whether the U-Net reads the known part of a picture, as inpainting models do."""
        return self.spatial is None and self.unet.config.in_channels == 2 * self.autoencoder.latent_channels + 1

    # Drawing

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = IntDefault(50),
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = FloatDefault(7.5),
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        guidance_rescale: float = FloatDefault(0.0),
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  (never changed; diffusers' default)
        *,
        seed: int | list[int] | None = None,
        sampler: str | Any | None = None,
        spacing: str | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        thresholding: str | Mapping[str, Any] | Thresholding | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        spatial: Any = None,
        class_labels: str | int | list[str | int | None] | None = None,
        depth_map: Any = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] | None = None,
        negative_target_size: tuple[int, int] | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        prompt_syntax: str | Mapping[str, Any] = "plain",
        deterministic_batch: bool = False,
        return_latents: bool = False,
        guidance: Guidance | None = None,
    ) -> LatentDiffusionOutput | tuple[Any, Any]:
        """Draw pictures.

        Names, order and defaults are those of diffusers' StableDiffusionPipeline; where the model stores defaults of
        its own (`pipe.defaults`), they stand for arguments that were left alone.

        Args:
            height, width: in pixels, multiples of `pipe.factor`; None: of the image, else the model's.
            guidance_scale: w of uncond + w (cond - uncond); up to 1 there is no guidance, at half the cost.
            generator: draws as diffusers does; a list holds one per picture.
            seed: picture i is drawn from seed + i (or seed[i]), whatever the batch; None draws a seed and tells it.
            latents: unit Gaussian noise to start from, (B, C, h, w).
            output_type: "pil", "np", "pt" or "latent".
            timesteps, sigmas: the times shown to the network, or the noise levels, one by one instead of spacing.
            sampler: one of `samplers.NAMES`, a function of their form, or a scheduler object of diffusers; None is
                `pipe.scheduler`'s.
            spacing: "leading", "trailing", "karras", "ddim25", ...; see `Law.steps`.
            sampler_options: the sampler's own keywords, such as {"order": 3}.
            thresholding: "none", "static", "dynamic", or a mapping of kind, percentile, max_value, space and cap;
                None: the model's, or what its scheduler file asks for.
            image, strength: start from a diffused picture (SDEdit, arXiv:2108.01073); strength 0.8, with a mask 1.0.
            mask_image: paint only where it is white; elsewhere the pixels of `image` come back unchanged.
            callback_on_step_end: called as (pipe, i, t, tensors) after each step; returns the tensors.
            spatial: maps for a model that was trained with them, in [0, 1], of the picture's size; None: no map.
            class_labels: names or numbers for a model that was trained with classes beside the text; None: no class.
            depth_map: for a depth model, (B, H, W) of any unit, or a grey picture; its estimator is not part of ours.
            prompt_2, negative_prompt_2: for the second text encoder and later ones; None: the same as for the first.
            original_size, crops_coords_top_left, target_size, and negative_*: what SDXL is told of heights and widths;
                None: the size drawn, (0, 0); see docs/models.md.
            aesthetic_score, negative_aesthetic_score: what SDXL's refiner is told instead of target_size; 6 and 2.5.
            denoising_end: stop at this share of the way; with output_type="latent" another model goes on from there.
            denoising_start: go on from `latents` (or `image`, if these are latents) of a model that stopped there.
            prompt_syntax: "weighted" reads `(red:1.3)`, `AND`, `[from:to:when]`, `BREAK` (docs/conditioning.md).
            deterministic_batch: draw one by one, so that a picture has the same bits in any batch.
            return_latents: also return what the pictures were decoded from.
            guidance: (denoiser, conds, weights, uncond) -> denoise, in place of classifier-free guidance; conds are one
                Condition, or one per branch; weights are theirs, (K, B). The scale is its own.
        Returns: LatentDiffusionOutput, or (images, None) for return_dict=False.
        Raises: LdmPipeError naming argument, value and range, before any work.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        output = self.run(check_request(self, given), one_by_one=deterministic_batch)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def run(self, request: Request, *, one_by_one: bool = False) -> LatentDiffusionOutput:
        """Draw the pictures of a checked request."""
        one_by_one = one_by_one and request.num_pictures > 1
        with self.one_at_a_time():
            drawn = [self._draw(part) for part in (request.rows() if one_by_one else [request])]
        z = torch.cat([part[0] for part in drawn])
        images: Any = z
        if request.output_type != "latent":
            from ldm_pipe.drawing.pixels import give_images

            image = torch.cat([part[1] for part in drawn])
            images = give_images(
                image, request.output_type, None if request.mask is None else request.image, request.mask
            )
        return LatentDiffusionOutput(
            images,
            seeds=None if request.seeds is None else list(request.seeds),
            latents=z if request.return_latents else None,
            infos=picture_infos(request, self.name, self.model_hash, self.adapter_settings()),
        )

    def _draw(self, request: Request) -> tuple[Tensor, Tensor]:
        """Run the three stages for one batch: (z, image)."""
        try:
            steps = drawing.choose_steps(request)
            plan = plan_prompts(self, request, steps.num_steps)
            cond, uncond = drawing.encode_prompts(self, request, plan)
            noise = drawing.noise_source(request)
            x, spatial, restore = drawing.start(self, request, steps, noise)
            if spatial is not None:
                cond, uncond = (c if c is None else c.join(Condition(spatial=spatial)) for c in (cond, uncond))
            z = drawing.sample(self, request, x, steps, noise, cond, uncond, restore, plan)
            return z, z if request.output_type == "latent" else self._decode(z)
        except torch.OutOfMemoryError as error:
            what = f"out of memory for {request.num_pictures} pictures of {request.width}x{request.height}"
            advice = "Draw fewer at once, smaller, in bfloat16, with enable_vae_tiling() or enable_model_cpu_offload()."
            raise LdmPipeError(what, str(self.device), advice) from error

    def _decode(self, z: Tensor) -> Tensor:
        with self.on_device(self.autoencoder):
            return self.autoencoder.decode(z.to(self.autoencoder.dtype))

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Encode prompts for `prompt_embeds` and `negative_prompt_embeds`: two tensors (B, L, D).

        Where the model reads pooled vectors, `pooled_prompt_embeds` and `negative_pooled_prompt_embeds` follow, (B, P).
        """
        negative = negative_prompt or ""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        is_zero = self.zero_empty_prompt and negative_prompt is None and negative_prompt_2 is None
        return encode_both(self, prompts, negatives, prompt_2, negative_prompt_2, clip_skip=clip_skip, is_zero=is_zero)
