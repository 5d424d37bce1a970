"""Strict loading and atomic saving of one component folder (config.json + safetensors).

What enters: a folder (or a hub id) and a module class. What leaves: a module with exactly the weights of the folder,
or one clear error. With files.py it is what every package may use; it knows no network.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm_pipe.pretrained.files import (
    LdmPipeError,
    atomic_write,
    first_ten,
    is_finite,
    read_json,
    refuse_nonfinite,
    save_tensors,
)
from ldm_pipe.pretrained.weights import load_folder_tensors

ModuleT = TypeVar("ModuleT", bound="PretrainedModule")


class FrozenConfig(dict[str, Any]):
    """A read-only dict whose keys are attributes too: `unet.config.in_channels`."""

    def __getattr__(self, name: str) -> Any:
        """Look up a field."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config has no field {name!r}; it has {sorted(self)}") from None

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise TypeError("a config is read-only: build a new one with FrozenConfig({**config, ...})")

    __setattr__ = __setitem__ = __delitem__ = __delattr__ = _refuse  # type: ignore[assignment]
    update = pop = popitem = clear = setdefault = __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        """Copy and pickle through a plain dict (item assignment is refused)."""
        return FrozenConfig, (dict(self),)


def resolve_folder(
    name_or_path: str | Path,
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    allow_patterns: list[str] | None = None,
) -> Path:
    """Find a model folder: a local folder first, else a snapshot from the Hugging Face hub.

    Raises: LdmPipeError saying where it was looked for, and whether the hub could be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    where = f"model {str(name_or_path)!r}"
    looked = f"no folder {path.absolute()}"
    name = str(name_or_path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise LdmPipeError(
            f"{looked}, and this is not a hub id", where, "Give a folder, or a hub id such as 'owner/name'."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    advice = "Give a folder or a hub id; offline, download it beforehand."
    try:
        found = snapshot_download(
            name, revision=revision, local_files_only=local_files_only, allow_patterns=allow_patterns
        )
    except (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError) as error:
        raise LdmPipeError(f"{looked}, and the hub has none to give ({type(error).__name__})", where, advice) from None
    except Exception as error:  # noqa: BLE001  (the hub client's network errors share no base class)
        asked = "only its local cache was allowed" if local_files_only else f"not reachable: {type(error).__name__}"
        raise LdmPipeError(f"{looked}, and not from the Hugging Face hub ({asked})", where, advice) from None
    return Path(found)


def without_wrapper(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Take off the prefix that data parallel training or compilation put before every name, and say so."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            warnings.warn(f"{where}: every name begins with {prefix!r}; it is left out", stacklevel=2)
            return without_wrapper({name.removeprefix(prefix): x for name, x in tensors.items()}, where)
    return tensors


def check_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], *, where: str, required: bool = True) -> None:
    """Refuse sizes of a config that are no whole numbers from 1 to the given ones, before anything is built.

    Raises: LdmPipeError naming field, value and range.
    """
    for name, largest in sizes.items():
        value = config.get(name)
        if (value is None and not required) or (type(value) is int and 1 <= value <= largest):
            continue
        raise LdmPipeError(f"{name} is {value!r:.80}, expected a whole number from 1 to {largest}", where)


def check_shapes(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of a checkpoint with a module; every difference is one error.

    Raises: LdmPipeError naming the first ten missing, unexpected or misshapen tensors.
    """
    wanted = module.state_dict()
    problems = [f"missing {name} {list(wanted[name].shape)}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name} {list(tensors[name].shape)}" for name in tensors if name not in wanted]
    problems += [
        f"misshapen {name} {list(tensors[name].shape)}, expected {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if problems:
        advice = "The weights belong to another config or another model."
        raise LdmPipeError(f"{len(problems)} tensors do not fit: {first_ten(problems)}", where, advice)


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare names, shapes and values of a checkpoint with a module; every difference is one error.

    Raises: LdmPipeError naming the first ten missing, unexpected or misshapen tensors, or those with NaN or infinity.
    """
    check_shapes(module, tensors, where)
    refuse_nonfinite([name for name, value in tensors.items() if not is_finite(value)], where)


class _NoDraws(TorchFunctionMode):
    """Skip the initialisation of weights while a network is built on the meta device.

    Nothing is drawn there, yet torch takes as long for it as for all the rest, and for `normal_` would import sympy and
    its compiler: 1.4 s before the first picture.
    """

    SKIPPED = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything else on."""
        kwargs = kwargs or {}
        if func in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _on_meta(cls: type[ModuleT], config: Mapping[str, Any], where: str) -> ModuleT:
    """Build a network without memory for its weights; what a senseless config makes torch raise is one clear error."""
    try:
        with torch.device("meta"), _NoDraws():
            return cls.from_config(config)
    except LdmPipeError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        fix = "Fetch or export the folder anew."
        raise LdmPipeError(f"cannot be built from its config: {reason}", where, fix) from error


class PretrainedModule(nn.Module):
    """A network that lives in a component folder: `config.json` beside `<weights_name>.safetensors`.

    Subclasses set `self.config` and implement `from_config`.
    """

    weights_name: ClassVar[str] = "diffusion_pytorch_model"
    class_name: ClassVar[str | None] = None
    other_class_names: ClassVar[tuple[str, ...]] = ()  # that `from_config` also builds
    config: FrozenConfig

    @classmethod
    def from_config(cls: type[ModuleT], config: Mapping[str, Any]) -> ModuleT:
        """Build the network from a config with random weights; unknown keys are kept in `.config`."""
        raise TypeError(f"{cls.__name__} cannot be built from a config")

    @classmethod
    def rename_keys(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map older key layouts to the present one. Default: as they are."""
        return tensors

    def fit_tables(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Grow tables that may have more rows than the config says. Default: there are none."""

    @classmethod
    def from_pretrained(
        cls: type[ModuleT],
        folder: str | Path,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> ModuleT:
        """Load a component folder strictly, in evaluation mode.

        Args:
            folder: local folder or hub id.
            subfolder: component folder inside it, such as "unet".
            dtype: of the weights in memory; None is float32.
            variant: "fp16" reads `<weights_name>.fp16.safetensors`.
            memory_format: of weights with four axes.
        Raises: LdmPipeError naming what is missing, unexpected, misshapen or not finite.
        """
        patterns = [f"{subfolder}/*"] if subfolder else None
        root = resolve_folder(folder, local_files_only=local_files_only, revision=revision, allow_patterns=patterns)
        root = root / subfolder if subfolder else root
        config = read_json(root / "config.json")
        if not isinstance(config, dict):
            raise LdmPipeError("a config must be a JSON object", str(root / "config.json"))
        written = config.get("_class_name")
        if cls.class_name and written and written not in (cls.class_name, *cls.other_class_names):
            what = f"the folder holds a {written}, not a {cls.class_name}"
            raise LdmPipeError(what, str(root), "Give the folder of the right component.")
        module = _on_meta(cls, config, str(root))
        dtype = dtype or torch.float32
        target: dict[str, Any] = {"device": device, "dtype": dtype, "memory_format": memory_format}
        target |= {"finite": True, "mapped": True}
        tensors = load_folder_tensors(root, cls.weights_name, variant, **target)
        tensors = cls.rename_keys(without_wrapper(tensors, str(root)))
        module.fit_tables(tensors, str(root))
        check_shapes(module, tensors, str(root))
        module.load_state_dict(tensors, assign=True, strict=True)
        stranded = [name for name, buffer in module.named_buffers() if buffer.is_meta]
        if stranded:
            raise LdmPipeError(f"buffers without values after loading: {stranded}", cls.__name__)
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        return cast(ModuleT, module.eval())

    def save_pretrained(
        self, folder: str | Path, *, variant: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write `config.json` and the weights, each file atomically.

        Args:
            dtype: of the weights on disk; None keeps what is in memory.
        """
        folder = Path(folder)
        tensors = {
            name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            for name, tensor in self.state_dict().items()
        }
        suffix = f".{variant}" if variant else ""
        save_tensors(folder / f"{self.weights_name}{suffix}.safetensors", tensors)
        head = {"_class_name": self.class_name} if self.class_name else {}
        atomic_write(folder / "config.json", json.dumps({**head, **self.config}, indent=2, sort_keys=True) + "\n")

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device
