"""Guidance by the gradient of a classifier that was trained on noisy data.

Enters: a `Denoise`, a classifier and the wanted classes. Leaves: a `Denoise`. This file does not know networks or
samplers; the "mean" form asks for the levels that a sampler steps between, as its shift is of the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoise, Denoised
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, Steps
from ldm_pipe.schedule.process import Variance, posterior

Classifier = Callable[[Tensor, Tensor], Tensor]  # (x_t, network time (B,)) -> logits (B, K)


def classifier_score(denoise: Denoise, classifier: Classifier, labels: Tensor, scale: float, schedule: Law) -> Denoise:
    """Guide the score by a classifier (Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2), for any sampler.

        eps' = eps - s sigma g,   so   x0' = x0 + s (sigma^2 / alpha) g,   g = gradient of log p(y | x_t)

    which samples from p(x) p(y | x)^s. At alpha = 0, where x_t says nothing of y, nothing is added.

    Args:
        denoise: what is guided, thresholding included.
        classifier: maps (x_t, network time) to logits (B, K); differentiable in x_t.
        labels: the wanted classes, shape (B,).
        scale: s.
        schedule: the noise law.

    Returns: (x_t, t) -> Denoised.
    """

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        estimate = denoise(x_t, t)
        alpha, sigma = (float(level) for level in schedule.alpha_sigma(t))
        if alpha == 0:
            return estimate
        gradient = _log_prob_gradient(classifier, x_t, schedule.network_time(t), labels)
        return Denoised(estimate.x0 + scale * sigma**2 / alpha * gradient, estimate.var_mix)

    return guided


def classifier_mean(
    denoise: Denoise,
    classifier: Classifier,
    labels: Tensor,
    scale: float,
    schedule: Law,
    *,
    steps: Steps,
    variance: Variance | None = None,
) -> Denoise:
    """Guide the mean of each step by a classifier (arXiv:2105.05233, algorithm 1), for the sampler ddpm.

        mu' = mu + s Sigma g,   so   x0' = x0 + s Sigma g / c

    where Sigma is the variance of the step and c what its mean takes of x0 (arXiv:2006.11239, eq. 7). The paper takes
    the gradient g at mu, its authors' code, and this function, at x_t. For short steps both forms are the same.

    Args:
        denoise, classifier, labels, scale, schedule: as of `classifier_score`.
        steps: the rows that the sampler walks.
        variance: the sampler's; see `samplers.ddpm`.

    Returns: (x_t, t) -> Denoised, for the times of the steps.
    """
    rows = {float(t): levels for t, *levels in steps.pairs()}

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        estimate = denoise(x_t, t)
        back = posterior(*rows[float(t)])
        small, large = float(back.small), float(back.large)
        if small == 0:  # the last step goes to the mean
            return estimate
        if variance == "fixed_large":
            spread: float | Tensor = large
        elif variance == "fixed_small" or estimate.var_mix is None:
            spread = small
        else:
            spread = small * (large / small) ** estimate.var_mix
        gradient = _log_prob_gradient(classifier, x_t, schedule.network_time(t), labels)
        return Denoised(estimate.x0 + scale / float(back.of_x0) * spread * gradient, estimate.var_mix)

    return guided


def _log_prob_gradient(classifier: Classifier, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of log p(label | x_t) at x_t, shape (B, *)."""
    time = t.to(x_t.device, torch.float32).expand(len(x_t))
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        logits = classifier(x, time)
        if logits.ndim != 2 or len(logits) != len(x) or int(labels.max()) >= logits.shape[1]:
            what = f"logits {list(logits.shape)} for {len(x)} samples and classes up to {int(labels.max())}"
            raise LdmPipeError(what, "classifier guidance", "A classifier gives (batch, classes).")
        chosen = logits.float().log_softmax(dim=1).gather(1, labels[:, None]).sum()
        return torch.autograd.grad(chosen, x)[0].to(x_t)
