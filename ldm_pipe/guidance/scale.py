"""How strong guidance is at each noise level: a number, or a function of the level.

Enters: the time and the levels of a step. Leaves: the guidance scale w, counted from 1. This file does not know
networks or conditions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Steps


@dataclass(frozen=True)
class NoiseLevel:
    """Where a step stands.

    Attributes:
        t: the time of the noise schedule.
        fraction: t as a share of the schedule's last time, 0 clean, 1 noise.
        sigma_edm: sigma / alpha, infinite at alpha = 0.
    """

    t: float
    fraction: float
    sigma_edm: float


Scale = float | Callable[[NoiseLevel], float]


def scale_at(scale: Scale, level: NoiseLevel) -> float:
    """Return w at a noise level.

    Raises: LdmPipeError if it is not a finite number.
    """
    w = float(scale(level) if callable(scale) else scale)
    if not math.isfinite(w):
        where = f"guidance at t = {level.t:g}"
        raise LdmPipeError(f"guidance scale is {w}", where, "use a finite number; 1 is no guidance, 7.5 customary")
    return w


def linear(scale: float) -> Scale:
    """Let w - 1 grow linearly from 0 at noise to 2 (scale - 1) at clean (Wang et al. 2024, arXiv:2404.13040, table 1).

    Its mean over t is `scale`.
    """
    return lambda level: 1 + 2 * (scale - 1) * (1 - level.fraction)


def cosine(scale: float) -> Scale:
    """Let w - 1 grow along a cosine, (scale - 1) (1 + cos(pi t)), of the same mean (arXiv:2404.13040, table 1)."""
    return lambda level: 1 + (scale - 1) * (1 + math.cos(math.pi * level.fraction))


def interval(scale: Scale, low: float, high: float) -> Scale:
    """Guide only where low < sigma_edm <= high (Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 6).

    Elsewhere w = 1, which saves the unconditional evaluation.

    Raises: LdmPipeError if the interval is empty.
    """
    if not 0 <= low < high:
        raise LdmPipeError(
            f"guidance interval ({low:g}, {high:g}] contains no noise level", how_to_fix="use 0 <= low < high"
        )
    return lambda level: scale_at(scale, level) if low < level.sigma_edm <= high else 1.0


def cfgpp(strength: float, steps: Steps) -> Scale:
    """Return the scale with which DDIM under classifier-free guidance is CFG++ (Chung et al. 2024, arXiv:2406.08070).

    CFG++ moves to x0 = x0_uncond + strength (x0_cond - x0_uncond) and adds the unconditional noise again (algorithm 2).
    Put into one step from (alpha, sigma) to (alpha', sigma'), that is guidance of x0 with

        w = strength alpha' sigma / (alpha' sigma - alpha sigma')

    Args:
        strength: the paper's lambda in [0, 1].
        steps: the rows that the sampler walks.

    Raises: LdmPipeError for a strength outside [0, 1], and at a time that is none of the steps'.
    """
    if not 0 <= strength <= 1:
        raise LdmPipeError(f"CFG++ strength is {strength}", how_to_fix="use a number from 0 to 1; 0.6 is customary")
    at = {
        float(t): strength * next_alpha * sigma / (next_alpha * sigma - alpha * next_sigma)
        for t, alpha, sigma, next_alpha, next_sigma in steps.pairs()
    }

    def scale(level: NoiseLevel) -> float:
        if level.t not in at:
            raise LdmPipeError(
                f"CFG++ was made for other steps: t = {level.t:g} is none of them",
                "guidance.cfgpp",
                "use a sampler that evaluates the network at the steps only, such as ddim",
            )
        return at[level.t]

    return scale
