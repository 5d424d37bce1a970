"""unCLIP, as Karlo: a prompt, or a picture, to the CLIP embedding of a picture, and that to pixels.

    prompt --CLIP--> tokens, vector;  noise --prior--> embedding;  or: picture --CLIP--> embedding
    embedding --unclip_stages--> picture

What enters: prompts, pictures, or embeddings. What leaves: pictures. Both classes are diffusers' in another guise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning import CLIPImageEncoder, Condition
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.output import MAX_PICTURES, LatentDiffusionOutput, real_number, whole_number
from ldm_pipe.drawing.pixels import load_images
from ldm_pipe.drawing.placement import Placement
from ldm_pipe.drawing.request.checks import Texts, check_texts, no_texts
from ldm_pipe.drawing.request.request import Request
from ldm_pipe.drawing.request.shared import check_floats, repeat_rows
from ldm_pipe.interop.folders import other
from ldm_pipe.interop.folders.unclip import UnCLIPParts, check_preprocessor, load_parts, refuse, write_parts
from ldm_pipe.networks.prior import PriorTransformer
from ldm_pipe.pipelines.unclip_stages import Cascade, Stage, encode, inner, paint, settle
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law

TEXT, IMAGE = "UnCLIPPipeline", "UnCLIPImageVariationPipeline"


class UnCLIPPipeline(Cascade, Placement):
    """Draw pictures from prompts by way of CLIP's embedding of them (Ramesh et al. 2022, arXiv:2204.06125).

    Args:
        parts: from the embedding to pixels.
        prior: of the embedding, from the prompt.
        prior_schedule: the noise law that the prior was trained on.
    """

    def __init__(self, parts: UnCLIPParts, prior: PriorTransformer, prior_schedule: Law, *, name: str = "") -> None:
        """Compose the parts; parts that do not belong together are refused."""
        super().__init__(parts, name)
        self.prior, self.prior_schedule = prior, prior_schedule
        config, width = prior.config, parts.text_proj.config.clip_embeddings_dim
        widths = {config.embedding_dim, config.embedding_proj_dim or width, config.clip_embed_dim or width}
        if widths != {width} or config.added_emb_type is None or config.encoder_hid_proj_type is None:
            raise refuse(f"the prior maps embeddings of widths {sorted(widths)}, the decoder reads {width}")
        if config.num_embeddings != parts.text_encoder.max_length:
            raise refuse(f"prompts are {parts.text_encoder.max_length} tokens, the prior has {config.num_embeddings}")

    @property
    def components(self) -> dict[str, nn.Module]:
        """Return the networks by name."""
        return {"prior": self.prior, **self.parts.networks}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> UnCLIPPipeline:
        """Load a folder or a model of the hub: UnCLIPPipeline of diffusers.

        Args:
            options: dtype or torch_dtype, variant, use_safetensors, local_files_only, revision, device: as of
                `LatentDiffusionPipeline.from_pretrained`.
        Raises: LdmPipeError naming file and cause.
        """
        with other.opened(pretrained_model_name_or_path, (TEXT,), **options) as (root, _, named, common):
            prior = other.load_part(root / "prior", PriorTransformer, common)
            law = other.read_law(root / "prior_scheduler")
            return cls(load_parts(root, common), prior, law, name=other.name_of(root, named))

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | str | None = None, variant: str | None = None
    ) -> None:
        """Write a folder that diffusers draws with too.

        Raises: LdmPipeError naming what has no place in such a folder.
        """
        laws = {"prior_scheduler": self.prior_schedule, **self.parts.laws}
        write_parts(
            save_directory, TEXT, self.parts, ("prior", self.prior), laws, self.name, dtype=dtype, variant=variant
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int = 25,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int = 7,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prior_latents: Tensor | None = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | None = None,
        text_model_output: Any = None,
        text_attention_mask: Tensor | None = None,
        prior_guidance_scale: float = 4.0,
        decoder_guidance_scale: float = 8.0,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seed: int | list[int] | None = None,
    ) -> LatentDiffusionOutput | tuple[Any]:
        """Draw pictures; names, order and defaults are those of diffusers' UnCLIPPipeline.

        Args:
            prior_latents, decoder_latents, super_res_latents: unit Gaussian noise to start the stages from: (B, P), and
                (B, 3, H, W) of the two U-Nets' sizes.
            text_model_output: in place of prompts, the projected vectors (B, P) and the last hidden states (B, L, P),
                or what transformers' CLIPTextModelWithProjection returns, with `text_attention_mask`, (B, L).
            prior_guidance_scale, decoder_guidance_scale: up to 1 there is no guidance in that stage.
            seed: picture i is drawn from seed + i (or seed[i]), whatever the batch; None draws a seed and tells it.
            output_type: "pil", "np", "pt" in [0, 1], or "latent": in [-1, 1].
        Returns: LatentDiffusionOutput, or (images,) for return_dict=False.
        Raises: LdmPipeError naming argument, value and range, before any work.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        text, texts = self._check_texts(given)
        requests = settle(self, given, texts)
        scale = real_number("prior_guidance_scale", prior_guidance_scale, 0.0, 1000.0)
        stage, shape = Stage(self, self.prior, self.prior_schedule), (self.prior.config.embedding_dim,)
        told = {**given, **inner(requests[1])}
        request: Request = stage.settle("prior", told, replace(texts, guidance_scale=scale), shape)
        with self.one_at_a_time():
            draw = drawing.noise_source(requests[1])
            text = encode(self, list(texts.prompts or ())) if text is None else text.to(self.device, self.dtype)
            guided = request.guided or requests[0].guided
            null = encode(self, [""] * texts.num_pictures) if guided else None
            x0 = stage.walk(request, shape, draw, text, null if request.guided else None).images
            with self.on_device(self.prior):
                image = self.prior.denormalise(x0)
            settings = {"Prior steps": request.sampling.steps.num_steps, "Prior CFG scale": f"{scale:g}"}
            output = paint(self, requests, image, text, null, draw, settings)
        return output if return_dict else (output.images,)

    def _check_texts(self, given: dict[str, Any]) -> tuple[Condition | None, Texts]:
        """Settle the prompts, or what stands for them, a row per picture."""
        output, mask = given["text_model_output"], given["text_attention_mask"]
        if (output is None) != (mask is None) or (output is not None and given["prompt"] is not None):
            what = "text_model_output and text_attention_mask must come together, in place of a prompt"
            raise LdmPipeError(what, how_to_fix="give both, or a prompt")
        if output is None and given["prompt"] is None:
            raise LdmPipeError("neither of prompt and text_model_output given", how_to_fix="give one of them")
        if output is None:
            return None, check_texts(self, {**given, "guidance_scale": 1.0})
        each = whole_number("num_images_per_prompt", given["num_images_per_prompt"], 1, MAX_PICTURES)
        try:
            vectors, tokens = output[0], output[1]
            text = Condition(tokens=tokens, token_mask=mask.bool(), pooled=vectors)
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            advice = "give the pair (vectors, tokens), and a mask"
            raise LdmPipeError(f"text_model_output is a {type(output).__name__}", how_to_fix=advice) from error
        length, width = self.parts.text_encoder.max_length, self.prior.config.embedding_dim
        check_floats("text_model_output[0]", vectors, (text.batch_size, width))
        check_floats("text_model_output[1]", tokens, (text.batch_size, length, width))
        return text.repeat(each), no_texts(text.batch_size * each)


class UnCLIPImageVariationPipeline(Cascade, Placement):
    """Draw pictures that mean what a picture means (Ramesh et al. 2022, arXiv:2204.06125, section 3.1).

    Args:
        parts: from the embedding to pixels.
        image_encoder: CLIP's, of pictures.
    """

    def __init__(self, parts: UnCLIPParts, image_encoder: CLIPImageEncoder, *, name: str = "") -> None:
        """Compose the parts; parts that do not belong together are refused."""
        super().__init__(parts, name)
        self.image_encoder = image_encoder
        found, width = image_encoder.config.projection_dim, parts.text_proj.config.clip_embeddings_dim
        if image_encoder.slot != "pooled" or found != width:
            raise refuse(f"the image encoder gives {found} numbers ({image_encoder.slot}), the decoder reads {width}")

    @property
    def components(self) -> dict[str, nn.Module]:
        """Return the networks by name."""
        return {"image_encoder": self.image_encoder, **self.parts.networks}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> UnCLIPImageVariationPipeline:
        """Load a folder or a model of the hub: UnCLIPImageVariationPipeline of diffusers.

        Args:
            options: as of `UnCLIPPipeline.from_pretrained`.
        Raises: LdmPipeError naming file and cause.
        """
        with other.opened(pretrained_model_name_or_path, (IMAGE,), **options) as (root, _, named, common):
            encoder = other.load_part(root / "image_encoder", CLIPImageEncoder, common)
            check_preprocessor(root, encoder)
            return cls(load_parts(root, common), encoder, name=other.name_of(root, named))

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | str | None = None, variant: str | None = None
    ) -> None:
        """Write a folder that diffusers draws with too.

        Raises: LdmPipeError naming what has no place in such a folder.
        """
        own = ("image_encoder", self.image_encoder)
        laws = self.parts.laws
        write_parts(save_directory, IMAGE, self.parts, own, laws, self.name, dtype=dtype, variant=variant)

    @torch.no_grad()
    def encode_image(self, image: Any) -> Tensor:
        """Return the CLIP embeddings of pictures, (B, P), for `image_embeddings`.

        Between two of them `ldm_pipe.drawing.editing.slerp` finds the way (arXiv:2204.06125, section 3.2).
        """
        with self.on_device(self.image_encoder):
            pooled = self.image_encoder.encode((load_images(image) * 2 - 1).to(self.device)).pooled
        assert pooled is not None
        return pooled

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        num_images_per_prompt: int = 1,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int = 7,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        decoder_guidance_scale: float = 8.0,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seed: int | list[int] | None = None,
    ) -> LatentDiffusionOutput | tuple[Any]:
        """Draw variations; names, order and defaults are those of diffusers' UnCLIPImageVariationPipeline.

        Args:
            image: one or several pictures; see `LatentDiffusionPipeline.__call__`. Tensors are in [0, 1], not what
                CLIP's preprocessing made of them, as diffusers takes.
            num_images_per_prompt: variations of each.
            image_embeddings: in place of pictures, (B, P); see `encode_image`.
            decoder_latents, super_res_latents, seed, output_type, ...: as of `UnCLIPPipeline`.
        Returns: LatentDiffusionOutput, or (images,) for return_dict=False.
        Raises: LdmPipeError naming argument, value and range, before any work.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        if (image is None) == (image_embeddings is None):
            state = "neither" if image is None else "both"
            raise LdmPipeError(f"{state} of image and image_embeddings given", how_to_fix="give one of them")
        each = whole_number("num_images_per_prompt", num_images_per_prompt, 1, MAX_PICTURES)
        pictures = load_images(image) if image_embeddings is None else None
        rows = image_embeddings if pictures is None else pictures
        assert rows is not None
        if pictures is None:
            width = self.parts.text_proj.config.clip_embeddings_dim
            count = len(rows) if isinstance(rows, Tensor) and rows.ndim == 2 else 1
            check_floats("image_embeddings", rows, (count, width))
        texts = no_texts(len(rows) * each)
        requests = settle(self, given, texts)
        with self.one_at_a_time():
            draw = drawing.noise_source(requests[1])
            text = encode(self, [""] * texts.num_pictures)
            found = rows.to(self.device) if pictures is None else self.encode_image(pictures)
            embeddings = repeat_rows(found, each)
            assert embeddings is not None
            output = paint(self, requests, embeddings, text, text, draw, {})
        return output if return_dict else (output.images,)
