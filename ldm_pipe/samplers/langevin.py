"""Langevin dynamics: walk along the score and shake, at one noise level after the other."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, flow_step, fresh, refuse_eta, report
from ldm_pipe.schedule import Steps


def annealed_langevin(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    num_inner: int = 10,
    step_size: float = 0.2,
) -> Tensor:
    """Sample with annealed Langevin dynamics (Song & Ermon 2019, arXiv:1907.05600, algorithm 1).

        x <- x + a_i / 2 score + sqrt(a_i) noise,   a_i = step_size * sigma_i^2,   num_inner times at each row i

    The paper's frame is x / alpha; multiplied out, with score = (alpha x0 - x) / sigma^2, nothing is divided by
    alpha, and the first level may be pure noise. The paper ends with the noise of the last level; here the mean of x0
    follows (Jolicoeur-Martineau et al. 2020, arXiv:2009.05475). It needs many levels close to each
    other: the paper has 10 from 1 to 0.01 with num_inner = 100.

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: source of fresh noise, needed.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`; called once per level.
        num_inner: T of the paper, evaluations per level, at least 1.
        step_size: epsilon / sigma_L^2 of the paper, there 2e-5 / 0.01^2; in (0, 2).

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "annealed_langevin")
    if num_inner < 1 or not 0 < step_size < 2:
        raise LdmPipeError(
            f"num_inner is {num_inner}, step_size {step_size}",
            how_to_fix="use at least 1 inner step, and a step_size above 0 and below 2, customary 0.2",
        )
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        for _ in range(num_inner):
            pull = alpha_t * denoise(x, t).x0 - x  # sigma^2 score
            x = x + step_size / 2 * pull + step_size**0.5 * sigma_t * fresh(noise, x, "annealed_langevin")
        x0 = denoise(x, t).x0
        if alpha_t == 0 or sigma_s == 0:
            x = flow_step(x, x0, alpha_t, sigma_t, alpha_s, sigma_s)
        else:
            x = (alpha_s / alpha_t) * x
        x = report(callback, i, t, x, x0)
    return x


def predictor_corrector(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    num_corrections: int = 1,
    snr: float = 0.16,
) -> Tensor:
    """Sample with predictor-corrector (Song et al. 2021, arXiv:2011.13456, algorithms 2-5).

        corrector  x <- x + a score + sqrt(2 a) z,   a = 2 r^2 (snr |z| / |score|)^2           (Langevin)
        predictor  x_s = (2 - r) x + b score + sqrt(b) z,   r = alpha_t / alpha_s,   b = sigma_t^2 - r^2 sigma_s^2

    which is reverse diffusion (appendix E): r = 1 where variance explodes, r^2 = 1 - beta where it is preserved. The
    corrector comes first, at the level the predictor leaves, as in the authors' code. The norms are of each sample,
    theirs are means over the batch. The step to sigma = 0 takes the mean of x0 and adds no noise; from alpha = 0,
    where no r is small enough, the predictor is DDIM's step.

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean; the predictor wants many.
        noise: source of fresh noise, needed.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`.
        num_corrections: M of the paper, Langevin steps per level; 0 is the predictor alone.
        snr: r of the paper, signal-to-noise ratio of a Langevin step; 0.16 there for variance exploding.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "predictor_corrector")
    if num_corrections < 0 or not 0 < snr < 1:
        raise LdmPipeError(
            f"num_corrections is {num_corrections}, snr {snr}", how_to_fix="use 0 or more, and an snr such as 0.16"
        )
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        r = alpha_t / alpha_s
        for _ in range(num_corrections if alpha_t > 0 else 0):
            score = (alpha_t * denoise(x, t).x0 - x) / sigma_t**2
            z = fresh(noise, x, "predictor_corrector")
            a = 2 * (r * snr * _norm(z) / _norm(score)) ** 2
            x = x + a * score + (2 * a) ** 0.5 * z
        x0 = denoise(x, t).x0
        if alpha_t == 0 or sigma_s == 0:
            x = flow_step(x, x0, alpha_t, sigma_t, alpha_s, sigma_s)
        else:
            b = max(sigma_t**2 - r**2 * sigma_s**2, 0.0)
            x = (2 - r) * x + (b / sigma_t**2) * (alpha_t * x0 - x)
            x = x + b**0.5 * fresh(noise, x, "predictor_corrector")
        x = report(callback, i, t, x, x0)
    return x


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample, (B, 1, ...)."""
    return x.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x.ndim - 1))
