"""What a diffusion training reads: latents and text embeddings, computed once and kept, maps, classes, the network.

What enters: a config, the records of a data set, a trained autoencoder and text encoders. What leaves: the
`DiffusionData` of the run and a U-Net that fits it. It knows no loss and no trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from autoencoder import Autoencoder
from conditioning.load import AnyTextEncoder
from conditioning.text import ids_digest
from ldm_pipe.data.cache import TextCache, caption_variants, module_hash
from ldm_pipe.data.captions import mix_caption
from ldm_pipe.data.dataset import Records
from ldm_pipe.networks import UNet
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.run.rng import generator
from ldm_pipe.training.tasks.beside import Beside
from ldm_pipe.training.tasks.diffusion import DiffusionConfig, DiffusionData, Texts
from ldm_pipe.training.tasks.joint import token_ids
from ldm_pipe.training.tasks.pictures import LatentBatches, ShapePlan


def build_unet(config: DiffusionConfig, autoencoder: Autoencoder, token_width: int, beside: Beside) -> UNet:
    """Build the network of the config with weights drawn from its seed."""
    maps = 0 if beside.spatial is None else beside.spatial.channels
    shape = config.unet.model_dump(mode="json") | {
        "sample_size": config.data.resolution // autoencoder.factor,
        "in_channels": autoencoder.latent_channels + maps,
        "out_channels": autoencoder.latent_channels * (2 if config.learn_variance else 1),
        "cross_attention_dim": token_width,
    }
    if beside.classes is not None:
        shape["num_class_embeds"] = beside.classes.null_label + 1
    with torch.random.fork_rng():
        torch.default_generator.set_state(generator(config.seed, "init", "unet").get_state())
        return UNet.from_config(shape)


def cache_latents(
    config: DiffusionConfig, records: Records, autoencoder: Autoencoder, plan: ShapePlan
) -> Callable[[Micro], tuple[Tensor, Tensor]]:
    """Compute, or find, the latents of every picture.

    Returns: what gives the normalised posterior of a slice, mean and standard deviation (B, C, h, w).
    """
    with tqdm(total=len(records), desc="latents") as bar:
        latents = LatentBatches.build(
            config.cache_dir, records, plan, autoencoder.encode_moments, config.data, config.seed,
            autoencoder_hash=module_hash(autoencoder), device=autoencoder.device,
            progress=lambda done, _: bar.update(done - bar.n) and None,
        )  # fmt: skip
    scale, shift = autoencoder.scaling_factor, autoencoder.shift_factor

    def moments(micro: Micro) -> tuple[Tensor, Tensor]:
        batch = latents(micro)
        return (batch.mean - shift) * scale, torch.exp(0.5 * batch.log_var) * scale

    return moments


@torch.no_grad()
def cache_texts(config: DiffusionConfig, records: Records, text_encoders: list[AnyTextEncoder]) -> dict[str, Any]:
    """Compute, or find, the embeddings of every caption variant; token ids where the encoder is trained too.

    Returns: the fields of `DiffusionData` that captions fill.
    """
    variants = caption_variants(
        records.caption_lists, records.keywords, config.num_caption_variants, config.seed, mix_caption
    )
    texts = list(dict.fromkeys(text for row in variants for text in row if text))
    if config.train_text_encoder:
        if len(text_encoders) > 1:
            what = "train_text_encoder trains one encoder, text_encoder_2 names another"
            raise LdmPipeError(what, "config", "Leave one of the two out.")
        numbers = {text: number for number, text in enumerate(texts)}
        table = torch.tensor([[numbers.get(text, len(texts)) for text in row] for row in variants])
        ids, mask = token_ids(text_encoders[0], [*texts, ""])
        return {"tokens": ids, "token_mask": mask, "caption_rows": table}
    first, *more = (embed(config, [*texts, ""], encoder) for encoder in text_encoders)
    second = Texts(more[0].tokens, more[0].token_mask, more[0].pooled) if more else None
    slots = {"tokens": first.tokens, "token_mask": first.token_mask, "pooled": first.pooled}
    return {**slots, "second": second, "caption_rows": first.table(variants)}


def embed(config: DiffusionConfig, texts: list[str], text_encoder: AnyTextEncoder) -> TextCache:
    """Compute, or find, what one encoder says of texts."""
    with tqdm(total=len(texts), desc="captions") as bar:
        return TextCache.build(
            config.cache_dir, texts, text_encoder.encode,
            encoder_hash=f"{module_hash(text_encoder)} {ids_digest(text_encoder, texts)}",
            dtype=torch.float16, progress=lambda done, _: bar.update(done - bar.n) and None,
        )  # fmt: skip


def cache_inputs(
    config: DiffusionConfig, records: Records, autoencoder: Autoencoder, encoders: list[AnyTextEncoder], plan: ShapePlan
) -> DiffusionData:
    """Gather everything a step needs."""
    side = config.data.resolution // autoencoder.factor
    moments = cache_latents(config, records, autoencoder, plan)
    texts = cache_texts(config, records, encoders)
    return DiffusionData(None, None, beside=Beside.read(records, config.data, (side, side)), moments=moments, **texts)


def shown_beside(beside: Beside, records: Records, prompts: list[str]) -> dict[str, Any]:
    """Return the maps and classes that validation prompts are drawn with: those of the picture so called, else none."""
    rows = [records.captions.index(prompt) if prompt in records.captions else None for prompt in prompts]
    slots: dict[str, Any] = {}
    if beside.maps is not None:
        nothing = torch.zeros_like(beside.maps[0])
        maps = torch.stack([nothing if row is None else beside.maps[row] for row in rows])
        slots["spatial"] = (maps + 1) / 2  # 0.5 is no map
    if beside.labels is not None:
        slots["class_labels"] = [None if row is None else int(beside.labels[row]) for row in rows]
    return slots
