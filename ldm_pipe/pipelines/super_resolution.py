"""From a small picture to a large one without words: super-resolution by latent diffusion.

    small picture --beside x_t-->  U-Net(x_t, t)  --autoencoder--> image

What enters: pictures. What leaves: pictures `factor` times as large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import Autoencoder
from conditioning import Condition
from ldm_pipe import drawing
from ldm_pipe.outputs import Defaults, IntDefault, LatentDiffusionOutput
from ldm_pipe.pipelines import files
from ldm_pipe.pipelines.calls import Call, check_call, check_small, draw_pictures, first_noise, no_texts
from ldm_pipe.pipelines.upscale import with_scale
from ldm_pipe.placement import Placement
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law
from ldm_pipe.unet import UNet

CLASS = "LDMSuperResolutionPipeline"


class SuperResolutionPipeline(Placement, Call):
    """Enlarge pictures (Rombach et al. 2022, arXiv:2112.10752, section 4.4).

    Args:
        unet: of x_t beside the small picture, and t.
        autoencoder: latents <-> pixels; its latents are not scaled, as in diffusers.
        schedule: the noise law the U-Net was trained on.
        defaults: what the model is best drawn with.
    """

    def __init__(
        self, unet: UNet, autoencoder: Autoencoder, schedule: Law, *, defaults: Defaults | None = None, name: str = ""
    ) -> None:
        """Compose the parts; parts that do not belong together are refused."""
        super().__init__(unet, autoencoder, (), schedule, defaults, name)
        channels, spec = autoencoder.latent_channels, unet.spec
        if spec.reads_tokens or spec.embedding.class_kind != "none":
            what = "the U-Net reads tokens" if spec.reads_tokens else "the U-Net reads classes"
            raise LdmPipeError(what, "SuperResolutionPipeline", "UpscalePipeline enlarges by a prompt.")
        if channels != 3 or spec.in_channels != 6 or spec.out_channels != 3:
            what = f"the U-Net maps {spec.in_channels} to {spec.out_channels} channels, latents have {channels}"
            raise LdmPipeError(what, "SuperResolutionPipeline", "It must map 6 to 3, of latents with 3.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> SuperResolutionPipeline:
        """Load a folder or a model of the hub: LDMSuperResolutionPipeline of diffusers.

        Its autoencoder is read with a scale of 1, whatever the folder says: neither the training nor diffusers scales.

        Args:
            options: dtype or torch_dtype, variant, use_safetensors, local_files_only, revision, device: as of
                `LatentDiffusionPipeline.from_pretrained`.
        Raises: LdmPipeError naming file and cause.
        """
        found = files.load(pretrained_model_name_or_path, (CLASS,), **options)
        assert found.autoencoder is not None
        autoencoder = with_scale(found.autoencoder, 1.0)
        return cls(found.unet, autoencoder, found.schedule, defaults=found.defaults, name=found.name)

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | str | None = None, variant: str | None = None
    ) -> None:
        """Write a folder that diffusers draws with too.

        Raises: LdmPipeError naming what has no place in such a folder.
        """
        if self.autoencoder.scaling_factor != 1:
            what = f"the autoencoder's scaling_factor is {self.autoencoder.scaling_factor:g}"
            raise LdmPipeError(what, str(save_directory), "diffusers' pipeline scales no latents: train with 1.")
        parts = {"unet": self.unet, "vqvae": self.autoencoder}
        law = files.scheduler_file(self.schedule, self.defaults.sampler or "ddim", self.defaults.thresholding)
        own = {"name": self.name, "defaults": self.defaults.to_json()}
        index = files.index_of(CLASS, parts, {"scheduler": law})
        files.write(save_directory, index, parts, {"scheduler": law}, own, dtype=dtype, variant=variant)

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
            seed: picture i is drawn from seed + i (or seed[i]), whatever the batch; None draws a seed and tells it.
            latents: unit Gaussian noise to start from, (B, 3, h, w) of the small picture's size.
            sampler, spacing, sampler_options, thresholding: as of LatentDiffusionPipeline.
        Returns: LatentDiffusionOutput, or (images,) for return_dict=False.
        Raises: LdmPipeError naming argument, value and range, before any work.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        small = check_small(image, None if batch_size == 1 else no_texts(batch_size).num_pictures)
        size = (small.shape[2] * self.factor, small.shape[3] * self.factor)
        request = check_call(self, given, no_texts(len(small)), size)
        with self.one_at_a_time():
            draw = drawing.noise_source(request)
            eps = first_noise(self, request, draw)
            cond = Condition(spatial=small.to(self.device, self.dtype))
            output = draw_pictures(self, request, eps, draw, cond, None)
        return output if return_dict else (output.images,)
