"""DDIM: straight steps along the estimated noise, with as much fresh noise as asked for. Order 1."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, flow_step, fresh, report
from ldm_pipe.schedule import Steps


def ddim(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    keep_eps: bool = False,
) -> Tensor:
    """Sample with DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16).

        x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau noise,   tau = eta * standard deviation of DDPM's step

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: source of fresh noise, needed where eta > 0.
        eta: 0 deterministic, 1 ancestral (DDPM).
        callback: see `samplers.common.Callback`.
        keep_eps: where x0 was thresholded, go along the eps of before, as diffusers does unless it is called with
            use_clipped_model_output; False takes the eps that belongs to x0, as openai's code does.

    Returns: x at the last row, shape (B, *).

    Raises: LdmPipeError if eta is outside [0, 1] or noise is missing.
    """
    if not 0 <= eta <= 1:
        raise LdmPipeError(f"eta is {eta}", how_to_fix="use a number from 0 (deterministic) to 1 (ancestral)")
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        estimate = denoise(x, t)
        x0 = estimate.x0
        b = max(sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2, 0.0)
        tau = eta * b**0.5 * sigma_s / sigma_t
        along = max(sigma_s**2 - tau**2, 0.0) ** 0.5  # what is taken of eps
        x = flow_step(x, x0, alpha_t, sigma_t, alpha_s, along)
        if keep_eps and estimate.raw is not None:
            x = x.add(x0 - estimate.raw, alpha=along * alpha_t / sigma_t)
        if tau > 0:
            x = x + tau * fresh(noise, x, "ddim with eta > 0")
        x = report(callback, i, t, x, x0)
    return x
