"""Which times a training batch sees: every choice is the quantile function of a law of times.

Enters: a noise law and numbers in [0, 1), independent or spread evenly over the batch. Leaves: times, float32, and
for importance sampling the weights that make the loss what it would be without. This file knows no networks or data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, NoiseSchedule


def stratify(u: Tensor, positions: range, global_batch: int) -> Tensor:
    """Spread one uniform number evenly over the batch (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).

        u_i = (u + i / B) mod 1

    Args:
        u: one uniform in [0, 1), float64, shape ().
        positions: places i of this slice in the global batch of B pictures.

    Returns: shape (len(positions),); each is uniform on [0, 1), and every B-th of it holds one of the whole batch.
    """
    places = torch.tensor(list(positions), dtype=torch.float64) / global_batch
    return (u + places).remainder(1.0)


def uniform(law: Law, u: Tensor) -> Tensor:
    """Return times that are uniform on the law's range, whole where the law is discrete, shape (B,)."""
    if isinstance(law, NoiseSchedule):
        last = law.num_train_timesteps
        return (u * last).floor().clamp_max(last - 1).float()
    low, high = law.t_range
    return (low + u * (high - low)).float()


def logit_normal(law: Law, u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return times whose place in the law's range is logit-normal (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    place = sigmoid(mean + std n),   n unit Gaussian: the middle is seen more often than the ends
    """
    return uniform(law, torch.sigmoid(mean + std * torch.special.ndtri(u)))


def log_normal(law: Law, u: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Return times at which log(sigma / alpha) is normal (Karras et al. 2022, arXiv:2206.00364, table 1).

    What lies outside the law's range is put at its end.
    """
    low, high = law.t_range
    log_sigma = mean + std * torch.special.ndtri(u)
    t = law.t_of(-log_sigma).clamp(low, high)
    return (t.round() if isinstance(law, NoiseSchedule) else t).float()


class SecondMoment(nn.Module):
    """Importance sampling of discrete times (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3, eq. 18).

        p_t ~ sqrt(mean L_t^2)   over the last losses seen at t,   loss = mean(L_t / (T p_t))

    The expected loss is that of uniform times, with less variance. Until every time has its `history_length` losses
    all are equally probable. The state lies in buffers, so that a checkpoint holds it. Several processes stay alike if
    each updates with the losses of all, in the same order.
    """

    def __init__(self, num_times: int, history_length: int = 10, uniform_share: float = 0.001) -> None:
        """Start without history.

        Args:
            num_times: T.
            history_length: losses kept per time; 10 in the paper.
            uniform_share: how much of p is spread evenly, so that no time is forgotten.
        """
        super().__init__()
        if num_times < 1 or history_length < 1 or not 0 < uniform_share <= 1:
            what = f"{num_times} times, {history_length} losses each, {uniform_share} of p uniform"
            raise LdmPipeError(what, "SecondMoment", "use at least 1, at least 1, and a number in (0, 1]")
        self.uniform_share = uniform_share
        self.losses: Tensor
        self.counts: Tensor
        self.register_buffer("losses", torch.zeros(num_times, history_length, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_times, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Return p_t, float64 on the CPU, shape (T,)."""
        num, length = self.losses.shape
        spread = torch.full((num,), 1 / num, dtype=torch.float64)
        root = self.losses.cpu().square().mean(1).sqrt()
        if bool((self.counts < length).any()) or float(root.sum()) == 0:
            return spread
        return (1 - self.uniform_share) * root / root.sum() + self.uniform_share * spread

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return (t, weight) for independent uniform numbers u: whole times, float32, and 1 / (T p_t), shape (B,).

        Independent, because numbers that are spread over a batch whose parts see different p would bias the loss.
        """
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u.double(), right=True).clamp_max(len(p) - 1)
        return t.float(), 1 / (len(p) * p[t])

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take note of unweighted losses at times t, shape (B,) each; those that are not finite are left out."""
        for time, loss in zip(t.long().tolist(), losses.double().tolist(), strict=True):
            if math.isfinite(loss):
                place = int(self.counts[time]) % self.losses.shape[1]
                self.losses[time, place] = loss
                self.counts[time] += 1
