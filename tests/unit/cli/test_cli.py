"""The command line without a model: help is quick, paths are checked first, errors are three lines."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ldm_pipe.cli import main
from ldm_pipe.cli.draw import call_arguments, plan_jobs, read_prompts, sampler_options
from ldm_pipe.cli.options import SPACINGS, build_parser
from ldm_pipe.cli.paths import MAX_SLUG, OutputError, OutputPlan, check_space, slug


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["interpolate", "--help"], ["invert", "--help"]])
def test_help_does_not_import_torch(words: list[str]) -> None:
    code = f"import sys; from ldm_pipe.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_wrong_path_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        f"import sys; from ldm_pipe.cli import main; c = main(['generate', 'x', '-o', {str(tmp_path / 'a.gif')!r}])\n"
    )
    code += "assert c == 2, c\nassert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.PIPE, text=True)
    assert run.stderr.startswith("error: ")


def test_help_lists_what_there_is() -> None:
    from typing import get_args

    from ldm_pipe.schedule.spacing import Spacing

    assert get_args(Spacing) == SPACINGS


def test_sampler_options_are_json_or_text() -> None:
    words = ["order=3", "s_churn=0.5", "variance=fixed_large", "lower=true", "a=b=c"]
    wanted = {"order": 3, "s_churn": 0.5, "variance": "fixed_large", "lower": True, "a": "b=c"}
    assert sampler_options(words) == wanted
    for bad in (["order"], ["=3"], ["order=1", "order=2"], ["a b=1"]):
        with pytest.raises(OutputError, match="NAME=VALUE"):
            sampler_options(bad)


def test_options_are_spelled_like_the_pipeline_arguments() -> None:
    import inspect

    from ldm_pipe import LatentDiffusionPipeline

    known = set(inspect.signature(LatentDiffusionPipeline.__call__).parameters)
    for kind in ("generate", "img2img", "inpaint", "interpolate", "invert"):
        extra = ["--image", "a.png"] if kind in ("img2img", "inpaint") else []
        extra += ["--mask-image", "m.png"] if kind == "inpaint" else []
        args = build_parser().parse_args(
            [kind, "x", *extra, "--sampler", "euler", "--guidance-scale", "3", "--seed", "1"]
        )
        args.thresholding = "static"
        assert set(call_arguments(args)) <= known
        assert call_arguments(args)["guidance_scale"] == 3


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Red apple!", "red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("é\n\x00", "e"),
        ("日本", "picture"),
        ("", "picture"),
    ],
)
def test_slug(prompt: str, name: str) -> None:
    assert slug(prompt) == name


def test_slug_is_capped() -> None:
    assert len(slug("long " * 300_000)) <= MAX_SLUG


def test_plan_names(tmp_path: Path) -> None:
    plan = OutputPlan.make(str(tmp_path / "new" / "a.png"), count=2, overwrite=False)
    assert [plan.path(i, 2).name for i in range(2)] == ["a-1.png", "a-2.png"]
    assert plan.path(0, 1).name == "a.png"
    named = OutputPlan.make(f"{tmp_path}/", count=1, overwrite=False)
    first = named.path(0, 1, prompt="A cat", seed=7)
    assert first.name == "a-cat-7.png"
    first.touch()
    assert named.path(0, 1, prompt="A cat", seed=7).name == "a-cat-7-2.png"


def test_plan_refuses(tmp_path: Path) -> None:
    (tmp_path / "there.png").touch()
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for output in ("there.png", "file/a.png", "a.jpg", "a"):
        with pytest.raises(OutputError):
            OutputPlan.make(str(tmp_path / output), count=1, overwrite=False)
    OutputPlan.make(str(tmp_path / "there.png"), count=1, overwrite=True)
    with pytest.raises(OutputError, match="free"):
        check_space(tmp_path, 2**62)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png", "there.png"]


def test_prompts_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n", encoding="utf-8")
    (tmp_path / "b.csv").write_text('prompt,seed,negative_prompt\n"a, b",5,\nc,,no\n', encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"prompt": "x", "seed": 3}\n', encoding="utf-8")
    assert [row["prompt"] for row in read_prompts(tmp_path / "a.txt")] == ["one", "two"]
    assert list(read_prompts(tmp_path / "b.csv")) == [
        {"prompt": "a, b", "negative_prompt": None, "seed": 5},
        {"prompt": "c", "negative_prompt": "no", "seed": None},
    ]
    assert next(read_prompts(tmp_path / "c.jsonl"))["seed"] == 3
    args = Namespace(output=str(tmp_path / "out"), num_images_per_prompt=2, seed=10)
    jobs = plan_jobs(args, str(tmp_path / "a.txt"))
    assert [[p.name for p in job.paths] for job in jobs] == [
        ["00000-one-10.png", "00000-one-11.png"],
        ["00001-two-12.png", "00001-two-13.png"],
    ]


@pytest.mark.parametrize(
    "text", ["", "\n\n", '{"text": "x"}', "[1]", "{", '{"prompt": 3}', '{"prompt": "a", "seed": "b"}']
)
def test_bad_prompts_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match=r"bad\.jsonl"):
        list(read_prompts(path))


@pytest.mark.parametrize(
    "command",
    [
        ["generate"],
        ["generate", "x", "--prompts", "y.txt"],
        ["generate", "x", "-n", "0"],
        ["generate", "x", "--thresholding-space", "pixel"],
        ["generate", "x", "--sampler-option", "order"],
        ["interpolate"],
        ["interpolate", "x"],
        ["interpolate", "x", "y", "--columns", "0"],
        ["interpolate", "x", "y", "-o", "film.mp4"],
        ["interpolate", "x", "--image", "missing.png", "missing.png"],
        ["invert", "missing.png"],
        ["generate", "--prompts", "missing.txt", "--out", "pictures"],
        ["img2img", "x", "--image", "missing.png"],
        ["info", "missing.png"],
        ["info", "./no/such/folder"],
        ["export", "./no/such/folder", "target"],
        ["generate", "x", "--model", "./no/such/folder"],
    ],
)
def test_errors_are_short(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("error: ")
    assert main([*command, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("wrong", [["--sede", "3"], ["--dtype", "float8"], ["--seed", "x"]])
def test_wrong_options_are_told_in_three_lines_too(wrong: list[str], capsys: pytest.CaptureFixture) -> None:
    """They came below forty lines of usage."""
    with pytest.raises(SystemExit) as left:
        main(["generate", "x", *wrong])
    assert left.value.code == 2
    labels = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert labels == ["error", "where", "do"]


def test_unreadable_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    assert main(["info", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "code"), [(".", 0), ("no-such-folder/at/all", 2)])
def test_a_command_leaves_at_once_with_its_code_and_all_it_printed(argument: str, code: int) -> None:
    argument = str(Path(__file__).parents[2] / "data" / "tiny_pipeline") if argument == "." else argument
    script = (
        "import atexit, sys; from ldm_pipe.cli import main; atexit.register(lambda: print('taken apart'))\n"
        f"sys.argv = ['ldm-pipe', 'info', '--json', {argument!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    if code == 0:
        assert json.loads(done.stdout)["parameters"]["unet"] > 0  # all of it, through a pipe, and nothing after
    else:
        assert done.stderr.startswith("error:")
