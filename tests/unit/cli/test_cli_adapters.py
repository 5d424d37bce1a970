"""LoRAs and words on the command line, what the picture says of them, and what `export` writes and reads again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.cli import main
from ldm_pipe.cli.draw import split_tail
from ldm_pipe.drawing.png_info import read_png_info
from ldm_pipe.interop.lora.file import LoraLayer, networks_of, read_lora, save_lora
from ldm_pipe.interop.lora.words import save_word
from ldm_pipe.pipelines import export_files
from ldm_pipe.pretrained import load_tensors
from tests.single_files import make_folder

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA and a word for the model."""
    place, generator = tmp_path_factory.mktemp("files"), torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 64), (64, 2)))
    save_lora(place / "style.safetensors", {("unet", QUERY): LoraLayer(down, up, 2.0)})
    save_word(place / "word.safetensors", "<thing>", [torch.randn(1, 32, generator=generator)])
    return place


def test_a_tail_is_what_follows_a_file(tmp_path: Path) -> None:
    (tmp_path / "a:0.5").touch()
    assert split_tail(str(tmp_path / "a:0.5")) == (str(tmp_path / "a:0.5"), None)
    assert split_tail("x.safetensors:0.8") == ("x.safetensors", "0.8")
    assert split_tail("x.safetensors") == ("x.safetensors", None)
    assert split_tail("C:\\x") == ("C:\\x", None)


def test_generate_takes_loras_and_words_and_the_picture_tells_them(
    folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, word = str(files / "style.safetensors"), str(files / "word.safetensors")
    base = ["generate", "a <thing>", "--model", str(folder), "--steps", "2", "--seed", "1", "--quiet"]
    base += ["--height", "16", "--width", "16", "--textual_inversion", f"{word}:<thing>"]
    assert main([*base, "-o", str(tmp_path / "plain.png")]) == 0
    assert main([*base, "--lora", f"{lora}:0.5", "-o", str(tmp_path / "lora.png")]) == 0
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "lora.png").read_bytes()
    info = read_png_info(tmp_path / "lora.png")
    assert info is not None
    assert info.settings["Lora"] == f"{lora}:0.5"
    assert info.settings["Textual inversion"] == f"{word}:<thing>"
    capsys.readouterr()
    assert main(["info", str(tmp_path / "lora.png")]) == 0
    again = capsys.readouterr().out
    assert f"--lora {lora}:0.5" in again
    assert "--textual-inversion" in again
    assert main([*base, "--lora", f"{lora}:much", "-o", str(tmp_path / "x.png")]) == 2
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("option", ["--lora", "--textual-inversion"])
def test_a_file_that_is_not_there_is_called_a_file(
    option: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was looked for as a folder and a hub id."""
    words = ["generate", "apple", "--model", str(folder), option, str(tmp_path / "style.safetensors"), "--quiet"]
    assert main([*words, "-o", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: no such file"


def test_export_writes_a_lora_for_a1111_and_reads_it_again(
    folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = str(files / "style.safetensors"), tmp_path / "kohya.safetensors"
    command = ["export", source, str(target), "--format", "lora", "--model", str(folder)]
    assert main(command) == 0
    flat = "lora_unet_" + QUERY.replace(".", "_")
    assert set(load_tensors(target)) == {f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"}
    networks = networks_of(LatentDiffusionPipeline.from_pretrained(folder))
    wanted, found = (read_lora(path, networks)["unet", QUERY].delta() for path in (source, target))
    assert torch.equal(wanted, found)
    assert main(command) == 2  # it is there already
    assert main([*command, "--sampler", "ddim"]) == 2
    assert "--sampler have no effect" in capsys.readouterr().err
    target.unlink()
    monkeypatch.setattr(export_files, "tensors_of", lambda layer: [torch.rand(3)])
    assert main(command) == 2
    assert not target.exists()


def test_export_writes_a_single_file_and_reads_it_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "one.safetensors"
    command = ["export", str(folder), str(target), "--format", "single_file"]
    assert main([*command, "--dtype", "float16"]) == 0
    assert {x.dtype for x in load_tensors(target).values()} == {torch.float16}
    target.unlink()
    real = export_files.load_tensors
    monkeypatch.setattr(export_files, "load_tensors", lambda path: {k: x + 1 for k, x in real(path).items()})
    assert main(command) == 2
    assert "comes back with other numbers" in capsys.readouterr().err
    assert not target.exists()
