"""What libraries raise reaches nobody raw: files that no parser of theirs takes are one error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm_pipe.cli import main
from ldm_pipe.cli.draw import read_prompts, sampler_options
from ldm_pipe.cli.paths import OutputError
from ldm_pipe.data.dataset import load_records
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.pretrained.files import read_json
from ldm_pipe.training.run.config import read_yaml
from ldm_pipe.training.run.records import read_history
from tests.records import write_folder

LONG = "9" * 5000  # Python refuses to read whole numbers of more than 4300 digits, by a plain ValueError
JSON = [f'{{"a": {LONG}}}', f"[{LONG}]", f'{{"a": -{LONG}}}', "[" * 100_000, '{"a": ', "\x00", "", '{"a": \ud800}']
YAML = [
    "a: 2001-13-45", "a: 2001-02-30", "a: 2001-01-01 25:61:61", f"a: {LONG}", f"a: 0x{LONG}", f"a: 0b{'1' * 5000}2",
    "a: !!python/object:os.system x", "a: !!binary ?", "a: !!int x", "a: !!float x", "a: !!timestamp x", "? [a]: b",
    "a: &a [*a]", "a: [", "\x00", "a: !!set x", "? {a: b}\n: c",
]  # fmt: skip


@pytest.mark.parametrize("text", JSON)
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(LdmPipeError, match=r"config\.json: cannot be read as JSON"):
        read_json(path)


@pytest.mark.parametrize("text", YAML)
def test_yaml_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(read_yaml(path), dict)
    except LdmPipeError as error:
        assert str(path) in str(error)  # noqa: PT017  (some of these are YAML all the same)


def test_yaml_dates_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    for text in YAML[:4]:
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(LdmPipeError, match="cannot be read as YAML"):
            read_yaml(tmp_path / "run.yaml")


def test_long_numbers_in_rows_prompts_histories_and_options(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": "0.png", "text": "x"}), f'{{"file_name": "1.png", "text": {LONG}}}']
    records = load_records(write_folder(tmp_path / "set", 2, lines), max_bad_fraction=1)
    assert "line 2: broken row (not JSON" in str(records.report.problems[0])
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "x", "seed": {LONG}}}')
    with pytest.raises(OutputError, match="cannot be read"):
        list(read_prompts(tmp_path / "p.jsonl"))
    (tmp_path / "history.jsonl").write_text(f'{{"step": {LONG}}}\n{{"step": 1}}\n')
    assert read_history(tmp_path) == [{"step": 1}]
    assert sampler_options([f"a={LONG}"]) == {"a": LONG}


def test_a_model_folder_with_a_long_number_is_told_by_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": {LONG}}}')
    assert main(["info", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err
