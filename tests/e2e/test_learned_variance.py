"""A model that learnt its variance: saved, loaded and drawn with like any other, and by ddpm with its variance."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.export import check_representable
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.checkpoint import load_checkpoint
from tests.source import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the tiny pipeline with a U-Net of twice the output channels; the first half are the tiny one's."""
    tiny = LatentDiffusionPipeline.from_pretrained(ROOT / "tests" / "data" / "tiny_pipeline")
    channels = tiny.autoencoder.latent_channels
    unet = UNet.from_config({**tiny.unet.config, "out_channels": 2 * channels})
    state = dict(tiny.unet.state_dict())
    generator = torch.Generator().manual_seed(0)
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = torch.cat([state[name], torch.randn(state[name].shape, generator=generator)])
    unet.load_state_dict(state)
    parts = (unet, tiny.autoencoder, tiny.text_encoders, tiny.schedule)
    path = tmp_path_factory.mktemp("learned") / "model"
    LatentDiffusionPipeline(*parts, defaults=tiny.defaults).save_pretrained(path)
    return path


def draw(model: Path, **options: object) -> torch.Tensor:
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe("red apple", seed=1, num_inference_steps=4, output_type="latent", **options).images  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_samplers_without_a_variance_draw_as_from_the_plain_model(folder: Path, scale: float) -> None:
    plain = draw(ROOT / "tests" / "data" / "tiny_pipeline", sampler="ddim", guidance_scale=scale)
    learned = draw(folder, sampler="ddim", guidance_scale=scale)
    torch.testing.assert_close(learned, plain, rtol=1e-4, atol=1e-4)


def test_ddpm_draws_with_the_learnt_variance(folder: Path) -> None:
    plain = draw(ROOT / "tests" / "data" / "tiny_pipeline", sampler="ddpm", guidance_scale=3.0)
    learned = draw(folder, sampler="ddpm", guidance_scale=3.0)
    assert learned.isfinite().all()
    assert (learned - plain).abs().max() > 1e-3


def test_it_is_not_exported_to_a_pipeline_that_would_misread_it(folder: Path) -> None:
    with pytest.raises(LdmPipeError, match="variance"):
        check_representable(LatentDiffusionPipeline.from_pretrained(folder), "ddim")


def train(folder: Path, **changes: object) -> Path:
    """Run the training script for two steps on three drawings and return the run's folder."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pytest.importorskip("accelerate")
    rng = np.random.default_rng(0)
    rows = []
    for name in ("red apple", "green apple", "worm"):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, format="PNG")
        picture = {"bytes": buffer.getvalue(), "path": None}
        rows.append({"image": picture, "id": name, "caption": name, "keywords": [name], "concept": name})
    pandas.DataFrame(rows).to_parquet(folder / "train.parquet")
    tiny = ROOT / "tests" / "data" / "tiny_pipeline"
    config = {
        "output_dir": str(folder / "run"), "autoencoder": str(tiny / "vae"), "text_encoder": str(tiny),
        "cache_dir": str(folder / "cache"), "max_train_steps": 2, "train_batch_size": 2, "report_to": "none",
        "num_threads": 1, "num_caption_variants": 1,
        "data": {
            "train_data_dir": str(folder / "train.parquet"), "resolution": 32, "caption_column": "caption",
            "keywords_column": "keywords",
        },
        "unet": {
            "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 2, "norm_num_groups": 4,
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config | changes))
    from scripts import train_diffusion

    train_diffusion.main(["--config", str(folder / "run.yaml")])
    return folder / "run"


def test_two_steps_of_l_hybrid_give_a_pipeline_that_draws_with_its_variance(tmp_path: Path) -> None:
    schedule = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
    kinds = {"objective": "hybrid", "learn_variance": True, "time_sampling": "importance"}
    run = train(tmp_path, schedule=schedule, **kinds)
    pipe = LatentDiffusionPipeline.from_pretrained(run)
    assert pipe.unet.config.out_channels == 2 * pipe.autoencoder.latent_channels
    assert draw(run, sampler="ddpm", guidance_scale=2.0).isfinite().all()
    groups, _ = load_checkpoint(run / "checkpoint-2")
    assert int(groups["importance"]["counts"].sum()) == 4


@pytest.mark.parametrize(
    ("schedule", "law"),
    [
        ({"kind": "flow", "prediction_type": "flow_prediction"}, "Flow"),
        ({"kind": "edm", "prediction_type": "edm", "sigma_max": 20.0}, "EDM"),
        ({"kind": "ve", "prediction_type": "score", "sigma_max": 20.0}, "VE"),
    ],
)
@pytest.mark.filterwarnings("ignore:diffusers cannot read this model")
def test_two_steps_on_other_noise_laws_give_a_pipeline_that_draws(
    tmp_path: Path, schedule: dict[str, object], law: str
) -> None:
    run = train(tmp_path, schedule=schedule, loss_weighting="snr" if law == "VE" else "min_snr")
    assert type(LatentDiffusionPipeline.from_pretrained(run).schedule).__name__ == law
    assert draw(run, guidance_scale=2.0).isfinite().all()
