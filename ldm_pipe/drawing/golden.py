"""The golden sample: a few numbers of two steps at a fixed seed, kept in a saved model and replayed when it is loaded.

It is the one check that catches a wrong latent scale, noise law, prediction, text encoder or weight file together,
all of which load without an error and draw a wrong picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conditioning import Condition
from ldm_pipe import guidance, samplers
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.request.beside import default_sizes
from ldm_pipe.drawing.request.sampling import at_resolution
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

PROMPT = "a golden sample"
SEED = 0
NUM_STEPS = 2
NUM_VALUES = 8
CHECKED = {
    "latents": "U-Net, text encoder, tokenizer or scheduler",
    "pixels": "autoencoder or its scaling_factor",
    "encoded": "autoencoder's encoder",
}
TOLERANCE = 1e-4  # relative to the largest value: fp32 rounding differs between machines by about 1e-6


@torch.no_grad()
def golden_sample(pipe: LatentDiffusionPipeline) -> dict[str, Any]:
    """Run two DDIM steps without guidance on the smallest latents the U-Net takes, and decode them.

    Returns: prompt, seed, size, and 8 evenly spread values each of the latents, the pixels, and the pixels encoded.
    Raises: LdmPipeError for weights that draw NaN or infinity.
    """
    side = max(8, 2 ** (len(pipe.unet.config.block_out_channels) - 1))
    channels = pipe.autoencoder.latent_channels
    num_extra = pipe.unet.config.in_channels - channels
    prompt = getattr(pipe.text_encoders[0].tokenizer, "names", [PROMPT])[0]  # a model of classes knows no other words
    cond = drawing.encode(pipe, [prompt]).to(pipe.device, pipe.dtype)
    x = Noise([SEED])((1, channels, side, side)).to(pipe.device)
    sizes = default_sizes(pipe, (side * pipe.factor, side * pipe.factor))
    if sizes is not None:
        cond = cond.join(sizes.to(pipe.device))
    if num_extra:
        cond = cond.join(Condition(spatial=x.new_zeros(1, num_extra, side, side)))
    steps = at_resolution(pipe.schedule, side * side).steps(
        NUM_STEPS, spacing=pipe.defaults.spacing or pipe.schedule.spacing or "trailing"
    )
    denoise = guidance.cfg(Denoiser(pipe.unet, pipe.schedule, pipe.schedule.prediction), cond, None, 1.0)
    z = samplers.ddim(denoise, x * steps.init_scale, steps)
    if not bool(torch.isfinite(z).all()):
        advice = "If it was just trained: lower the learning rate, and go back to an earlier checkpoint."
        raise LdmPipeError("the weights are numbers, but what they draw is NaN or infinity", "the U-Net", advice)
    image = pipe.autoencoder.decode(z.to(pipe.autoencoder.dtype))
    return {
        "prompt": prompt,
        "seed": SEED,
        "num_steps": NUM_STEPS,
        "side": side,
        "latents": _spread(z),
        "pixels": _spread(image),
        "encoded": _spread(pipe.autoencoder.encode(image.clamp(-1, 1))),
    }


def _spread(tensor: Tensor) -> list[float]:
    flat = tensor.detach().float().cpu().flatten()
    return [round(float(flat[i]), 7) for i in torch.linspace(0, len(flat) - 1, NUM_VALUES).long().tolist()]


def check_golden(pipe: LatentDiffusionPipeline, stored: Any, where: str) -> None:
    """Replay a stored golden sample.

    Raises: LdmPipeError if the loaded parts do not give the stored numbers.
    """
    if not isinstance(stored, Mapping) or not all(_is_numbers(stored.get(name)) for name in CHECKED):
        raise LdmPipeError("the golden sample is not of the known form", where, "Save the model anew.")
    fresh = golden_sample(pipe)
    for name in CHECKED:
        wanted, got = torch.tensor(stored[name]).double(), torch.tensor(fresh[name]).double()
        difference = float((wanted - got).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            guilty = CHECKED[name]
            what = f"the golden sample's {name} differ by {difference:.2g}: {guilty} is not what was saved"
            raise LdmPipeError(what, where, "Fetch the folder anew, or save it again if it was changed on purpose.")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == NUM_VALUES and all(isinstance(v, (int, float)) for v in value)
