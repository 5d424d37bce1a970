"""From the command line to strips and films: real components, a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ldm_pipe.cli import main
from ldm_pipe.drawing.png_info import read_png_info

TINY = str(Path(__file__).parents[1] / "data" / "tiny_pipeline")
QUICK = ["--model", TINY, "--quiet", "--num-inference-steps", "2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    return main([*words, *QUICK])


def test_a_strip_between_prompts_and_seeds(folder: Path, capsys: pytest.CaptureFixture) -> None:
    way = ["interpolate", "red apple", "a worm", "--seed", "1", "2", "--num-frames", "5"]
    assert run(*way, "-o", "strip.png", "--columns", "5", "--batch-size", "2") == 0
    assert capsys.readouterr().out == "strip.png\n"
    strip = Image.open("strip.png")
    assert strip.width == 5 * (128 + 4) + 4  # pictures of 32 pixels are enlarged
    assert strip.height > 128 + 8, "labels below"
    info = read_png_info("strip.png")
    assert info is not None
    assert info.prompt == "red apple -> a worm"
    assert (info.settings["Seeds"], info.settings["Frames"], info.settings["Steps"]) == ("1 -> 2", "5", "2")
    assert run(*way, "-o", "strip.png") == 2
    assert capsys.readouterr().err.startswith("error: the file exists")


def test_a_film_holds_every_frame_and_its_settings(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("interpolate", "red apple", "--seed", "1", "2", "3", "--frames", "6", "--fps", "5", "-o", "a.gif") == 0
    film = Image.open("a.gif")
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    assert (len(frames), frames[0].shape, film.info["duration"]) == (6, (128, 128, 3), 200)
    assert not np.array_equal(frames[0], frames[5])
    capsys.readouterr()
    assert main(["info", "a.gif", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["Seeds"] == "1 -> 2 -> 3"
    assert "again" not in facts


def test_a_strip_between_pictures(folder: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "teal")):
        Image.new("RGB", (32, 32), colour).save(name)
    assert run("interpolate", "--image", "a.png", "b.png", "--seed", "1", "--num-frames", "3", "-o", "out/") == 0
    assert len(list((folder / "out").glob("*.png"))) == 1


def test_a_picture_is_inverted_and_drawn_anew(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "red apple", "--seed", "1", "-o", "a.png", *QUICK]) == 0
    edits = ["--to", "a worm", "green apple", "--variations", "2", "--strength", "0.4", "--guidance-scale", "2"]
    assert run("invert", "a.png", "red apple", *edits, "-o", "strip.png") == 0
    assert "dB PSNR" in capsys.readouterr().err
    strip = np.asarray(Image.open("strip.png")).astype(int)
    assert strip.shape[1] == 6 * (128 + 4) + 4
    picture = np.asarray(Image.open("a.png").resize((128, 128), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(strip[4:132, 4:132] - picture).max() <= 1
    info = read_png_info("strip.png")
    assert info is not None
    assert (info.prompt, info.settings["Frames"], info.settings["CFG scale"]) == ("red apple", "6", "1")
    assert float(info.settings["Inversion PSNR"]) > 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["interpolate", "a", "b", "--num-frames", "1"], "num_frames"),
        (["interpolate", "a", "b", "--seed", "1", "2", "3"], "points"),
        (["interpolate", "a", "b", "--sampler", "eulr"], "euler"),
        (["interpolate", "a", "b", "--eta", "0.5", "--sampler", "euler"], "eta"),
        (["interpolate", "a", "b", "--spacing", "ddim300"], "ddim300"),
        (["generate", "a", "--sampler-option", "order=3"], "order"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    folder: Path, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    words = [*words, "--model", TINY, "--quiet"]
    assert main([*words, "-o", "a.png"]) == 2
    assert said in capsys.readouterr().err
    assert list(folder.iterdir()) == []
