"""Betas of discrete variance-preserving noise laws.

Enters: a name and numbers. Leaves: float64 tensors. This file does not know times, samplers or files.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError

BetaSchedule = Literal[
    "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "sqrt", "quadratic", "jsd", "flow_levels"
]
WITHOUT_ENDS: tuple[BetaSchedule, ...] = (
    "squaredcos_cap_v2",
    "jsd",
    "flow_levels",
)  # beta_start and beta_end play no role


def make_betas(kind: BetaSchedule, beta_start: float, beta_end: float, num_train_timesteps: int) -> Tensor:
    """Return the betas of a discrete variance-preserving noise law, float64, shape (num_train_timesteps,).

    linear             beta_t linear in t                   (Ho et al. 2020, arXiv:2006.11239, section 4)
    scaled_linear      sqrt(beta_t) linear in t             (Rombach et al. 2022, arXiv:2112.10752, appendix);
                       "quadratic" in the code of DDPM
    squaredcos_cap_v2  alpha_bar = cos^2(pi/2 (t/T + 0.008) / 1.008), beta <= 0.999
                       (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17); beta_start and beta_end play no role
    sigmoid            between the ends as 1 / (1 + exp(-u)), u from -6 to 6      (Xu et al. 2022, arXiv:2203.02923)
    sqrt               beta_t^2 linear in t, from the ends' roots                 (the code of arXiv:2112.10752)
    jsd                beta_t = 1 / (T - t), t = 0 .. T-1: alpha_bar falls linearly to 0, a zero terminal SNR
                       (Sohl-Dickstein et al. 2015, arXiv:1503.03585, section 2.4.1); the ends play no role
    flow_levels        sigma / alpha = u / (1 - u), u = (t + 1) / (T + 1): the noise levels of rectified flow at even
                       times (Liu et al. 2022, arXiv:2209.03003, eq. 1), variance preserving; the ends play no role
    """
    num = num_train_timesteps
    match kind:
        case "linear":
            return torch.linspace(beta_start, beta_end, num, dtype=torch.float64)
        case "scaled_linear" | "quadratic":
            return torch.linspace(beta_start**0.5, beta_end**0.5, num, dtype=torch.float64).square()
        case "squaredcos_cap_v2":
            u = torch.arange(num + 1, dtype=torch.float64) / num
            alpha_bar = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)).square()
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(0.999)
        case "sigmoid":
            rise = torch.linspace(-6, 6, num, dtype=torch.float64).sigmoid()
            return rise * (beta_end - beta_start) + beta_start
        case "sqrt":
            return torch.linspace(beta_start, beta_end, num, dtype=torch.float64).sqrt()
        case "jsd":
            return 1 / torch.arange(num, 0, -1, dtype=torch.float64)
        case "flow_levels":
            u = torch.arange(num + 1, dtype=torch.float64) / (num + 1)
            alpha_bar = (1 - u).square() / ((1 - u).square() + u.square())
            return 1 - alpha_bar[1:] / alpha_bar[:-1]
    raise LdmPipeError(f"unknown beta_schedule {kind!r}", how_to_fix=f"use one of {', '.join(get_args(BetaSchedule))}")


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and starts as before (arXiv:2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
