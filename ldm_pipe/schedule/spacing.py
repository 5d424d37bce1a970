"""Choices of times: evenly spaced indices, ramps of noise levels, sections.

Enters: how many steps, and the ends. Leaves: falling float64 vectors of times or of noise levels. This file does not
know noise laws; `Law.steps` joins the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError

Even = Literal["leading", "trailing", "linspace", "lcm"]
Ramp = Literal["karras", "exponential", "polynomial", "log_snr", "beta"]
Spacing = Literal["leading", "trailing", "linspace", "lcm", "karras", "exponential", "polynomial", "log_snr", "beta"]
Grid = Literal["integer", "fractional", "multistep"]

_LCM_STEPS = 50  # the times that latent consistency models are distilled at, and every file of one says so


def whole_times(num_steps: int, spacing: Even, grid: Grid, num_levels: int, steps_offset: int) -> Tensor:
    """Return num_steps falling times out of 0 .. num_levels - 1 (arXiv:2305.08891, table 2); see `Law.steps`.

    "lcm" takes every so-many of 50 times, as latent consistency models are distilled (arXiv:2310.04378, section 4.3).
    """
    n = num_steps + 1 if grid == "multistep" else num_steps
    i = torch.arange(num_steps, dtype=torch.float64)
    match spacing:
        case "trailing":
            return (num_levels - i * (num_levels / num_steps)).round() - 1
        case "leading":
            return (n - 1 - i) * (num_levels // n) + steps_offset
        case "linspace":
            # diffusers' single step is at t = 0; ours is where the noise is
            t = (n - 1 - i) * ((num_levels - 1) / (n - 1)) if n > 1 else i + num_levels
            t = t.clamp_max(num_levels - 1)
            return t if grid == "fractional" else t.round()
        case "lcm":
            every = num_levels // min(_LCM_STEPS, num_levels)
            return (_LCM_STEPS - (i * (_LCM_STEPS / num_steps)).floor()) * every - 1
    raise LdmPipeError(f"unknown spacing {spacing!r}", how_to_fix=f"use one of {', '.join(get_args(Spacing))}")


def line(num_steps: int, spacing: Even, grid: Grid, first: float, last: float) -> Tensor:
    """Return num_steps falling times of a continuous law.

    "linspace" goes from the first to the last ("multistep": n + 1 of which the last is left out), "trailing" from the
    first in n equal steps to 0.

    Raises: LdmPipeError for the other spacings, which start at less than pure noise or belong to one discrete law.
    """
    i = torch.arange(num_steps, dtype=torch.float64)
    if spacing == "trailing":
        return first * ((num_steps - i) / num_steps)
    if spacing == "linspace":
        intervals = num_steps if grid == "multistep" else max(num_steps - 1, 1)
        return first + (i / intervals) * (last - first)
    raise LdmPipeError(f"spacing {spacing!r} on continuous times", how_to_fix="use linspace, trailing or a ramp")


def ramp(kind: Ramp, num_steps: int, largest: float, smallest: float, rho: float | None = None) -> Tensor:
    """Return num_steps noise levels sigma, falling from the largest to the smallest, both exact, float64.

    With u = 1 - i / (n - 1), from 1 to 0:

    karras        (smallest^(1/rho) + u (largest^(1/rho) - smallest^(1/rho)))^rho, rho 7    (arXiv:2206.00364, eq. 5)
    exponential   smallest (largest / smallest)^u: evenly spaced logarithms; so "log_snr", which always takes
                  sigma / alpha for sigma (arXiv:2211.01095, section 6)
    polynomial    smallest (largest / smallest)^(u^rho), rho 2; "polyexponential" in the code of k-diffusion
    beta          smallest + q(u) (largest - smallest), q the quantiles of Beta(0.6, 0.6)   (arXiv:2407.12173)

    One step is at the largest. If that is infinite (alpha = 0), no ramp reaches it: see `open_ramp`.
    """
    if not 0 < smallest <= largest:
        raise LdmPipeError(f"a {kind} ramp from {largest:g} to {smallest:g}", how_to_fix="end it above 0")
    u = torch.linspace(1, 0, num_steps, dtype=torch.float64)
    match kind:
        case "karras":
            power = 7.0 if rho is None else rho
            low, high = smallest ** (1 / power), largest ** (1 / power)
            levels = (low + u * (high - low)) ** power
        case "exponential" | "log_snr":
            levels = smallest * (largest / smallest) ** u
        case "polynomial":
            levels = smallest * (largest / smallest) ** (u ** (2.0 if rho is None else rho))
        case "beta":
            levels = smallest + _beta_quantiles(u) * (largest - smallest)
        case _:
            raise LdmPipeError(f"unknown ramp {kind!r}", how_to_fix=f"use one of {', '.join(get_args(Ramp))}")
    levels[0] = largest
    if num_steps > 1:
        levels[-1] = smallest
    return levels


def open_ramp(kind: Ramp, num_steps: int, second: float, smallest: float, rho: float | None = None) -> Tensor:
    """Return a ramp from the second largest level, whose first is replaced by infinity: for laws with alpha = 0."""
    levels = ramp(kind, num_steps, second, smallest, rho)
    levels[0] = math.inf
    return levels


def _beta_quantiles(u: Tensor, shape: float = 0.6) -> Tensor:
    """Return the quantiles of Beta(shape, shape) at u, by integrating its density up to the middle."""
    s = np.linspace(0, 1, 4001)
    angle = (math.pi / 4) * s ** (1 / (2 * shape))  # with x = sin^2(angle) the density in s is smooth
    density = (np.sinc(angle / math.pi) * np.cos(angle)) ** (2 * shape - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    side = np.minimum(u.numpy(), 1 - u.numpy())  # the right half is the mirror image of the left
    x = np.sin((math.pi / 4) * np.interp(side, 0.5 * mass / mass[-1], s) ** (1 / (2 * shape))) ** 2
    return torch.from_numpy(np.where(u.numpy() <= 0.5, x, 1 - x))


def respace(sections: str, num_levels: int) -> Tensor:
    """Return the falling whole times of improved DDPM's respacing strings (arXiv:2102.09672, section 4, and its code).

    "ddim25": times 0, k, 2k, ... with the smallest whole k that gives exactly 25 of them.
    "10,15,20": the times are cut into three equal parts (the first ones get the rest), and from each part that many
    are taken, evenly spaced from its first to its last, rounded.

    Raises: LdmPipeError if the string means nothing or the levels do not allow it.
    """
    if sections.startswith("ddim") and sections[4:].isascii() and sections[4:].isdigit():
        wanted = int(sections[4:])
        for stride in range(1, num_levels + 1):
            if len(range(0, num_levels, stride)) == wanted:
                return torch.arange(0, num_levels, stride, dtype=torch.float64).flip(0)
        raise LdmPipeError(
            f"no whole stride gives {wanted} of {num_levels} times",
            where=f"spacing {sections!r}",
            how_to_fix="use another number, or trailing spacing",
        )
    parts = [part.strip() for part in sections.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        known = ", ".join(get_args(Spacing))
        raise LdmPipeError(f"unknown spacing {sections!r}", how_to_fix=f'use one of {known}, "ddim25" or "10,15,20"')
    times: list[int] = []
    size, rest = divmod(num_levels, len(parts))
    start = 0
    for i, wanted in enumerate(int(part) for part in parts):
        length = size + (i < rest)
        if wanted > length:
            raise LdmPipeError(
                f"section {i + 1} has {length} times, not {wanted}",
                where=f"spacing {sections!r}",
                how_to_fix=f"ask for {size} per section at most",
            )
        stride = (length - 1) / (wanted - 1) if wanted > 1 else 1.0
        times += [start + round(stride * k) for k in range(wanted)]
        start += length
    return torch.tensor(times, dtype=torch.float64).flip(0)


def explicit(values: Sequence[float] | Tensor, name: str, low: float, high: float) -> Tensor:
    """Return times or noise levels given one by one, float64.

    Raises: LdmPipeError if they are empty, out of range, or do not fall.
    """
    given: Any = values.detach().cpu() if isinstance(values, Tensor) else values
    try:
        vector = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LdmPipeError(f"{name} is {values!r:.80}", how_to_fix="give a list of numbers") from error
    if vector.ndim != 1 or len(vector) == 0:
        raise LdmPipeError(f"{name} has the shape {tuple(vector.shape)}", how_to_fix="give a list of numbers")
    inside = (vector >= low * (1 - 1e-9)) & (vector <= high * (1 + 1e-9))  # an end may be computed by another way
    if not bool(inside.all()):
        outside = f"{name} reach from {vector.min():g} to {vector.max():g}"
        raise LdmPipeError(outside, how_to_fix=f"this law's go from {high:g} down to {low:g}; the end is added")
    if not bool((vector[1:] < vector[:-1]).all()):
        raise LdmPipeError(
            f"{name} do not fall, or repeat: {vector.tolist()!r:.120}", how_to_fix="sort them, once each"
        )
    return vector
