"""Where pictures, features and statistics of an evaluation come from, and that what does not fit is refused."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipe.metrics import described
from ldm_pipe.metrics.described import Described, Processes, describe, load_statistics, open_reference, save_statistics
from ldm_pipe.metrics.features import FeatureNet, load_features, of_module
from ldm_pipe.metrics.measure import measure
from ldm_pipe.metrics.moments import Moments
from ldm_pipe.metrics.pictures import of_tensor, open_pictures, save_npz
from ldm_pipe.pretrained import LdmPipeError
from tests.ranks import free_port
from tests.source import ROOT

MODEL = str(ROOT / "tests" / "data" / "tiny_pipeline")


def images(num: int, seed: int = 0, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, side, side), generator=generator, dtype=torch.uint8)


def inception_like(dim: int = 2048) -> FeatureNet:
    """Make features that look like Inception's."""
    line = torch.randn(3 * 16 * 16, dim, generator=torch.Generator().manual_seed(0))

    def embed(x: Tensor) -> dict[str, Tensor]:
        vectors = x.flatten(1).float() / 255 @ line
        return {"vectors": vectors, "spatial": vectors[:, :23], "logits": vectors[:, :9]}

    return FeatureNet("Inception 2015 pool_3", embed, is_inception=True)


PIXELS = load_features("pixels:4")


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stored", "compressed"])
def test_guided_diffusions_pictures_are_read_by_rows(how: str, tmp_path: Path) -> None:
    given = images(10)
    if how == "stored":
        save_npz(tmp_path / "a.npz", given)
    else:
        np.savez_compressed(tmp_path / "a.npz", arr_0=given.permute(0, 2, 3, 1).numpy(), arr_1=np.zeros(10))
    found = open_pictures(tmp_path / "a.npz")
    assert len(found) == 10
    assert torch.equal(found.read(range(3, 7)), given[3:7])
    assert len(found.first(4)) == 4
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (10, 16, 16, 3)


def folder_of(path: Path, given: Tensor) -> Path:
    path.mkdir()
    for i, image in enumerate(given):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:03d}.png")
    return path


def test_folders_and_mixed_sizes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures", images(5))
    assert torch.equal(open_pictures(folder).read(range(5)), images(5))
    Image.new("RGB", (20, 16)).save(folder / "other.png")
    with pytest.raises(LdmPipeError, match=r"2 sizes.*20x16"):
        open_pictures(folder)
    assert tuple(open_pictures(folder, side=16).read(range(6)).shape) == (6, 3, 16, 16)


def test_bad_npz_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    objects = io.BytesIO()
    np.savez(objects, arr_0=np.array([{}, {}], dtype=object))
    stored = io.BytesIO()
    np.savez(stored, arr_0=images(5).permute(0, 2, 3, 1).numpy())
    floats = io.BytesIO()
    np.savez(floats, arr_0=np.zeros((4, 8, 8, 3)))
    others = io.BytesIO()
    np.savez(others, pictures=np.zeros(3))
    for content in (objects, floats, others):
        path.write_bytes(content.getvalue())
        with pytest.raises(LdmPipeError):
            open_pictures(path)
    for content in (b"", b"no zip", stored.getvalue()[:2000]):
        path.write_bytes(content)
        with pytest.raises(LdmPipeError):
            open_pictures(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(LdmPipeError):
        open_pictures(path)
    with pytest.raises(LdmPipeError, match="not exist"):
        open_pictures(tmp_path / "none.npz")
    save_npz(path, images(5))
    with pytest.raises(LdmPipeError, match="5 pictures, 6 are wanted"):
        open_pictures(path).first(6)


# -- features ----------------------------------------------------------------------------------------------------------


def test_any_module_and_our_own_networks_are_features(tmp_path: Path) -> None:
    from conditioning.contrastive import ImageTower

    tower = ImageTower({"channels": [8, 16], "projection_dim": 12}).eval()
    tower.save_pretrained(tmp_path / "tower")
    net, given = load_features(f"tower:{tmp_path / 'tower'}"), images(4)
    torch.testing.assert_close(net(given)["vectors"], tower(given.float() / 127.5 - 1).detach())
    other = of_module("mine", nn.Sequential(nn.Flatten(), nn.Linear(768, 5)))
    assert tuple(other(given)["vectors"].shape) == (4, 5)
    again = of_module("mine", nn.Sequential(nn.Flatten(), nn.Linear(768, 5)))
    assert other.identity != again.identity  # other weights, other features


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_networks_of_transformers_are_read_from_folders(kind: str, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "dinov2":
        given: Any = Dinov2Model(Dinov2Config(**small)).eval()
    else:
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        vision = {**small, "intermediate_size": 16}
        given = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval()
    given.save_pretrained(tmp_path / "net")
    net = load_features(f"{kind}:{tmp_path / 'net'}")
    found = net(images(3))["vectors"]
    assert tuple(found.shape) == (3, 16 if kind == "dinov2" else 6)
    if kind == "clip":
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    weights = next((tmp_path / "net").glob("*.safetensors"))
    weights.unlink()
    with pytest.raises(LdmPipeError):
        load_features(f"{kind}:{tmp_path / 'net'}")


@pytest.mark.parametrize(
    "spec",
    ["resnet:x", "pixels:0", "pixels:a", "tower:", "inception", "inception:/none", "dinov2:/none", "clip:/none",
     "tower:/none", "classifier:/none", "open_clip:ViT-B-32", "open_clip:ViT-B-32@/none.safetensors"],
)  # fmt: skip
def test_features_that_are_not_there_are_told_offline(spec: str) -> None:
    with pytest.raises(LdmPipeError) as error:
        load_features(spec)
    assert error.value.how_to_fix


def test_features_that_are_no_vectors_or_not_finite_are_refused() -> None:
    for bad in (lambda x: x.float(), lambda x: x.flatten(1)[:1].float(), lambda x: x.flatten(1).float() * math.nan):
        with pytest.raises(LdmPipeError, match="bad"):
            FeatureNet("bad", bad)(images(3))


# -- shards and statistics -----------------------------------------------------------------------------------------


def test_processes_share_the_work_and_a_stopped_evaluation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(described, "SHARD", 4)
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    monkeypatch.setattr(described.in_shards, "__defaults__", (4,))
    pictures, seen = of_tensor(images(18)), []
    counting = FeatureNet("counting", lambda x: (seen.append(len(x)), x.flatten(1).float())[1])
    with pytest.raises(LdmPipeError, match="not exist"):  # one of two processes alone has not done everything
        describe(pictures, counting, tmp_path, processes=Processes(1, 2), batch_size=3)
    assert sum(seen) == 8
    found = describe(pictures, counting, tmp_path, batch_size=5)
    assert sum(seen) == 18
    assert found.vectors is not None and torch.equal(found.vectors, images(18).flatten(1).float())
    describe(pictures, counting, tmp_path)
    assert sum(seen) == 18
    other = FeatureNet("counting", counting.embed, key="other weights")
    describe(pictures, other, tmp_path)
    assert sum(seen) == 36


def test_statistics_are_written_and_reused(tmp_path: Path) -> None:
    net = inception_like()
    found = describe(of_tensor(images(30)), net, tmp_path / "features")
    save_statistics(tmp_path / "a.safetensors", found)
    again = load_statistics(tmp_path / "a.safetensors", net)
    assert torch.equal(again.moments.covariance, found.moments.covariance) and again.moments.num == 30
    assert again.vectors is not None and found.vectors is not None and torch.equal(again.vectors, found.vectors)
    save_statistics(tmp_path / "a.npz", found)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert {name: x.shape for name, x in arrays.items()} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (23,), "sigma_s": (23, 23)
        }  # fmt: skip
    known = load_statistics(tmp_path / "a.npz", net)
    assert known.spatial_moments is not None
    torch.testing.assert_close(known.moments.mean, found.moments.mean)
    names = {row.metric for row in measure(found, known, net, num_bootstraps=0)}
    assert {"FID", "sFID", "Vendi score", "Inception Score, parts of 5000"} == names


def test_a_reference_batch_holds_moments_of_all_and_some_pictures(tmp_path: Path) -> None:
    net = inception_like()
    whole = describe(of_tensor(images(40)), net, tmp_path / "features")
    spatial = whole.spatial_moments
    assert spatial is not None
    path = tmp_path / "VIRTUAL.npz"
    np.savez(
        path, arr_0=images(40)[:10].permute(0, 2, 3, 1).numpy(), mu=whole.moments.mean.numpy(),
        sigma=whole.moments.covariance.numpy(), mu_s=spatial.mean.numpy(), sigma_s=spatial.covariance.numpy(),
    )  # fmt: skip
    reference = open_reference(path, net, tmp_path / "features")
    assert reference.vectors is not None and len(reference.vectors) == 10
    rows = {row.metric: row for row in measure(whole, reference, net, num_bootstraps=10)}
    assert rows["FID"].estimate.value == pytest.approx(0, abs=1e-6)
    assert rows["sFID"].estimate.value == pytest.approx(0, abs=1e-6)
    assert rows["FID"].num_reference is None and rows["precision, k = 3"].num_reference == 10
    assert "rank 39 of 2048" in rows["FID"].note


def test_only_inceptions_frechet_distance_is_called_fid(tmp_path: Path) -> None:
    sets = [describe(of_tensor(images(60, seed)), PIXELS, tmp_path) for seed in (0, 1)]
    rows = measure(sets[0], sets[1], PIXELS, num_bootstraps=20)
    assert not [row for row in rows if "FID" in row.metric]
    assert {row.features for row in rows} == {"pixels 4x4"}
    by_name = {row.metric: row for row in rows}
    assert by_name["Frechet distance"].note == "ranks 48 and 48"
    assert by_name["Frechet distance"].estimate.low is not None and by_name["KID x 1000"].estimate.low is not None
    assert rows[0].metric == "KID x 1000"
    few = describe(of_tensor(images(20, 2)), PIXELS, tmp_path)
    note = {row.metric: row.note for row in measure(few, sets[1], PIXELS, num_bootstraps=0)}["Frechet distance"]
    assert note == "covariance not carried: N = 20, rank 19 of 48"


def test_references_of_other_features_are_refused(tmp_path: Path) -> None:
    pixels = describe(of_tensor(images(30)), PIXELS, tmp_path)
    other = load_features("pixels:8")
    save_statistics(tmp_path / "a.safetensors", pixels)
    with pytest.raises(LdmPipeError, match=r"pixels 4x4.*pixels 8x8"):
        load_statistics(tmp_path / "a.safetensors", other)
    with pytest.raises(LdmPipeError, match=r"pixels 8x8.*pixels 4x4|pixels 4x4.*pixels 8x8"):
        measure(pixels, describe(of_tensor(images(30)), other, tmp_path), PIXELS)
    with pytest.raises(LdmPipeError, match="spatial"):
        save_statistics(tmp_path / "b.npz", pixels)
    np.savez(tmp_path / "c.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(LdmPipeError, match="Inception"):
        load_statistics(tmp_path / "c.npz", PIXELS)
    with pytest.raises(LdmPipeError, match="width 64"):
        load_statistics(tmp_path / "c.npz", inception_like())
    np.savez(tmp_path / "d.npz", mu=np.zeros(64))
    with pytest.raises(LdmPipeError, match="sigma"):
        load_statistics(tmp_path / "d.npz", inception_like())
    narrow = Described("narrow", PIXELS.identity, given=(Moments.of(torch.randn(9, 3)), None))
    with pytest.raises(LdmPipeError, match="width 48, the reference has 3"):
        measure(pixels, narrow, PIXELS)
    save_file({"x": torch.zeros(2)}, str(tmp_path / "e.safetensors"))
    with pytest.raises(LdmPipeError, match="no statistics"):
        load_statistics(tmp_path / "e.safetensors", PIXELS)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return importlib.import_module("scripts.evaluate")


def test_samples_against_a_reference_in_one_command(
    evaluate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_npz(tmp_path / "samples.npz", images(30, 0))
    reference = folder_of(tmp_path / "reference", images(40, 1))
    call = [
        "metrics",
        "--samples",
        str(tmp_path / "samples.npz"),
        "--reference",
        str(reference),
        "--num_bootstraps",
        "20",
    ]
    call += ["--features", "pixels:4", "pixels:8", "--output", str(tmp_path / "out")]
    evaluate.main([*call, "--save_statistics", str(tmp_path / "stats.safetensors")])
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    (result,) = report["results"]
    assert {number["features"] for number in result["numbers"]} == {"pixels 4x4", "pixels 8x8"}
    assert {number["num"] for number in result["numbers"]} == {30}
    assert (tmp_path / "out" / "sheet-samples.png").is_file()
    out = capsys.readouterr().out
    assert "| KID x 1000 |" in out and "| metric | value |" in out
    assert {path.name for path in tmp_path.glob("stats*")} == {
        "stats-pixels-4x4.safetensors", "stats-pixels-8x8.safetensors"
    }  # fmt: skip
    # The statistics serve as a reference; a set is at distance 0 from its own.
    call = ["metrics", "--samples", str(tmp_path / "samples.npz"), "--features", "pixels:4", "--num_bootstraps", "0"]
    evaluate.main(
        [*call, "--reference", str(tmp_path / "stats-pixels-4x4.safetensors"), "--output", str(tmp_path / "b")]
    )
    numbers = json.loads((tmp_path / "b" / "results.json").read_text())["results"][0]["numbers"]
    values = {number["metric"]: number["estimate"]["value"] for number in numbers}
    assert values["Frechet distance"] == pytest.approx(0, abs=1e-9) and values["MIND"] == pytest.approx(0, abs=1e-9)
    assert values["authenticity"] == 0 and values["recall, k = 3"] == 1


def test_a_model_is_drawn_measured_and_resumed(
    evaluate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "prompts.txt").write_text("red apple\n\ngreen apple\n")
    reference = folder_of(tmp_path / "reference", images(8, 1, side=64))
    call = ["metrics", "--model", MODEL, "--prompts", str(tmp_path / "prompts.txt"), "--num", "5", "--batch_size", "2"]
    call += ["--num_inference_steps", "1", "2", "--reference", str(reference), "--num_bootstraps", "10"]
    call += ["--sampler", "ddim", "--output", str(tmp_path / "out")]
    evaluate.main(call)
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["num_inference_steps"] for row in first["results"]] == [1, 2]
    assert (tmp_path / "out" / "curves.png").is_file()
    drawn = sorted((tmp_path / "out" / "pictures").rglob("*.safetensors"))
    assert len(drawn) == 6  # shards of 2, 2 and 1 for either setting
    drawn[0].unlink()
    for path in (tmp_path / "out" / "features").rglob("*.safetensors"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in drawn[1:]}
    evaluate.main(call)
    assert {path: path.stat().st_mtime_ns for path in drawn[1:]} == before
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["results"] == first["results"]


@pytest.mark.parametrize(
    "words",
    [["--samples", "x.npz", "--guidance_scale", "2"], ["--num", "3"], ["--num_bootstraps", "1"],
     ["--num_inference_steps", "0"], ["--guidance_scale", "1", "2", "--save_samples", "x.npz"],
     ["--prompts", "/none.txt"], ["--features", "inception:/none"], ["--samples", "/none.npz"]],
)  # fmt: skip
def test_senseless_commands_are_refused_before_any_work(evaluate: ModuleType, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError):
        evaluate.main(["metrics", *words, "--output", str(tmp_path)])


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red apple\ngreen apple\n")
    reference = folder_of(tmp_path / "reference", images(8, 1, side=64))
    call = [str(ROOT / "scripts" / "evaluate.py"), "metrics", "--model", MODEL, "--num", "6", "--batch_size", "2"]
    call += ["--prompts", str(tmp_path / "prompts.txt"), "--num_inference_steps", "2", "--num_bootstraps", "10"]
    call += ["--reference", str(reference), "--device", "cpu"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    found = []
    for name, start in (("one", []), ("two", launch)):
        done = subprocess.run(
            [sys.executable, *start, *call, "--output", str(tmp_path / name)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("| KID x 1000 |") == 1
        found.append(json.loads((tmp_path / name / "results.json").read_text())["results"])
    assert found[0] == found[1]
