"""Secrets and foreign words that are written down or printed, job folders, and streams that take no words."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo as PillowInfo

from ldm_pipe.cli import main
from ldm_pipe.cli.job import NOTE
from ldm_pipe.masking import masked, masked_command
from ldm_pipe.printable import printable
from tests.training import make_config, make_trainer

TINY = str(Path(__file__).parents[1] / "data" / "tiny_pipeline")
ROOT = Path(__file__).parents[2]


# -- secrets -----------------------------------------------------------------------------------------------------

SECRET = "Zq8canaryZq8"
COMMANDS = [
    "--token {}", "--token={}", "--hub_token {}", "--hub-token={}", "--hf_token {}", "--api_key {}", "--api-key={}",
    "--password {}", "--wandb.api_key {}", "--tracker.wandb_key {}", "--secret {}", "--aws_secret_access_key {}",
    "--data.access_key={}", "--auth {}", "--url https://me:{}@host/x.tar", "--url https://{}@host/x.tar",
    "https://host/x?token={}", "https://host/x?a=1&api_key={}&b=2", "s3://k/x?X-Amz-Signature={}", "HF_TOKEN={}",
    "--extra token={}", "--header 'Authorization: Bearer {}'", "--x hf_{}", "--x sk-{}", "--x ghp_{}", "--x=hf_{}",
    "git+https://user:{}@github.com/a/b.git", "--dsn postgres://u:{}@db/x", "--json '{{\"token\": \"{}\"}}'",
    "--passwd {}", "--credentials {}", "--x github_pat_{}",
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_secrets_of_a_command_line_are_not_written_down(words: str) -> None:
    command = ["train.py", *shlex.split(words.format(SECRET)), "--seed", "7"]
    for shown in (shlex.join(masked(command, {})), masked_command(shlex.join(command))):
        assert SECRET not in shown
        assert shown.startswith("train.py ")
        assert shown.endswith("--seed 7")


def test_words_that_are_no_secrets_stay() -> None:
    words = shlex.split(
        "train.py --num_tokens 77 --tokenizer clip --placeholder_token '<toy>' --initializer_token toy "
        "--keywords a,b --key_frames 3 --train_data_dir https://host/x?page=2 --learning_rate 1e-4 --prompt 'a monkey, a key'"  # noqa: E501
    )
    assert masked(words, {"HF_TOKEN": "short", "HOME": "/a/long/folder"}) == words


def test_a_secret_of_the_environment_is_not_written_down() -> None:
    assert masked(["x.py", f"--note=a{SECRET}b"], {"MY_API_KEY": SECRET}) == ["x.py", "--note=a***b"]


def test_the_record_of_a_run_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 53: every byte that a run leaves, on resume too, also where an earlier version wrote it down."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", SECRET, f"https://me:{SECRET}@host", "--seed", "1"])
    make_trainer(make_config(tmp_path)).fit()
    facts = json.loads((tmp_path / "run.json").read_text())
    facts["command"] = f"train.py --token {SECRET}"
    facts["before"] = [{"command": f"train.py hf_{SECRET}"}]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    make_trainer(
        make_config(tmp_path, max_train_steps=7, allow_config_change=True, resume_from_checkpoint="latest")
    ).fit()
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["command"] == "train.py --hub_token '***' 'https://***@host' --seed 1"
    assert len(facts["before"]) == 2
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


# -- foreign words -----------------------------------------------------------------------------------------------

ESCAPES = [
    "\x1b[2J", "\x1b[31m", "\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x1b\\", "\x9b31m", "\x9d0;t\x9c", "\x07x",
    "\x07", "\x08\x08", "\x7f", "\x00", "\u202e", "\u2066", "\x1bPq\x1b\\", "\x1bc", "\x1b(0", "\x85", "\r", "\ufeff", "\x1b",  # noqa: E501
    "\x1b[", "\x1b]0;never closed",
]  # fmt: skip


@pytest.mark.parametrize("escape", ESCAPES)
def test_info_prints_no_escape_codes_of_a_foreign_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], escape: str
) -> None:
    text = (
        f"red{escape}apple\nagain: rm -rf /\nNegative prompt: b{escape}ad\n"
        f'Steps: 2, Sampler: DD{escape}IM, Seed: 1, Size: 8x8, Model: "m{escape}m", Sa{escape}x: 3'
    )
    chunks = PillowInfo()
    chunks.add_itxt("parameters", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    for words in (["info", str(tmp_path / "a.png")], ["info", str(tmp_path / "a.png"), "--json"]):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert not [char for char in said if char != "\n" and (ord(char) < 32 or 0x7F <= ord(char) < 0xA0)]
        assert not set(said) & set("\u202e\u2066\ufeff\x85")
        assert "\nagain: rm" not in said, "a line of the prompt cannot pass for a fact"


def test_printable_keeps_what_is_no_control() -> None:
    for text in ("a b", "\u00e4\u4e2d\u6587", "\U0001f469\u200d\U0001f680", "[31m", "x" * 10_000):
        assert printable(text) == text
    assert printable("a\udcffb\nc") == "a\\udcffb c"
    assert printable("a\r\nb", lines=True) == "a\nb"


# -- job folders -------------------------------------------------------------------------------------------------


def draw(*words: str) -> int:
    return main(["generate", "--prompts", "prompts.txt", "-o", "out", "--model", TINY, "--quiet", *words])


BASE = ("--num-inference-steps", "1", "--seed", "3", "--guidance-scale", "1")
OTHER = [
    (("--num-inference-steps", "2"), "num_inference_steps was 1, is 2"), (("--seed", "4"), "seed was 3, is 4"),
    (("--guidance-scale", "2"), "guidance_scale was 1.0, is 2.0"), (("-n", "2"), "n was 1, is 2"),
    (("--sampler", "euler"), "sampler was left to the model, is 'euler'"), (("--height", "64"), "height was left to"),
    (("--negative-prompt", "x"), "negative_prompt was left to"), (("--eta", "1"), "eta was"),
    (("--dtype", "bfloat16"), "dtype was left to"), (("--model", "elsewhere"), "model was"),
    (("--lora", "x.safetensors"), "lora was"), (("--clip-skip", "1"), "clip_skip was"),
]  # fmt: skip


def test_a_job_folder_takes_no_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 34: nothing was drawn, and the exit code was 0."""
    monkeypatch.chdir(tmp_path)
    long = "a very long prompt whose name of sixty letters does not tell it from its neighbours"
    Path("prompts.txt").write_text(f"red apple\n{long} one\n")
    assert draw(*BASE) == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert draw(*BASE, "--batch-size", "3") == 0, "the same settings go on"
    assert "2 already drawn" in capsys.readouterr().err
    for words, said in OTHER:
        assert draw(*BASE, *words) == 2, words
        text = capsys.readouterr().err
        assert said in text, text
        assert "--overwrite" in text
    Path("prompts.txt").write_text(f"red apple\n{long} two\n")
    assert draw(*BASE) == 2
    assert f"prompt was '{long} one', is '{long} two'" in capsys.readouterr().err
    Path("prompts.txt").write_text(f"red apple\n{long} one\na worm\n")
    assert draw(*BASE) == 0, "a longer file goes on"
    assert {name: Path("out", name).read_bytes() for name in before} == before
    for path in Path("out").glob("*worm*"):
        path.write_bytes(b"")
    assert draw(*BASE) == 2
    assert "it is no whole picture" in capsys.readouterr().err
    assert draw(*BASE, "--overwrite", "--sampler", "euler") == 0
    assert draw(*BASE, "--sampler", "euler") == 0
    Path("out", NOTE).write_text("{")
    assert draw(*BASE) == 2
    Path("out", NOTE).unlink()  # as earlier versions left it: the pictures tell
    assert draw(*BASE, "--num-inference-steps", "2") == 2
    assert "num_inference_steps was 1, is 2" in capsys.readouterr().err
    assert draw(*BASE, "--sampler", "ddim") == 2
    assert draw(*BASE, "--sampler", "euler") == 0
    assert Path("out", NOTE).is_file()


# -- streams that take no words ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "ascii", "all closed"])
def test_words_that_cannot_be_printed_are_no_crash(tmp_path: Path, how: str) -> None:
    chunks = PillowInfo()
    chunks.add_itxt("parameters", "\u4e2d\u6587 \U0001f34e\nSteps: 2, Seed: 1, Size: 8x8")
    path = tmp_path / ("\U0001f469\u200d\U0001f680" * 20 + ".png")
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    close = {"closed": " >&-", "all closed": " <&- >&- 2>&-", "ascii": ""}[how]
    command = f"{shlex.quote(sys.executable)} -m ldm_pipe.cli info {shlex.quote(str(path))}{close}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)} if how == "ascii" else None
    run = subprocess.run(command, shell=True, capture_output=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    if how == "ascii":
        assert b"prompt: \\u4e2d\\u6587 \\U0001f34e" in run.stdout
