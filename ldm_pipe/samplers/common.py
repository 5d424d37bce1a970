"""What all samplers share: how they are called, and the checks at their border; no mathematics."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError

# callback(i, t, x, x0) after step i, from time t: x is the state it reached; a returned tensor replaces it
Callback = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


def report(callback: Callback | None, i: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """Tell the callback about a finished step and return the state to go on with."""
    changed = None if callback is None else callback(i, t, x, x0)
    return x if changed is None else changed


def fresh(noise: Draw | None, like: Tensor, sampler: str) -> Tensor:
    """Draw unit Gaussian noise of the shape, dtype and device of `like`."""
    if noise is None:
        raise LdmPipeError(f"{sampler} draws noise in every step, but got none", how_to_fix="pass noise=Noise(seeds)")
    return noise(like.shape).to(like)


def refuse_eta(eta: float, sampler: str) -> None:
    """Refuse an eta that the sampler would ignore."""
    if eta != 0:
        raise LdmPipeError(
            f"eta is {eta}, but the sampler {sampler} has no eta", how_to_fix='leave it at 0, or use the sampler "ddim"'
        )
