"""From the network's raw output to an estimate of x0: the one border where predictions end.

Enters: a network, a noise law, and what the network predicts. Leaves: `Denoiser`, a map (x_t, t, cond) -> x0, and the
`Denoise` closure type that guidance and thresholding return and samplers take. This file does not know guidance or
samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.process import to_x0
from ldm_pipe.schedule import NoiseSchedule, Prediction


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
    """An estimate of x0 and, if the network learnt one, of the log variance of the step; shape (B, *) each."""

    x0: Tensor
    log_var: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Denoised]


def parameter_dtype(module: object, default: torch.dtype) -> torch.dtype:
    """Return the dtype a module computes in, or `default` for what has no parameters."""
    if not isinstance(module, nn.Module):
        return default
    return next((parameter.dtype for parameter in module.parameters()), default)


class Denoiser:
    """Estimate x0 from x_t with a network of any prediction.

    The network runs in its own precision; x_t, alpha, sigma and x0 are at least float32, because x0 from eps divides
    by a small alpha.
    """

    def __init__(
        self, net: Callable[..., Tensor], schedule: NoiseSchedule, prediction: Prediction | None = None
    ) -> None:
        """Join a network and its noise law.

        Args:
            net: called as net(x_t, t, tokens=, token_mask=, pooled=, spatial=, labels=) -> shape of x_t.
            schedule: gives alpha and sigma at t.
            prediction: what the network outputs; None is the schedule's.

        Raises: LdmPipeError for eps with a schedule that reaches alpha = 0, where eps says nothing about x0.
        """
        self.net = net
        self._kept: tuple[Tensor, int, Any] | None = None  # tokens, their version, what the network keeps of them
        self.schedule = schedule
        self.prediction: Prediction = schedule.prediction if prediction is None else prediction
        if self.prediction == "eps" and float(schedule.alpha(schedule.num_train_timesteps - 1)) == 0:
            raise LdmPipeError(
                "prediction eps on a schedule with a zero terminal SNR: at alpha = 0 there is no x0 in it",
                where="Denoiser",
                how_to_fix='use a network trained with prediction="v", or a schedule without zero terminal SNR',
            )

    def predict(self, x_t: Tensor, t: Tensor, cond: ConditionLike | None = None) -> Tensor:
        """Run the network once.

        Args:
            x_t: shape (B, *).
            t: network time, scalar or shape (B,).
            cond: what to condition on, B rows.

        Returns: the raw prediction in the dtype of the frame, shape (B, *).
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
        time = t.to(device=x_t.device, dtype=torch.float32)
        # Leaner than no_grad; the copy is an ordinary tensor again, which a callback may change.
        with torch.inference_mode(not torch.is_grad_enabled()):
            output = self.net(x_t.to(parameter_dtype(self.net, frame)), time, **slots)
        output = output.to(frame, copy=not torch.is_grad_enabled())
        if output.shape != x_t.shape:
            raise LdmPipeError(
                f"the network maps {tuple(x_t.shape)} to {tuple(output.shape)}",
                where="Denoiser",
                how_to_fix="its output needs the shape of its input",
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
        """Turn a raw prediction at (x_t, t) into x0."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Denoised(to_x0(self.prediction, output, x_t.to(_frame_dtype(x_t)), alpha, sigma))

    def __call__(self, x_t: Tensor, t: Tensor, cond: ConditionLike | None = None) -> Denoised:
        """Estimate x0, shape (B, *); arguments as in `predict`."""
        return self.to_denoised(self.predict(x_t, t, cond), x_t, t)


def _frame_dtype(x_t: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if x_t.dtype == torch.float64 else torch.float32
