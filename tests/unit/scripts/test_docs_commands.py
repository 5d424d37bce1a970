"""The commands in the pages on training: each script exists, and its flags are understood as they are written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from string import Template
from typing import Any

import pytest

pytest.importorskip("accelerate")

from ldm_pipe.cli.options import build_parser
from ldm_pipe.training.run.config import parse_config
from tests.e2e.test_training_scripts import load_script
from tests.source import ROOT

PAGES = ("training", "running", "data")


def commands_of(page: str) -> list[list[str]]:
    """Read the commands of a page's blocks, joined where a line goes on, variables put in; unfinished ones left out."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found = []
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for block in (block for language, block in fences if not language):
        lines = block.replace("\\\n", " ").splitlines()
        values = {name: value for line in lines for name, value in re.findall(r'^(\w+)="(.*)"$', line)}
        for line in lines:
            words = shlex.split(Template(line).substitute(values), comments=True)
            if words and "=" not in words[0] and "..." not in words:
                found.append(words)
    return found


COMMANDS = [pytest.param(words, id=" ".join(words)[:60]) for page in PAGES for words in commands_of(page)]


class Understood(Exception):  # noqa: N818  no error: what stops a script after its flags
    """Carries the config that a script made of its flags."""


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_of_the_pages_are_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    match words:
        case ["ldm-pipe", *rest]:
            build_parser().parse_args(rest)
        case ["accelerate", "config", "default"]:
            pass
        case ["python", script, *rest] | ["accelerate", "launch", script, *rest]:
            assert (ROOT / script).is_file()
            module = load_script(script.removeprefix("scripts/").removesuffix(".py"))

            def read(model: Any, argv: Sequence[str], description: str) -> Any:
                raise Understood(parse_config(model, argv, description))

            monkeypatch.setattr(module, "parse_config", read)
            monkeypatch.chdir(ROOT)
            with pytest.raises(Understood) as stopped:
                module.main(rest)
            assert stopped.value.args[0].output_dir == rest[rest.index("--output_dir") + 1]
        case _:
            pytest.fail(f"what is {words}?")


def test_the_pages_hold_commands() -> None:
    assert len(COMMANDS) >= 7
