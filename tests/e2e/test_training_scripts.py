"""The training scripts as users start them: two steps of each stage, a stop in the middle, two processes."""

from __future__ import annotations

import importlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from autoencoder import AutoencoderKL
from conditioning import CLIPTextEncoder
from conditioning.contrastive import ImageTower
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.checkpoint import find_checkpoint, load_checkpoint
from ldm_pipe.training.run.config import build_config, dump_config, read_yaml
from tests.ranks import free_port
from tests.source import ROOT
from tests.training import assert_same_bits, saved_state

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")

NAMES = ["red apple", "green apple", "octopus", "grinning face", "racing car", "worm"]
MODEL = ROOT / "tests" / "data" / "tiny_pipeline"
OPTIM = {"learning_rate": 1.0e-3, "lr_warmup_steps": 1}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for i, name in enumerate(NAMES):
        buffer = io.BytesIO()
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(blocks).save(buffer, format="PNG")
        picture = {"bytes": buffer.getvalue(), "path": None}
        words = {"name": name, "caption": name, "keywords": name.split(), "concept": name}
        plain = dict.fromkeys(("is_skin_tone_variant", "is_gender_variant", "is_flag"), False)
        rows.append({"image": picture, "id": str(i), **words, **plain})
    path = tmp_path_factory.mktemp("drawings") / "train.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    return path


def write_config(path: Path, **values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {"num_threads": 1, "report_to": "none", "train_batch_size": 2, "max_train_steps": 2, "optim": OPTIM}
    path.write_text(yaml.safe_dump({**common, **values}))
    return path


def data_of(drawings: Path) -> dict[str, object]:
    return {
        "train_data_dir": str(drawings),
        "caption_column": "caption",
        "keywords_column": "keywords",
        "concept_column": "concept",
        "resolution": 32,
    }


def autoencoder_config(folder: Path, drawings: Path, **values: object) -> Path:
    network = {"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "mid_block_add_attention": False}
    return write_config(
        folder / "autoencoder.yaml",
        **{
            "output_dir": str(folder / "autoencoder"),
            "network": network,
            "objective": {"adversarial_start": 1},
            "perceptual": None,
            "discriminator_width": 4,
            "discriminator_layers": 1,
            "validation_steps": 1,
            "num_validation_images": 2,
            "data": data_of(drawings),
            **values,
        },
    )


def diffusion_config(folder: Path, drawings: Path, autoencoder: Path, **values: object) -> Path:
    unet = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return write_config(
        folder / "diffusion.yaml",
        **{
            "output_dir": str(folder / "diffusion"),
            "autoencoder": str(autoencoder),
            "text_encoder": str(MODEL),
            "cache_dir": str(folder / "cache"),
            "unet": unet,
            "num_caption_variants": 2,
            "validation_steps": 1000,
            "data": data_of(drawings),
            **values,
        },
    )


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def script(*words: str | Path, launcher: tuple[str, ...] = (), check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, *(str(word) for word in words)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=500, check=False
    )
    assert done.returncode == 0 or not check, done.stderr[-4000:]
    return done


ACCELERATE = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml")
TWO_RANKS = (
    "-m",
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--master_addr",
    "127.0.0.1",
    "--master_port",
    str(free_port()),  # of this process: other tests may run beside these
)


def test_two_steps_of_each_stage_give_a_pipeline_that_draws(tmp_path: Path, drawings: Path) -> None:
    script("scripts/train_autoencoder.py", "--config", autoencoder_config(tmp_path, drawings), launcher=ACCELERATE)
    vae = tmp_path / "autoencoder" / "vae"
    autoencoder = AutoencoderKL.from_pretrained(vae)
    assert autoencoder.factor == 4
    assert autoencoder.scaling_factor != 0.18215  # measured, not assumed
    assert sorted(p.name for p in (tmp_path / "autoencoder" / "grids").iterdir()) == [
        "step-000001.png",
        "step-000002.png",
    ]
    extra = {"validation_steps": 2, "validation_prompts": ["red apple"], "validation_num_inference_steps": 2}
    config = diffusion_config(tmp_path, drawings, vae, **extra)
    script("scripts/train_diffusion.py", "--config", config, "--report_to", "tensorboard", launcher=ACCELERATE)
    run = tmp_path / "diffusion"
    assert (run / "grids" / "step-000002.png").is_file()
    assert list((run / "tensorboard").iterdir())
    assert not (run / ".lock").exists()
    pipe = LatentDiffusionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    (picture,) = pipe("red apple", seed=0, num_inference_steps=2).images
    assert picture.size == (32, 32)
    checkpoint = find_checkpoint(run, "latest")
    assert checkpoint is not None
    groups, state = load_checkpoint(checkpoint)
    assert state["step"] == 2
    averaged = pipe.unet.state_dict()  # what is drawn with are the EMA weights
    for name, tensor in groups["unet.ema"].items():
        torch.testing.assert_close(averaged[name], tensor, rtol=0, atol=0)
    # a second start in the same folder does not mix two runs, and says how to go on
    again = script("scripts/train_diffusion.py", "--config", config, check=False)
    assert again.returncode == 2
    assert any(line.startswith("error: ") for line in again.stderr.splitlines())
    assert "--resume_from_checkpoint latest" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.slow
def test_fault_6_sigterm_saves_and_exits_0_and_the_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, drawings: Path
) -> None:
    common = {"max_train_steps": 300, "checkpointing_steps": 1000, "cache_dir": str(tmp_path / "cache")}
    config = diffusion_config(tmp_path / "a", drawings, MODEL / "vae", **common)
    command = [sys.executable, "scripts/train_diffusion.py", "--config", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    text = ""
    try:
        while not re.search(r"[1-9]\d*/300 \[", text) and process.poll() is None:
            text += process.stderr.read(1)
        process.send_signal(signal.SIGTERM)
        text += process.communicate(timeout=200)[1]
    finally:
        process.kill()
    assert process.returncode == 0, text[-2000:]
    run = tmp_path / "a" / "diffusion"
    (checkpoint,) = run.glob("checkpoint-*")
    assert 1 <= int(checkpoint.name.split("-")[1]) < 300
    assert not (run / ".lock").exists()
    assert (run / "pipeline" / "model_index.json").is_file()
    script("scripts/train_diffusion.py", "--config", config, "--resume_from_checkpoint", "latest")
    script("scripts/train_diffusion.py", "--config", config, "--output_dir", tmp_path / "b")
    assert_same_bits(saved_state(run / "checkpoint-300"), saved_state(tmp_path / "b" / "checkpoint-300"))
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, drawings: Path) -> None:
    """The same global batch on one process and on two gloo ranks: same rows, same noise, same weights to rounding."""
    common = {"max_train_steps": 4, "checkpointing_steps": 4, "data": {**data_of(drawings), "concept_column": None}}
    one = diffusion_config(tmp_path / "one", drawings, MODEL / "vae", train_batch_size=4, **common)
    two = diffusion_config(tmp_path / "two", drawings, MODEL / "vae", train_batch_size=2, **common)
    script("scripts/train_diffusion.py", "--config", one)
    script("scripts/train_diffusion.py", "--config", two, launcher=TWO_RANKS)
    a = saved_state(tmp_path / "one" / "diffusion" / "checkpoint-4")
    b = saved_state(tmp_path / "two" / "diffusion" / "checkpoint-4")
    assert a.keys() == b.keys()
    for name in a:
        # first moments are averages of gradients: rounding only. Weights move by up to the learning rate where Adam
        # divides a rounding by itself.
        tolerance = 1e-6 if name.endswith((".exp_avg", ".exp_avg_sq", ".step")) else 4.1e-3
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_the_autoencoder_trains_on_two_processes(tmp_path: Path, drawings: Path) -> None:
    """Until the discriminator starts, as on one process; from then on the adaptive weight is each process's own."""
    common = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 100}
    common |= {"objective": {"adversarial_start": 2}, "data": {**data_of(drawings), "concept_column": None}}
    one = autoencoder_config(tmp_path / "one", drawings, train_batch_size=4, **common)
    two = autoencoder_config(tmp_path / "two", drawings, train_batch_size=2, **common)
    script("scripts/train_autoencoder.py", "--config", one)
    script("scripts/train_autoencoder.py", "--config", two, launcher=TWO_RANKS)
    a, b = (saved_state(tmp_path / name / "autoencoder" / "checkpoint-2") for name in ("one", "two"))
    for name in a:
        tolerance = 1e-6 if name.endswith((".exp_avg", ".exp_avg_sq", ".step")) else 2.1e-3
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    start, end = (saved_state(tmp_path / "two" / "autoencoder" / f"checkpoint-{k}") for k in (2, 4))
    for group in ("autoencoder/", "discriminator/"):
        assert any(not torch.equal(start[name], end[name]) for name in start if name.startswith(group))
    assert all(torch.isfinite(tensor).all() for tensor in end.values())


def load_script(name: str) -> ModuleType:
    return importlib.import_module(f"scripts.{name}")


@pytest.mark.parametrize("name", ["clip.yaml", "sketch.yaml"])
def test_the_clip_configs_of_the_project_build(name: str) -> None:
    module = load_script("train_clip")
    path = ROOT / "configs" / "emoji" / name
    config = build_config(module.ClipConfig, read_yaml(path), str(path))
    assert build_config(module.ClipConfig, yaml.safe_load(dump_config(config)), "again") == config


@pytest.mark.parametrize("source", ["--train_file", "--data.train_data_dir"])
def test_two_steps_of_clip_give_what_the_other_stages_load(tmp_path: Path, drawings: Path, source: str) -> None:
    module = load_script("train_clip")
    sizes = ["--hidden_size", "16", "--num_layers", "1", "--num_heads", "2", "--projection_dim", "8", "--channels", "8"]
    numbers = ["--vocab_size", "530", "--max_length", "8", "--train_batch_size", "4", "--max_train_steps", "2"]
    files = ["--output_dir", str(tmp_path), source, str(drawings), "--resolution", "32", "--num_threads", "1"]
    with torch.random.fork_rng():
        module.main([*files, *sizes, *numbers])
        with pytest.raises(LdmPipeError, match="batches of 4000"):
            module.main([*files, *sizes, *numbers, "--train_batch_size", "4000"])
    tokens = CLIPTextEncoder.from_pretrained(tmp_path).encode(["red apple"]).tokens
    assert tokens is not None
    assert tokens.shape == (1, 8, 16)
    features = ImageTower.from_pretrained(tmp_path / "image_tower").features(torch.zeros(1, 3, 32, 32))
    assert [f.shape[1] for f in features] == [8]


def test_a_text_encoder_learns_to_predict_latents(tmp_path: Path, drawings: Path) -> None:
    module = load_script("train_clip")
    sizes = ["--hidden_size", "16", "--num_layers", "1", "--num_heads", "2", "--projection_dim", "8", "--channels", "8"]
    numbers = ["--vocab_size", "530", "--max_length", "32", "--train_batch_size", "4", "--max_train_steps", "1"]
    files = ["--train_file", str(drawings), "--resolution", "32", "--num_threads", "1"]
    second = ["--sketch_steps", "2", "--autoencoder", str(MODEL / "vae"), "--validation_file", str(drawings)]
    with torch.random.fork_rng():
        module.main(["--output_dir", str(tmp_path / "first"), *files, *sizes, *numbers])
        given = ["--init_from", str(tmp_path / "first"), "--train_batch_size", "4"]
        module.main(["--output_dir", str(tmp_path / "second"), *files, *given, *second])
    old, new = (CLIPTextEncoder.from_pretrained(tmp_path / name).encode(["red apple"]) for name in ("first", "second"))
    assert old.tokens is not None and new.tokens is not None
    assert old.tokens.shape == new.tokens.shape
    assert not torch.equal(old.tokens, new.tokens)
    assert not (tmp_path / "second" / "image_tower").exists()
    assert "6 unseen concepts" in (tmp_path / "second" / "clip.yaml").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sketch_steps", "2"], "without an autoencoder"),
        (["--init_from", "somewhere"], "leaves the first phase out"),
        (["--validation_file", "somewhere"], "only the second phase"),
    ],
)
def test_phases_of_clip_that_lack_something_are_refused(tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(LdmPipeError, match=words):
        load_script("train_clip").main(["--output_dir", str(tmp_path), *flags])
