"""Single files that we write, read by diffusers (0.42), and open_clip's towers under our names; tiny random models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from conditioning import CLIPTextEncoder
from ldm_pipe.interop.single.clip_names import from_open_clip, to_open_clip
from ldm_pipe.interop.single.families import FAMILIES
from ldm_pipe.interop.single.file import export_single_file, import_single_file
from tests.single_files import make_folder, random_weights

PIPELINES = {"sd1": 4, "sd2": 4, "sdxl": 4, "sdxl-refiner": 4, "sd1-inpainting": 9}


@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_reads_the_file_as_it_reads_the_folder(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every tensor of every part, through diffusers' own maps of the names."""
    diffusers = pytest.importorskip("diffusers")
    family = name.removesuffix("-inpainting")
    folder = make_folder(tmp_path / "folder", family, channels=PIPELINES[name])
    export_single_file(folder, tmp_path / "model.safetensors")
    wanted = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    caplog.set_level(logging.WARNING)
    diffusers.utils.logging.enable_propagation()
    cls = type(wanted)
    found = cls.from_single_file(str(tmp_path / "model.safetensors"), config=str(folder), local_files_only=True)
    said = [record.getMessage() for record in caplog.records if "diffusers" in record.name]
    assert [text for text in said if "key" in text or "initialized" in text] == []
    parts = ["unet", "vae", *(text.folder for text in FAMILIES[family].texts)]
    for part in parts:
        theirs, ours = getattr(found, part).state_dict(), getattr(wanted, part).state_dict()
        assert set(theirs) == set(ours)
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{part} {key}"


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_diffusers_reads_the_folder_that_a_file_became(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = make_folder(tmp_path / "folder", name)
    export_single_file(folder, tmp_path / "model.safetensors")
    import_single_file(tmp_path / "model.safetensors", tmp_path / "back", like=folder)
    wanted = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    found = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "back"), local_files_only=True)
    assert type(found) is type(wanted)
    call: dict[str, Any] = {"prompt": "abba", "num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    pictures = []
    for pipe in (wanted, found):
        pipe.set_progress_bar_config(disable=True)
        pictures.append(torch.from_numpy(pipe(**call, generator=torch.Generator().manual_seed(0)).images))
    assert torch.equal(pictures[0], pictures[1])


@torch.no_grad()
def test_a_tower_of_open_clip_says_the_same_under_our_names() -> None:
    """fp32, 1e-5: the same sums in another order."""
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.CLIPTextCfg(context_length=9, vocab_size=20, width=32, heads=4, layers=2)
    tower = open_clip.model._build_text_tower(24, config).eval()
    tensors = random_weights(tower, 0)
    ours, rest = from_open_clip(tensors, 2, projection=True)
    assert set(rest) <= {"logit_scale"}
    text = FAMILIES["sdxl"].texts[1].config
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"vocab_size": 20, "max_position_embeddings": 9, "projection_dim": 24, "eos_token_id": 19}
    encoder = CLIPTextEncoder.from_config({**text, **sizes, **more}).eval()
    encoder.load_state_dict(ours, strict=True)
    ids = torch.tensor([[18, 1, 2, 3, 19, 0, 0, 0, 0], [18, 4, 19, 0, 0, 0, 0, 0, 0]])
    projected = encoder(ids).projected
    assert projected is not None
    torch.testing.assert_close(projected, tower(ids), rtol=1e-5, atol=1e-5)
    back = to_open_clip(ours, 2)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_clips_vocabulary_is_that_of_transformers(tmp_path: Path) -> None:
    """The list that open_clip installs gives CLIP's ids: those of a sentence are written out in OpenAI's notebook."""
    pytest.importorskip("open_clip")
    from ldm_pipe.interop.single.clip_vocabulary import clip_tokenizer, tokenizer_folder

    tokenizer = clip_tokenizer(tokenizer_folder(None, None), "<|endoftext|>")
    assert len(tokenizer) == 49408
    import open_clip

    texts = ["a photo of a cat", "Na\u00efve caf\u00e9, 3 o'clock: \u732b \U0001f431!"]
    assert torch.equal(
        tokenizer(texts).ids.masked_fill(~tokenizer(texts).mask.bool(), 0), open_clip.SimpleTokenizer()(texts)
    )
    assert tokenizer(["a photo of a cat"]).ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
