"""scripts/evaluate.py on the tiny pipeline and a few drawings."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe.interop.lora.file import networks_of, save_lora
from ldm_pipe.interop.lora.layers import TrainableLora
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from tests.source import ROOT

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

MODEL = str(ROOT / "tests" / "data" / "tiny_pipeline")
NAMES = ["red apple", "green apple", "octopus", "grinning face", "racing car", "worm", "flag"]


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return importlib.import_module("scripts.evaluate")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write seven noisy drawings; the last one is a flag."""
    rng = np.random.default_rng(0)
    rows = []
    for i, name in enumerate(NAMES):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, format="PNG")
        flags = {"is_skin_tone_variant": False, "is_gender_variant": False, "is_flag": name == "flag"}
        picture = {"bytes": buffer.getvalue(), "path": None}
        rows.append({"image": picture, "id": f"{i:x}", "caption": name, "concept": name, "keywords": [], **flags})
        rows[-1]["group"] = name.split()[-1]
    path = tmp_path_factory.mktemp("drawings") / "train.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    return str(path)


def test_retrieval_writes_results_pictures_and_plot(
    evaluate: ModuleType, drawings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    common = [
        "retrieval",
        "--model",
        MODEL,
        "--train_file",
        drawings,
        "--num_prompts",
        "4",
        "--num_inference_steps",
        "2",
    ]
    scales = ["--guidance_scale", "3", "1", "--sampler", "dpmpp_2m"]
    evaluate.main([*common, *scales, "--batch_size", "3", "--output", str(tmp_path / "a")])
    report = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [row["guidance_scale"] for row in report["results"]] == [1.0, 3.0]
    assert (report["num_prompts"], report["num_drawings"], report["sampler"]) == (4, 6, "dpmpp_2m")
    for row in report["results"]:
        assert "flag" not in row["ranks"]
        assert len(row["ranks"]) == 4
        ranks = list(row["ranks"].values())
        assert row["top1"] == sum(rank < 1 for rank in ranks) / 4
        assert row["top5"] == sum(rank < 5 for rank in ranks) / 4
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"results.json", "guidance.png", "pictures-1.png", "pictures-3.png"}
    assert f"| 3 | {report['results'][1]['top1']:.3f} |" in capsys.readouterr().out
    # A picture does not depend on the batch it was drawn in, so neither does the result.
    evaluate.main([*common, *scales, "--batch_size", "4", "--output", str(tmp_path / "b")])
    again = json.loads((tmp_path / "b" / "results.json").read_text())
    assert [row["ranks"] for row in again["results"]] == [row["ranks"] for row in report["results"]]
    assert again["hashes"] == report["hashes"]


def test_perfect_pictures_are_all_found(evaluate: ModuleType, drawings: str, tmp_path: Path) -> None:
    records = evaluate.load_plain(drawings)
    original = {caption: records.image(row) for row, caption in enumerate(records.captions)}

    class Perfect:
        class Output:
            def __init__(self, images: list[Image.Image]) -> None:
                self.images = images

        def __call__(self, prompts: list[str], **_: object) -> Output:
            return self.Output([original[prompt] for prompt in prompts])

        components: dict[str, object] = {}  # noqa: RUF012
        model_hash = None
        defaults = evaluate.LatentDiffusionPipeline.from_pretrained(MODEL).defaults

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_model", lambda *_: Perfect())
        evaluate.main(["retrieval", "--train_file", drawings, "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (row["top1"], row["top5"], len(row["ranks"])) == (1.0, 1.0, 6)


def test_a_model_of_classes_is_asked_by_another_column(
    evaluate: ModuleType, drawings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = evaluate.load_plain(drawings)
    groups, asked = records.column("group"), []

    class Classes:
        components: dict[str, object] = {}  # noqa: RUF012
        model_hash = None
        defaults = evaluate.LatentDiffusionPipeline.from_pretrained(MODEL).defaults

        def __call__(self, prompts: list[str], *, seed: list[int], **_: object) -> SimpleNamespace:
            asked.extend(zip(prompts, seed, strict=True))
            rows = [[row for row, group in enumerate(groups) if group == prompt] for prompt in prompts]
            return SimpleNamespace(images=[records.image(own[s]) for own, s in zip(rows, seed, strict=True)])

    monkeypatch.setattr(evaluate, "load_model", lambda *_: Classes())
    columns = ["--prompt_column", "group", "--answer_column", "group", "--batch_size", "2"]
    evaluate.main(["retrieval", "--train_file", drawings, *columns, "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (row["top1"], len(row["ranks"])) == (1.0, 6)
    assert sorted(asked) == [("apple", 0), ("apple", 1), *((name, 0) for name in ("car", "face", "octopus", "worm"))]


def test_autoencoder_measures_both_sets(evaluate: ModuleType, drawings: str, tmp_path: Path) -> None:
    files = ["--train_file", drawings, "--validation_file", drawings]
    evaluate.main(["autoencoder", "--model", MODEL, *files, "--resolution", "32", "--output", str(tmp_path / "whole")])
    report = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert report["results"]["validation drawings"]["num_drawings"] == 7
    assert report["results"]["plain training drawings"]["num_drawings"] == 6
    assert 0 < report["results"]["validation drawings"]["psnr"] < 30
    vae = f"{MODEL}/vae"
    evaluate.main(["autoencoder", "--model", vae, *files, "--resolution", "32", "--output", str(tmp_path / "part")])
    part = json.loads((tmp_path / "part" / "results.json").read_text())
    assert part["results"] == report["results"]
    assert part["autoencoder_hash"] == report["autoencoder_hash"]


def test_perceptual_distance_is_measured_with_an_image_tower(
    evaluate: ModuleType, drawings: str, tmp_path: Path
) -> None:
    from conditioning.contrastive import ImageTower

    ImageTower({"channels": [8, 8], "projection_dim": 4}).save_pretrained(tmp_path / "tower")
    files = ["--train_file", drawings, "--validation_file", drawings, "--num_images", "2"]
    evaluate.main(
        ["autoencoder", "--model", MODEL, *files, "--image_tower", str(tmp_path / "tower"), "--output", str(tmp_path)]
    )
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["validation drawings"]["num_drawings"] == 2
    assert results["validation drawings"]["perceptual"] > 0


def test_sheet_draws_the_captions_that_retrieval_asks_for(evaluate: ModuleType, drawings: str, tmp_path: Path) -> None:
    evaluate.main(["sheet", "--model", MODEL, "--train_file", drawings, "--output", str(tmp_path)])
    prompts = json.loads((tmp_path / "results.json").read_text())["prompts"]
    records = evaluate.load_plain(drawings)
    assert prompts == [records.captions[row] for row in evaluate.asked(records, 200)]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 6 * (128 + 4) + 4


def test_inversion_comes_nearer_with_refinements(evaluate: ModuleType, drawings: str, tmp_path: Path) -> None:
    common = ["inversion", "--model", MODEL, "--train_file", drawings, "--num_prompts", "3"]
    evaluate.main([*common, "--num_inference_steps", "10", "--num_refinements", "0", "4", "--output", str(tmp_path)])
    facts = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    plain, refined = facts["results"]
    assert (plain["evaluations"], refined["evaluations"]) == (10, 50)
    assert refined["latent_rmse"] < plain["latent_rmse"]
    assert refined["psnr"] > plain["psnr"]
    assert Image.open(tmp_path / "inversion.png").size == (3 * 36 + 4, 3 * 36 + 4)


def test_bits_measures_the_bound_and_its_parts(
    evaluate: ModuleType, drawings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["bits", "--model", MODEL, "--validation_file", drawings, "--num_steps", "5", "--num_images", "3"]

    def results(name: str, *more: str) -> dict[str, float]:
        evaluate.main([*common, *more, "--output", str(tmp_path / name)])
        return json.loads((tmp_path / name / "results.json").read_text())["results"]

    whole = results("whole")
    assert f"| {whole['bits_per_dim']:.4f} |" in capsys.readouterr().out
    assert whole["bits_per_dim"] == pytest.approx(whole["prior"] + whole["steps"] + whole["decoder"])
    assert len(whole["levels"]) == 4  # type: ignore[arg-type]
    # a drawing's bound does not depend on its batch
    assert results("split", "--batch_size", "2")["bits_per_dim"] == pytest.approx(whole["bits_per_dim"], rel=1e-4)
    # rounding to bins of w costs -log2(w) bits more than the density, apart from the decoder's variance
    fine, finer = (results(w, "--bin_width", w)["decoder"] for w in ("0.001", "0.0005"))
    assert finer - fine == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sheet", "--batch_size", "0"], "batch_size"),
        (["sheet", "--model", "nowhere"], "nowhere"),
        (["sheet", "--sampler", "huen"], "sampler"),
        (["retrieval", "--guidance_scale", "nan"], "guidance_scale"),
        (["autoencoder", "--resolution", "30"], "resolution"),
        (["bits", "--num_steps", "0"], "num_steps"),
        (["bits", "--bin_width", "-1"], "bin_width"),
    ],
)
def test_bad_input_is_one_clear_error(
    evaluate: ModuleType, drawings: str, tmp_path: Path, arguments: list[str], named: str
) -> None:
    files = [] if arguments[0] == "bits" else ["--train_file", drawings]
    files += ["--validation_file", drawings] if arguments[0] in ("autoencoder", "bits") else []
    model = [] if "--model" in arguments else ["--model", MODEL]
    with pytest.raises(LdmPipeError, match=named):
        evaluate.main([*arguments, *model, *files, "--output", str(tmp_path)])


def test_an_output_that_cannot_be_written_is_refused_before_work(
    evaluate: ModuleType, drawings: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LdmPipeError, match="cannot write"):
        evaluate.main(["sheet", "--model", "nowhere", "--train_file", drawings, "--output", str(tmp_path / "file")])


def test_style_is_scored_with_a_lora_and_words_behind_the_prompts(
    evaluate: ModuleType,
    drawings: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    table = pandas.read_parquet(drawings)
    for style in ("noto", "twemoji"):
        for split in ("train", "validation"):
            path = tmp_path / "data" / style / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(path)
    monkeypatch.setattr(evaluate, "FLAT", str(tmp_path / "data" / "twemoji"))
    pipe = LatentDiffusionPipeline.from_pretrained(MODEL)
    lora = TrainableLora(networks_of(pipe), rank=2)
    for name, parameter in lora.named_parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    save_lora(tmp_path / "lora.safetensors", lora.layers())
    common = ["style", "--model", MODEL, "--train_file", drawings, "--classifier", str(tmp_path / "classifier")]
    common += ["--num_prompts", "2", "--num_inference_steps", "2", "--guidance_scale", "2"]
    evaluate.main([*common, "--output", str(tmp_path / "plain")])
    evaluate.main([*common, "--output", str(tmp_path / "words"), "--prompt_suffix", ", flat"])
    evaluate.main([*common, "--output", str(tmp_path / "lora"), "--lora", str(tmp_path / "lora.safetensors")])
    reports = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "words", "lora")]
    pictures = {(tmp_path / name / "pictures-2.png").read_bytes() for name in ("plain", "words", "lora")}
    assert len(pictures) == 3
    for report in reports:
        assert 0 <= report["results"][0]["style"] <= 1
        assert report["classifier"]["styles"] == ["noto", "twemoji"]
    assert [len(report["lora"]) for report in reports] == [0, 0, 1]
    assert "style classifier on unseen drawings" in capsys.readouterr().out


def test_likeness_measures_two_seeds_against_all_drawings(
    evaluate: ModuleType, drawings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--num_prompts", "2", "--num_inference_steps", "1", "--output", str(tmp_path)]
    evaluate.main(["likeness", "--model", MODEL, "--train_file", drawings, *small])
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert found["between_seeds"] > 0
    assert found["to_drawing"] > 0
    assert f"sharpness: {found['sharpness']}" in capsys.readouterr().out
