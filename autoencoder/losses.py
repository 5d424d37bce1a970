"""The training objective of the autoencoder, as plain functions.

Images, reconstructions and what lay between enter; scalars leave. Who steps which optimiser is not known here.
Sources: VAE (arXiv:1312.6114), VQ-VAE (arXiv:1711.00937, eq. 3), VQGAN (arXiv:2012.09841, eq. 5-7), LDM
(arXiv:2112.10752, appendix G), LPIPS (arXiv:1801.03924).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from autoencoder.gaussian import DiagonalGaussian
from autoencoder.quantizer import Quantised
from ldm_pipe.pretrained import LdmPipeError

Features = Callable[[Tensor], Sequence[Tensor]]
"""Maps an image (B, 3, H, W) to feature maps (B, C_k, h_k, w_k), with gradient."""

Game = Literal["hinge", "vanilla"]
"""Hinge: Lim & Ye 2017, arXiv:1705.02894. Vanilla, not saturating: Goodfellow et al. 2014, arXiv:1406.2661, sec. 3."""


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weigh the parts of the objective. All losses are per pixel and channel, so LDM's weights keep their meaning.

    Args:
        reconstruction: "l1" or "l2".
        perceptual_weight: of the perceptual distance, 0 for none.
        kl_weight: of the divergence; LDM: 1e-6. With a codebook it has no meaning.
        codebook_weight: of the quantiser's loss; LDM: 1. Without a codebook it has no meaning.
        commitment_weight: beta of the quantiser's loss; VQ-VAE and LDM: 0.25.
        legacy_commitment: put beta on the codebook's term instead, as LDM's code and diffusers' `VQModel` do.
        game: what discriminator and autoencoder play.
        adversarial_weight: factor on the adaptive weight; LDM: 0.5.
        max_adaptive_weight: upper bound of the adaptive weight.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    legacy_commitment: bool = False
    game: Game = "hinge"
    adversarial_weight: float = 0.5
    max_adaptive_weight: float = 1e4

    def __post_init__(self) -> None:
        """Refuse unknown words and negative weights."""
        for name, allowed in (("reconstruction", ("l1", "l2")), ("game", ("hinge", "vanilla"))):
            if getattr(self, name) not in allowed:
                raise LdmPipeError(f"{name} {getattr(self, name)!r}", "autoencoder loss", f"Give one of {allowed}.")
        weights = ("perceptual", "kl", "codebook", "commitment", "adversarial")
        for name in (*(f"{name}_weight" for name in weights), "max_adaptive_weight"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                what = f"{name} is {getattr(self, name)!r}"
                raise LdmPipeError(what, "autoencoder loss", "Give a finite number, at least 0.")


def reconstruction_loss(image: Tensor, reconstruction: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Return the mean absolute ("l1") or squared ("l2") difference, a scalar."""
    return F.l1_loss(reconstruction, image) if kind == "l1" else F.mse_loss(reconstruction, image)


def perceptual_distance(features: Features, image: Tensor, reconstruction: Tensor) -> Tensor:
    """Compare feature maps (LPIPS, Zhang et al. 2018, arXiv:1801.03924, eq. 1, all channel weights 1).

        d = sum_k mean_hw |f_k(image) / |f_k(image)| - f_k(rec) / |f_k(rec)||^2      (norms over channels)

    Args:
        features: maps an image to feature maps, with gradient.
        image: the target (B, 3, H, W); no gradient flows to it.
        reconstruction: (B, 3, H, W).
    Returns: (B,).
    Raises: LdmPipeError if the features cut the gradient of the reconstruction (a loss that trains nothing).
    """
    with torch.no_grad():
        targets = features(image)
    outputs = features(reconstruction)
    if torch.is_grad_enabled() and reconstruction.requires_grad and not all(f.requires_grad for f in outputs):
        fix = "Freeze the network's weights with requires_grad_(False) instead of torch.no_grad()."
        raise LdmPipeError("the perceptual features cut the gradient", "perceptual_distance", fix)
    distances = [
        (_normalise(y) - _normalise(x)).square().sum(1).mean((1, 2)) for x, y in zip(targets, outputs, strict=True)
    ]
    return torch.stack(distances).sum(0)


def _normalise(features: Tensor) -> Tensor:
    # The bound inside the root keeps the gradient finite where all channels are 0.
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)


def quantiser_loss(quantised: Quantised, beta: float = 0.25, legacy: bool = False) -> Tensor:
    """Return the loss of codebook and commitment, a scalar (VQ-VAE, van den Oord et al. 2017, arXiv:1711.00937, eq. 3).

        mean (sg[raw] - codes)^2 + beta mean (raw - sg[codes])^2

    `legacy` weighs the first term with beta and the second with 1, the slip of LDM's code that diffusers keeps. A
    codebook that no gradient reaches (it moves by averages) leaves the second term alone, beta times.
    """
    if not quantised.codes.requires_grad and torch.is_grad_enabled():
        return beta * quantised.commitment()
    codebook, commitment = quantised.codebook(), quantised.commitment()
    return beta * codebook + commitment if legacy else codebook + beta * commitment


def adversarial_loss(discriminator: nn.Module, reconstruction: Tensor, game: Game = "hinge") -> Tensor:
    """Return the autoencoder's side of the game: -mean D(rec), or -mean log sigmoid D(rec) for vanilla.

    The discriminator's weights are constants here: this loss leaves no gradient in them.
    """
    constants = {name: p.detach() for name, p in discriminator.named_parameters()}
    logits = functional_call(discriminator, constants, (reconstruction,))
    return -logits.mean() if game == "hinge" else F.softplus(-logits).mean()


def discriminator_loss(
    discriminator: nn.Module,
    image: Tensor,
    reconstruction: Tensor,
    game: Game = "hinge",
    r1_weight: float = 0.0,
    *,
    lecam_weight: float = 0.0,
    anchors: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the discriminator's side of the game (LDM's form with 1/2), with R1 or LeCam where they are asked for.

        hinge:    1/2 (mean max(0, 1 - D(image)) + mean max(0, 1 + D(rec)))
        vanilla:  1/2 (mean softplus(-D(image)) + mean softplus(D(rec)))
        R1:       w / 2 mean |grad_image D(image)|^2, D averaged over patches  (Mescheder et al. 2018,
                  arXiv:1801.04406, eq. 9)
        LeCam:    w (mean (D(image) - a_rec)^2 + mean (D(rec) - a_image)^2)  (Tseng et al. 2021, arXiv:2104.03310,
                  section 3.2)

    The reconstruction is detached: no gradient reaches the autoencoder. Both halves pass in one batch, so that a
    wrapper such as DDP sees one forward per backward.

    Args:
        anchors: moving averages of the logits of pictures and of reconstructions (a_image, a_rec), (2,); None: there is
            no average yet, and no LeCam term.
    Returns: the loss, and detached scalars "real" and "fake", the mean logits of pictures and of reconstructions.
    """
    image = image.detach().requires_grad_(r1_weight > 0)
    logits = discriminator(torch.cat([image, reconstruction.detach().to(image.dtype)])).float()
    real, fake = logits.chunk(2)
    if game == "hinge":
        loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    else:
        loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    if r1_weight > 0:
        (slope,) = torch.autograd.grad(real.flatten(1).mean(1).sum(), image, create_graph=True)
        loss = loss + 0.5 * r1_weight * slope.square().flatten(1).sum(1).mean()
    if lecam_weight > 0 and anchors is not None:
        loss = loss + lecam_weight * ((real - anchors[1]).square().mean() + (fake - anchors[0]).square().mean())
    return loss, {"real": real.detach().mean(), "fake": fake.detach().mean()}


def adaptive_weight(
    reconstruction_term: Tensor, adversarial_term: Tensor, last_layer: Tensor, max_weight: float = 1e4
) -> Tensor:
    """Balance two losses by their gradients at the decoder's last layer (VQGAN, arXiv:2012.09841, eq. 7).

        lambda = |grad reconstruction| / |grad adversarial|, at most max_weight

    Returns: a scalar without gradient.
    """
    (wanted,) = torch.autograd.grad(reconstruction_term, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial_term, last_layer, retain_graph=True)
    # Far below any gradient that trains; the paper's 1e-6 would bias per-pixel losses.
    ratio = wanted.float().norm() / (given.float().norm() + 1e-12)
    return ratio.clamp(max=max_weight).detach()


def autoencoder_loss(
    image: Tensor,
    reconstruction: Tensor,
    between: DiagonalGaussian | Quantised,
    config: AutoencoderLossConfig,
    *,
    perceptual: Features | None = None,
    discriminator: nn.Module | None = None,
    last_layer: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the autoencoder's objective and its parts (LDM, arXiv:2112.10752, eq. 25).

        L = |image - rec| + w_p d(image, rec) + R + w_adv lambda (-mean D(rec))
        R = w_kl KL / (C H W) for a Gaussian, w_codebook (quantiser's loss) for a codebook

    Args:
        image: (B, 3, H, W) in [-1, 1].
        reconstruction: (B, 3, H, W).
        between: what was decoded from: the posterior, or the quantised latents.
        config: the weights.
        perceptual: image -> feature maps, with gradient; None: no such part.
        discriminator: None before the adversarial part starts; not wrapped by DDP.
        last_layer: weight of the decoder's last layer, needed with a discriminator.
    Returns: the loss, and detached scalars "reconstruction", "perceptual", "kl" (nats per image) or "quantiser",
        "adversarial", "adaptive_weight" as far as they were computed.
    """
    image, reconstruction = image.float(), reconstruction.float()
    term = reconstruction_loss(image, reconstruction, config.reconstruction)
    parts = {"reconstruction": term.detach()}
    if perceptual is not None and config.perceptual_weight > 0:
        distance = perceptual_distance(perceptual, image, reconstruction).mean()
        parts["perceptual"] = distance.detach()
        term = term + config.perceptual_weight * distance
    if isinstance(between, DiagonalGaussian):
        kl = between.kl().mean()
        parts["kl"] = kl.detach()
        loss = term + config.kl_weight * kl / image[0].numel()
    else:
        distance = quantiser_loss(between, config.commitment_weight, config.legacy_commitment)
        parts["quantiser"] = distance.detach()
        loss = term + config.codebook_weight * distance
    if discriminator is not None and config.adversarial_weight > 0:
        if last_layer is None:
            raise LdmPipeError("a discriminator without last_layer", "autoencoder_loss", "Give autoencoder.last_layer.")
        adversarial = adversarial_loss(discriminator, reconstruction, config.game)
        weight = adaptive_weight(term, adversarial, last_layer, config.max_adaptive_weight)
        parts |= {"adversarial": adversarial.detach(), "adaptive_weight": weight}
        loss = loss + config.adversarial_weight * weight * adversarial
    return loss, {**parts, "loss": loss.detach()}
