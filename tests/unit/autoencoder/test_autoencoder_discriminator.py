"""Laws of the patch discriminator."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from autoencoder import PatchDiscriminator
from ldm_pipe.pretrained import LdmPipeError


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_the_patch_of_the_paper(num_layers: int, patch: int) -> None:
    model = PatchDiscriminator(width=4, num_layers=num_layers, norm="none")
    for parameter in model.parameters():  # all positive: no path cancels
        torch.nn.init.constant_(parameter, 0.01)
    image = torch.ones(1, 3, 128, 128, requires_grad=True)
    logits = model(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == patch


@pytest.mark.parametrize("norm", ["group", "none"])
def test_an_image_is_judged_by_itself(norm: Literal["group", "none"]) -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(width=8, num_layers=2, norm=norm).train()
    batch = images(4, 3, 32, 32)
    singles = torch.cat([model(image) for image in batch.split(1)])
    torch.testing.assert_close(model(batch), singles, atol=1e-6, rtol=1e-5)
    assert not list(model.buffers())  # no running statistics that processes would have to share


def test_images_too_small_for_a_patch_are_refused() -> None:
    model = PatchDiscriminator(width=4, num_layers=3)
    assert model(images(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(LdmPipeError, match="23x24"):
        model(images(1, 3, 23, 24))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(LdmPipeError, match="norm 'batch'"):
        PatchDiscriminator(norm="batch")  # type: ignore[arg-type]
    with pytest.raises(LdmPipeError, match="num_layers 0"):
        PatchDiscriminator(num_layers=0)
