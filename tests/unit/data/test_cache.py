"""Caches: the same rows as computing anew, never half a file, never a damaged or a foreign one."""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm_pipe.data.cache import LatentCache, TextCache, caption_variants, module_hash
from ldm_pipe.data.captions import mix_caption
from ldm_pipe.data.dataset import Records, load_records
from ldm_pipe.data.images import resize, to_tensor
from ldm_pipe.data.shards import Shards, settings_key, write_shards
from ldm_pipe.pretrained import LdmPipeError

NUM = 11


@dataclass
class Moments:
    mean: Tensor
    log_var: Tensor


@dataclass
class Embeddings:
    tokens: Tensor | None
    token_mask: Tensor | None = None
    pooled: Tensor | None = None


class Encoder(nn.Module):
    """A stand-in with the autoencoder's border: images in, moments out; counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, stride=2)
        self.num_seen = 0
        with torch.no_grad():
            self.conv.bias.zero_()
            self.conv.weight.copy_(torch.linspace(-1, 1, self.conv.weight.numel()).view_as(self.conv.weight))

    def forward(self, images: Tensor) -> Moments:
        self.num_seen += len(images)
        return Moments(*self.conv(images).chunk(2, dim=1))


@pytest.fixture
def records(tmp_path: Path) -> Records:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(NUM):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{i:02d}.png").write_bytes(buffer.getvalue())
        (folder / f"{i:02d}.txt").write_text(f"caption {i}")
    return load_records(folder)


def build(root: Path, records: Records, encoder: Encoder, **options: object) -> LatentCache:
    settings = {"autoencoder_hash": module_hash(encoder), "resolution": 4, "batch_size": 4, **options}
    return LatentCache.build(root, records, encoder, **settings)


def expected(records: Records, encoder: Encoder, index: int, flip: bool = False) -> Moments:
    image = to_tensor(resize(records.image(index), 4))[None]
    with torch.no_grad():
        return encoder(image.flip(-1) if flip else image)


@pytest.mark.parametrize("max_memory_bytes", [0, 1 << 30])
def test_cached_moments_are_those_of_the_encoder(tmp_path: Path, records: Records, max_memory_bytes: int) -> None:
    encoder = Encoder()
    cache = build(tmp_path / "cache", records, encoder, flip=True, max_memory_bytes=max_memory_bytes)
    assert len(cache) == NUM
    indices, variants = [3, 10, 3, 0], [0, 1, 1, 0]
    mean, log_var = cache.moments(indices, variants)
    for row, (index, variant) in enumerate(zip(indices, variants, strict=True)):
        whole = expected(records, encoder, index, flip=bool(variant))
        torch.testing.assert_close(mean[row], whole.mean[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(log_var[row], whole.log_var[0], rtol=0, atol=1e-6)
    with pytest.raises(LdmPipeError, match="variants"):
        cache.moments([0], [2])
    with pytest.raises(LdmPipeError, match="does not exist"):
        cache.moments([NUM])


def test_several_crops_are_those_of_their_place_with_matching_time_ids(tmp_path: Path, records: Records) -> None:
    """Each variant is what encoding that part of the picture gives, and its time ids say which part it is."""
    encoder = Encoder()
    options = {"resolution": (4, 6), "flip": True, "num_crops": 3, "crop_seed": 5}
    cache = build(tmp_path / "cache", records, encoder, **options)
    assert (cache.num_variants, len(cache)) == (6, NUM)
    places = set()
    for variant in range(6):
        (ids,) = cache.time_ids([7], [variant]).tolist()
        top, left = ids[2:4]
        assert (ids[:2], ids[4:]) == ([8, 8], [4, 6])
        whole = to_tensor(resize(records.image(7), 6))
        part = (whole.flip(-1) if variant % 2 else whole)[:, top : top + 4, left : left + 6]
        with torch.no_grad():
            wanted = encoder(part[None]).mean[0]
        torch.testing.assert_close(cache.moments([7], [variant])[0][0], wanted, rtol=0, atol=1e-6)
        places.add(top)
    assert len(places) > 1, "the crops differ"
    again = build(tmp_path / "other", records.select([7]), encoder, **options)
    assert torch.equal(again.mean, cache.moments([7] * 6, range(6))[0]), "a crop depends on the picture's name alone"
    with pytest.raises(LdmPipeError, match="crop_seed"):
        build(tmp_path / "cache", records, encoder, num_crops=2)


def test_several_captions_come_first_and_then_mixes_of_each() -> None:
    found = caption_variants([["a b", "c d"], "e f"], [[], ["word"]], 6, 0, mix_caption)
    assert found[0][:2] == ["a b", "c d"]
    assert found[1][0] == "e f"
    assert {text[0] for text in found[0][2:]} <= set("abcd")
    assert [len(row) for row in found] == [6, 6]
    with pytest.raises(LdmPipeError, match="at least 2"):
        caption_variants([["a", "b"]], [[]], 1, 0, mix_caption)


def test_latents_are_computed_once(tmp_path: Path, records: Records) -> None:
    encoder = Encoder()
    steps: list[tuple[int, int]] = []
    first = build(tmp_path / "cache", records, encoder, progress=lambda done, of: steps.append((done, of)))
    assert encoder.num_seen == NUM
    assert steps == [(4, NUM), (8, NUM), (NUM, NUM)]
    again = build(tmp_path / "cache", records, encoder)
    assert encoder.num_seen == NUM
    assert torch.equal(first.mean, again.mean)


def test_of_several_processes_one_computes_and_the_others_wait(tmp_path: Path, records: Records) -> None:
    """Two launched processes would otherwise encode everything twice; here they are threads, the lock is the same."""
    encoder, forward = Encoder(), Encoder.forward

    def slow(images: Tensor) -> Moments:
        time.sleep(0.05)
        return forward(encoder, images)

    def one(_: int) -> Tensor:
        settings = {"autoencoder_hash": "x", "resolution": 4, "batch_size": 4}
        return LatentCache.build(tmp_path / "cache", records, slow, **settings).mean

    with ThreadPoolExecutor(3) as pool:
        means = list(pool.map(one, range(3)))
    assert encoder.num_seen == NUM
    assert all(torch.equal(mean, means[0]) for mean in means)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the lock is taken away"


def test_whatever_changes_the_latents_changes_the_folder(tmp_path: Path, records: Records) -> None:
    encoder = Encoder()
    build(tmp_path, records, encoder)
    for options in (
        {"resolution": 8},
        {"flip": True},
        {"crop_seed": 3},
        {"crop_seed": 3, "num_crops": 2},
        {"resolution": (4, 6)},
        {"dtype": torch.float16},
    ):
        seen = encoder.num_seen
        build(tmp_path, records, encoder, **options)
        assert encoder.num_seen > seen, options
    seen = encoder.num_seen
    build(tmp_path, records.select(range(5)), encoder)
    assert encoder.num_seen == seen + 5
    before = module_hash(encoder)
    with torch.no_grad():
        encoder.conv.bias[0] += 1e-3
    assert module_hash(encoder) != before
    build(tmp_path, records, encoder)
    assert encoder.num_seen == seen + 5 + NUM


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_latents_names_the_picture_and_leaves_nothing(tmp_path: Path, records: Records, bad: float) -> None:
    """kohya_ss#2541."""

    def encode(images: Tensor) -> Moments:
        moments = Encoder()(images)
        target = to_tensor(resize(records.image(6), 4))
        moments.mean[(images == target).flatten(1).all(dim=1), 0, 0, 0] = bad
        return moments

    with pytest.raises(LdmPipeError, match=r"06\.png.*NaN or infinity"):
        LatentCache.build(tmp_path / "cache", records, encode, autoencoder_hash="x", resolution=4, batch_size=4)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("max_memory_bytes", [0, 1 << 30])
def test_nan_in_a_cache_written_elsewhere_is_noticed(tmp_path: Path, max_memory_bytes: int) -> None:
    tensors = {"mean": torch.zeros(3, 1, 2, 2), "log_var": torch.zeros(3, 1, 2, 2)}
    tensors["mean"][1, 0, 0, 0] = float("nan")
    folder = write_shards(tmp_path, {"flip": False, "num_crops": 1}, [tensors])
    with pytest.raises(LdmPipeError, match="picture 1"):
        LatentCache(Shards(folder, max_memory_bytes=max_memory_bytes)).moments([0, 1])


def test_an_interrupted_build_leaves_nothing_that_looks_whole(tmp_path: Path, records: Records) -> None:
    class Killed(BaseException):
        pass

    def encode(images: Tensor) -> Moments:
        if len(images) < 4:
            raise Killed
        return Encoder()(images)

    with pytest.raises(Killed):
        LatentCache.build(tmp_path / "cache", records, encode, autoencoder_hash="x", resolution=4, batch_size=4)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("where", [0.1, 0.5, 0.99])
def test_a_flipped_bit_is_noticed(tmp_path: Path, records: Records, where: float) -> None:
    build(tmp_path / "cache", records, Encoder())
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[int(len(data) * where)] ^= 16
    shard.write_bytes(bytes(data))
    with pytest.raises(LdmPipeError, match=r"shard-00000\.safetensors does not have the recorded sha256"):
        build(tmp_path / "cache", records, Encoder())


def test_missing_short_and_foreign_shards_are_noticed(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        return write_shards(
            tmp_path / name, {"a": 1}, [{"x": torch.arange(3.0)}, {"x": torch.arange(5.0)}], shard_rows=3
        )

    assert len(Shards(fresh("good"))) == 8
    missing = fresh("missing")
    (missing / "shard-00001.safetensors").unlink()
    short = fresh("short")
    (short / "shard-00000.safetensors").write_bytes(b"\0" * 10)
    foreign = fresh("foreign").rename(tmp_path / "foreign" / ("0" * 64))
    outside = fresh("outside")
    manifest = json.loads((outside / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../../good/x.safetensors"
    (outside / "manifest.json").write_text(json.dumps(manifest))
    broken = fresh("broken")
    (broken / "manifest.json").write_text('{"format": 1, "settings": {}}')
    for folder, reason in (
        (missing, "is missing"),
        (short, "10 bytes instead of"),
        (foreign, "does not belong"),
        (outside, "leads out"),
        (broken, "lacks entries"),
    ):
        with pytest.raises(LdmPipeError, match=reason):
            Shards(folder)


def test_rows_across_shards_come_in_the_order_asked_for(tmp_path: Path) -> None:
    values = torch.arange(50.0)
    folder = write_shards(tmp_path, {}, [{"x": part} for part in values.split(4)], shard_rows=8)
    assert len(list(folder.glob("*.safetensors"))) == 7
    index = [49, 0, 8, 7, 7, 23]
    for limit in (0, 1 << 20):
        assert Shards(folder, max_memory_bytes=limit).rows("x", index).tolist() == index


def test_two_builders_of_one_cache_do_not_disturb_each_other(tmp_path: Path) -> None:
    def batches() -> list[dict[str, Tensor]]:
        return [{"x": torch.arange(4.0)}]

    def slow() -> object:
        yield from batches()
        write_shards(tmp_path, {"a": 1}, batches())  # the other one is faster

    assert write_shards(tmp_path, {"a": 1}, slow()) == tmp_path / settings_key({"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == [settings_key({"a": 1})]
    assert len(Shards(tmp_path / settings_key({"a": 1}))) == 4


def test_a_full_or_forbidden_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LdmPipeError, match="cache cannot be written"):
        write_shards(tmp_path / "file" / "cache", {}, [{"x": torch.zeros(1)}])

    def full(*_: object) -> None:
        raise LdmPipeError("cannot be written (No space left on device)", "shard")

    monkeypatch.setattr("ldm_pipe.data.shards.save_tensors", full)
    with pytest.raises(LdmPipeError, match="No space"):
        write_shards(tmp_path / "cache", {}, [{"x": torch.zeros(1)}])
    assert list((tmp_path / "cache").iterdir()) == []


def embed(texts: list[str]) -> Embeddings:
    """Return numbers that depend on the text alone."""
    lengths = torch.tensor([[float(len(text))] for text in texts])
    codes = torch.tensor([[float(sum(text.encode()))] for text in texts])
    return Embeddings(torch.stack([lengths, codes], dim=1), torch.ones(len(texts), 2, dtype=torch.bool), codes)


def test_text_rows_belong_to_their_texts(tmp_path: Path) -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> Embeddings:
        seen.extend(texts)
        return embed(texts)

    texts = ["red apple", "", "dog", "red apple", "\u732b", "dog "]
    cache = TextCache.build(tmp_path, texts, encode, encoder_hash="e", batch_size=2)
    assert seen == ["red apple", "", "dog", "\u732b", "dog "], "each distinct text once"
    for text in texts:
        row = int(cache.rows([text])[0])
        assert torch.equal(cache.tokens[row], embed([text]).tokens[0])
    assert cache.token_mask is not None
    assert cache.token_mask.dtype == torch.bool
    assert cache.pooled is not None
    assert cache.pooled.shape == (5, 1)
    assert cache.table([["dog", ""], ["red apple", "dog"]]).tolist() == [[2, 1], [0, 2]]
    with pytest.raises(LdmPipeError, match="'cat' is not in the cache"):
        cache.rows(["cat"])
    TextCache.build(tmp_path, texts, encode, encoder_hash="e", batch_size=2)
    assert len(seen) == 5
    for options in (
        {"encoder_hash": "f"},
        {"encoder_hash": "e", "layer": -2},
        {"encoder_hash": "e", "dtype": torch.float16},
    ):
        TextCache.build(tmp_path, texts, encode, **options)
    TextCache.build(tmp_path, ["red appl", "edog"], encode, encoder_hash="e")
    TextCache.build(tmp_path, ["red apple", "dog"], encode, encoder_hash="e")
    assert len(seen) == 5 + 15 + 4


def test_nan_in_embeddings_names_the_text(tmp_path: Path) -> None:
    def encode(texts: list[str]) -> Embeddings:
        tokens = embed(texts).tokens
        assert tokens is not None
        return Embeddings(tokens / torch.tensor([0.0 if text == "dog" else 1.0 for text in texts])[:, None, None])

    with pytest.raises(LdmPipeError, match="text 'dog'"):
        TextCache.build(tmp_path, ["cat", "dog"], encode, encoder_hash="e")


def test_caption_variants_are_keyed_by_row_and_start_with_the_caption() -> None:
    captions, keywords = ["red apple", "dog", "flag"], [["fruit", "food", "diet"], ["pet", "animal"], []]
    drawn = caption_variants(captions, keywords, 16, 0, mix_caption)
    assert drawn == caption_variants(captions, keywords, 16, 0, mix_caption)
    assert drawn != caption_variants(captions, keywords, 16, 1, mix_caption)
    assert [texts[0] for texts in drawn] == captions
    assert {len(texts) for texts in drawn} == {16}
    assert caption_variants(captions[:1], keywords[:1], 16, 0, mix_caption) == drawn[:1], (
        "rows do not disturb each other"
    )
    assert caption_variants(captions, keywords, 4, 0, mix_caption) == [texts[:4] for texts in drawn]
    styled = caption_variants(captions, keywords, 16, 0, mix_caption, styles=["", ", flat", ""])
    assert styled[1] == [text + ", flat" for text in drawn[1]]
    assert styled[0] == drawn[0]
