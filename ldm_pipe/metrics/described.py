"""A set of pictures, described: vectors, logits, moments; computed in shards by any number of processes, and kept.

Pictures and a feature network enter; a `Described` leaves. Shards that are there already are not computed again, so
that an evaluation that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.metrics.features import FeatureNet
from ldm_pipe.metrics.moments import Moments
from ldm_pipe.metrics.pictures import Pictures, npz_names, open_npz, open_pictures
from ldm_pipe.pretrained import LdmPipeError, atomic_write, load_tensors, read_metadata, save_tensors

SHARD = 200  # pictures
FORMAT = "ldm_pipe statistics 1"


@dataclass(frozen=True)
class Processes:
    """This process among those that `accelerate launch` started."""

    rank: int = 0
    num: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Read the launcher's numbers."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def wait(self) -> None:
        """Wait until all have come here; a process that ends is the launcher's to tell."""
        if self.num > 1:
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2)).wait_for_everyone()


def in_shards(
    folder: Path, num: int, make: Callable[[range], dict[str, Tensor]], processes: Processes, size: int = SHARD
) -> dict[str, Tensor]:
    """Compute rows in shards, each process its own, and return all of them in order, mapped from their files.

    Args:
        folder: of these rows and no others.
        make: rows to named tensors.
    """
    parts = [range(first, min(first + size, num)) for first in range(0, num, size)]
    paths = [folder / f"{part.start:07d}-{part.stop:07d}.safetensors" for part in parts]
    for part, path in list(zip(parts, paths, strict=True))[processes.rank :: processes.num]:
        if not path.is_file():
            save_tensors(path, {name: x.contiguous() for name, x in make(part).items()})
    processes.wait()
    found = [load_tensors(path, mapped=True) for path in paths]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


@dataclass(frozen=True)
class Described:
    """What is known of a set of pictures in some features.

    Attributes:
        name: of the set.
        features: identity of the features.
        vectors: (N, D), None where a file holds statistics only.
        logits, spatial: (N, K) and (N, S), for features that have them.
        given: moments of vectors and of spatial features read from a file, in place of those computed.
    """

    name: str
    features: str
    vectors: Tensor | None = None
    logits: Tensor | None = None
    spatial: Tensor | None = None
    given: tuple[Moments, Moments | None] | None = None

    @cached_property
    def moments(self) -> Moments:
        """Return the moments of the vectors."""
        if self.given is not None:
            return self.given[0]
        if self.vectors is None:
            raise LdmPipeError("there are neither features nor statistics", self.name)
        return Moments.of(self.vectors.split(SHARD))

    @cached_property
    def spatial_moments(self) -> Moments | None:
        """Return the moments of the spatial features, if there are any."""
        if self.given is not None:
            return self.given[1]
        return None if self.spatial is None else Moments.of(self.spatial.split(SHARD))


def describe(
    pictures: Pictures,
    net: FeatureNet,
    folder: str | Path,
    *,
    batch_size: int = 50,
    processes: Processes | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Described:
    """Compute the features of a set, or take those that the folder keeps.

    Raises: LdmPipeError for NaN.
    """

    def make(rows: range) -> dict[str, Tensor]:
        found = []
        for first in range(rows.start, rows.stop, batch_size):
            part = range(first, min(first + batch_size, rows.stop))
            found.append(net(pictures.read(part)))
            progress(len(part))
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    key = hashlib.sha256(f"{pictures.key}\0{net.identity}\0{len(pictures)}".encode()).hexdigest()[:24]
    found = in_shards(Path(folder) / key, len(pictures), make, processes or Processes())
    return Described(pictures.name, net.identity, found["vectors"], found.get("logits"), found.get("spatial"))


# -- statistics in files -----------------------------------------------------------------------------------------------


def save_statistics(path: str | Path, found: Described, *, vectors: bool = True) -> None:
    """Write what is known of a set: safetensors with features and moments, or guided-diffusion's .npz of moments.

    Args:
        vectors: False leaves the features out: then only Frechet distances can be measured against it.
    Raises: LdmPipeError for .npz without spatial features: its readers want all four arrays.
    """
    path, spatial = Path(path), found.spatial_moments
    if path.suffix == ".npz":
        if spatial is None:
            what = f"{found.features} have no spatial features"
            raise LdmPipeError(what, str(path), "Write .safetensors, or use Inception's.")
        arrays = {"mu": found.moments.mean, "sigma": found.moments.covariance}
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
        buffer = io.BytesIO()
        np.savez(buffer, **{name: x.cpu().numpy() for name, x in arrays.items()})
        atomic_write(path, buffer.getvalue())
        return
    if path.suffix != ".safetensors":
        raise LdmPipeError(f"statistics in a {path.suffix or 'file without suffix'}", str(path), "Use .safetensors.")
    tensors = {"mean": found.moments.mean, "covariance": found.moments.covariance}
    if spatial is not None:
        tensors |= {"spatial_mean": spatial.mean, "spatial_covariance": spatial.covariance}
    kept = {"vectors": found.vectors, "logits": found.logits} if vectors else {}
    tensors |= {name: x for name, x in kept.items() if x is not None}
    words = {"format": FORMAT, "features": found.features, "name": found.name, "num": str(found.moments.num or "")}
    save_tensors(path, {name: x.contiguous() for name, x in tensors.items()}, words)


def load_statistics(path: str | Path, net: FeatureNet) -> Described:
    """Read statistics of a set.

    Raises: LdmPipeError if they are of other features, damaged, or none.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _from_npz(path, net)
    words = read_metadata(path)
    if words.get("format") != FORMAT:
        raise LdmPipeError("holds no statistics of this package", str(path), "Write them with --save_statistics.")
    if words.get("features") != net.identity:
        what = f"the reference is of the features {words.get('features')!r}, not {net.identity!r}"
        raise LdmPipeError(what, str(path), "Compute it anew with these features.")
    tensors = load_tensors(path, finite=True)
    num = int(words["num"]) if words.get("num", "").isdecimal() else None
    spatial = (
        Moments(tensors["spatial_mean"], tensors["spatial_covariance"], num) if "spatial_mean" in tensors else None
    )
    given = (Moments(tensors["mean"], tensors["covariance"], num), spatial)
    name = words.get("name", path.name)
    return Described(name, net.identity, tensors.get("vectors"), tensors.get("logits"), given=given)


def _from_npz(path: Path, net: FeatureNet) -> Described:
    """Read mu and sigma (guided-diffusion's, pytorch-fid's): they do not say whose features they are."""
    if not net.is_inception:
        what = f"mu and sigma in an .npz are of Inception's features, not of {net.name}"
        raise LdmPipeError(what, str(path), "Use --features inception:FOLDER, or give pictures.")
    known = {"mu", "sigma", "mu_s", "sigma_s"} & set(npz_names(path))
    read = {name: torch.from_numpy(np.array(open_npz(path, name))).double() for name in known}
    missing = {"mu", "sigma"} - read.keys()
    if missing:
        raise LdmPipeError(f"there is no {' and no '.join(sorted(missing))}", str(path), "Give mu and sigma.")
    first = Moments(read["mu"].flatten(), read["sigma"])
    if first.dim != 2048:
        raise LdmPipeError(f"features of width {first.dim}, Inception's pool_3 has 2048", str(path), "Compute it anew.")
    spatial = Moments(read["mu_s"].flatten(), read["sigma_s"]) if {"mu_s", "sigma_s"} <= read.keys() else None
    return Described(path.name, net.identity, given=(first, spatial))


def open_reference(
    source: str | Path | Pictures, net: FeatureNet, folder: str | Path, *, side: int | None = None,
    batch_size: int = 50, processes: Processes | None = None,
) -> Described:  # fmt: skip
    """Describe a reference: statistics where the file holds some, and pictures where it holds some.

    guided-diffusion's reference batches hold both: moments of the whole set, and 10,000 pictures for precision and
    recall.
    """
    call = {"batch_size": batch_size, "processes": processes}
    if isinstance(source, Pictures):
        return describe(source, net, folder, **call)  # pyright: ignore[reportArgumentType]
    path = Path(source)
    if path.suffix == ".safetensors":
        return load_statistics(path, net)
    if path.suffix == ".npz" and "mu" in npz_names(path):
        known = _from_npz(path, net)
        if "arr_0" not in npz_names(path):
            return known
        found = describe(open_pictures(path), net, folder, **call)  # pyright: ignore[reportArgumentType]
        return Described(path.name, net.identity, found.vectors, found.logits, found.spatial, known.given)
    return describe(open_pictures(path, side=side), net, folder, **call)  # pyright: ignore[reportArgumentType]
