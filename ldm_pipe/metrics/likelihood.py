"""How likely a model finds pictures: the variational bound on the bits per dimension of their latents.

Enters: a pipeline, captioned drawings and the chain's length. Leaves: the bound and its parts, averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ldm_pipe import guidance
from ldm_pipe.data.dataset import Records
from ldm_pipe.data.images import resize, to_tensor
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.noise import Noise
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.schedule.laws import EDM
from ldm_pipe.schedule.process import Variance
from ldm_pipe.training.objectives.variational import Bound, Decoder, bits_per_dim


def default_num_steps(pipe: LatentDiffusionPipeline) -> int:
    """Return the number of levels of a discrete law, 1000 in continuous time."""
    return getattr(pipe.schedule, "num_train_timesteps", 1000)


@torch.no_grad()
def measure_bits(
    pipe: LatentDiffusionPipeline,
    records: Records,
    *,
    num_steps: int,
    variance: Variance | None = None,
    bin_width: float | None = None,
    batch_size: int = 20,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Bound -log2 p(z | caption) / dimensions of latents drawn from the autoencoder's posterior, as in training.

    Without bins this bounds the differential entropy of the normalised latents: it may be negative, and compares
    models of one autoencoder only. With bins it bounds the length of a code of the latents rounded to them. A chain
    of fewer steps than the law has levels is another, worse model.

    Args:
        pipe: the model; no guidance.
        records: drawings with captions.
        num_steps: of the chain.
        variance: of its steps; None is learned where the network learnt it, else fixed_small.
        bin_width: None for the density.
        batch_size: drawings at once; the numbers do not depend on it.
        seed: of the noise; drawing i has seed + i.
        progress: told the number of drawings done, after each batch.

    Returns: bits_per_dim and its standard error, its parts prior, steps and decoder, and `levels`, each step's part
        from noise to clean.
    """
    steps = pipe.schedule.steps(num_steps, spacing="karras" if isinstance(pipe.schedule, EDM) else "trailing")
    decoder, side = Decoder(bin_width), pipe.default_size[0]
    shape = (pipe.autoencoder.latent_channels, side // pipe.factor, side // pipe.factor)
    bounds: list[Bound] = []
    for first in range(0, len(records), batch_size):
        rows = range(first, min(first + batch_size, len(records)))
        image = torch.stack([to_tensor(resize(records.image(row), side)) for row in rows]).to(pipe.device)
        noise = Noise([seed + row for row in rows])
        z = pipe.autoencoder.encode(image, noise((len(rows), *shape)).to(pipe.device))
        cond = drawing.encode(pipe, [records.captions[row] for row in rows]).to(pipe.device, pipe.dtype)
        denoise = guidance.cfg(Denoiser(pipe.unet, pipe.schedule), cond, None, 1.0)
        bounds.append(bits_per_dim(denoise, z, steps, noise, variance=variance, decoder=decoder))
        progress(rows.stop)
    total = torch.cat([bound.total for bound in bounds])
    levels = torch.cat([bound.levels for bound in bounds], dim=1).mean(1).tolist()
    return {
        "bits_per_dim": float(total.mean()),
        "standard_error": float(total.std() / len(total) ** 0.5) if len(total) > 1 else None,
        "prior": float(torch.cat([bound.prior for bound in bounds]).mean()),
        "steps": sum(levels),
        "decoder": float(torch.cat([bound.decoder for bound in bounds]).mean()),
        "levels": [round(value, 7) for value in levels],
    }
