"""The comparison of autoencoders: what was measured stands in its column, what was not is a dash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm_pipe.pretrained import LdmPipeError
from scripts.compare_autoencoders import main
from tests.autoencoders import make_autoencoder, make_vq

pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")


def write_run(folder: Path, name: str, measured: dict[str, float]) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    run = folder / "runs" / name
    (make_vq() if "codebook_usage" in measured else make_autoencoder()).save_pretrained(run / "vae")
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for step in (10, 20):
            writer.add_scalar("autoencoder/reconstruction", 1.0 / step, step)
            writer.add_scalar("images_per_second", float(step), step)
    (folder / "evaluation" / name).mkdir(parents=True)
    report = {"num_parameters": 1234, "results": {"validation drawings": {"psnr": 20.0, "ssim": 0.5, **measured}}}
    (folder / "evaluation" / name / "results.json").write_text(json.dumps(report))
    return run


def test_runs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kl = write_run(tmp_path, "kl", {"kl": 5000.0, "perceptual": 0.1})
    vq = write_run(tmp_path, "vq", {"codebook_usage": 0.91, "codebook_perplexity": 300.0})
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    options = ["--evaluation", str(tmp_path / "evaluation"), "--pictures", str(tmp_path / "pictures")]
    main([str(kl), str(vq), *options, "--output", str(tmp_path / "out" / "ae")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| kl | 20.00 | 0.500 | 0.100 | - | 5000 | - | - | 1,234 | 20.0 |"
    assert lines[3] == "| vq | 20.00 | 0.500 | - | - | - | 91.0% | 300 | 1,234 | 20.0 |"
    with Image.open(tmp_path / "out" / "ae-sheet.webp") as sheet:
        assert sheet.width == 3 * 36 + 4, "as many columns as there are pictures"
    with Image.open(tmp_path / "out" / "ae-curves.png") as curves:
        assert curves.width > curves.height
    (tmp_path / "evaluation" / "vq" / "results.json").unlink()
    with pytest.raises(LdmPipeError, match="has not been evaluated"):
        main([str(kl), str(vq), *options, "--output", str(tmp_path / "out" / "ae")])
