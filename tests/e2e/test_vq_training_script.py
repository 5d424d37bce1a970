"""scripts/train_autoencoder.py with a codebook, as users start it: what it leaves, two processes, diffusion on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoencoder import PreviewDecoder, VQModel
from ldm_pipe import LatentDiffusionPipeline
from tests.e2e.test_training_scripts import (
    TWO_RANKS,
    autoencoder_config,
    data_of,
    diffusion_config,
    drawings,  # noqa: F401  (a fixture)
    script,
)
from tests.training import saved_state

NETWORK = {
    "regularisation": "vq",
    "block_out_channels": [8, 8, 8],
    "latent_channels": 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
CODEBOOK = {"num_vq_embeddings": 16}


@pytest.mark.slow
def test_a_vq_autoencoder_trains_and_a_diffusion_model_on_its_latents_draws(tmp_path: Path, drawings: Path) -> None:  # noqa: F811
    crop = {"random": True, "zoom_min": 0.9, "zoom_max": 1.1}
    values = {"network": NETWORK, "codebook": CODEBOOK, "crop": crop, "preview": {"width": 4, "num_steps": 2}}
    done = script("scripts/train_autoencoder.py", "--config", autoencoder_config(tmp_path, drawings, **values))
    assert "6 of 6 rows used" in done.stdout
    run = tmp_path / "autoencoder"
    autoencoder, preview = VQModel.from_pretrained(run / "vae"), PreviewDecoder.from_pretrained(run / "preview")
    assert autoencoder.scaling_factor != 1.0  # measured, not assumed
    z = autoencoder.encode(torch.zeros(1, 3, 32, 32))
    assert preview(z).shape == autoencoder.decode(z).shape == (1, 3, 32, 32)
    script("scripts/train_diffusion.py", "--config", diffusion_config(tmp_path, drawings, run / "vae"))
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "diffusion")
    assert isinstance(pipe.autoencoder, VQModel)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red apple", seed=0, num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("ema", [True, False])
def test_two_processes_hold_the_codebook_of_one(tmp_path: Path, drawings: Path, ema: bool) -> None:  # noqa: F811
    common = {"network": NETWORK, "codebook": {**CODEBOOK, "ema": ema}, "validation_steps": 100, "max_train_steps": 1}
    common |= {"objective": {"adversarial_weight": 0.0}, "data": {**data_of(drawings), "concept_column": None}}
    one = autoencoder_config(tmp_path / "one", drawings, train_batch_size=4, **common)
    two = autoencoder_config(tmp_path / "two", drawings, train_batch_size=2, **common)
    script("scripts/train_autoencoder.py", "--config", one)
    script("scripts/train_autoencoder.py", "--config", two, launcher=TWO_RANKS)
    a, b = (saved_state(tmp_path / name / "autoencoder" / "checkpoint-1") for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert torch.equal(a["autoencoder/usage"], b["autoencoder/usage"])
    # Revived from the same latents by the same draw; the others were moved by averages, or by Adam.
    name = "autoencoder/autoencoder.quantize.embedding.weight"
    torch.testing.assert_close(b[name], a[name], atol=1e-5 if ema else 2.1e-3, rtol=1e-4)
