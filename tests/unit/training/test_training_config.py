"""Run configs are read strictly: every refusal names the key, and nothing is converted in silence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import (
    HARMLESS,
    OptimConfig,
    TrainConfig,
    build_config,
    config_changes,
    dump_config,
    parse_config,
    read_yaml,
)
from ldm_pipe.training.tasks.autoencoder import AutoencoderConfig
from ldm_pipe.training.tasks.diffusion import DiffusionConfig
from ldm_pipe.training.tasks.finetune.config import FinetuneConfig
from tests.source import ROOT

YAMLS = sorted((ROOT / "configs").glob("*/*.yaml"))


def parse(folder: Path, text: str, *flags: str) -> DiffusionConfig:
    path = folder / "run.yaml"
    path.write_text(text)
    return parse_config(DiffusionConfig, ["--config", str(path), *flags], "test")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("output_dir: x\nlearning_rat: 1.0", "learning_rat:"),
        ("output_dir: x\noptim: {learning_rat: 1.0}", r"optim\.learning_rat:"),
        ("output_dir: x\noptim: {lr_scheduler: cosin}", r"optim\.lr_scheduler: .*'cosine'.*got 'cosin'"),
        ("output_dir: x\nschedule: {prediction_type: eps}", r"schedule\.prediction_type: .*epsilon"),
        ("output_dir: x\nseed: [1]", r"seed: .*got \(1,\)"),
        ("output_dir: x\noptim: {learning_rate: 1e-4}", r"optim\.learning_rate: .*got '1e-4'.*write 1\.0e-4"),
        ("output_dir: x\nmax_train_steps: '10'", "max_train_steps:"),
        ("output_dir: x\nmax_train_steps: 10.5", "max_train_steps:"),
        ("output_dir: x\nmax_train_steps: true", "max_train_steps:"),
        ("output_dir: x\nmax_train_steps: 0", "max_train_steps: .*greater than or equal to 1"),
        ("output_dir: x\nuse_ema: 1", "use_ema:"),
        ("output_dir: x\ncheckpoints_total_limit: 1", "checkpoints_total_limit:"),
        ("output_dir: x\nema_decay: 1.0", "ema_decay:"),
        ("output_dir: x\nunet: {block_out_channels: 32}", r"unet\.block_out_channels"),
        ("seed: 1", "output_dir: Field required"),
    ],
)
def test_a_wrong_value_is_refused_with_the_path_of_its_key(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(LdmPipeError, match=named) as error:
        parse(tmp_path, text)
    assert str(tmp_path / "run.yaml") in str(error.value)


def test_all_wrong_keys_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match=r"seed: .*; optim\.learning_rate: "):
        parse(tmp_path, "output_dir: x\nseed: x\noptim: {learning_rate: -1.0}")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- a\n- b", "mapping"),
        ("", "mapping"),
        ("a: [", "cannot be read as YAML"),
        ("a: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("a: " + "[" * 12 + "]" * 12, "8 levels"),
        ("output_dir: &x y\ncache_dir: *x", "aliases"),
    ],
)
def test_a_file_that_is_no_run_config_is_one_clear_error(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(LdmPipeError, match=named):
        parse(tmp_path, text)


def test_an_alias_bomb_is_refused_before_it_is_walked(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    began = time.process_time()
    with pytest.raises(LdmPipeError, match="aliases"):
        read_yaml(tmp_path / "bomb.yaml")
    assert time.process_time() - began < 1


def test_a_missing_or_huge_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "huge.yaml").write_text("# " + "x" * (1 << 20))
    with pytest.raises(LdmPipeError, match="larger than"):
        read_yaml(tmp_path / "huge.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LdmPipeError, match="cannot be read"):
        read_yaml(tmp_path / "binary.yaml")


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    text = "output_dir: x\nseed: 3\noptim: {learning_rate: 0.5, adam_beta1: 0.8}\nunet: {block_out_channels: [8, 16]}"
    flags = ["--optim.learning_rate", "1e-4", "--unet.block_out_channels", "32", "64", "--snr_gamma", "None"]
    config = parse(tmp_path, text, *flags, "--no-use_ema", "--validation_prompts", "red apple", "octopus")
    assert (config.optim.learning_rate, config.optim.adam_beta1, config.seed) == (1e-4, 0.8, 3)
    assert config.unet.block_out_channels == (32, 64)
    assert config.snr_gamma is None
    assert config.use_ema is False
    assert config.validation_prompts == ("red apple", "octopus")
    assert config.optim.adam_beta2 == OptimConfig().adam_beta2


@pytest.mark.parametrize("flag", [["--seeed", "1"], ["--max_train_steps", "0"], ["--schedule.prediction_type", "eps"]])
def test_a_wrong_flag_ends_the_process_and_is_named(
    tmp_path: Path, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, "output_dir: x", *flag)
    assert stop.value.code == 2
    assert flag[0].removeprefix("--") in capsys.readouterr().err


def test_config_may_be_given_with_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("output_dir: here")
    assert parse_config(DiffusionConfig, [f"--config={tmp_path / 'run.yaml'}", "--seed", "4"], "").output_dir == "here"
    with pytest.raises(LdmPipeError, match="needs a file"):
        parse_config(DiffusionConfig, ["--config"], "")


@settings(max_examples=50, deadline=None)
@given(
    rate=st.floats(1e-12, 1e3),
    prompts=st.lists(st.text(max_size=20), max_size=3).map(tuple),
    steps=st.integers(1, 10**9),
    gamma=st.none() | st.floats(1e-3, 100),
    channels=st.lists(st.integers(1, 999), min_size=1, max_size=4).map(tuple),
)
def test_a_dumped_config_reads_back_as_itself(
    rate: float, prompts: tuple[str, ...], steps: int, gamma: float | None, channels: tuple[int, ...]
) -> None:
    values: dict[str, Any] = {"output_dir": "x", "optim": {"learning_rate": rate}, "max_train_steps": steps}
    values |= {"validation_prompts": prompts, "snr_gamma": gamma, "unet": {"block_out_channels": channels}}
    config = build_config(DiffusionConfig, values, "test")
    assert build_config(DiffusionConfig, yaml.safe_load(dump_config(config)), "again") == config


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_yaml_of_the_project_builds(path: Path) -> None:
    values = read_yaml(path)
    if path.parent.name == "accelerate":
        assert values["mixed_precision"] in ("no", "bf16", "fp16")
    elif {"vocab_size", "kind", "train_file"} & values.keys():
        assert values["output_dir"]  # their models live in scripts, and are tested with them
    else:
        model: type[TrainConfig] = DiffusionConfig if "autoencoder" in values else AutoencoderConfig
        model = FinetuneConfig if path.name.startswith("finetune-") else model
        config = build_config(model, values, str(path))
        assert build_config(model, yaml.safe_load(dump_config(config)), "again") == config
        header = path.read_text().split("\n\n")[0]
        assert f"--config {path.relative_to(ROOT)}" in header, "the header gives the exact command"


def test_changes_are_listed_by_path_and_harmless_ones_are_not() -> None:
    a = build_config(DiffusionConfig, {"output_dir": "x"}, "").model_dump(mode="json")
    assert config_changes(a, a) == []
    b = {**a, "output_dir": "y", "num_threads": 3, "optim": {**a["optim"], "adam_beta1": 0.5}, "seed": 9}
    assert config_changes(a, b) == ["optim.adam_beta1: 0.9 -> 0.5", "seed: 0 -> 9"]
    assert config_changes({**a, "gone": 1}, a) == ["gone: 1 -> None"]
    assert set(DiffusionConfig.model_fields) >= HARMLESS, "a key that no longer exists hides nothing"
