"""Faults 35 to 40 on the way to the autoencoder: odd pictures train with the right colours, bad ones are counted."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("accelerate")

from autoencoder import AutoencoderKL
from ldm_pipe.data.images import to_tensor
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import DataConfig, build_config
from ldm_pipe.training.tasks.pictures import PictureSource, open_records
from scripts import train_autoencoder

SIZE = 32


def chart() -> Image.Image:
    """Draw four flat fields, upper left red: a turned or recoloured picture is noticed."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[:16, :16], pixels[:16, 16:] = (255, 0, 0), (0, 255, 0)
    pixels[16:, :16], pixels[16:, 16:] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_pictures() -> dict[str, bytes]:
    """Return pictures in unusual forms that all show the chart, named as the report counts them."""
    plain, transparent = chart(), chart().convert("RGBA")
    transparent.putpixel((31, 31), (7, 7, 7, 0))  # a hidden colour: white shows
    turned, exif = plain.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[274] = 6
    return {
        "palette.png": encoded(plain.quantize(16), "PNG"),
        "alpha.png": encoded(transparent, "PNG"),
        "cmyk.tif": encoded(plain.convert("CMYK"), "TIFF"),
        "turned.png": encoded(turned, "PNG", exif=exif),
        "animated.gif": encoded(plain, "GIF", save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE), "black")]),
    }


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Return files that hold no usable picture, with a word of the reason they are reported with."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 12000, 10000, 8, 2, 0, 0, 0)
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + end
    whole = encoded(chart(), "PNG")
    return {
        "enormous.png": (bomb, "larger than"),
        "truncated.png": (whole[: len(whole) // 2], "unreadable picture"),
        "empty.png": (b"", "0 bytes"),
        "error.png": (b"<html><body>404</body></html>", "starts with"),
    }


pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in odd_pictures().items():
        (folder / name).write_bytes(data)
    for name, (data, _) in bad_pictures().items():
        (folder / name).write_bytes(data)
    ramp = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 64
    (folder / "sixteen.png").write_bytes(encoded(Image.fromarray(ramp), "PNG"))
    (folder / "pixel.png").write_bytes(encoded(Image.new("RGB", (1, 1), "red"), "PNG"))
    return folder


def data_config(folder: Path) -> dict[str, Any]:
    return {"train_data_dir": str(folder), "caption_column": None, "resolution": SIZE, "max_bad_fraction": 0.5}


def test_odd_pictures_reach_the_autoencoder_with_their_colours(pictures: Path) -> None:
    """FAULTS 35 to 38: palette, alpha on white, CMYK, turned, animated, 16 bits, one pixel."""
    records = open_records(build_config(DataConfig, data_config(pictures), "test"))  # type: ignore[type-var]
    source = PictureSource(records, SIZE)
    shown = {Path(records.where(row)).name: source([row])[0] for row in range(len(records))}
    assert set(shown) == {*odd_pictures(), "sixteen.png", "pixel.png"}
    for name in odd_pictures():
        torch.testing.assert_close(shown[name], to_tensor(chart()), atol=2 / 127.5 + 1e-6, rtol=0, msg=name)
    sixteen = (shown["sixteen.png"][0] + 1) * 127.5
    assert float(sixteen[0, 0]) == 0.0
    assert float(sixteen[-1, -1]) == pytest.approx(1023 * 64 / 257, abs=1.0), "not clipped to white"
    assert shown["pixel.png"].shape == (3, SIZE, SIZE)
    assert torch.equal(shown["pixel.png"][:, 5, 7], torch.tensor([1.0, -1.0, -1.0]))


def config_file(folder: Path, pictures: Path, **data: Any) -> Path:
    network = {"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "mid_block_add_attention": False}
    values = {
        "output_dir": str(folder / "run"), "network": network, "perceptual": None, "num_threads": 1,
        "report_to": "none", "train_batch_size": 2, "max_train_steps": 2, "validation_steps": 100,
        "discriminator_width": 4, "discriminator_layers": 1, "objective": {"adversarial_start": 1},
        "data": {**data_config(pictures), **data},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_bad_pictures_are_counted_at_the_end_and_never_a_crash(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_autoencoder.main(["--config", str(config_file(tmp_path, pictures))])
    said = capsys.readouterr().out
    assert "7 of 11 rows used; left out: 4 " in said
    listed = (tmp_path / "run" / "left_out.txt").read_text().splitlines()
    assert len(listed) == len(bad_pictures())
    for name, (_, reason) in bad_pictures().items():
        (line,) = [line for line in listed if name in line]
        assert reason in line
    model = AutoencoderKL.from_pretrained(tmp_path / "run" / "vae")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_too_many_bad_pictures_are_refused_before_training(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match="4 of 11 rows"):
        train_autoencoder.main(["--config", str(config_file(tmp_path, pictures, max_bad_fraction=0.1))])
    assert not (tmp_path / "run").exists()


def test_a_stream_trains_and_its_bad_pictures_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="streams are its")
    monkeypatch.setattr("ldm_pipe.training.tasks.autoencoder_inputs.NUM_FIRST", 8)
    pictures = [*odd_pictures().values(), *(data for data, _ in bad_pictures().values())]
    columns = {"image": [{"bytes": data, "path": None} for data in pictures], "text": ["a picture"] * len(pictures)}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    data = {"streaming": True, "random_flip": True, "center_crop": False}
    train_autoencoder.main(["--config", str(config_file(tmp_path, path, **data))])
    assert "left out: " in capsys.readouterr().out
    assert "unreadable picture" in (tmp_path / "run" / "left_out.txt").read_text()
    model = AutoencoderKL.from_pretrained(tmp_path / "run" / "vae")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.scaling_factor != AutoencoderKL.from_config(model.config | {"scaling_factor": None}).scaling_factor
