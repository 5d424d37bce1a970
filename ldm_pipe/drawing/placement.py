"""Where the networks of a pipeline run: device, dtype, offloading, and how much memory the decoder takes.

What enters: the networks. What leaves: the same, moved. This file knows neither prompts nor samplers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

from autoencoder import Autoencoder
from conditioning import AnyTextEncoder
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.networks import UNet
from ldm_pipe.pretrained import LdmPipeError

PlacementT = TypeVar("PlacementT", bound="Placement")


class Placement:
    """The networks of a pipeline, and where they are."""

    unet: UNet
    autoencoder: Autoencoder
    text_encoders: tuple[AnyTextEncoder, ...]
    defaults: Defaults
    _progress: dict[str, Any]
    _offload: torch.device | None
    _offload_lock: threading.Lock

    @property
    def components(self) -> dict[str, nn.Module]:
        """Return the networks by name."""
        encoders = {f"text_encoder_{i + 1}" if i else "text_encoder": e for i, e in enumerate(self.text_encoders)}
        return {"unet": self.unet, "autoencoder": self.autoencoder, **encoders}

    @property
    def device(self) -> torch.device:
        """Return the device pictures are drawn on."""
        return self._offload or self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the U-Net's weights."""
        return self.unet.dtype

    @property
    def factor(self) -> int:
        """Return how many pixels one latent spans along a side."""
        return self.autoencoder.factor

    @property
    def default_size(self) -> tuple[int, int]:
        """Return the height and width drawn when none are asked for."""
        sample = self.unet.config.get("sample_size") or 64
        rows, columns = (sample, sample) if isinstance(sample, int) else sample
        return self.defaults.height or rows * self.factor, self.defaults.width or columns * self.factor

    def to(self: PlacementT, *args: Any, **kwargs: Any) -> PlacementT:
        """Move all networks to a device or dtype, as `torch.nn.Module.to` does."""
        kwargs = {("dtype" if name == "torch_dtype" else name): value for name, value in kwargs.items()}
        for module in self.components.values():
            layout = {"memory_format": torch.channels_last} if module is self.unet else {}  # faster convolutions
            try:
                module.to(*args, **{**layout, **kwargs})
            except (RuntimeError, AssertionError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise LdmPipeError(
                    f"cannot move to {args or kwargs}: {reason}", how_to_fix="Use a device of this machine."
                ) from error
        self._offload = None
        return self

    def enable_model_cpu_offload(self, gpu_id: int = 0, device: torch.device | str = "cuda") -> None:
        """Keep each network on the CPU and bring it to the device for its stage only; calls then wait for another."""
        target = torch.device(device)
        if target.type == "cpu":
            raise LdmPipeError("offload to the CPU from the CPU", how_to_fix="Name a GPU, or leave it.")
        if importlib.util.find_spec("accelerate") is None:
            raise LdmPipeError("accelerate is not installed", "offload", "pip install 'ldm-pipe[train]'")
        self.to("cpu")
        self._offload = torch.device(target.type, gpu_id) if target.index is None else target

    def enable_vae_slicing(self) -> None:
        """Decode the pictures of a batch one by one, to save memory."""
        self.autoencoder.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode whole batches again."""
        self.autoencoder.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in blended tiles, to bound memory."""
        self.autoencoder.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode whole pictures again."""
        self.autoencoder.disable_tiling()

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Do nothing but say so: the attention kernel used here never holds the whole matrix."""
        warnings.warn(
            f"attention slicing ({slice_size}) has no effect: attention is memory-efficient here", stacklevel=2
        )

    def set_progress_bar_config(self, **config: Any) -> None:
        """Set tqdm's arguments, such as disable=True."""
        self._progress = config

    def one_at_a_time(self) -> AbstractContextManager[Any]:
        """Return what a call holds while it draws: with offloading on, calls wait for each other."""
        return self._offload_lock if self._offload else contextlib.nullcontext()

    @contextlib.contextmanager
    def on_device(self, module: nn.Module) -> Iterator[None]:
        """Bring a network to the device for the time of its stage, where offloading is on (by accelerate's hook)."""
        if self._offload is None or next(module.parameters(), None) is None:  # or there is nothing to bring
            yield
            return
        from accelerate.hooks import CpuOffload

        hook = CpuOffload(self._offload)
        hook.pre_forward(module)
        try:
            yield
        finally:
            hook.init_hook(module)

    def progress_bar(self, total: int) -> Any:
        """Return a tqdm bar with the settings of `set_progress_bar_config`."""
        from tqdm import tqdm

        return tqdm(**{"total": total, **self._progress})


def read_dtype(value: torch.dtype | str | None) -> torch.dtype:
    """Read a dtype or its name; None is float32."""
    found = torch.float32 if value is None else getattr(torch, value, None) if isinstance(value, str) else value
    known = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if found not in known:
        raise LdmPipeError(f"dtype is {value!r}", how_to_fix=f"Use one of {', '.join(str(d) for d in known)}.")
    return found


def read_device(value: torch.device | str | int) -> torch.device:
    """Read a device or its name, and look whether this machine has it.

    Raises: LdmPipeError naming what this machine has.
    """
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        known = ["cpu", *(f"cuda:{i}" for i in range(count)), *(["mps"] if torch.backends.mps.is_available() else [])]
        reason = str(error).splitlines()[0][:120]
        advice = f"This machine has {', '.join(known)}."
        raise LdmPipeError(f"device is {value!r}: {reason}", how_to_fix=advice) from None
    return device
