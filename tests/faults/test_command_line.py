"""Flags typed by habit were refused without a word of help, and some only after torch was imported."""

from __future__ import annotations

import pytest

from ldm_pipe.cli.options import build_parser, dashed

HABITS = ["--guidance_scale", "--cfg", "--cfg-scale", "--cfg_scale", "--guidance-scale"]
MISTYPED = {
    "--guidence-scale=3": "--guidance-scale", "--sampeler=ddim": "--sampler", "--negative-promt=x": "--negative-prompt",
    "--heigth=8": "--height", "--modell=x": "--model", "--batch-sise=2": "--batch-size", "--overwite": "--overwrite",
}  # fmt: skip


@pytest.mark.parametrize("flag", HABITS)
def test_flags_of_habit_are_understood(flag: str) -> None:
    assert build_parser().parse_args(dashed(["generate", "x", flag, "3"])).guidance_scale == 3
    assert build_parser().parse_args(dashed(["generate", "x", f"{flag}=3"])).guidance_scale == 3


def test_only_flags_are_written_with_dashes() -> None:
    words = ["generate", "a_b", "--output=my_file.png", "--sampler-option", "s_noise=1", "--", "--a_b"]
    assert dashed(words) == words


@pytest.mark.parametrize(("typed", "meant"), MISTYPED.items())
def test_a_mistyped_flag_is_told_what_was_meant(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["generate", "x", typed])
    assert f"Did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "meant"), [("genrate", "generate"), ("exprt", "export"), ("inpant", "inpaint")])
def test_a_mistyped_command_is_told_what_was_meant(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args([typed, "x"])
    assert f"Did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-3", "2.5", "many", ""])
def test_a_senseless_number_of_steps_is_refused_by_the_parser(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["generate", "x", f"--steps={steps}"])
    assert "whole number from 1" in capsys.readouterr().err
