"""Change one part of a call or of a pipeline: your own guidance, sampler, networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import LatentDiffusionPipeline, UNet, guidance, samplers
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import TINY, fill, quiet, tiny

CALL: dict[str, Any] = {"prompt": "red apple", "seed": 0, "num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny()


def by_hand(denoiser: Any, conds: Any, weights: Tensor, uncond: Any) -> Any:
    """Classifier-free guidance as a caller would write it."""
    return guidance.cfg(denoiser, conds[0], uncond, 3.0 * float(weights[0, 0]))


def test_a_guidance_of_the_caller_takes_the_place_of_cfg(pipe: LatentDiffusionPipeline) -> None:
    plain = pipe(**CALL, guidance_scale=3.0).images
    for own in (by_hand, guidance.classifier_free(3.0)):
        assert torch.equal(pipe(**CALL, guidance=own).images, plain)
        assert torch.equal(pipe(**CALL, guidance_scale=1.0, guidance=own).images, plain)
    told: list[tuple[Any, ...]] = []

    def unguided(denoiser: Any, conds: Any, weights: Tensor, uncond: Any) -> Any:
        told.append((len(conds), tuple(weights.shape), uncond is None))
        return lambda x_t, t: denoiser(x_t, t, conds[0])

    free = pipe(**CALL, guidance_scale=3.0, guidance=unguided)
    assert torch.equal(free.images, pipe(**CALL, guidance_scale=1.0).images)
    assert free.infos[0].settings["Guidance"] == "unguided"
    pipe(**{**CALL, "prompt": "red apple AND cat"}, prompt_syntax="weighted", guidance=unguided)
    pipe(**CALL, guidance_scale=1.0, guidance=unguided)
    assert told == [(1, (1, 1), False), (2, (2, 1), False), (1, (1, 1), False)]


@pytest.mark.parametrize("wrong", ["cfg", 3, [by_hand]])
def test_a_guidance_that_cannot_be_called_is_refused(pipe: LatentDiffusionPipeline, wrong: Any) -> None:
    with pytest.raises(LdmPipeError, match="guidance is"):
        pipe(**CALL, guidance=wrong)


def test_a_sampler_may_be_a_function_or_an_entry_of_the_table(pipe: LatentDiffusionPipeline) -> None:
    def mine(
        denoise: Any, x: Tensor, steps: Any, *, noise: Any = None, eta: float = 0.0, callback: Any = None
    ) -> Tensor:
        return samplers.ddim(denoise, x, steps, noise=noise, eta=eta, callback=callback)

    wanted = pipe(**CALL, sampler="ddim").images
    output = pipe(**CALL, sampler=mine)
    assert torch.equal(output.images, wanted)
    assert output.infos[0].settings["Sampler"] == "mine"
    assert torch.equal(pipe(**CALL, sampler=samplers.get("heun")).images, pipe(**CALL, sampler="heun").images)
    with pytest.raises(LdmPipeError, match="takes no noise, eta, callback"):
        pipe(**CALL, sampler=lambda denoise, x, steps: x)
    with pytest.raises(LdmPipeError, match="no option"):
        pipe(**CALL, sampler=mine, sampler_options={"order": 2})


def test_parts_are_replaced_and_checked_for_fit() -> None:
    pipe = tiny()
    other = fill(UNet.from_config(pipe.unet.config))
    before, encoder = pipe(**CALL).images, pipe.text_encoder
    pipe.put(unet=other)
    assert pipe.unet is other
    changed = pipe(**CALL).images
    assert not torch.equal(changed, before)
    loaded = quiet(LatentDiffusionPipeline.from_pretrained(TINY, unet=other))
    assert torch.equal(loaded(**CALL).images, changed)
    wide = UNet.from_config({**pipe.unet.config, "in_channels": 7})
    for wrong in ({"unet": wide}, {"text_encoders": (encoder, encoder)}, {"decoder": other}):
        with pytest.raises(LdmPipeError):
            pipe.put(**wrong)
    with pytest.raises(LdmPipeError, match="7 channels"):
        LatentDiffusionPipeline.from_pretrained(TINY, unet=wide)
    assert pipe.unet is other
    pipe.text_encoder, pipe.vae = encoder, pipe.vae
    assert torch.equal(pipe(**CALL).images, changed)


def test_a_printed_pipeline_shows_its_parts(pipe: LatentDiffusionPipeline) -> None:
    shown = repr(pipe)
    assert "tiny" in shown
    for part in (pipe.unet, pipe.autoencoder, *pipe.text_encoders, pipe.schedule):
        assert type(part).__name__ in shown
    assert "sampler=ddim" in shown
