"""Diffusion where every answer is known: one dimension, then the swiss roll. docs/tutorial_1d.md walks through it.

    python scripts/tutorial_1d.py --output out/tutorial

What enters: nothing. What leaves: four pictures and the numbers of docs/tutorial_1d.md. Noise laws, objectives, the
denoiser and the samplers are the ones that the latent model uses; only the network is a small one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm_pipe import samplers
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.metrics.mixture import GaussianMixture
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import atomic_write
from ldm_pipe.schedule import Law, NoiseSchedule
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow
from ldm_pipe.schedule.process import posterior, q_sample, q_step
from ldm_pipe.training.objectives import times
from ldm_pipe.training.objectives.objective import Objective, losses
from ldm_pipe.training.objectives.variational import vlb
from ldm_pipe.training.run.figures import figure_png, subplots

MIXTURE = GaussianMixture([[-4.0], [4.0]], [1.0, 1.0], [1.0, 2.0])
# 24 levels, the last of which is pure noise; the network outputs the mean of x_{t-1} and its variance
CHAIN = NoiseSchedule("linear", 0.01, 0.75, num_train_timesteps=24, prediction="mean", spacing="trailing")
INK, BLUE, ORANGE, GREY = "#2b2b2b", "#2166ac", "#d6604d", "#9a9a9a"


class MLP(nn.Module):
    """A small network with the UNet's calling convention: (x_t, t, ...) -> prediction, shape (B, out_channels)."""

    def __init__(self, law: Law, channels: int, out_channels: int, width: int = 128) -> None:
        super().__init__()
        low, high = (float(law.network_time(torch.tensor(t, dtype=torch.float64))) for t in law.t_range)
        self.low, self.span = low, high - low
        layers = [nn.Linear(9 * channels + 16, width), *(nn.Linear(width, width) for _ in range(2))]
        self.layers = nn.Sequential(*(part for layer in layers for part in (layer, nn.SiLU())))
        self.last = nn.Linear(width, out_channels)

    def forward(self, x_t: Tensor, t: Tensor, **slots: object) -> Tensor:
        """Predict from x_t, shape (B, channels), at times t, scalar or (B,); nothing conditions it."""
        when = ((t - self.low) / self.span).reshape(-1, 1) * (math.pi / 2 * torch.arange(1, 9))
        where = (x_t[:, :, None] * 2.0 ** torch.arange(4)).flatten(1)  # fine detail needs quick waves of x_t
        waves = torch.cat([where, when.expand(len(x_t), -1)], 1)
        return self.last(self.layers(torch.cat([x_t, waves.cos(), waves.sin()], 1)))


def fit(net: nn.Module, loss: Callable[[], Tensor], num_steps: int, title: str) -> list[float]:
    """Minimise a loss and return its course."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    course = []
    for _ in tqdm(range(num_steps), desc=f"{title:32}", unit="step"):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        lr_schedule.step()
        course.append(value.item())
    return course


def draws(seed: int) -> Noise:
    """Return a source of noise for whole batches."""
    return Noise.from_generator(torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Line:
    """What the one-dimensional part found out.

    Attributes:
        course: L_vlb of each training step, bits.
        entropy: of the data, bits: no model gets below.
        samples: shape (n, 1).
        right: share of the samples above 0; the truth is 2/3.
        distance: Wasserstein-1 distance of the samples from the truth.
        floor: the same of as many true samples.
    """

    course: list[float]
    entropy: float
    samples: Tensor
    right: float
    distance: float
    floor: float


def diffuse_line(num_paths: int, seed: int) -> Tensor:
    """Walk forward from data to noise, one level after the other; shape (T + 1, num_paths)."""
    noise, rows = draws(seed), CHAIN.steps(CHAIN.num_train_timesteps)
    x = MIXTURE.sample(num_paths, torch.Generator().manual_seed(seed))
    path = [x]
    for _, alpha_t, sigma_t, alpha_s, sigma_s in reversed(list(rows.pairs())):
        x = q_step(x, noise(x.shape).to(x), alpha_s, sigma_s, alpha_t, sigma_t)
        path.append(x)
    return torch.cat(path, 1).T


class MeanAndVariance(MLP):
    """The network of the chain: where untrained it stays at x_t, with a variance half-way between its bounds."""

    def forward(self, x_t: Tensor, t: Tensor, **slots: object) -> Tensor:
        """Return the mean of x_{t-1} and 2 v - 1, shape (B, 2)."""
        step, mix = super().forward(x_t, t).chunk(2, 1)
        return torch.cat([x_t + step, mix], 1)


def learn_line(num_steps: int, seed: int, batch: int = 256) -> tuple[Denoiser, list[float]]:
    """Train mean and variance on the variational bound of whole trajectories."""
    torch.manual_seed(seed)
    net = MeanAndVariance(CHAIN, 1, 2, width=64)
    denoiser, rows = Denoiser(net, CHAIN), CHAIN.steps(CHAIN.num_train_timesteps)
    data, noise = torch.Generator().manual_seed(seed), draws(seed + 1)

    def loss() -> Tensor:
        return vlb(denoiser, MIXTURE.sample(batch, data).float(), rows, noise, variance="learned").total.mean()

    return denoiser, fit(net, loss, num_steps, "mixture, mean and variance")


@torch.no_grad()
def draw_line(denoiser: Denoiser, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Walk back from noise to data; return the states (T + 1, n) and v of each step at each state (T, n)."""
    noise, rows = draws(seed), CHAIN.steps(CHAIN.num_train_timesteps)
    x = noise((num_samples, 1))
    path, mixes = [x], []
    samplers.ddpm(denoiser, x, rows, noise=noise, variance="learned", callback=lambda i, t, x, x0: path.append(x))
    for x_t, t in zip(path[:-1], rows.t[:-1], strict=True):
        mix = denoiser(x_t, t).var_mix
        assert mix is not None
        mixes.append(mix)
    return torch.cat(path, 1).T, torch.cat(mixes, 1).T


def run_line(output: Path, num_steps: int, seed: int) -> Line:
    """Do the one-dimensional part: forward, learn, back, compare."""
    num_samples = 4000
    forward = diffuse_line(num_samples, seed)
    denoiser, course = learn_line(num_steps, seed)
    backward, mixes = draw_line(denoiser, num_samples, seed + 2)
    truth = MIXTURE.sample(200_000, torch.Generator().manual_seed(seed + 3))
    samples = backward[-1][:, None]
    result = Line(
        course,
        float(-MIXTURE.log_prob(truth).mean()) / math.log(2),
        samples,
        float((samples > 0).double().mean()),
        MIXTURE.wasserstein(samples),
        MIXTURE.wasserstein(truth[:num_samples]),
    )
    plot_paths(output / "tutorial-forward.png", forward, "Forward: noise is added until nothing else is left")
    plot_paths(
        output / "tutorial-reverse.png", backward.flip(0), "Back: the trained chain, from noise to data", back=True
    )
    plot_training(output / "tutorial-loss.png", result, mixes)
    return result


@dataclass(frozen=True)
class Process:
    """A noise law with what is trained on it and how it is walked back."""

    title: str
    law: Law
    sampler: str
    num_steps: int
    objective: Objective = field(default_factory=Objective)
    choose_times: Callable[[Law, Tensor], Tensor] = times.uniform
    options: dict[str, Any] = field(default_factory=dict)


PROCESSES = (
    Process("DDPM\nlinear, eps", NoiseSchedule("linear", 1e-3, 0.2, 100, spacing="trailing"), "ddpm", 100),
    Process(
        "Sohl-Dickstein\n1/T, x0",
        NoiseSchedule("jsd", num_train_timesteps=100, prediction="x0", spacing="trailing"),
        "ddim",
        100,
        Objective(weighting="min_snr"),
    ),
    Process(
        "improved DDPM\ncosine, v",
        NoiseSchedule("squaredcos_cap_v2", num_train_timesteps=100, prediction="v", spacing="trailing"),
        "dpmpp_2m",
        25,
    ),
    Process("score SDE\ncontinuous VP, eps", ContinuousVP(spacing="log_snr"), "dpmpp_3m", 25),
    Process("NCSN\nVE, eps", VE(0.02, 5.0, prediction="eps"), "annealed_langevin", 40, options={"num_inner": 5}),
    Process(
        "EDM\npreconditioned", EDM(0.01, 10.0, sigma_data=1.0), "heun", 15, Objective(weighting="edm"), times.log_normal
    ),
    Process("rectified flow\nflow", Flow(), "euler", 50),
)


def swiss_roll(num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw points of a noisy spiral of standard deviation about 1, shape (n, 2) (arXiv:1503.03585, figure 1)."""
    u, eps = torch.rand(num_samples, generator=generator), torch.randn(num_samples, 2, generator=generator)
    angle = 1.5 * math.pi * (1 + 2 * u)
    return torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 7 + 0.04 * eps


def sliced_distance(a: Tensor, b: Tensor, num_directions: int = 64) -> float:
    """Return the Wasserstein-1 distance of as many samples, (n, 2) each, averaged over directions."""
    angle = math.pi * torch.arange(num_directions) / num_directions
    directions = torch.stack([angle.cos(), angle.sin()]).to(a)
    return float(((a @ directions).sort(0).values - (b.to(a) @ directions).sort(0).values).abs().mean())


def learn_roll(process: Process, num_steps: int, seed: int, batch: int = 256) -> Denoiser:
    """Train one process on the swiss roll."""
    torch.manual_seed(seed)
    law, generator, noise = process.law, torch.Generator().manual_seed(seed), draws(seed + 1)
    net = MLP(law, 2, 2)
    denoiser = Denoiser(net, law)

    def loss() -> Tensor:
        x0, eps = swiss_roll(batch, generator), noise((batch, 2))
        u = times.stratify(torch.rand((), generator=generator, dtype=torch.float64), range(batch), batch)
        t = process.choose_times(law, u)
        x_t = q_sample(x0, eps, *law.alpha_sigma(t))
        return losses(process.objective, law, denoiser.predict(x_t, t), x0, eps, x_t, t).mean()

    fit(net, loss, num_steps, process.title.replace("\n", ", "))
    return denoiser


@torch.no_grad()
def draw_roll(process: Process, denoiser: Denoiser, num_samples: int, seed: int) -> tuple[list[Tensor], int]:
    """Draw; return the states at noise, at two levels between and at the end, in unit scale, and the evaluations."""
    sampler, noise, calls = samplers.get(process.sampler), draws(seed), 0
    steps = process.law.steps(process.num_steps, grid=sampler.grid)
    x = steps.init_scale * noise((num_samples, 2))
    path = [x]

    def denoise(x: Tensor, t: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return denoiser(x, t)

    sampler(denoise, x, steps, noise=noise, callback=lambda i, t, x, x0: path.append(x), **process.options)
    edm = (steps.sigma / steps.alpha).tolist()
    shown = [0, *(min(range(len(edm)), key=lambda i: abs(edm[i] - level)) for level in (1.0, 0.3)), len(path) - 1]
    return [path[i] / math.hypot(float(steps.alpha[i]), float(steps.sigma[i])) for i in shown], calls


def run_roll(output: Path, num_steps: int, seed: int) -> dict[str, tuple[str, int, float]]:
    """Train and draw all processes; return (sampler, evaluations, distance) of each."""
    num_samples, truth = 2000, torch.Generator().manual_seed(seed + 100)
    true = swiss_roll(num_samples, truth)
    columns, found = [], {"true samples": ("", 0, sliced_distance(swiss_roll(num_samples, truth), true))}
    for process in PROCESSES:
        denoiser = learn_roll(process, num_steps, seed)
        states, calls = draw_roll(process, denoiser, num_samples, seed + 2)
        columns.append(states)
        found[process.title.replace("\n", ", ")] = (process.sampler, calls, sliced_distance(states[-1], true))
    plot_rolls(output / "tutorial-swiss-roll.png", columns, true)
    return found


def figure(*args: Any, **kwargs: Any) -> Any:
    """Return matplotlib's subplots in this page's style."""
    from matplotlib import rcParams

    rcParams.update({
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
        "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    })  # fmt: skip
    return subplots(*args, **kwargs)


def plot_paths(path: Path, states: Tensor, title: str, *, back: bool = False) -> None:
    """Draw trajectories over the exact densities, with the histograms of both ends beside them.

    Args:
        path, title: of the picture.
        states: clean to noise, shape (T + 1, n).
        back: read from noise to data: the axis of time is turned round.
    """
    fig, (left, middle, right) = figure(
        1, 3, figsize=(11, 4.2), sharey=True, gridspec_kw={"width_ratios": [1, 5, 1], "wspace": 0.04}
    )
    height = torch.linspace(-8.5, 8.5, 400, dtype=torch.float64)
    rows = CHAIN.steps(CHAIN.num_train_timesteps)
    levels = list(zip(rows.alpha.flip(0).tolist(), rows.sigma.flip(0).tolist(), strict=True))
    density = torch.stack([MIXTURE.log_prob(height[:, None], *level).exp() for level in levels], 1)
    extent = (-0.5, len(levels) - 0.5, -8.5, 8.5)
    middle.imshow(
        density.sqrt(), origin="lower", extent=extent, aspect="auto", cmap="Blues", vmax=0.9, interpolation="bilinear"
    )
    for walk in states[:, :60].T:
        middle.plot(walk, lw=0.7, alpha=0.75, color=ORANGE if walk[0] > 0 else BLUE)
    middle.set_xlabel("t (0 is data)")
    for axes, at in ((left, -1 if back else 0), (right, 0 if back else -1)):
        axes.hist(states[at].numpy(), bins=60, density=True, orientation="horizontal", color="0.8")
        axes.plot(MIXTURE.log_prob(height[:, None], *levels[at]).exp(), height, color=INK, lw=1.2)
        axes.set_title("data" if at == 0 else "noise", fontsize=10)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_ylim(-8.5, 8.5)
    if back:
        middle.invert_xaxis()
    left.invert_xaxis()
    left.set_ylabel("x")
    middle.set_title(title, fontsize=11)
    atomic_write(path, figure_png(fig, dpi=110, bbox_inches="tight"))


def plot_training(path: Path, found: Line, mixes: Tensor) -> None:
    """Draw the loss with the entropy below it, and the learned standard deviations between their bounds."""
    fig, (left, right) = figure(1, 2, figsize=(11, 3.8))
    left.plot(found.course, color=BLUE, lw=1)
    left.axhline(found.entropy, color=INK, lw=1, ls=(0, (4, 3)))
    left.text(0.01, found.entropy - 0.05, "entropy of the data", transform=left.get_yaxis_transform(), va="top")
    left.set_ylim(found.entropy - 0.45, found.entropy + 3)
    left.set(xlabel="training step", ylabel="L_vlb, bits")
    left.set_title("Loss of whole trajectories", loc="left", fontsize=11)
    rows = CHAIN.steps(CHAIN.num_train_timesteps)
    backs = [posterior(alpha_t, sigma_t, alpha_s, sigma_s) for _, alpha_t, sigma_t, alpha_s, sigma_s in rows.pairs()]
    t, small, large = rows.t[:-2], *(torch.tensor([b[k] for b in backs[:-1]]) for k in (2, 3))
    mean = mixes.mean(1)[:-1]
    learned = (mean * large.log() + (1 - mean) * small.log()).mul(0.5).exp()
    right.fill_between(t, small.sqrt(), large.sqrt(), color="0.9", lw=0)
    for values, name, ha, va in ((large, "large", "right", "bottom"), (small, "small", "left", "top")):
        right.plot(t, values.sqrt(), color=GREY, lw=1)
        right.text(5, float(values[-5] ** 0.5), f" {name} ", color="0.4", fontsize=9, ha=ha, va=va)
    right.plot(t, learned, color=ORANGE, marker="o", ms=3, lw=1.2)
    right.text(float(t[11]), float(learned[11]) + 0.02, "learned ", color=ORANGE, ha="right", va="bottom")
    right.set_xlabel("t")
    right.set_title("Standard deviation of a step back", loc="left", fontsize=11)
    fig.tight_layout()
    atomic_write(path, figure_png(fig, dpi=110))


def plot_rolls(path: Path, columns: Sequence[Sequence[Tensor]], true: Tensor) -> None:
    """Draw one column per process, from noise at the top to samples at the bottom, coloured by where points end."""
    fig, grid = figure(4, len(columns), figsize=(2 * len(columns), 8.2), sharex=True, sharey=True)
    for k, states in enumerate(columns):
        hue = states[-1].norm(dim=1)
        for axes, points in zip(grid[:, k], states, strict=True):
            if points is states[-1]:
                axes.scatter(*true.T, s=2, color="0.85", lw=0)
            axes.scatter(*points.T, c=hue, s=2, lw=0, cmap="turbo", vmin=0.5, vmax=2.1)
            axes.set_aspect("equal")
            axes.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), xticks=[], yticks=[])
            axes.spines[["left", "bottom"]].set_visible(False)
        grid[0, k].set_title(PROCESSES[k].title, fontsize=10)
    for axes, name in zip(grid[:, 0], ("noise", "sigma = alpha", "sigma = 0.3 alpha", "samples"), strict=True):
        axes.set_ylabel(name)
    fig.tight_layout(pad=0.4)
    atomic_write(path, figure_png(fig, dpi=100))


def main(argv: Sequence[str] | None = None) -> tuple[Line, dict[str, tuple[str, int, float]]]:
    """Run both parts, print what they found, and return it."""
    parser = argparse.ArgumentParser(description="Diffusion in one and two dimensions, with known answers.")
    parser.add_argument("--output", type=Path, default=Path("out/tutorial"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=900, help="training steps of each process of the swiss roll")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error(f"--steps is {args.steps}: train for at least 3")
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small matrices only wait for each other, and the numbers are those of any machine
    began = time.perf_counter()
    line = run_line(args.output, args.steps // 3, args.seed)
    rolls = run_roll(args.output, args.steps, args.seed)
    last = sum(line.course[-20:]) / len(line.course[-20:])
    print(f"L_vlb {last:.3f} bits; the entropy of the data is {line.entropy:.3f}")
    print(f"share of the right mode {line.right:.3f}; the truth is 0.667")
    print(f"distance from the truth {line.distance:.3f}; of as many true samples {line.floor:.3f}")
    print("\n| process | sampler | evaluations | distance |\n|---|---|---:|---:|")
    for title, (sampler, calls, distance) in rolls.items():
        print(f"| {title} | {f'`{sampler}`' if sampler else ''} | {calls or ''} | {distance:.3f} |")
    print(f"\n{time.perf_counter() - began:.0f} s; pictures in {args.output}")
    return line, rolls


if __name__ == "__main__":
    main()
