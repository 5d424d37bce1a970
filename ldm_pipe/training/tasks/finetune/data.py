"""The pictures and captions of a fine-tuning run as tensors, and its loss.

What enters: records, a pipeline and a FinetuneConfig. What leaves: latents and embeddings (or token ids), computed
once, and `loss(micro)` for the trainer. This file knows no optimiser and does not choose what is trained.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from conditioning.text import ids_digest
from ldm_pipe.data.cache import TextCache, module_hash
from ldm_pipe.data.dataset import Records
from ldm_pipe.data.stream import StreamOrder
from ldm_pipe.drawing.walk import encode
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law
from ldm_pipe.training.run.loop import Logs, Micro
from ldm_pipe.training.run.rng import batch_uniform, generator
from ldm_pipe.training.tasks.diffusion import DiffusionData, diffusion_loss
from ldm_pipe.training.tasks.finetune.config import CAPTION, WORD, FinetuneConfig
from ldm_pipe.training.tasks.finetune.convert import random_masks
from ldm_pipe.training.tasks.finetune.nets import stacked_ids
from ldm_pipe.training.tasks.pictures import (
    ImageBatch,
    ImageBatches,
    LatentBatch,
    LatentBatches,
    ShapePlan,
    StreamBatches,
    drawing_weights,
    open_records,
    plan_shapes,
)


def open_instances(config: FinetuneConfig) -> Records:
    """Read the run's pictures, captions only where they are used; `max_train_samples` are drawn by the seed.

    Raises: LdmPipeError naming what is missing: pictures, captions, columns.
    """
    column, most = config.data.caption_column if config.reads_captions else None, config.data.max_train_samples
    data = config.data.model_copy(update={"caption_column": column, "max_train_samples": None})
    records = open_records(data, config.output_dir)
    if not len(records):
        raise LdmPipeError("no pictures are left", config.data.train_data_dir, str(records.report))
    if most is None or most >= len(records):
        return records
    chosen = torch.randperm(len(records), generator=generator(config.seed, "samples"))[:most]
    return records.select(sorted(chosen.tolist()))


def captions_of(config: FinetuneConfig, records: Records) -> list[list[str]]:
    """Write the captions of every picture: each template with each of its captions, equally many for all pictures."""
    most = max(len(captions) for captions in records.caption_lists)
    rows = [[captions[i % len(captions)] for i in range(most)] for captions in records.caption_lists]
    return [[write_caption(template, text, config) for template in config.templates for text in row] for row in rows]


def write_caption(template: str, caption: str, config: FinetuneConfig) -> str:
    """Put a picture's caption, and the new word where there is one, into a template."""
    return template.replace(CAPTION, caption).replace(WORD, config.placeholder_token or "")


def check_shapes(pipe: LatentDiffusionPipeline, plan: ShapePlan) -> None:
    """Refuse sides that the autoencoder cannot map to latents and back.

    Raises: LdmPipeError with the sides nearby that fit.
    """
    unit = pipe.factor
    for height, width in plan.shapes:
        if height % unit or width % unit:
            low = max(min(height, width) // unit, 1) * unit
            what = f"pictures of {width}x{height} do not fit a model with one latent for {unit} pixels a side"
            how = f"Use a resolution (and bucket_step) that is a multiple of {unit}, such as {low} or {low + unit}."
            raise LdmPipeError(what, "config data.resolution", how)


@dataclass(frozen=True)
class Pictures:
    """The latents of some records, framed anew in every step: cached, or encoded when they are needed.

    Args:
        pipe: has the autoencoder.
        frames: gives the cached latents, or the pictures, of a slice.
        config: the run's.
    """

    pipe: LatentDiffusionPipeline
    frames: LatentBatches | ImageBatches | StreamBatches
    config: FinetuneConfig

    @torch.no_grad()
    def moments(self, micro: Micro) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the normalised latents of a slice, (B, C, h, w) each."""
        autoencoder, batch = self.pipe.autoencoder, self._batch(micro)
        raw = (
            batch if isinstance(batch, LatentBatch) else autoencoder.encode_moments(batch.images.to(autoencoder.device))
        )
        scale, shift = autoencoder.scaling_factor, autoencoder.shift_factor
        return (raw.mean.cpu() - shift) * scale, torch.exp(0.5 * raw.log_var.cpu()) * scale

    @torch.no_grad()
    def beside(self, micro: Micro) -> dict[str, Tensor]:
        """Return what the U-Net reads beside x_t and the text: SDXL's six numbers, the mask and the known part."""
        batch, found = self._batch(micro), {}
        if self.config.data.streaming:
            assert isinstance(batch, ImageBatch)
            found |= self._texts(batch.captions, micro)
        if self.pipe.unet.spec.embedding.number_dim:
            found["labels"] = batch.time_ids.float()
        if self.config.inpainting:
            assert isinstance(batch, ImageBatch)
            masks = random_masks(self.config.seed, micro, batch.images.shape[2:]).to(self.pipe.autoencoder.device)
            known = self.pipe.autoencoder.encode(batch.images.to(masks) * (masks < 0.5))
            found["spatial"] = torch.cat([F.interpolate(masks, size=known.shape[2:]), known], dim=1)
        return found

    def _texts(self, captions: Sequence[str], micro: Micro) -> dict[str, Tensor]:
        """Write, drop and encode the captions of a slice."""
        config, encoders = self.config, self.pipe.text_encoders
        draws = batch_uniform(2, config.seed, "streamed caption", micro.step, positions=micro.positions).tolist()
        texts = []
        for caption, (drop, which) in zip(captions, draws, strict=True):
            template = config.templates[int(which * len(config.templates))]
            texts.append("" if drop < config.caption_dropout else write_caption(template, caption, config))
        if config.trains_tokens:
            ids, mask = stacked_ids(encoders, texts)
            return {"tokens": ids, "token_mask": mask}
        found = {name: value.float() for name, value in encode(self.pipe, texts).slots().items()}
        if self.pipe.zero_empty_prompt:
            empty = [i for i, text in enumerate(texts) if not text]
            found = {name: value.index_fill(0, torch.tensor(empty, dtype=torch.int64, device=value.device), 0.0)
                     for name, value in found.items()}  # fmt: skip
        return found

    def _batch(self, micro: Micro) -> LatentBatch | ImageBatch:
        """Frame a slice once, for all who ask."""
        if "frames" not in micro.memo:
            micro.memo["frames"] = self.frames(micro)
        return micro.memo["frames"]


def cache_pictures(
    pipe: LatentDiffusionPipeline, config: FinetuneConfig, records: Records, plan: ShapePlan, order: Any
) -> Pictures:
    """Compute, or find, the latents of every picture; with `cache_latents` off they are encoded in each step.

    So they are for inpainting too, where the known part depends on the mask of the step.
    """
    autoencoder, data = pipe.autoencoder, config.data
    if not config.cache_latents or config.inpainting:
        return Pictures(pipe, ImageBatches(records, plan, data, config.seed, order), config)
    with tqdm(total=len(records), desc="latents") as bar:
        frames = LatentBatches.build(
            config.cache_dir, records, plan, autoencoder.encode_moments, data, config.seed,
            autoencoder_hash=module_hash(autoencoder), device=autoencoder.device,
            progress=lambda done, _: bar.update(done - bar.n) and None,
        )  # fmt: skip
    return Pictures(pipe, frames, config)


@torch.no_grad()
def cache_texts(
    pipe: LatentDiffusionPipeline, config: FinetuneConfig, variants: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Embed every distinct caption once, or only tokenize it where the text encoders run in every step."""
    texts = [*dict.fromkeys(text for row in variants for text in row if text), ""]
    rows = {text: row for row, text in enumerate(texts)}
    table = torch.tensor([[rows[text] for text in row] for row in variants])
    if config.trains_tokens:
        ids, mask = stacked_ids(pipe.text_encoders, texts)
        return {"tokens": ids, "caption_rows": table, "token_mask": mask}
    encoders = [f"{module_hash(encoder)} {ids_digest(encoder, texts)}" for encoder in pipe.text_encoders]
    with tqdm(total=len(texts), desc="captions") as bar:
        found = TextCache.build(
            config.cache_dir, texts, lambda part: encode(pipe, part), encoder_hash=" ".join(encoders), batch_size=64,
            dtype=torch.float16, progress=lambda done, _: bar.update(done - bar.n) and None,
        )  # fmt: skip
    slots = {"tokens": found.tokens, "pooled": found.pooled}
    if pipe.zero_empty_prompt:  # SDXL's guidance leaves from zeros, so a dropped caption is zeros too
        slots = {name: x if x is None else torch.cat([x[:-1], torch.zeros_like(x[-1:])]) for name, x in slots.items()}
    return {**slots, "caption_rows": table, "token_mask": found.token_mask}


@dataclass(frozen=True)
class Inputs:
    """What the steps of a run read.

    Args:
        data: the run's pictures and captions.
        num_rows: how many pictures; 0 for a stream.
        order: makes the data order of a global batch size.
        fingerprint: of the pictures and captions, to notice changed ones.
        prior, prior_order: the pictures of the class, where it is preserved, and their order.
    """

    data: DiffusionData
    num_rows: int
    order: Callable[[int], Any]
    fingerprint: str = ""
    prior: DiffusionData | None = None
    prior_order: Any = None


def make_inputs(
    pipe: LatentDiffusionPipeline,
    config: FinetuneConfig,
    records: Records,
    class_records: Records | None = None,
) -> Inputs:
    """Compute everything that the steps read.

    Args:
        class_records: pictures of the class that is preserved.
    """
    parts = [(records, captions_of(config, records))]
    if class_records is not None:
        parts.append((class_records, [[config.class_prompt or ""]] * len(class_records)))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * num_processes
    plans = [plan_shapes(part, config.data, global_batch) for part, _ in parts]
    weights = drawing_weights(records, config.data)
    orders = [plan.order(config.seed + i, None if i else weights) for i, plan in enumerate(plans)]
    found = []
    for (part, variants), plan, order in zip(parts, plans, orders, strict=True):
        check_shapes(pipe, plan)
        pictures = cache_pictures(pipe, config, part, plan, order(global_batch))
        texts = cache_texts(pipe, config, variants)
        found.append(DiffusionData(None, None, moments=pictures.moments, more=pictures.beside, **texts))
    fingerprint = f"{records.fingerprint} {encoders_hash(pipe)}"
    prior = (found[1], orders[1](global_batch)) if len(found) > 1 else ()
    return Inputs(found[0], len(records), orders[0], fingerprint, *prior)


def encoders_hash(pipe: LatentDiffusionPipeline) -> str:
    """Hash the networks that turn pictures and captions into what the U-Net sees."""
    hashes = [module_hash(module) for module in (pipe.autoencoder, *pipe.text_encoders)]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def stream_inputs(pipe: LatentDiffusionPipeline, config: FinetuneConfig) -> Inputs:
    """Read pictures and captions forward, nothing kept: both are encoded in the step that needs them."""
    part = {"process_index": int(os.environ.get("RANK", "0")), "num_processes": int(os.environ.get("WORLD_SIZE", "1"))}
    column = config.data.caption_column if config.reads_captions else None
    data = config.data.model_copy(update={"caption_column": column})
    per_step = config.train_batch_size * config.gradient_accumulation_steps
    pictures = Pictures(pipe, StreamBatches.open(data, config.seed, **part, per_step=per_step), config)
    nothing = cache_texts(pipe, config, [[""]])
    nothing["caption_rows"] = nothing["caption_rows"].expand(1 << 40, 1)  # the captions come with the pictures
    found = DiffusionData(None, None, moments=pictures.moments, more=pictures.beside, **nothing)
    return Inputs(found, 0, StreamOrder, f"{config.data.train_data_dir} {encoders_hash(pipe)}")


def finetune_loss(
    net: Callable[..., Tensor],
    inputs: Inputs,
    schedule: Law,
    config: FinetuneConfig,
    *,
    global_batch: int,
    device: torch.device,
) -> Callable[[Micro], tuple[Tensor, Logs]]:
    """Make the loss of a run: the diffusion loss, where asked with the class preserved beside the instances.

        L = L(instances) + prior_loss_weight L(class)    (Ruiz et al. 2022, arXiv:2208.12242, eq. 2)

    Each slice of instances is joined by as many pictures of the class, noised independently.
    """
    sizes: dict[str, Any] = {"global_batch": global_batch, "device": device}
    of_instances = diffusion_loss(net, inputs.data, schedule, config.loss_config(), **sizes)
    if inputs.prior is None:
        return of_instances
    of_class = diffusion_loss(net, inputs.prior, schedule, config.loss_config(), **sizes)

    def loss(micro: Micro) -> tuple[Tensor, Logs]:
        value, logs = of_instances(micro)
        rows = inputs.prior_order.batch_at(micro.step)[micro.positions.start : micro.positions.stop].tolist()
        places = range(micro.positions.start + global_batch, micro.positions.stop + global_batch)
        prior, _ = of_class(Micro(micro.step, rows, places))
        logs = {**logs, "instance_loss": float(value.detach()), "prior_loss": float(prior.detach())}
        return value + config.prior_loss_weight * prior, logs

    return loss
