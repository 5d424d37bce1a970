"""Latents and text embeddings, computed once and kept in content-addressed folders.

Enters: records and an encoder. Leaves: the moments (mean, log variance) of every picture's latents, and the embeddings
of every distinct text. This file does not know the autoencoder's scale and shift: the moments are raw, training
normalises them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm_pipe.data.dataset import Records
from ldm_pipe.data.framing import CENTER, frame_picture
from ldm_pipe.data.images import to_tensor
from ldm_pipe.data.shards import MANIFEST, Shards, only_one, settings_key, write_shards
from ldm_pipe.pretrained import LdmPipeError

Progress = Callable[[int, int], None]


class Moments(Protocol):
    """A diagonal Gaussian over latents."""

    mean: Tensor
    log_var: Tensor


class Embeddings(Protocol):
    """What a text encoder returns; `conditioning.Condition` is one."""

    tokens: Tensor | None
    token_mask: Tensor | None
    pooled: Tensor | None


def module_hash(module: nn.Module) -> str:
    """Return the sha256 over names, types, shapes and values of a module's weights, and its config if it has one."""
    digest = hashlib.sha256(type(module).__name__.encode())
    config = getattr(module, "config", None)
    if isinstance(config, dict):
        digest.update(
            repr(sorted((key, repr(value)) for key, value in config.items() if not key.startswith("_"))).encode()
        )
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class LatentCache:
    """Raw latent moments of all pictures of a data set, several variants of each.

    Row `i * num_variants + v` belongs to picture `i` of the records. Variant `v` is crop `v // 2`, mirrored if odd,
    when `flip` is set, else crop `v`.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.settings = shards.settings
        self.num_crops = int(self.settings["num_crops"])
        self.num_variants = (2 if self.settings["flip"] else 1) * self.num_crops
        # whole caches are checked here, larger ones row by row when they are read
        if shards.tensors is not None:
            for name in ("mean", "log_var"):
                _check_finite(
                    shards.tensors[name],
                    lambda row: f"picture {row // self.num_variants}",
                    f"cached {name}",
                    shards.folder,
                )

    @classmethod
    def build(
        cls,
        root: str | Path,
        records: Records,
        encode_moments: Callable[[Tensor], Moments],
        *,
        autoencoder_hash: str,
        resolution: int | tuple[int, int],
        flip: bool = False,
        num_crops: int = 1,
        crop_seed: int | None = None,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_memory_bytes: int = 4 << 30,
        progress: Progress | None = None,
    ) -> LatentCache:
        """Load the cache of these settings, or compute it; of several processes one computes, the others wait.

        Args:
            root: folder of all caches; this one gets a folder named by the hash of its settings.
            records: the pictures.
            encode_moments: maps images (B, 3, H, W) in [-1, 1] to an object with `mean` and `log_var`, (B, C, h, w),
                raw.
            autoencoder_hash: `module_hash` of the encoder.
            resolution: side of the square pictures, or (height, width).
            flip: also encode each picture mirrored.
            num_crops: crops of each picture, drawn with `crop_seed`.
            crop_seed: None crops the middle; else crops are drawn by this seed, the picture's name and their number.
            batch_size: images encoded at once.
            device: where the encoder is.
            dtype: number type of the stored moments.
            max_memory_bytes: larger caches are read from disk row by row.
            progress: called with (pictures done, all pictures).
        Raises: LdmPipeError naming the picture whose latents are NaN or infinite.
        """
        if num_crops < 1 or (num_crops > 1 and crop_seed is None):
            raise LdmPipeError(f"{num_crops} crops of the middle", "latent cache", "Give a crop_seed, or one crop.")
        settings = {
            "kind": "latents",
            "images": records.image_fingerprint,
            "num_images": len(records),
            "autoencoder": autoencoder_hash,
            "shape": [resolution, resolution] if isinstance(resolution, int) else list(resolution),
            "flip": flip,
            "num_crops": num_crops,
            "crop_seed": crop_seed,
            "dtype": str(dtype),
        }
        folder = Path(root) / settings_key(settings)
        with only_one(root, folder.name):
            if not (folder / MANIFEST).is_file():
                batches = _encode_pictures(records, encode_moments, settings, batch_size, device, dtype, progress)
                write_shards(root, settings, batches)
        return cls(Shards(folder, max_memory_bytes=max_memory_bytes))

    def __len__(self) -> int:
        return len(self._shards) // self.num_variants

    @property
    def mean(self) -> Tensor:
        """Return all means, (N * num_variants, C, h, w), row `i * num_variants + variant`; needs them in memory."""
        return self._whole("mean")

    @property
    def log_var(self) -> Tensor:
        """Return all log variances, laid out like `mean`."""
        return self._whole("log_var")

    def _whole(self, name: str) -> Tensor:
        if self._shards.tensors is None:
            raise LdmPipeError("the cache is larger than max_memory_bytes", str(self._shards.folder), "Use moments().")
        return self._shards.tensors[name]

    def time_ids(self, indices: Iterable[int], variants: Iterable[int] | None = None) -> Tensor:
        """Return original size, crop and target size of some pictures, int64 (B, 6); see `framing.Frame`."""
        return self._shards.rows("time_ids", self._rows([int(index) for index in indices], variants))

    def _rows(self, indices: list[int], variants: Iterable[int] | None) -> list[int]:
        chosen = [0] * len(indices) if variants is None else [int(variant) for variant in variants]
        if len(chosen) != len(indices) or not all(0 <= variant < self.num_variants for variant in chosen):
            raise LdmPipeError(f"variants must be one number below {self.num_variants} per picture")
        return [index * self.num_variants + variant for index, variant in zip(indices, chosen, strict=True)]

    def moments(self, indices: Iterable[int], variants: Iterable[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return (mean, log_var) of some pictures, each (B, C, h, w), one variant per picture (None: the first)."""
        indices = [int(index) for index in indices]
        rows = self._rows(indices, variants)
        mean, log_var = (self._shards.rows(name, rows) for name in ("mean", "log_var"))
        if self._shards.tensors is None:
            for tensor in (mean, log_var):
                _check_finite(tensor, lambda row: f"picture {indices[row]}", "cached latents", self._shards.folder)
        return mean, log_var


@torch.no_grad()
def _encode_pictures(
    records: Records,
    encode_moments: Callable[[Tensor], Moments],
    settings: dict[str, Any],
    batch_size: int,
    device: str | torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> Iterator[dict[str, Tensor]]:
    shape, num_crops = tuple(settings["shape"]), settings["num_crops"]
    mirrors = (False, True) if settings["flip"] else (False,)
    num_variants = num_crops * len(mirrors)
    size, names = max(1, batch_size // num_variants), records.ids
    for start in range(0, len(records), size):
        indices = range(start, min(start + size, len(records)))
        framed = []
        for index in indices:
            picture = records.image(index)
            for number in range(num_crops):
                crop_at = crop_position(settings["crop_seed"], names[index], number)
                framed += [frame_picture(picture, shape, crop_at, mirror) for mirror in mirrors]
        images = torch.stack([to_tensor(part) for part, _ in framed])  # (B * num_variants, 3, H, W)
        moments = encode_moments(images.to(device))
        batch = {"mean": moments.mean.to("cpu", dtype), "log_var": moments.log_var.to("cpu", dtype)}
        for name, tensor in batch.items():
            _check_finite(tensor, lambda row, s=start: records.where(s + row // num_variants), f"{name} of the latents")
        yield {**batch, "time_ids": torch.tensor([frame.time_ids for _, frame in framed])}
        if progress is not None:
            progress(indices.stop, len(records))


def crop_position(seed: int | None, name: str, number: int) -> tuple[float, float]:
    """Return where a picture is cropped, (x, y) in [0, 1): the middle without a seed, else drawn by all three."""
    if seed is None:
        return CENTER
    draw = random.Random(hashlib.blake2b(f"{seed}/crop/{name}/{number}".encode("utf-8", "surrogatepass")).digest())
    return draw.random(), draw.random()


def _check_finite(tensor: Tensor, name_of: Callable[[int], str], what: str, folder: Path | None = None) -> None:
    """Name the first row with NaN or infinity."""
    # one pass without a copy: a sum is finite exactly when no value is NaN or infinite (float64 cannot overflow here)
    if torch.isfinite(tensor.sum(dtype=torch.float64)):
        return
    good = torch.isfinite(tensor).flatten(1).all(dim=1)
    row = int((~good).nonzero()[0])
    where = name_of(row) if folder is None else f"{folder}: {name_of(row)}"
    raise LdmPipeError(
        f"{what}: NaN or infinity in {int((~good).sum())} of {len(good)} rows",
        where,
        "Encode in float32; check the encoder's weights and this item.",
    )


class TextCache:
    """Embeddings of distinct texts; the rows are the texts in the order of their first appearance."""

    def __init__(self, shards: Shards, texts: Sequence[str]) -> None:
        if shards.tensors is None:
            raise LdmPipeError(
                "the text embeddings are too large for memory", str(shards.folder), "Use fewer variants."
            )
        self.texts = list(texts)
        self.index = {text: row for row, text in enumerate(self.texts)}
        for name, tensor in shards.tensors.items():
            if tensor.is_floating_point():
                _check_finite(tensor, lambda row: f"text {self.texts[row]!r}", f"cached {name}", shards.folder)
        self.tokens: Tensor = shards.tensors["tokens"]  # (N, L, D)
        self.token_mask: Tensor | None = shards.tensors.get("token_mask")  # (N, L)
        self.pooled: Tensor | None = shards.tensors.get("pooled")  # (N, P)

    @classmethod
    def build(
        cls,
        root: str | Path,
        texts: Iterable[str],
        encode: Callable[[list[str]], Embeddings],
        *,
        encoder_hash: str,
        layer: str | int = "last",
        batch_size: int = 256,
        dtype: torch.dtype = torch.float32,
        max_memory_bytes: int = 16 << 30,
        progress: Progress | None = None,
    ) -> TextCache:
        """Load the embeddings of these texts, or compute them; repeated texts are encoded once.

        Args:
            root: folder of all caches.
            texts: captions, prompts, and "" for the empty prompt.
            encode: maps texts to an object with `tokens` (B, L, D), `token_mask` (B, L) or None, `pooled` (B, P) or
                None.
            encoder_hash: `module_hash` of the text encoder (and whatever else decides: tokenizer, clip_skip).
            layer: which hidden layer `encode` returns; part of the folder's name.
            batch_size: texts encoded at once.
            dtype: number type of the stored embeddings.
            max_memory_bytes: refused above this size.
            progress: called with (texts done, all texts).
        """
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            raise LdmPipeError("no texts to encode")
        digest = hashlib.sha256()
        for text in distinct:
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        settings = {
            "kind": "texts",
            "texts": digest.hexdigest(),
            "num_texts": len(distinct),
            "encoder": encoder_hash,
            "layer": str(layer),
            "dtype": str(dtype),
        }
        folder = Path(root) / settings_key(settings)
        with only_one(root, folder.name):
            if not (folder / MANIFEST).is_file():
                write_shards(root, settings, _encode_texts(distinct, encode, batch_size, dtype, progress))
        return cls(Shards(folder, max_memory_bytes=max_memory_bytes), distinct)

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Return the row of each text: int64 (B,)."""
        try:
            return torch.tensor([self.index[text] for text in texts], dtype=torch.int64)
        except KeyError as error:
            raise LdmPipeError(f"the text {error.args[0]!r} is not in the cache") from None

    def table(self, variants: Sequence[Sequence[str]]) -> Tensor:
        """Return the rows of K texts per picture: int64 (N, K)."""
        return torch.stack([self.rows(texts) for texts in variants])


@torch.no_grad()
def _encode_texts(
    texts: list[str],
    encode: Callable[[list[str]], Embeddings],
    batch_size: int,
    dtype: torch.dtype,
    progress: Progress | None,
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        found = encode(part)
        if found.tokens is None:
            raise LdmPipeError("the text encoder returns no tokens")
        batch = {"tokens": found.tokens.to("cpu", dtype)}
        if found.token_mask is not None:
            batch["token_mask"] = found.token_mask.to("cpu")
        if found.pooled is not None:
            batch["pooled"] = found.pooled.to("cpu", dtype)
        for name, tensor in batch.items():
            if tensor.is_floating_point():
                _check_finite(tensor, lambda row, part=part: f"text {part[row]!r}", f"{name} of the embeddings")
        yield batch
        if progress is not None:
            progress(start + len(part), len(texts))


def caption_variants(
    captions: Sequence[str | Sequence[str]],
    keywords: Sequence[Sequence[str]],
    num_variants: int,
    seed: int,
    mix: Callable[[str, Sequence[str], random.Random], str],
    styles: Sequence[str] | None = None,
) -> list[list[str]]:
    """Draw K caption variants per picture: first its captions as they are, then mixes; keyed by (seed, row, variant).

    Args:
        captions: one caption per picture, or several.
        keywords: one keyword list per picture.
        num_variants: K, at least as many as a picture has captions.
        seed: seed of the draw.
        mix: `ldm_pipe.data.captions.mix_caption` or the like.
        styles: words appended to every variant of a picture (", noto style"), or None.
    """
    if num_variants < 1:
        raise LdmPipeError(f"{num_variants} caption variants: must be at least 1")
    drawn = []
    for row, (given, words) in enumerate(zip(captions, keywords, strict=True)):
        plain = [given] if isinstance(given, str) else list(given)
        if len(plain) > num_variants:
            what = f"picture {row} has {len(plain)} captions, but {num_variants} variants are drawn"
            raise LdmPipeError(what, "captions", f"Raise num_caption_variants to at least {len(plain)}.")
        mixed = [
            mix(plain[k % len(plain)], words, random.Random(hashlib.blake2b(f"{seed}/{row}/{k}".encode()).digest()))
            for k in range(len(plain), num_variants)
        ]
        drawn.append([text + (styles[row] if styles else "") for text in (*plain, *mixed)])
    return drawn
