"""From the command line to pictures, in a process of its own: real components, a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_pipe.cli import main
from ldm_pipe.drawing.png_info import read_png_info

TINY = str(Path(__file__).parents[1] / "data" / "tiny_pipeline")


def test_generate_in_a_fresh_process(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ldm_pipe.cli",
        "generate",
        "red apple",
        "--model",
        TINY,
        "--seed",
        "7",
        "-o",
        "a.png",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "a.png\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]
    assert Image.open(tmp_path / "a.png").size == (32, 32)
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[0] == "error: the file exists"
    script = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "generate.py"), *command[4:-1], "b.png"]
    subprocess.run(script, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(*words: str) -> int:
    return main([words[0], *words[1:], "--model", TINY, "--quiet"])


def test_settings_are_read_back_and_draw_the_same_bytes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--seed", "7", "--guidance-scale", "2.5", "--num-inference-steps", "3", "--sampler", "dpmpp_2m"]
    options += ["--negative-prompt", "ugly, old", "--thresholding", "dynamic", "--thresholding-max-value", "2.5"]
    assert draw("generate", 'a "quoted", red apple', *options, "-o", "a.png") == 0
    info = read_png_info("a.png")
    assert info is not None
    assert (info.prompt, info.negative_prompt) == ('a "quoted", red apple', "ugly, old")
    assert (info.settings["Sampler"], info.settings["Seed"], info.settings["CFG scale"]) == ("DPM++ 2M", "7", "2.5")
    capsys.readouterr()
    assert main(["info", "a.png", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    import shlex

    again = shlex.split(facts["again"])
    assert again[0] == "ldm-pipe"
    assert main([*again[1:], "--model", TINY, "--quiet", "-o", "b.png"]) == 0
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()


def test_grid_and_single_pictures(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert draw("generate", "red apple", "--seed", "7", "-n", "4", "-o", "grid.png", "--grid") == 0
    assert draw("generate", "red apple", "--seed", "7", "-n", "4", "-o", "one.png", "--batch-size", "3") == 0
    assert draw("generate", "red apple", "a worm", "--seed", "7", "-o", "out/") == 0
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png")) == [
        "grid.png", "one-1.png", "one-2.png", "one-3.png", "one-4.png", "out/a-worm-8.png", "out/red-apple-7.png",
    ]  # fmt: skip
    sheet = np.asarray(Image.open("grid.png")).astype(int)
    assert sheet.shape == (76, 76, 3)
    one = np.asarray(Image.open("one-1.png")).astype(int)
    assert np.abs(sheet[4:36, 4:36] - one).max() <= 1
    info = read_png_info("grid.png")
    assert info is not None
    assert info.settings["Pictures"] == "4"
    assert capsys.readouterr().out.split() == [
        "grid.png",
        *(f"one-{i}.png" for i in (1, 2, 3, 4)),
        "out/red-apple-7.png",
        "out/a-worm-8.png",
    ]


def test_img2img_and_inpaint(folder: Path) -> None:
    assert draw("generate", "red apple", "--seed", "1", "-o", "a.png") == 0
    assert draw("img2img", "a worm", "--image", "a.png", "--strength", "0.5", "--seed", "1", "-o", "b.png") == 0
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    mask.save("mask.png")
    assert draw("inpaint", "a worm", "--image", "a.png", "--mask-image", "mask.png", "--seed", "1", "-o", "c.png") == 0
    first, painted = np.asarray(Image.open("a.png")), np.asarray(Image.open("c.png"))
    assert np.array_equal(first[:, 16:], painted[:, 16:])
    assert not np.array_equal(first[:, :16], painted[:, :16])
    info = read_png_info("b.png")
    assert info is not None
    assert info.settings["Denoising strength"] == "0.5"


def test_prompts_file_is_restartable(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """FAULTS 34: interrupted and run again, the folder holds the same bytes as an unbroken run."""
    (folder / "prompts.txt").write_text("red apple\na worm\n../escape\n", encoding="utf-8")
    options = ["--prompts", "prompts.txt", "-n", "2", "--seed", "5", "--num-inference-steps", "2"]
    assert draw("generate", *options, "--out", "whole") == 0
    assert draw("generate", *options, "--out", "broken") == 0
    wanted = {p.name: p.read_bytes() for p in (folder / "whole").glob("[!.]*")}
    assert sorted(wanted) == [
        "00000-red-apple-5.png", "00000-red-apple-6.png", "00001-a-worm-7.png", "00001-a-worm-8.png",
        "00002-escape-10.png", "00002-escape-9.png",
    ]  # fmt: skip
    (folder / "broken" / "00001-a-worm-8.png").unlink()
    (folder / "broken" / "00002-escape-9.png").unlink()
    capsys.readouterr()
    assert draw("generate", *options, "--out", "broken") == 0
    captured = capsys.readouterr()
    assert len(captured.out.split()) == 2
    assert "1 already drawn" in captured.err
    assert {p.name: p.read_bytes() for p in (folder / "broken").glob("[!.]*")} == wanted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--height", "33"], "32 or 36"),
        (["--sampler", "karras"], "ddim"),
        (["--seed", "-3"], "seed"),
        (["--device", "cuda:9"], "cannot move"),
        (["--guidance-scale", "nan"], "guidance_scale"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    folder: Path, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    assert draw("generate", "red apple", "-o", "a.png", *words) == 2
    assert said in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_no_steps_are_refused_by_the_parser_and_leave_nothing(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Before torch is imported, with the exit code of all wrong options."""
    with pytest.raises(SystemExit) as stopped:
        draw("generate", "red apple", "-o", "a.png", "--num-inference-steps", "0")
    assert stopped.value.code == 2
    assert "--num-inference-steps" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_unreadable_picture_is_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "bad.png").write_text("<html>not found</html>", encoding="utf-8")
    assert draw("img2img", "x", "--image", "bad.png", "-o", "a.png") == 2
    assert "bad.png" in capsys.readouterr().err
    assert not (folder / "a.png").exists()


def test_info_of_a_model(capsys: pytest.CaptureFixture) -> None:
    assert main(["info", TINY, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "tiny"
    assert facts["size"] == 32
    assert facts["parameters"]["unet"] > 100_000
    assert facts["defaults"]["guidance_scale"] == 3.0
    assert main(["info", TINY]) == 0


def test_data_check(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "set").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (80, 80), "red").save(folder / "set" / f"{name}.png")
        (folder / "set" / f"{name}.txt").write_text(name, encoding="utf-8")
    assert main(["data", "check", "set"]) == 0
    (folder / "set" / "b.png").write_bytes(b"broken")
    assert main(["data", "check", "set", "--json"]) == 2
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["bad"]
    assert main(["data", "check", "nowhere"]) == 2


def test_the_way_of_a_prompt_imports_only_what_it_needs() -> None:
    """transformers costs 3 s of CPU time, sympy and torch's compiler 1.4 s, huggingface_hub is for the network."""
    code = f"""
import sys
from ldm_pipe import LatentDiffusionPipeline
pipe = LatentDiffusionPipeline.from_pretrained({TINY!r})
pipe.set_progress_bar_config(disable=True)
pipe("red apple", seed=0)
heavy = ("transformers", "diffusers", "datasets", "accelerate", "huggingface_hub", "sympy", "torch._dynamo", "pydantic")
found = [name for name in heavy if name in sys.modules]
assert not found, found
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
