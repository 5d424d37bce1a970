"""Teach a text tower to sketch the drawing: its last positions predict the latents of the picture.

What enters: a CLIP text tower, captions, latents. What leaves: the same tower, whose last hidden states hold a coarse
picture that a U-Net reads by cross-attention; the linear head that taught them is dropped. Padding carries the sketch:
attention is causal, so that the last positions see the whole caption, and the U-Net is shown all positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from conditioning import CLIPTextEncoder, ClipTokenizer
from conditioning.contrastive import contrastive_loss
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.rng import key_seed
from ldm_pipe.training.tasks.tower import TowerUpdate

PATCH = 4


def patches(latents: Tensor) -> Tensor:
    """Cut latents (B, C, h, w) into squares of 4x4 positions, row by row: (B, h w / 16, 16 C)."""
    return rearrange(latents, "b c (y p) (x q) -> b (y x) (c p q)", p=PATCH, q=PATCH)


class SketchHead(nn.Module):
    """One linear layer from the last hidden states to the patches of the latents; thrown away after the training.

    Args:
        latents: all that are to be predicted, (N, C, h, w); their mean is left to the head's constant.
        width: of the text tower.
        max_length: positions of the text tower.
    Raises: LdmPipeError if the latents do not cut into patches, or have more of them than half the positions.
    """

    def __init__(self, latents: Tensor, width: int, max_length: int) -> None:
        """Make the layer and keep the mean drawing."""
        super().__init__()
        _, channels, height, across = latents.shape
        self.num = (height // PATCH) * (across // PATCH)
        if height % PATCH or across % PATCH or not 1 <= self.num <= max_length // 2:
            what = f"latents of {height}x{across} for {max_length} positions"
            raise LdmPipeError(what, "sketch", "Use sides in multiples of 4, and at most half as many patches.")
        self.linear = nn.utils.skip_init(nn.Linear, width, channels * PATCH * PATCH)  # draws nothing
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mean: Tensor
        self.register_buffer("mean", patches(latents).mean(dim=0))

    def forward(self, hidden: Tensor) -> Tensor:
        """Predict the patches less their mean from hidden states (B, L, D): (B, patches, values)."""
        return self.linear(hidden[:, -self.num :])

    def target(self, latents: Tensor) -> Tensor:
        """Return what `forward` shall predict for some latents."""
        return patches(latents) - self.mean


@dataclass(frozen=True)
class SketchSettings:
    """The training: AdamW with warm-up and cosine decay to zero; the contrastive term keeps drawings apart."""

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    lr_warmup_steps: int
    contrastive_weight: float = 0.1
    seed: int = 0


def hidden_states(encoder: CLIPTextEncoder, tokenizer: ClipTokenizer, captions: list[str]) -> Tensor:
    """Return the last hidden states of all positions, padding included, as a pipeline passes them on: (B, L, D)."""
    return encoder(tokenizer(captions, max_length=encoder.max_length).ids).last


def train_sketch(
    encoder: CLIPTextEncoder,
    tokenizer: ClipTokenizer,
    latents: Tensor,
    concepts: Tensor,
    weights: Tensor,
    caption: Callable[[int], str],
    settings: SketchSettings,
    *,
    save: Callable[[int], None] = lambda step: None,
) -> SketchHead:
    """Train the tower in place.

        loss = mean (head(hidden) - (patches - mean))^2 + weight * InfoNCE(predicted latents, true latents)

    Args:
        latents: normalised, of all rows, (N, C, h, w).
        concepts: (N,); rows of one concept are not held against each other.
        weights: how often a row is drawn, (N,).
        caption: draws a caption for a row.
        save: called after every hundredth of the steps or so, with the number of steps done.
    Returns: the head, with which `measure_sketch` looks at the tower.
    Raises: LdmPipeError for a loss that is not finite.
    """
    head = SketchHead(latents, encoder.config.hidden_size, encoder.max_length)
    at_start = torch.Generator().manual_seed(key_seed(settings.seed, "sketch head"))
    nn.init.normal_(head.linear.weight, std=encoder.config.hidden_size**-0.5, generator=at_start)
    update = TowerUpdate(
        [*encoder.parameters(), *head.parameters()],
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        num_warmup=settings.lr_warmup_steps,
        num_steps=settings.num_steps,
    )
    generator = torch.Generator().manual_seed(key_seed(settings.seed, "sketch rows"))
    progress = tqdm(range(settings.num_steps), desc="sketch", mininterval=5)
    for step in progress:
        rows = torch.multinomial(weights, settings.batch_size, generator=generator)
        predicted = head(hidden_states(encoder, tokenizer, [caption(row) for row in rows.tolist()]))
        target = head.target(latents[rows])
        square = (predicted - target).square().mean()
        apart = contrastive_loss(target.flatten(1), predicted.flatten(1), update.log_scale, concepts[rows])
        loss = square + settings.contrastive_weight * apart
        update(loss, step)
        progress.set_postfix(square=f"{square.item():.4f}", apart=f"{apart.item():.3f}", refresh=False)
        save(step + 1)
    return head


@dataclass(frozen=True)
class SketchReport:
    """How well captions foretell their drawings.

    Args:
        first, ten: share of captions whose own drawing is nearest to the prediction, or among the ten nearest.
        explained: 1 - (mean square error) / (that of the mean drawing of the training); below 0 is worse than it.
        nearest: the nearest of the training drawings, (B,).
    """

    first: float
    ten: float
    explained: float
    nearest: Tensor


@torch.no_grad()
def measure_sketch(
    head: SketchHead,
    encoder: CLIPTextEncoder,
    tokenizer: ClipTokenizer,
    captions: list[str],
    latents: Tensor,
    others: Tensor,
) -> SketchReport:
    """Predict the drawings of captions and look for them among others.

    Args:
        captions: B texts.
        latents: their own, (B, C, h, w).
        others: those of the training, (N, C, h, w); drawings that are in both count once.
    """
    parts = [captions[i : i + 256] for i in range(0, len(captions), 256)]
    predicted = torch.cat([head(hidden_states(encoder, tokenizer, part)) for part in parts]).flatten(1)
    own, all_others = head.target(latents).flatten(1), head.target(others).flatten(1)
    to_own = (predicted - own).square().sum(dim=1)
    distances = torch.cdist(predicted, all_others).square()
    nearer = (distances < to_own[:, None] * (1 - 1e-5)).sum(dim=1)
    nearer += (
        (torch.cdist(predicted, own).square() < to_own[:, None] * (1 - 1e-5)).sum(dim=1) if _new(own, all_others) else 0
    )
    explained = 1 - float(to_own.mean() / own.square().sum(dim=1).mean())
    rates = [float((nearer < k).float().mean()) for k in (1, 10)]
    return SketchReport(rates[0], rates[1], explained, distances.argmin(dim=1))


def _new(own: Tensor, others: Tensor) -> bool:
    """Return whether the drawings are not those of the training."""
    return float(torch.cdist(own[:1], others).min()) > 1e-3
