"""Laws of single files: names of full-size models, round trips to the bit, what is refused, what stays behind."""

from __future__ import annotations

import collections
import hashlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder import AutoencoderKL
from conditioning import CLIPTextEncoder
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.cli import main
from ldm_pipe.interop.pickles.checkpoint import load_checkpoint
from ldm_pipe.interop.single.families import FAMILIES, UNET, Family, detect
from ldm_pipe.interop.single.file import REST, export_single_file, guessed_otherwise, import_single_file, join
from ldm_pipe.networks import UNet
from ldm_pipe.pretrained import LdmPipeError, load_tensors, save_tensors
from ldm_pipe.schedule import read as schedule_config
from tests.single_files import make_folder

KINDS = ("sd1", "sd2", "sdxl", "sdxl-refiner")
# sha256 of "name [shape]", sorted, of what the networks that A1111 builds hold (CompVis/stable-diffusion 21f890f,
# Stability-AI/stablediffusion cf1d67a, Stability-AI/generative-models 0ad7de9), but for buffers, the logit_scale and
# SD 2's 24th layer. ComfyUI a125cd8 (0.3.64) reads each of these names too.
READ_BY_OTHERS = {
    "sd1": (1130, "dd0d17c940fbd3a9"),
    "sd2": (1214, "cb60416bf599c468"),
    "sdxl": (2513, "e8b4f0d1a190ee22"),
    "sdxl-refiner": (1857, "8e1d49b53cb02860"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_folder(tmp_path_factory.mktemp(name), name) for name in KINDS}


def _full_size(family: Family) -> dict[str, Tensor]:
    with torch.device("meta"):
        parts = {
            "unet": UNet.from_config(family.unet).state_dict(),
            "vae": AutoencoderKL.from_config(family.vae).state_dict(),
            **{text.folder: CLIPTextEncoder.from_config(text.config).state_dict() for text in family.texts},
        }
    return join(parts, {}, family)


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def _files(folder: Path) -> dict[str, dict[str, Tensor]]:
    paths = sorted(folder.glob("*/*.safetensors"))
    return {str(path.relative_to(folder)): load_tensors(path) for path in paths}


@pytest.mark.parametrize("name", KINDS)
def test_full_size_files_are_known_by_their_names_and_shapes(name: str) -> None:
    tensors = _full_size(FAMILIES[name])
    assert detect(tensors, "file").name == name
    lines = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(tensors.items()))
    assert (len(tensors), hashlib.sha256(lines.encode()).hexdigest()[:16]) == READ_BY_OTHERS[name]
    wide = tensors[f"{UNET}input_blocks.0.0.weight"].shape[0]
    nine = {**tensors, f"{UNET}input_blocks.0.0.weight": torch.empty(wide, 9, 3, 3, device="meta")}
    if name == "sdxl-refiner":
        with pytest.raises(LdmPipeError, match="the U-Net takes 9 channels"):
            detect(nine, "file")
    else:
        assert detect(nine, "file").pipeline.endswith("InpaintPipeline")


@pytest.mark.parametrize("name", KINDS)
def test_the_noise_law_of_a_family_is_one_that_we_read(name: str) -> None:
    law = schedule_config.read({**FAMILIES[name].scheduler, "prediction_type": "v_prediction"})
    assert law.prediction == "v"
    assert float(law.alpha(torch.tensor(999.0))) == pytest.approx(0.0682, abs=1e-3)  # alpha_bar of SD: 0.00466


def test_original_names_of_stable_diffusion_1() -> None:
    """Names and shapes as the published file has them: 686 of the U-Net, 248 of the autoencoder, 196 of the text."""
    tensors = _full_size(FAMILIES["sd1"])
    counts = collections.Counter(name.split(".")[0] for name in tensors)
    assert counts == {"model": 686, "first_stage_model": 248, "cond_stage_model": 196}
    for name, shape in {
        "model.diffusion_model.time_embed.2.weight": (1280, 1280),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
    }.items():
        assert tuple(tensors[name].shape) == shape, name


def test_original_names_of_stable_diffusion_xl() -> None:
    tensors = _full_size(FAMILIES["sdxl"])
    for name, shape in {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    }.items():
        assert tuple(tensors[name].shape) == shape, name


@pytest.mark.parametrize("name", KINDS)
def test_folder_to_file_to_folder_to_file_keeps_every_bit(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    export_single_file(folders[name], tmp_path / "first.safetensors")
    report = import_single_file(tmp_path / "first.safetensors", tmp_path / "folder", like=folders[name])
    assert report.family == name
    theirs, ours = _files(folders[name]), _files(tmp_path / "folder")
    assert set(theirs) == set(ours)
    for part, tensors in theirs.items():
        _equal(tensors, ours[part])
    export_single_file(tmp_path / "folder", tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_what_the_folder_has_no_place_for_comes_back(folders: dict[str, Path], tmp_path: Path) -> None:
    """Stable Diffusion 2 files hold 24 layers and a projection; the model reads 23 layers."""
    export_single_file(folders["sd2"], tmp_path / "plain.safetensors")
    tensors = {name: tensor.half() for name, tensor in load_tensors(tmp_path / "plain.safetensors").items()}
    prefix = "cond_stage_model.model."
    own = {name: x for name, x in tensors.items() if name.startswith(f"{prefix}transformer.resblocks.1.")}
    tensors |= {name.replace("resblocks.1.", "resblocks.2."): x + 1 for name, x in own.items()}
    tensors |= {f"{prefix}text_projection": torch.ones(32, 32), f"{prefix}logit_scale": torch.tensor(4.6)}
    save_tensors(tmp_path / "whole.safetensors", tensors)
    buffers = {"betas": torch.ones(9), "model_ema.decay": torch.tensor(0.5)}
    save_tensors(tmp_path / "more.safetensors", {**tensors, **buffers})
    import_single_file(tmp_path / "more.safetensors", tmp_path / "folder", like=folders["sd2"], prediction="v")
    assert (tmp_path / "folder" / REST).is_file()
    law = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert law["prediction_type"] == "v_prediction"
    notes = export_single_file(tmp_path / "folder", tmp_path / "back.safetensors")
    assert "Readers must be told that this model predicts v" in notes[0]
    _equal(load_tensors(tmp_path / "back.safetensors"), tensors)


def test_pickled_files_give_the_same_folder_and_averages_are_taken_when_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    export_single_file(folders["sd1"], tmp_path / "a.safetensors")
    tensors = load_tensors(tmp_path / "a.safetensors")
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith(UNET)
    }
    torch.save({"state_dict": {**tensors, **averages}, "global_step": 3}, tmp_path / "a.ckpt")
    torch.save({**tensors}, tmp_path / "bare.ckpt")
    plain = import_single_file(tmp_path / "a.ckpt", tmp_path / "plain", like=folders["sd1"])
    import_single_file(tmp_path / "bare.ckpt", tmp_path / "bare", like=folders["sd1"])
    import_single_file(tmp_path / "a.ckpt", tmp_path / "ema", like=folders["sd1"], ema=True)
    assert "ema=True" in plain.notes[0]
    unet = "unet/diffusion_pytorch_model.safetensors"
    wanted = load_tensors(folders["sd1"] / unet)
    _equal(load_tensors(tmp_path / "plain" / unet), wanted)
    _equal(load_tensors(tmp_path / "bare" / unet), wanted)
    _equal(load_tensors(tmp_path / "ema" / unet), {name: tensor + 1 for name, tensor in wanted.items()})
    with pytest.raises(LdmPipeError, match="has no EMA"):
        import_single_file(tmp_path / "bare.ckpt", tmp_path / "no", like=folders["sd1"], ema=True)


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": torch.ones(1)}, "callbacks": _Runs()}, tmp_path / "bad.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(_Runs(), protocol=2))
    for name in ("bad.ckpt", "bare.ckpt"):
        with pytest.raises(LdmPipeError, match=r"the pickle wants more than tensors|not a whole checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_files_are_refused_and_nothing_is_left(folders: dict[str, Path], tmp_path: Path) -> None:
    export_single_file(folders["sd1"], tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    tensors = load_tensors(tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(tensors, tmp_path / "b.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "b.ckpt").read_bytes()[:5000])
    conv = f"{UNET}input_blocks.0.0.weight"
    cases = {
        "few": ({name: x for name, x in tensors.items() if "time_embed" not in name}, "4 tensors do not fit: missing"),
        "more": ({**tensors, f"{UNET}control.weight": torch.ones(2)}, r"unexpected control.weight \[2\]"),
        "odd": ({**tensors, "lora.up": torch.ones(2)}, "1 tensors belong to no part: lora.up"),
        "wide": ({**tensors, conv: torch.ones(32, 5, 3, 3)}, "the U-Net takes 5 channels"),
        "none": ({"x": torch.ones(1)}, "no model.diffusion_model.input_blocks.0.0.weight"),
        "nan": ({**tensors, f"{UNET}out.2.bias": torch.full((4,), torch.nan)}, "NaN or infinity in conv_out.bias"),
    }
    for name, (content, reason) in cases.items():
        save_tensors(tmp_path / f"{name}.safetensors", content)
        with pytest.raises(LdmPipeError, match=reason):
            import_single_file(tmp_path / f"{name}.safetensors", tmp_path / "out" / name, like=folders["sd1"])
    for name in ("cut.safetensors", "cut.ckpt"):
        with pytest.raises(LdmPipeError, match="not a whole"):
            import_single_file(tmp_path / name, tmp_path / "out" / name, like=folders["sd1"])
    with pytest.raises(LdmPipeError, match="is of no family"):
        import_single_file(tmp_path / "a.safetensors", tmp_path / "out" / "unlike")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_depth_model_is_read_and_its_estimator_stays_behind(folders: dict[str, Path], tmp_path: Path) -> None:
    """The layout of stabilityai's 512-depth-ema: SD 2 with 5 channels, and MiDaS under `depth_model.`."""
    export_single_file(folders["sd2"], tmp_path / "plain.safetensors")
    tensors, conv = load_tensors(tmp_path / "plain.safetensors"), f"{UNET}input_blocks.0.0.weight"
    tensors[conv] = torch.cat([tensors[conv], torch.ones(len(tensors[conv]), 1, 3, 3)], dim=1)
    save_tensors(tmp_path / "depth.safetensors", {**tensors, "depth_model.model.pretrained.x": torch.ones(2)})
    like, folder = folders["sd2"], tmp_path / "folder"
    report = import_single_file(tmp_path / "depth.safetensors", folder, like=like, prediction="eps")
    assert "depth estimator stays behind" in report.notes[0]
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    assert pipe.spatial is not None
    assert pipe.spatial.kind == "depth"
    assert torch.equal(pipe.unet.conv_in.weight, tensors[conv])
    with pytest.raises(LdmPipeError, match="only with an estimator"):
        export_single_file(folder, tmp_path / "again.safetensors")


def test_stable_diffusion_2_is_not_imported_without_its_prediction() -> None:
    from ldm_pipe.interop.single.file import _prediction

    family = FAMILIES["sd2"]
    with pytest.raises(LdmPipeError, match="do not say what the network predicts"):
        _prediction({}, family, None, "file")
    assert _prediction({}, family, "v", "file") == "v_prediction"
    assert _prediction({}, FAMILIES["sd1"], None, "file") == "epsilon"
    assert _prediction({"v_pred": torch.zeros(0)}, FAMILIES["sdxl"], None, "file") == "v_prediction"


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("vae/config.json", {"scaling_factor": 0.3}, "the latents are scaled by 0.3"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "the noise law has"),
        ("model_index.json", {"_class_name": "LDMTextToImagePipeline"}, "the folder holds a 'LDMTextToImagePipeline'"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "unet is a UNet2DModel"),
    ],
)
def test_what_readers_would_assume_wrongly_is_refused(
    part: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "folder", "sd1")
    (folder / part).write_text(json.dumps({**json.loads((folder / part).read_text()), **changes}))
    with pytest.raises(LdmPipeError, match=reason):
        export_single_file(folder, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(("word", "spread", "told"), [("eps", 0.05, 0), ("eps", 0.2, 1), ("v", 0.05, 1), ("v", 0.2, 0)])
def test_comfyuis_guess_at_the_prediction_is_told_where_it_is_wrong(word: str, spread: float, told: int) -> None:
    """As tried with ComfyUI a125cd8 on full-size files."""
    law = {"prediction_type": {"eps": "epsilon", "v": "v_prediction"}[word]}
    bias = spread * torch.tensor([1.0, -1.0])
    tensors = {f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias": bias.half()}
    assert len(guessed_otherwise(tensors, replace(FAMILIES["sd2"], scheduler=law))) == told
    assert guessed_otherwise(tensors, replace(FAMILIES["sd1"], scheduler=law)) == ()


def test_predicting_v_with_zero_terminal_snr_is_written_where_readers_look_for_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", "sdxl", prediction="v_prediction")
    law = folder / "scheduler" / "scheduler_config.json"
    law.write_text(json.dumps({**json.loads(law.read_text()), "rescale_betas_zero_snr": True}))
    export_single_file(folder, tmp_path / "x.safetensors", dtype=torch.float16)
    tensors = load_tensors(tmp_path / "x.safetensors")
    assert {"v_pred", "ztsnr"} <= set(tensors)
    assert {tensor.dtype for name, tensor in tensors.items() if "." in name} == {torch.float16}
    import_single_file(tmp_path / "x.safetensors", tmp_path / "back", like=folder)
    back = json.loads((tmp_path / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert (back["prediction_type"], back["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_the_command_goes_both_ways_and_says_what_is_of_no_use(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = str(folders["sd1"]), str(tmp_path / "a.safetensors")
    assert main(["convert", folder, file]) == 0
    assert main(["convert", file, str(tmp_path / "back"), "--like", folder]) == 0
    assert (tmp_path / "back" / "model_index.json").is_file()
    for words, reason in (
        (["convert", folder, file], "exists already"),
        (["convert", folder, str(tmp_path / "b.safetensors"), "--ema"], "--ema have no effect here"),
        (["convert", file, str(tmp_path / "c"), "--like", folder, "--num-heads", "4"], "--num-heads have no effect"),
        (["convert", str(tmp_path / "none.ckpt"), str(tmp_path / "c")], "no such file or folder"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        assert reason in capsys.readouterr().err


def test_every_row_of_the_page_of_models_names_a_test() -> None:
    """But for measurements, which give a ratio."""
    tests = Path(__file__).parents[2]
    tables = re.findall(r"(?:^\|.*\n)+", (tests.parent / "docs" / "models.md").read_text(), flags=re.MULTILINE)
    rows = [row for table in tables if "| ratio |" not in table for row in table.splitlines()[2:]]
    assert len(rows) > 50
    named = [re.findall(r"(?:unit|parity|e2e)/test_\w+\.py", row) for row in rows]
    assert [row for row, found in zip(rows, named, strict=True) if not found and "the same" not in row] == []
    assert [name for found in named for name in found if not (tests / name).is_file()] == []
