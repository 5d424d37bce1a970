"""Small data sets with pictures, for the tests of what reads them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow", reason="parquet tests need pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="parquet tests need pyarrow")


def picture(number: int = 0, size: int = 4) -> bytes:
    """Return a small PNG, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def rows(number: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": picture(i), "path": f"{i}.png"},
            "text": f"caption {i}",
            "keywords": ["a", str(i)],
            "concept": f"c{i // 2}",
            "flag": i % 2 == 0,
        }
        for i in range(start, start + number)
    ]


def write_folder(folder: Path, number: int, lines: list[Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"{i}.png").write_bytes(picture(i))
    lines = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(number)] if lines is None else lines
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder
