"""Code that lies in a model folder never runs, nor does anybody ask for it at the terminal."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conditioning.text import LibraryTokenizer
from ldm_pipe.pretrained import LdmPipeError

ROOT = Path(__file__).parents[2]
PACKAGES = ("autoencoder", "conditioning", "ldm_pipe", "scripts", "benchmarks")
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('yes')\nclass Own:\n    pass\n"
MAPS: dict[str, dict[str, Any]] = {
    "slow": {"auto_map": {"AutoTokenizer": ["code.Own", None]}},
    "fast": {"auto_map": {"AutoTokenizer": [None, "code.Own"]}},
    "old form": {"auto_map": ["code.Own", None]},
    "of another repository": {"auto_map": {"AutoTokenizer": ["somebody/else--code.Own", None]}},
    "beside a known class": {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "T5Tokenizer"},
    "of an unknown class": {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"},
    "empty": {"auto_map": {}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "tokenizer").mkdir(parents=True)
    (tmp_path / "model" / "tokenizer" / "code.py").write_text(CODE)
    return tmp_path / "model"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("kind", MAPS)
def test_a_tokenizer_folder_with_code_is_refused_by_name(kind: str, place: str, folder: Path) -> None:
    (folder / "tokenizer" / place).write_text(json.dumps({"model_type": "t5", **MAPS[kind]}))
    with pytest.raises(LdmPipeError, match=f"auto_map.*{place}|{place}.*auto_map"):
        LibraryTokenizer.from_pretrained(folder, subfolder="tokenizer")
    assert not list(folder.rglob("ran"))


def test_nobody_waits_for_an_answer_at_an_open_terminal(folder: Path) -> None:
    """It asked "Do you wish to run the custom code? [y/N]" and ran the file on y."""
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_type": "t5", **MAPS["slow"]}))
    code = (
        "from conditioning.text import LibraryTokenizer\n"
        f"LibraryTokenizer.from_pretrained({str(folder / 'tokenizer')!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], input="y\ny\ny\n", capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0 and "auto_map" in run.stderr and "y/N" not in run.stdout + run.stderr
    assert not list(folder.rglob("ran"))


def test_transformers_itself_is_told_not_to_run_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the check before it saw nothing."""
    monkeypatch.setattr("conditioning.text.refuse_code", lambda folder: None)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(MAPS["of an unknown class"]))
    with pytest.raises(LdmPipeError, match="no tokenizer can be read"):
        LibraryTokenizer.from_pretrained(folder / "tokenizer")
    assert not list(folder.rglob("ran"))


def auto_calls(path: Path) -> list[ast.Call]:
    """Find calls of from_pretrained or from_config on transformers' Auto classes."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("from_"):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id.startswith("Auto") and not owner.id.startswith("Autoencoder"):
                found.append(node)
    return found


def test_every_call_of_an_auto_class_refuses_remote_code() -> None:
    calls = [
        (path, call) for package in PACKAGES for path in (ROOT / package).rglob("*.py") for call in auto_calls(path)
    ]
    assert calls, "the search finds what it looks for"
    for path, call in calls:
        told = {word.arg: word.value for word in call.keywords}
        value = told.get("trust_remote_code")
        assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{call.lineno}"


def test_a_plain_tokenizer_folder_still_loads(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1, "apple": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(__file__, tmp_path / "code.py")  # a Python file alone harms nobody
    assert len(LibraryTokenizer.from_pretrained(tmp_path)) == 3
