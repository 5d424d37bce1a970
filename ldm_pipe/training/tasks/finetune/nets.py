"""What a fine-tuning run trains: the networks of a pipeline as one module, in which only the chosen weights learn.

What enters: a pipeline and a FinetuneConfig. What leaves: a module for the trainer, and how its result is written. This
file knows no data and no loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning import CLIPTextEncoder, Reading
from conditioning.joined import join_all
from ldm_pipe.interop.lora.file import networks_of, save_lora
from ldm_pipe.interop.lora.layers import TrainableLora
from ldm_pipe.interop.lora.words import save_word
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.rng import generator
from ldm_pipe.training.tasks.finetune.config import FinetuneConfig
from ldm_pipe.training.tasks.finetune.words import NewWord

LORA_FILE, WORD_FILE = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
PATTERNS = {"all": "*", "cross_attention": "*.attn2.*", "attention": "*.attn[12].*"}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class FinetuneNet(nn.Module):
    """A U-Net, the text encoders that run in every step, and what was added to them, as one network.

    Args:
        unet: the U-Net.
        encoders: text encoders; without any the tokens come ready.
        added: LoRA layers or a new word, whose hooks act inside the others.
    """

    def __init__(self, unet: nn.Module, encoders: Sequence[nn.Module] = (), added: nn.Module | None = None) -> None:
        """Hold the parts."""
        super().__init__()
        self.unet, self.text_encoders = unet, nn.ModuleList(encoders)
        self.added = nn.Identity() if added is None else added

    def forward(
        self, x_t: Tensor, t: Tensor, *, tokens: Tensor, token_mask: Tensor | None = None, **slots: Tensor
    ) -> Tensor:
        """Predict from noisy x.

        Args:
            x_t: noisy latents, shape (B, C, h, w).
            t: network time, shape (B,).
            tokens: embeddings, shape (B, L, D); with E text encoders here, token ids of each, shape (B, L, E).
            token_mask: True up to the end of the text, shape (B, L), or (B, L, E).
            slots: further inputs of the U-Net.
        """
        if len(self.text_encoders):
            assert token_mask is not None
            encoders: Any = self.text_encoders
            conds = [e.encode_ids(tokens[..., i], token_mask[..., i]) for i, e in enumerate(encoders)]
            return self.unet(x_t, t, **join_all(conds).slots(), **slots)
        if token_mask is not None:
            slots["token_mask"] = token_mask
        return self.unet(x_t, t, tokens=tokens, **slots)


@torch.no_grad()
def stacked_ids(encoders: Sequence[Any], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokenize all texts of a run for every encoder: ids and mask, (V, L, E) each.

    Raises: LdmPipeError if an encoder has no tokenizer, or their lengths differ.
    """
    lacking = [type(encoder).__name__ for encoder in encoders if encoder.tokenizer is None]
    if lacking:
        raise LdmPipeError(f"{lacking[0]} has no tokenizer", "fine-tuning", "Load a folder with its tokenizer.")
    batches = [encoder.tokenizer(list(texts), max_length=encoder.max_length) for encoder in encoders]
    lengths = {batch.ids.shape[1] for batch in batches}
    if len(lengths) > 1:
        raise LdmPipeError(f"text encoders of lengths {sorted(lengths)}", "fine-tuning", "Train the U-Net alone.")
    return torch.stack([b.ids for b in batches], -1), torch.stack([b.mask for b in batches], -1)


@dataclass
class Trained:
    """What a run trains."""

    net: FinetuneNet
    pipe: LatentDiffusionPipeline
    lora: TrainableLora | None = None
    word: NewWord | None = None

    def save(self, folder: Path, card: dict[str, str]) -> None:
        """Write the result: `pipeline/` for any loader, and beside it the small file of a LoRA or a word."""
        if self.lora is not None:
            save_lora(folder / LORA_FILE, self.lora.layers())
        if self.word is not None:
            self.word.write()
            save_word(folder / WORD_FILE, self.word.name, self.word.vectors)
        with self.merged():
            self.pipe.save_pretrained(folder / "pipeline", card=card)

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Put a LoRA into the weights themselves for the block, as a folder holds them; then their old bits return."""
        kept: list[tuple[Tensor, Tensor]] = []
        networks = networks_of(self.pipe)
        try:
            with torch.no_grad():
                for (part, name), layer in (self.lora.layers() if self.lora is not None else {}).items():
                    weight: Any = networks[part].get_submodule(name).weight
                    kept.append((weight, weight.detach().clone()))
                    weight += layer.delta().reshape(weight.shape)
            yield
        finally:
            with torch.no_grad():
                for weight, old in kept:
                    weight.copy_(old)


def build_trained(pipe: LatentDiffusionPipeline, config: FinetuneConfig) -> Trained:
    """Choose what trains; everything else is frozen.

    Raises: LdmPipeError if nothing is left to train, or the model has not what the method needs.
    """
    encoders: tuple[Any, ...] = pipe.text_encoders
    for module in (pipe.unet, pipe.autoencoder, *encoders):
        module.requires_grad_(False)
    pipe.unet.to(memory_format=torch.contiguous_format)  # channels-last weights train more slowly on CPUs
    running = encoders if config.trains_tokens else ()
    match config.method:
        case "full":
            choose_parts(pipe.unet, config.train_parts)
            for encoder in running:
                encoder.requires_grad_(True)
                freeze_unread(encoder, encoder.named_parameters())
            return Trained(FinetuneNet(pipe.unet, running), pipe)
        case "lora":
            networks = networks_of(pipe)
            names = list(networks) if config.train_text_encoder else ["unet"]
            targets = {name: config.lora_targets if name == "unet" else TEXT_TARGETS for name in names}
            lora = TrainableLora(
                {name: networks[name] for name in names}, rank=config.rank, alpha=config.lora_alpha, targets=targets,
                generator=generator(config.seed, "init", "lora"),
            )  # fmt: skip
            for (part, name), branch in zip(lora.places, lora.branches, strict=True):
                if part != "unet":
                    freeze_unread(networks[part], ((name, weight) for weight in branch.parameters()))
            return Trained(FinetuneNet(pipe.unet, running, lora), pipe, lora=lora)
        case "textual_inversion":
            assert config.placeholder_token is not None
            assert config.initializer_token is not None
            word = NewWord(encoders, config.placeholder_token, config.initializer_token, config.num_vectors)
            return Trained(FinetuneNet(pipe.unet, running, word), pipe, word=word)


def freeze_unread(encoder: Any, weights: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Freeze weights in layers behind the one that is read: SDXL's first encoder is read before its last layer.

    They would get no gradient, which processes that train together wait for.

    Args:
        encoder: the text encoder.
        weights: weights and the places in the encoder where they act.
    """
    reading: Reading = encoder.reading
    if not isinstance(encoder, CLIPTextEncoder) or reading.pooled != "none":
        return
    depth = encoder.config.num_hidden_layers
    unread = tuple(f"text_model.encoder.layers.{i}." for i in range(depth - reading.skip, depth))
    unread += ("text_projection",) if reading.final_norm else ("text_projection", "text_model.final_layer_norm")
    for name, weight in weights:
        if name.startswith(unread):
            weight.requires_grad_(False)


def choose_parts(unet: nn.Module, parts: Sequence[str]) -> None:
    """Let the weights learn whose names fit one of the patterns.

    Raises: LdmPipeError for a pattern that fits none.
    """
    names = [name for name, _ in unet.named_parameters()]
    patterns = [PATTERNS.get(part, part) for part in parts]
    for part, pattern in zip(parts, patterns, strict=True):
        if not any(fnmatch(name, pattern) for name in names):
            tops = sorted({name.split(".")[0] for name in names})
            how = f"Use {', '.join(PATTERNS)}, or patterns such as up_blocks.*; the U-Net has {', '.join(tops)}."
            raise LdmPipeError(f"train_parts {part!r} fits no weight of the U-Net", "config", how)
    for name, weight in unet.named_parameters():
        weight.requires_grad_(any(fnmatch(name, pattern) for pattern in patterns))
