"""Laws of the preview decoder: known maps are found again, it is small, and the pipeline's callback can show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder import PreviewDecoder
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from tests.source import ROOT

SHAPE = {"latent_channels": 4, "factor": 4}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coloured(z: Tensor) -> Tensor:
    """Make the image whose 4x4 blocks have the colours a linear map gives the latents, and a texture of mean 0."""
    image = torch.einsum("bchw,kc->bkhw", z, randn(3, 4, seed=5)) + torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1)
    texture = F.interpolate(torch.ones(1, 1, 1, 1), z.shape[2] * 4)
    texture[..., ::2, :] = -1.0
    return F.interpolate(image, scale_factor=4.0) + texture


def test_a_linear_map_is_found_again() -> None:
    preview, z = PreviewDecoder.from_config(SHAPE), randn(6, 4, 8, 8)
    preview.fit_linear([(z[:4], coloured(z[:4])), (z[4:], coloured(z[4:]))])
    torch.testing.assert_close(preview.linear.weight[:, :, 0, 0], randn(3, 4, seed=5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(preview.linear.bias, torch.tensor([0.1, -0.2, 0.3]), atol=1e-5, rtol=1e-5)
    blocks = F.avg_pool2d(preview.raw(z), 4)
    torch.testing.assert_close(blocks, F.avg_pool2d(coloured(z), 4), atol=1e-4, rtol=1e-4)
    assert float(preview(z).abs().max()) <= 1.0


def test_a_channel_that_never_changes_does_no_harm() -> None:
    preview, z = PreviewDecoder.from_config(SHAPE), randn(4, 4, 8, 8)
    z[:, 2] = 0.5
    preview.fit_linear([(z, coloured(z))])
    assert torch.isfinite(preview.linear.weight).all()
    torch.testing.assert_close(F.avg_pool2d(preview.raw(z), 4), F.avg_pool2d(coloured(z), 4), atol=1e-3, rtol=1e-3)


def test_convolutions_start_as_the_linear_map_and_are_saved_with_it(tmp_path: Path) -> None:
    preview, z = PreviewDecoder.from_config({**SHAPE, "width": 8}), randn(2, 4, 8, 8)
    linear = PreviewDecoder.from_config(SHAPE)
    linear.linear.load_state_dict(preview.linear.state_dict())
    assert torch.equal(preview.raw(z), linear.raw(z))
    with torch.no_grad():
        preview.detail[-1].weight.copy_(randn(3, 8, 3, 3))  # type: ignore[union-attr, operator]
    preview.save_pretrained(tmp_path)
    again = PreviewDecoder.from_pretrained(tmp_path)
    assert torch.equal(again(z), preview(z))
    assert preview(z).shape == (2, 3, 32, 32)
    assert not torch.equal(preview.raw(z), linear.raw(z))


@pytest.mark.parametrize("change", [{"factor": 3}, {"factor": 0}, {"latent_channels": True}, {"width": -1}])
def test_what_cannot_be_built_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError, match=next(iter(change))):
        PreviewDecoder.from_config({**SHAPE, **change})


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(LdmPipeError, match="no picture"):
        PreviewDecoder.from_config(SHAPE).fit_linear([])


def test_the_callback_of_the_pipeline_can_show_it() -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(ROOT / "tests" / "data" / "tiny_pipeline")
    pipe.set_progress_bar_config(disable=True)
    shape = {"latent_channels": pipe.autoencoder.latent_channels, "factor": pipe.factor}
    preview, image = PreviewDecoder.from_config({**shape, "width": 8}), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        preview.fit_linear([(pipe.autoencoder.encode(image), image)])
    shown: list[Tensor] = []

    def show(_: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shown.append(preview(tensors["latents"]))
        return tensors

    with_preview = pipe("red apple", seed=0, num_inference_steps=3, callback_on_step_end=show, output_type="pt").images
    assert [picture.shape for picture in shown] == [(1, 3, 32, 32)] * 3
    assert torch.equal(with_preview, pipe("red apple", seed=0, num_inference_steps=3, output_type="pt").images)
