"""A model folder is read strictly: what does not belong to it, or would draw a wrong picture, is one clear error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.drawing.golden import check_golden, golden_sample
from ldm_pipe.drawing.output import Defaults, Thresholding
from ldm_pipe.interop.folders import folder as model_folder
from ldm_pipe.pipelines.export import check_representable
from ldm_pipe.pretrained import LdmPipeError, load_tensors, read_json, save_tensors

TINY = Path(__file__).parents[2] / "data" / "tiny_pipeline"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = read_json(path)
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_frozen_checkpoint_loads() -> None:
    """STYLE, habit 9: old checkpoints load; its golden sample is replayed on the way."""
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    assert read_json(TINY / "ldm_pipe.json")["golden_sample"]["latents"]
    assert pipe.defaults.sampler == "ddim"
    assert {module.dtype for module in pipe.components.values()} == {torch.float32}


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    pipe.save_pretrained(tmp_path / "a")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "a")
    for name, module in pipe.components.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, again.components[name].state_dict()[key]), f"{name} {key}"
    again.save_pretrained(tmp_path / "b")
    first, second = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert first == second


def test_a_training_run_is_a_model(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "run" / "pipeline")
    assert LatentDiffusionPipeline.from_pretrained(tmp_path / "run").factor == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_dtype_for_all_parts(tmp_path: Path, dtype: torch.dtype) -> None:
    LatentDiffusionPipeline.from_pretrained(TINY).save_pretrained(tmp_path / "m", variant="low", dtype=dtype)
    for part, weights in model_folder.WEIGHTS.items():
        tensors = load_tensors(tmp_path / "m" / part / f"{weights}.low.safetensors")
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {dtype}
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "m", variant="low", torch_dtype=dtype)
    assert {module.dtype for module in pipe.components.values()} == {dtype}
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red apple", seed=0, output_type="pt").images.isfinite().all()
    with pytest.raises(LdmPipeError, match="low"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "m")


def test_files_follow_the_umask_and_no_pickle_is_written(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        LatentDiffusionPipeline.from_pretrained(TINY).save_pretrained(tmp_path / "m")
    finally:
        os.umask(mask)
    files = [p for p in (tmp_path / "m").rglob("*") if p.is_file()]
    assert {oct(p.stat().st_mode & 0o777) for p in files} == {"0o644"}
    assert {p.suffix for p in files} == {".json", ".txt", ".md", ".safetensors"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_saving_over_a_model_replaces_it_whole(tmp_path: Path) -> None:
    target = Path(shutil.copytree(TINY, tmp_path / "m"))
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    pipe.save_pretrained(target)
    assert torch.equal(LatentDiffusionPipeline.from_pretrained(target).unet.conv_out.bias, pipe.unet.conv_out.bias)
    assert (target / "notes.txt").exists()


@pytest.mark.parametrize("call", [{"safe_serialization": False}, {"dtype": "int8"}])
def test_save_refuses(tmp_path: Path, call: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError):
        LatentDiffusionPipeline.from_pretrained(TINY).save_pretrained(tmp_path / "m", **call)
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_where_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Path(shutil.copytree(TINY, tmp_path / "m"))
    before = snapshot(target)
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipe.text_encoders[0], "save_pretrained", full)
    with pytest.raises(LdmPipeError, match="No space left"):
        pipe.save_pretrained(target)
    assert snapshot(target) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    (tmp_path / "file").touch()
    with pytest.raises(LdmPipeError, match="file"):
        pipe.save_pretrained(tmp_path / "file")


# Strictness

INDEX = "model_index.json"
WRONG_FOLDERS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("unknown pipeline", INDEX, lambda j: j.update(_class_name="SomethingPipeline")),
    ("custom code", INDEX, lambda j: j.update(unet=["my_module", "MyUNet"])),
    ("path as class", INDEX, lambda j: j.update(vae=["diffusers", "../../AutoencoderKL"])),
    ("unknown part", INDEX, lambda j: j.update(extra=["diffusers", "UNet2DConditionModel"])),
    ("scheduler from elsewhere", INDEX, lambda j: j.update(scheduler=["os", "system"])),
    ("missing part", INDEX, lambda j: j.pop("vae")),
    ("list", INDEX, lambda j: [j]),
    ("latent channels", "vae/config.json", lambda j: j.update(latent_channels=8)),
    ("scaling_factor", "vae/config.json", lambda j: j.update(scaling_factor=0.6)),
    ("unet width", "unet/config.json", lambda j: j.update(block_out_channels=[16, 48])),
    ("unet heads", "unet/config.json", lambda j: j.update(attention_head_dim=4)),
    ("huge unet", "unet/config.json", lambda j: j.update(block_out_channels=[2**31, 2**31])),
    ("prediction", "scheduler/scheduler_config.json", lambda j: j.update(prediction_type="v_prediction")),
    ("betas", "scheduler/scheduler_config.json", lambda j: j.update(beta_schedule="linear")),
    ("no betas", "scheduler/scheduler_config.json", lambda j: j.pop("beta_start")),
    ("spacing", "scheduler/scheduler_config.json", lambda j: j.update(timestep_spacing="trailing")),
    ("scheduler list", "scheduler/scheduler_config.json", lambda j: [1]),
    ("activation", "text_encoder/config.json", lambda j: j.update(hidden_act="gelu")),
    ("end token", "tokenizer/vocab.json", lambda j: j.update({"a": j["b"], "b": j["a"]})),
    ("format", "ldm_pipe.json", lambda j: j.update(format_version=99)),
    ("defaults", "ldm_pipe.json", lambda j: j["defaults"].update(guidance_scale="much")),
    ("unknown default", "ldm_pipe.json", lambda j: j["defaults"].update(magic=1)),
    ("golden shape", "ldm_pipe.json", lambda j: j.update(golden_sample={"latents": [1]})),
    ("golden values", "ldm_pipe.json", lambda j: j["golden_sample"]["latents"].__setitem__(3, 0.0)),
    ("deep", "ldm_pipe.json", lambda j: json.loads("[" * 100 + "]" * 100)),
]


@pytest.mark.parametrize(("file", "change"), [w[1:] for w in WRONG_FOLDERS], ids=[w[0] for w in WRONG_FOLDERS])
def test_a_wrong_folder_is_refused(model: Path, file: str, change: Callable[[Any], Any]) -> None:
    """FAULTS 18, 20, 49, 51: most of these load elsewhere and draw another picture."""
    edit(model / file, change)
    with pytest.raises(LdmPipeError) as caught:
        LatentDiffusionPipeline.from_pretrained(model)
    assert str(model) in str(caught.value) or caught.value.how_to_fix


@pytest.mark.parametrize("part", sorted(model_folder.WEIGHTS))
@pytest.mark.parametrize("damage", ["missing", "truncated", "nan", "renamed", "other value"])
def test_wrong_weights_are_refused(model: Path, part: str, damage: str) -> None:
    path = model / part / f"{model_folder.WEIGHTS[part]}.safetensors"
    tensors = load_tensors(path)
    name = "decoder.conv_in.weight" if part == "vae" else max(tensors, key=lambda key: tensors[key].numel())
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        case "nan":
            save_tensors(path, {**tensors, name: tensors[name] * float("nan")})
        case "renamed":
            save_tensors(path, {("module." + k if k == name else k): v for k, v in tensors.items()})
        case _:
            save_tensors(path, {**tensors, name: tensors[name] + 0.5})
    with pytest.raises(LdmPipeError) as caught:
        LatentDiffusionPipeline.from_pretrained(model)
    if damage in ("nan", "renamed"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "name", ["no/such/model", "./missing", "/missing/folder", "", " ", "a/b/c", "../no/such", "x\0y", "no-such-model"]
)
def test_an_unknown_model_says_where_it_was_looked_for(name: str) -> None:
    with pytest.raises(LdmPipeError, match=r"no folder|model name"):
        LatentDiffusionPipeline.from_pretrained(name, local_files_only=True)


@pytest.mark.parametrize("call", [{"dtype": "float8"}, {"dtype": "float16", "torch_dtype": torch.float32}])
def test_from_pretrained_refuses(call: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError):
        LatentDiffusionPipeline.from_pretrained(TINY, **call)


def test_a_pickle_beside_is_not_read(model: Path) -> None:
    """FAULTS 46: diffusers falls back to pickle where the safetensors file is absent."""
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_tensors(path), model / "unet" / "diffusion_pytorch_model.bin")
    path.unlink()
    with pytest.raises(LdmPipeError, match=r"diffusion_pytorch_model\.safetensors"):
        LatentDiffusionPipeline.from_pretrained(model)


def test_a_plain_diffusers_folder_needs_no_ldm_pipe_json(model: Path) -> None:
    (model / "ldm_pipe.json").unlink()
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    assert pipe.defaults == Defaults(sampler="ddim")
    assert pipe.default_size == (32, 32)


def test_weights_that_draw_no_numbers_are_told_as_that_when_saved(tmp_path: Path) -> None:
    """A LoRA at a learning rate of 1e9 ended with "NaN or infinity in the input" of the decoder."""
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(3e38)
    with pytest.raises(LdmPipeError, match=r"what they draw is NaN.*learning rate"):
        pipe.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_golden_sample_notices_the_prompt_path() -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    stored = golden_sample(pipe)
    check_golden(pipe, stored, "here")
    with torch.no_grad():
        pipe.text_encoders[0].text_model.embeddings.token_embedding.weight.mul_(1.1)
    with pytest.raises(LdmPipeError, match="text encoder"):
        check_golden(pipe, stored, "here")


def test_model_card_escapes_what_came_from_outside(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    pipe.name = "<script>alert(1)</script>\n# not a title"
    pipe.save_pretrained(tmp_path / "m", card={"data": "<b>" + "x" * 10_000, "hours": "3"})
    text = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "\n# not" not in text
    assert len(text) < 8000
    assert "- hours: 3" in text
    assert "- licence: not recorded" in text


def test_what_diffusers_cannot_represent_is_told_or_refused() -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    pipe.defaults = Defaults(thresholding=Thresholding("dynamic"), guidance_rescale=0.7)
    notes = check_representable(pipe, "euler")
    assert any("thresholding" in note for note in notes)
    assert any("guidance_rescale=0.7" in note for note in notes)
    pipe.text_encoders = (*pipe.text_encoders, *pipe.text_encoders)
    with pytest.raises(LdmPipeError, match="2 text encoders"):
        check_representable(pipe, "ddim")


def test_tensors_of_every_type_and_shape_are_read_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    types += [torch.int8, torch.uint8, torch.bool]
    wanted = {str(d): (torch.randn(3, 5, generator=generator) * 9).abs().to(d) for d in types}
    wanted |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    save_tensors(tmp_path / "x.safetensors", wanted, {"note": "not a tensor"})
    found = load_tensors(tmp_path / "x.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in wanted.items())
    for path in tmp_path.iterdir():  # what was read stays what it was, whatever becomes of the file
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert all(torch.equal(found[n], t) for n, t in wanted.items())


def test_unknown_types_and_cut_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(4).to(torch.float8_e4m3fn)})
    with pytest.raises(LdmPipeError, match="F8_E4M3"):
        load_tensors(path)
    save_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LdmPipeError, match="not a whole safetensors file"):
        load_tensors(path)
