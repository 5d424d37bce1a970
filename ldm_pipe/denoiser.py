"""From the network's raw output to an estimate of x0: the one border where predictions end.

Enters: a network, a noise law, and what the network predicts. Leaves: `Denoiser`, a map (x_t, t, cond) -> x0, and the
`Denoise` closure type that guidance and thresholding return and samplers take. This file does not know guidance or
samplers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, Prediction
from ldm_pipe.schedule.process import Coefficient, edm_spread, expand, extras, to_x0


class ConditionLike(Protocol):
    """What the diffusion needs to know of a condition: named slots for the network, and joining along the batch."""

    @property
    def tokens(self) -> Tensor | None: ...  # noqa: D102
    @property
    def token_mask(self) -> Tensor | None: ...  # noqa: D102
    @property
    def pooled(self) -> Tensor | None: ...  # noqa: D102
    @property
    def spatial(self) -> Tensor | None: ...  # noqa: D102
    @property
    def labels(self) -> Tensor | None: ...  # noqa: D102
    @staticmethod
    def cat(conditions: Sequence[Any], /) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class Denoised:
    """An estimate of x0 and, if the network learnt one, of the variance of a step back; shape (B, *) each.

    Attributes:
        x0: the estimate.
        var_mix: where the log variance of the step lies between its two bounds, 0 the posterior's (small), 1 the
            forward process's (large); v of Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15. It is of the network's
            output and holds for a step of any length: the sampler puts in its own bounds.
        raw: the estimate before it was thresholded, where it was.
    """

    x0: Tensor
    var_mix: Tensor | None = None
    raw: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Denoised]


def parameter_dtype(module: object, default: torch.dtype) -> torch.dtype:
    """Return the dtype a module computes in, or `default` for what has no parameters."""
    if not isinstance(module, nn.Module):
        return default
    return next((parameter.dtype for parameter in module.parameters()), default)


def network_input(schedule: Law, prediction: Prediction, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the network is shown: x_t, for "edm" scaled to unit variance, and its own time for t."""
    if prediction == "edm":
        sigma_data = extras(schedule, prediction, t).sigma_data
        assert sigma_data is not None
        x_t = x_t / expand(edm_spread(*schedule.alpha_sigma(t), sigma_data), x_t)
    return x_t, schedule.network_time(t)


def split_variance(output: Tensor, num_channels: int) -> tuple[Tensor, Tensor | None]:
    """Split a network's output into its prediction and, where it has twice the channels, v of `Denoised.var_mix`.

    The network's channel is 2 v - 1, so that an untrained one, which gives 0, lies in the middle (arXiv:2102.09672,
    section 3.1, and the code of its authors; diffusers' variance_type "learned_range").

    Raises: LdmPipeError if it has neither once nor twice as many channels.
    """
    if output.shape[1] == num_channels:
        return output, None
    if output.shape[1] != 2 * num_channels:
        raise LdmPipeError(
            f"the network gives {output.shape[1]} channels for {num_channels}",
            where="Denoiser",
            how_to_fix="it must give as many, or twice as many if it learnt the variance",
        )
    return output[:, :num_channels], (output[:, num_channels:] + 1) / 2


class Denoiser:
    """Estimate x0 from x_t with a network of any prediction.

    The network runs in its own precision; x_t, alpha, sigma and x0 are at least float32, because x0 from eps divides
    by a small alpha.
    """

    def __init__(self, net: Callable[..., Tensor], schedule: Law, prediction: Prediction | None = None) -> None:
        """Join a network and its noise law.

        Args:
            net: called as net(x_t, t, tokens=, token_mask=, pooled=, spatial=, labels=) -> shape of x_t, or with
                twice the channels: prediction and variance.
            schedule: gives alpha and sigma at t.
            prediction: what the network outputs; None is the schedule's.

        Raises: LdmPipeError for eps or score with a schedule that reaches alpha = 0, where they say nothing about x0,
            and for a prediction that the schedule has no meaning for.
        """
        self.net = net
        self._kept: tuple[Tensor, int, Any] | None = None  # tokens, their version, what the network keeps of them
        self.schedule = schedule
        self.prediction: Prediction = schedule.prediction if prediction is None else prediction
        last = torch.tensor(schedule.t_range[1], dtype=torch.float64)
        extras(schedule, self.prediction, last)
        if self.prediction in ("eps", "score") and float(schedule.alpha(last)) == 0:
            raise LdmPipeError(
                f"prediction {self.prediction} on a schedule with a zero terminal SNR: at alpha = 0 it holds no x0",
                where="Denoiser",
                how_to_fix='use a network trained with prediction="v", or a schedule without zero terminal SNR',
            )

    def predict(self, x_t: Tensor, t: Tensor, cond: ConditionLike | None = None) -> Tensor:
        """Run the network once.

        Args:
            x_t: shape (B, *).
            t: network time, scalar or shape (B,).
            cond: what to condition on, B rows.

        Returns: the raw prediction in the dtype of the frame, shape (B, *), of a network that learnt the variance with
            twice the channels.
        """
        frame = _frame_dtype(x_t)
        slots: dict[str, Any] = {}
        if cond is not None:
            slots = {
                "tokens": self._keep(cond.tokens),
                "token_mask": cond.token_mask,
                "pooled": cond.pooled,
                "spatial": cond.spatial,
                "labels": cond.labels,
            }
        shown, time = network_input(self.schedule, self.prediction, x_t, t)
        time = time.to(device=x_t.device, dtype=torch.float32)
        # Leaner than no_grad; the copy is an ordinary tensor again, which a callback may change.
        with torch.inference_mode(not torch.is_grad_enabled()):
            output = self.net(shown.to(parameter_dtype(self.net, frame)), time, **slots)
        output = output.to(frame, copy=not torch.is_grad_enabled())
        if output.shape != x_t.shape and output.shape != (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:]):
            raise LdmPipeError(
                f"the network maps {tuple(x_t.shape)} to {tuple(output.shape)}",
                where="Denoiser",
                how_to_fix="its output needs the shape of its input, or twice its channels",
            )
        return output

    def _keep(self, tokens: Tensor | None) -> Any:
        """Let the network keep what it makes of the tokens, as long as they stay the same from step to step."""
        keep = getattr(self.net, "keep_tokens", None)
        if tokens is None or keep is None or torch.is_grad_enabled() or tokens.is_inference():
            return tokens
        if self._kept is None or self._kept[0] is not tokens or self._kept[1] != tokens._version:
            self._kept = (tokens, tokens._version, keep(tokens))
        return self._kept[2]

    def to_denoised(self, output: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """Turn a raw prediction at (x_t, t) into x0 and, where the network learnt it, the variance."""
        alpha, sigma = _levels(self.schedule, t)
        extra = extras(self.schedule, self.prediction, t)
        output, var_mix = split_variance(output, x_t.shape[1]) if output.shape != x_t.shape else (output, None)
        return Denoised(to_x0(self.prediction, output, x_t.to(_frame_dtype(x_t)), alpha, sigma, extra), var_mix)

    def __call__(self, x_t: Tensor, t: Tensor, cond: ConditionLike | None = None) -> Denoised:
        """Estimate x0, shape (B, *); arguments as in `predict`."""
        return self.to_denoised(self.predict(x_t, t, cond), x_t, t)


def _levels(schedule: Law, t: Tensor) -> tuple[Coefficient, Coefficient]:
    """Return alpha and sigma at t; those of a single time are kept as numbers, ten times faster than asking the law."""
    return _level(schedule, float(t)) if t.ndim == 0 and t.device.type == "cpu" else schedule.alpha_sigma(t)


@functools.lru_cache(maxsize=8192)
def _level(schedule: Law, t: float) -> tuple[float, float]:
    alpha, sigma = schedule.alpha_sigma(t)
    return float(alpha), float(sigma)


def _frame_dtype(x_t: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if x_t.dtype == torch.float64 else torch.float32
