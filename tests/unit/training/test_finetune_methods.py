"""Fine-tuning on the tiny pipeline: what each method may change, that it learns, that it resumes, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("accelerate")

from autoencoder import VQModel
from conditioning import SpatialInput
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.interop.lora.words import read_vectors
from ldm_pipe.pretrained import LdmPipeError, load_tensors
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.tasks.finetune.convert import widened
from ldm_pipe.training.tasks.finetune.nets import LORA_FILE, WORD_FILE
from ldm_pipe.training.tasks.finetune.run import draw_sheet
from tests.finetuning import TINY, make_pictures, start
from tests.single_files import make_folder
from tests.training import assert_same_bits, whole_state

WORD = {"method": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "apple", "num_vectors": 2}
PRIOR = {"with_prior_preservation": True, "class_prompt": "an apple", "num_class_images": 3, "sample_batch_size": 2}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"use_ema": True},
    "attention": {"train_parts": ["cross_attention"]},
    "encoder": {"train_text_encoder": True},
    "lora": {"method": "lora"},
    "lora-encoder": {
        "method": "lora",
        "train_text_encoder": True,
        "rank": 2,
        "lora_alpha": 4.0,
        "use_ema": True,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
    },
    "word": WORD,
    "inpainting": {"inpainting": True},
    "conversion": {"prediction_type": "v_prediction", "zero_terminal_snr": True, "snr_gamma": 5.0},
    "dreambooth": {"instance_prompt": "a sks apple", **PRIOR},
}


def weights_of(pipe: LatentDiffusionPipeline) -> dict[str, Tensor]:
    """Copy every weight of a pipeline; a word's table is compared without its new rows."""
    nets = {"unet": pipe.unet, "vae": pipe.autoencoder, "text": pipe.text_encoders[0]}
    return {f"{part} {name}": w.clone() for part, net in nets.items() for name, w in _rows(net).items()}


def _rows(net: nn.Module) -> dict[str, Tensor]:
    tensors = dict(net.state_dict())
    for name in [name for name in tensors if name.endswith("token_embedding.weight")]:
        tensors[name] = tensors[name][: len(net.tokenizer.merges) + 512]  # type: ignore[union-attr,arg-type]
    return tensors


def may_change(method: str, name: str) -> bool:
    """Tell whether a method may change a weight of the saved pipeline."""
    part, _, weight = name.partition(" ")
    match method:
        case "attention":
            return part == "unet" and ".attn2." in weight
        case "encoder":
            return part in ("unet", "text")
        case "lora" | "lora-encoder":
            ends = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
            more = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")
            allowed = part == "text" and weight.endswith(more) and method == "lora-encoder"
            return allowed or (part == "unet" and weight.endswith(ends))
        case "word":
            return False
    return part == "unet"


SLOW = ("attention", "encoder", "lora", "conversion")  # the others show the same and more


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in METHODS])
def test_a_method_learns_and_changes_only_what_it_may(method: str, tmp_path: Path) -> None:
    trainer, _, pipe = start(tmp_path, max_train_steps=8, checkpointing_steps=8, caption_dropout=0.0, **METHODS[method])
    loss, part = trainer.parts[0].loss, trainer.parts[0]
    before = weights_of(pipe)
    micros = [Micro(step, [(4 * step + i) % 8 for i in range(4)], range(4)) for step in range(8)]

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(loss(micro)[0]) for micro in micros) / len(micros)

    first = mean_loss()
    trainer.fit()
    assert mean_loss() < first
    assert all(p.dtype == torch.float32 for p in part.module.parameters())
    after = weights_of(LatentDiffusionPipeline.from_pretrained(tmp_path / "run"))  # replays the golden sample
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if not may_change(method, name)} == set()
    assert bool(moved) == (method != "word")
    live = weights_of(pipe)  # outside of a save, a LoRA is beside the weights, not in them
    assert all(torch.equal(live[name], before[name]) for name in before if "lora" in method)


def test_a_lora_run_leaves_a_file_and_a_pipeline_that_draw_alike(tmp_path: Path) -> None:
    start(tmp_path, **METHODS["lora-encoder"])[0].fit()
    merged = LatentDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    loaded = LatentDiffusionPipeline.from_pretrained(TINY)
    loaded.load_lora_weights(tmp_path / "run" / LORA_FILE)
    tensors = load_tensors(tmp_path / "run" / LORA_FILE)
    assert all(name.startswith(("unet.", "text_encoder.")) for name in tensors)
    how: dict[str, Any] = {"seed": 0, "num_inference_steps": 3, "output_type": "pt"}
    images = [pipe("red apple", **how).images for pipe in (merged, loaded)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)
    plain = LatentDiffusionPipeline.from_pretrained(TINY)("red apple", **how).images
    assert float((plain - images[0]).abs().max()) > 1e-2


def test_a_word_is_saved_with_the_encoder_and_by_itself(tmp_path: Path) -> None:
    start(tmp_path, **WORD)[0].fit()
    encoder = LatentDiffusionPipeline.from_pretrained(tmp_path / "run").text_encoders[0]
    name, vectors = read_vectors(tmp_path / "run" / WORD_FILE)
    assert name == "<x>"
    table = encoder.text_model.embeddings.token_embedding.weight  # type: ignore[union-attr]
    assert torch.equal(table[-2:], vectors[0])
    old = LatentDiffusionPipeline.from_pretrained(TINY).text_encoders[0]
    start_ids = old.tokenizer.pieces("apple").ids  # type: ignore[union-attr]
    begun = old.text_model.embeddings.token_embedding.weight.detach()[start_ids].mean(0)  # type: ignore[union-attr]
    assert float((vectors[0] - begun).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["full", "lora", "word"])
def test_a_run_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    changes = {**METHODS[method], "data": {"random_flip": True, "center_crop": False, "num_crops": 2}}
    changes |= {"checkpoints_total_limit": 3}
    whole = start(tmp_path, **changes)[0]
    whole.fit()
    wanted = whole_state(whole)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = start(tmp_path, resume_from_checkpoint="latest", **changes)[0]
    again.fit()
    assert_same_bits(whole_state(again), wanted)
    if method != "full":  # the frozen networks are not written again and again
        assert (
            sum(t.numel() for t in load_tensors(tmp_path / "run" / "checkpoint-4" / "unet.safetensors").values()) < 1e5
        )


def test_validation_draws_what_the_result_draws(tmp_path: Path) -> None:
    sheet = {"validation_prompts": ["red apple", "worm"], "num_validation_images": 2, "validation_steps": 2}
    changes = {**sheet, "validation_num_inference_steps": 2, "use_ema": True, "ema_decay": 0.5}
    trainer, _, _ = start(tmp_path, **changes)
    trainer.fit()
    draw_sheet(LatentDiffusionPipeline.from_pretrained(tmp_path / "run"), trainer.config, tmp_path / "again.png")  # type: ignore[arg-type]
    sheets = sorted((tmp_path / "run" / "grids").iterdir())
    assert [path.name for path in sheets] == [f"step-00000{step}.png" for step in (0, 2, 4)]
    before, first, last, again = (np.asarray(Image.open(p)).astype(int) for p in (*sheets, tmp_path / "again.png"))
    assert abs(last - again).max() <= 1
    assert abs(first - again).max() > 1
    draw_sheet(LatentDiffusionPipeline.from_pretrained(TINY), trainer.config, tmp_path / "before.png")  # type: ignore[arg-type]
    assert abs(before - np.asarray(Image.open(tmp_path / "before.png"))).max() <= 1


def test_encoding_in_every_step_gives_the_loss_of_the_cache(tmp_path: Path) -> None:
    losses = []
    for cache in (True, False):
        trainer = start(tmp_path, method="lora", cache_latents=cache, output_dir=str(tmp_path / str(cache)))[0]
        losses.append(float(trainer.parts[0].loss(Micro(0, [0, 5, 2], range(3)))[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "word"])
def test_a_stream_is_trained_on_and_resumed(method: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted(make_pictures(tmp_path / "pictures").glob("*.png"))
    rows = {"image": [str(path) for path in files], "text": [f"{path.stem} apple" for path in files]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    changes = {**METHODS[method], "data": {"train_data_dir": str(tmp_path / "rows.parquet"), "streaming": True}}
    changes |= {"checkpoints_total_limit": 3}
    whole = start(tmp_path, **changes)[0]
    whole.fit()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = start(tmp_path, resume_from_checkpoint="latest", **changes)[0]
    again.fit()
    assert_same_bits(whole_state(again), whole_state(whole))


def test_class_pictures_are_drawn_once(tmp_path: Path) -> None:
    start(tmp_path, **METHODS["dreambooth"])
    folder = tmp_path / "run" / "class_images"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(times) == 3
    start(tmp_path, **METHODS["dreambooth"])
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def make_vq_folder(folder: Path) -> Path:
    """Write the tiny pipeline with a VQ autoencoder, as LDM's text-to-image has one."""
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    shape = {"block_out_channels": [8, 16, 16], "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 16}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vq = VQModel.from_config({**shape, **blocks}).eval()
    vq.set_latent_statistics([0.1] * 4, [0.5] * 4)
    LatentDiffusionPipeline(pipe.unet, vq, pipe.text_encoders, pipe.schedule).save_pretrained(folder)
    return folder


FAMILIES = [("sdxl", "lora-encoder"), ("sdxl", "encoder"), ("sdxl", "word"), ("sd2", "full"), ("ldm", "lora-encoder")]


@pytest.mark.parametrize(("family", "method"), FAMILIES)
def test_other_families_are_fine_tuned(family: str, method: str, tmp_path: Path) -> None:
    folder = make_vq_folder(tmp_path / "model") if family == "ldm" else make_folder(tmp_path / "model", family)
    changes = {**METHODS[method], "pretrained_model_name_or_path": str(folder), "initializer_token": "a"}
    changes = changes if method == "word" else {**changes, "initializer_token": None}
    trainer, trained, _ = start(tmp_path, max_train_steps=2, data={"random_flip": True}, **changes)
    trainer.parts[0].loss(Micro(0, [0, 1], range(2)))[0].backward()
    learning = {name: weight for name, weight in trained.net.named_parameters() if weight.requires_grad}
    assert [name for name, weight in learning.items() if weight.grad is None] == []  # or processes wait for each other
    trainer.fit()
    after = LatentDiffusionPipeline.from_pretrained(tmp_path / "run")
    assert len(after.text_encoders) == (2 if family == "sdxl" else 1)
    if trained.lora is not None:
        names = {"unet", "text_encoder", "text_encoder_2"} if family == "sdxl" else {"unet", "text_encoder"}
        assert {part for part, _ in trained.lora.places} == names
    if trained.word is not None:
        assert [v.shape for v in read_vectors(tmp_path / "run" / WORD_FILE)[1]] == [(2, 32), (2, 48)]


# -- bad input ---------------------------------------------------------------------------------------------------


def test_pictures_without_captions_are_refused(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", captions=False)
    with pytest.raises(LdmPipeError, match="caption"):
        start(tmp_path)


def test_an_unknown_column_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match=r"(?s)'words'.*text"):
        start(tmp_path, data={"caption_column": "words"})


def test_a_model_in_float16_is_trained_in_float32(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(TINY).to(torch.float16)
    pipe.save_pretrained(tmp_path / "model")
    weights = load_tensors(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    trainer, _, loaded = start(tmp_path, pretrained_model_name_or_path=str(tmp_path / "model"), max_train_steps=1)
    trainer.fit()
    assert {p.dtype for p in trainer.nets["unet"].parameters()} == {torch.float32}
    result = load_tensors(tmp_path / "run" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in result.values()} == {torch.float32}
    moved = [name for name, w in loaded.unet.state_dict().items() if not torch.equal(w, w.half().float())]
    assert moved, "a step of float16 would have been lost in rounding"


def test_captions_without_pictures_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}) + "\n")
    with pytest.raises(LdmPipeError, match=r"a\.png"):
        start(tmp_path)


def test_a_resolution_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match=r"30x30.*28 or 32"):
        start(tmp_path, data={"resolution": 30})


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match="nowhere"):
        start(tmp_path, pretrained_model_name_or_path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("method", ["lora", "word"])
def test_another_model_is_refused_on_resume(method: str, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    changes = {**METHODS[method], "pretrained_model_name_or_path": str(tmp_path / "model")}
    start(tmp_path, **changes)[0].fit()
    other = LatentDiffusionPipeline.from_pretrained(TINY)
    with torch.no_grad():
        other.unet.conv_in.weight += 0.1
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(LdmPipeError, match="frozen"):
        start(tmp_path, resume_from_checkpoint="latest", **changes)[0].fit()


def test_another_autoencoder_is_refused_on_resume(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    start(tmp_path, pretrained_model_name_or_path=str(tmp_path / "model"))[0].fit()
    other = LatentDiffusionPipeline.from_pretrained(TINY)
    with torch.no_grad():
        other.autoencoder.encoder.conv_in.weight *= 1.1  # type: ignore[operator,union-attr]
    other.save_pretrained(tmp_path / "model")
    changes = {"pretrained_model_name_or_path": str(tmp_path / "model"), "resume_from_checkpoint": "latest"}
    with pytest.raises(LdmPipeError, match="or what encodes it did"):
        start(tmp_path, **changes)[0].fit()


def test_a_model_with_maps_is_refused(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    parts = (widened(pipe.unet, 5), pipe.autoencoder, pipe.text_encoders, pipe.schedule)
    LatentDiffusionPipeline(*parts, spatial=SpatialInput(1)).save_pretrained(tmp_path / "model")
    with pytest.raises(LdmPipeError, match="maps or classes"):
        start(tmp_path, pretrained_model_name_or_path=str(tmp_path / "model"))


def test_another_config_is_refused_on_resume_with_the_differences(tmp_path: Path) -> None:
    start(tmp_path, method="lora")[0].fit()
    with pytest.raises(LdmPipeError, match="rank: 4 -> 8"):
        start(tmp_path, method="lora", rank=8, resume_from_checkpoint="latest")[0].fit()


def test_a_learning_rate_that_gives_nan_ends_in_words_and_keeps_the_last_state(tmp_path: Path) -> None:
    changes = {"max_train_steps": 30, "checkpointing_steps": 1, "max_nonfinite_steps": 3, "optim": {}}
    start(tmp_path, **{**changes, "max_train_steps": 2})[0].fit()
    with pytest.raises(LdmPipeError, match="NaN or infinity"):
        start(
            tmp_path, **changes | {"optim": {"learning_rate": 1.0e20}}, resume_from_checkpoint="latest",
            allow_config_change=True,
        )[0].fit()  # fmt: skip
    assert LatentDiffusionPipeline.from_pretrained(tmp_path / "run") is not None
