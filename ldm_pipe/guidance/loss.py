"""Guidance by the gradient of any differentiable loss of x0: similarity to a text in CLIP's space, or one of your own.

Enters: a `Denoise` and a loss. Leaves: a `Denoise` whose x0 was moved down the gradient. This file does not know
networks, autoencoders or samplers; a loss that judges pixels decodes by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm_pipe.denoiser import ConditionLike, Denoise, Denoised, Denoiser
from ldm_pipe.guidance.classifier import Classifier, classifier_score
from ldm_pipe.guidance.pair import Guidance
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law

Loss = Callable[[Tensor], Tensor]  # x0 (B, *) -> (B,)


def loss_score(denoise: Denoise, loss: Loss, scale: float, schedule: Law, *, through_network: bool = True) -> Denoise:
    """Guide the score by a loss of x0 (Bansal et al. 2023, arXiv:2302.07121, eq. 6).

        x0' = x0 - s (sigma^2 / alpha) g,   g = gradient of loss(x0(x_t)) by x_t

    which for a loss linear in x0 samples exactly from p(x) exp(-s loss(x)), and approximately for others. Without the
    network's own gradient x0 is taken as (x_t - sigma eps) / alpha at fixed eps, so that g = gradient by x0 / alpha:
    cheaper, and blunter at high noise. Where alpha = 0 nothing is added.

    Args:
        denoise: what is guided.
        loss: maps x0 (B, *) to one number per sample, shape (B,); differentiable.
        scale: s.
        schedule: the noise schedule.
        through_network: whether the gradient runs through the network.

    Returns: (x_t, t) -> Denoised.

    Raises: LdmPipeError for a loss of another shape, one that x0 does not move, and for NaN or infinite gradients.
    """
    if not math.isfinite(scale):
        raise LdmPipeError(f"scale of a loss is {scale}", how_to_fix="use a finite number; 0 is no guidance")

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (float(level) for level in schedule.alpha_sigma(t))
        if alpha == 0 or scale == 0:
            return denoise(x_t, t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(through_network)
            estimate = denoise(x, t)
            x0 = estimate.x0 if through_network else estimate.x0.detach().requires_grad_()
            gradient = _gradient(loss, x0, x if through_network else x0, float(t))
        shift = sigma**2 / alpha * (1.0 if through_network else 1 / alpha)
        return Denoised(estimate.x0.detach() - scale * shift * gradient.to(estimate.x0), _detached(estimate.var_mix))

    return guided


def by_loss(loss: Loss, scale: float, base: Guidance, *, through_network: bool = True) -> Guidance:
    """Return `base` with the guidance of `loss_score` on top, for `pipe(..., guidance=)`."""

    def guidance(
        denoiser: Denoiser, conds: Sequence[ConditionLike], weights: Tensor, uncond: ConditionLike | None
    ) -> Denoise:
        inner = base(denoiser, conds, weights, uncond)
        return loss_score(inner, loss, scale, denoiser.schedule, through_network=through_network)

    return guidance


def by_classifier(classifier: Classifier, labels: Tensor, scale: float, base: Guidance) -> Guidance:
    """Return `base` with a noisy classifier's score on top (`classifier_score`), for `pipe(..., guidance=)`.

    Args:
        classifier: maps (x_t, network time (B,)) to logits (B, K).
        labels: the wanted classes, shape (B,).
        scale: s.
        base: the guidance below, such as `classifier_free(1.0)`.
    """

    def guidance(
        denoiser: Denoiser, conds: Sequence[ConditionLike], weights: Tensor, uncond: ConditionLike | None
    ) -> Denoise:
        inner = base(denoiser, conds, weights, uncond)
        return classifier_score(inner, classifier, labels, scale, denoiser.schedule)

    return guidance


def spherical_distance(vectors: Tensor, targets: Tensor) -> Tensor:
    """Return the squared angle between vectors, (B, D) each, halved as is customary: 2 arcsin(|u - v| / 2)^2, (B,)."""
    u, v = nn.functional.normalize(vectors, dim=-1), nn.functional.normalize(targets, dim=-1)
    return 2 * ((u - v).norm(dim=-1) / 2).clamp(max=1 - 1e-6).arcsin().square()


def range_loss(x0: Tensor, max_value: float = 1.0) -> Tensor:
    """Return how far x0 leaves [-max_value, max_value], mean square per sample, shape (B,)."""
    return (x0 - x0.clamp(-max_value, max_value)).square().flatten(1).mean(dim=1)


def cutouts(image: Tensor, num: int, size: int, seeds: Sequence[int]) -> Tensor:
    """Cut random squares out of pictures and scale them, so that a clean tower sees several views of a noisy estimate.

    Args:
        image: shape (B, C, H, W).
        num: squares per picture; their sides lie between half of the shorter side and all of it.
        size: side of what leaves.
        seeds: one per picture, so that no picture depends on its neighbours.

    Returns: shape (num * B, C, size, size), all pictures' first squares first.
    """
    views: list[list[Tensor]] = []
    shorter = min(image.shape[-2:])
    for picture, seed in zip(image, seeds, strict=True):
        generator, cut = torch.Generator().manual_seed(seed), []
        for share, down, right in torch.rand((num, 3), generator=generator).tolist():
            side = max(int(shorter * (1 - share / 2)), 1)
            top = int(down * (picture.shape[-2] - side + 1))
            left = int(right * (picture.shape[-1] - side + 1))
            square = picture[None, :, top : top + side, left : left + side]
            cut.append(nn.functional.adaptive_avg_pool2d(square, size) if side >= size else _enlarged(square, size))
        views.append(cut)
    return torch.cat([cut[k] for k in range(num) for cut in views])


def clip_loss(
    embed: Callable[[Tensor], Tensor],
    targets: Tensor,
    seeds: Sequence[int],
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    num_cutouts: int = 8,
    size: int = 64,
    range_weight: float = 0.0,
) -> Loss:
    """Return the loss of CLIP guidance with a clean tower: the mean angle of cut-outs to the text, and the range loss.

    Args:
        embed: the image tower: pictures (N, 3, size, size) in [-1, 1] -> vectors (N, D).
        targets: the texts' vectors in the same space, shape (B, D).
        seeds: of the cut-outs, one per picture.
        decode: latents -> pictures in [-1, 1]; None for a model of pixels.
        num_cutouts: views of each picture.
        size: side of the pictures that the tower takes.
        range_weight: weight of `range_loss` on the pictures.

    Raises: LdmPipeError if targets and seeds do not fit, and when called if the tower's vectors have another width.
    """
    if len(targets) != len(seeds):
        raise LdmPipeError(f"{len(targets)} texts and {len(seeds)} seeds", "guidance.clip_loss", "give one of each")

    def loss(x0: Tensor) -> Tensor:
        image = x0 if decode is None else decode(x0)
        vectors = embed(cutouts(image, num_cutouts, size, seeds))
        if vectors.shape[-1] != targets.shape[-1]:
            widths = f"pictures of width {vectors.shape[-1]} and texts of width {targets.shape[-1]}"
            raise LdmPipeError(widths, "guidance.clip_loss", "take both towers of the same CLIP")
        distance = spherical_distance(vectors, targets.to(vectors).repeat(num_cutouts, 1))
        return distance.reshape(num_cutouts, -1).mean(dim=0) + range_weight * range_loss(image)

    return loss


def _enlarged(square: Tensor, size: int) -> Tensor:
    return nn.functional.interpolate(square, size=(size, size), mode="bilinear", align_corners=False)


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _gradient(loss: Loss, x0: Tensor, by: Tensor, t: float) -> Tensor:
    """Return the gradient of each sample's loss, shape (B, *)."""
    values = loss(x0)
    if values.shape != x0.shape[:1]:
        raise LdmPipeError(f"a loss of shape {list(values.shape)} for {len(x0)} samples", "guidance", "give (B,)")
    if not values.requires_grad:
        advice = "compute it from x0 by differentiable operations, without no_grad or detach"
        raise LdmPipeError("the loss does not depend on x0", "guidance", advice)
    gradient = torch.autograd.grad(values.sum(), by)[0]
    if not bool(gradient.isfinite().all()):
        raise LdmPipeError(f"the gradient of the loss is NaN or infinite at t = {t:g}", "guidance", "lower its scale")
    return gradient
