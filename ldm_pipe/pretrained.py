"""Strict loading and atomic saving of one component folder (config.json + safetensors).

What enters: a folder (or a hub id) and a module class. What leaves: a module with exactly the weights of the folder,
or one clear error. This file imports nothing else of ours, so every package may use it; it knows no network.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MAX_JSON_BYTES = 64 * 1024 * 1024  # a CLIP vocabulary is 1 MB; more than this is not a config
MAX_JSON_DEPTH = 32

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

ModuleT = TypeVar("ModuleT", bound="PretrainedModule")


class LdmPipeError(ValueError):
    """Report what came, where, and what to do: the one error of this package for what a user can get wrong."""

    def __init__(self, what: str, where: str = "", how_to_fix: str = "") -> None:
        """Keep the three parts, so that the command line can print them on three lines."""
        self.what, self.where, self.how_to_fix = what, where, how_to_fix
        super().__init__(what, where, how_to_fix)

    def __str__(self) -> str:
        """Join the parts to one line."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.how_to_fix}" if self.how_to_fix else text


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


def _json_depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            return depth
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children.extend(item.values())
            elif isinstance(item, list):
                children.extend(item)
        level = children
    return depth


def read_json(path: str | Path) -> Any:
    """Read a JSON file of sane size and depth.

    Raises: LdmPipeError if it is missing, too large, too deep or not JSON.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise LdmPipeError(f"the file is larger than {MAX_JSON_BYTES} bytes", str(path), "This is not a config.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LdmPipeError("the file does not exist", str(path)) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise LdmPipeError(f"cannot be read as JSON ({error})", str(path), "Fetch or export the folder anew.") from None
    if _json_depth(value) > MAX_JSON_DEPTH:
        raise LdmPipeError(f"nested deeper than {MAX_JSON_DEPTH} levels", str(path), "This is not a config.")
    return value


def _umask_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that it is there whole or not at all: temporary name, flush to disk, rename.

    The file gets the mode the umask asks for (safetensors' own writer leaves 0600).
    Raises: LdmPipeError naming the path if it cannot be written.
    """
    path = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _umask_mode())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        need = f"{len(payload)} bytes are needed"
        raise LdmPipeError(f"cannot be written ({error.strerror or error}; {need})", str(path)) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to disk, where the system can (a rename is only durable after this)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically. Shared memory is written out once per name."""
    whole = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    atomic_write(path, safetensors_bytes(whole, {"format": "pt", **(metadata or {})}))


def _read_tensor(stream: BinaryIO, start: int, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"a tensor of type {entry['dtype']}")
    tensor = torch.empty(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]])
    stream.seek(start + entry["data_offsets"][0])
    if stream.readinto(tensor.view(-1).view(torch.uint8).numpy()) != tensor.nbytes:  # type: ignore[attr-defined]
        raise ValueError("the file ends too early")
    return tensor


def load_tensors(path: str | Path, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file tensor by tensor, as pages of a mapped file stay beside what is made of them.

    Raises: LdmPipeError naming the file if it is missing, truncated or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise LdmPipeError("the file does not exist", str(path))
    try:
        with safe_open(str(path), framework="pt"), path.open("rb") as stream:  # the former checks the header
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start - 8))
            header.pop("__metadata__", None)
            return {name: _read_tensor(stream, start, entry).to(device) for name, entry in header.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LdmPipeError(f"not a whole safetensors file ({error})", str(path), "Fetch or export it anew.") from None


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


def _first_ten(lines: Iterable[str]) -> str:
    lines = list(lines)
    more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
    return "; ".join(lines[:10]) + more


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare names, shapes and values of a checkpoint with a module; every difference is one error.

    Raises: LdmPipeError naming the first ten missing, unexpected or misshapen tensors, or those with NaN or infinity.
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
        raise LdmPipeError(f"{len(problems)} tensors do not fit: {_first_ten(problems)}", where, advice)
    bad = [
        name for name, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value.sum()))
    ]
    bad = [
        name for name in bad if not bool(torch.isfinite(tensors[name]).all())
    ]  # a finite half tensor's sum may overflow
    if bad:
        raise LdmPipeError(f"NaN or infinity in {_first_ten(bad)}", where, "Use an earlier checkpoint.")


class _NoNormalDraws(TorchFunctionMode):
    """Skip `normal_` while a network is built on the meta device.

    Nothing is drawn there, yet torch would import sympy and its compiler for it: 1.4 s before the first picture.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything else on."""
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


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
    ) -> ModuleT:
        """Load a component folder strictly, in evaluation mode.

        Args:
            folder: local folder or hub id.
            subfolder: component folder inside it, such as "unet".
            dtype: of the weights in memory; None is float32.
            variant: "fp16" reads `<weights_name>.fp16.safetensors`.
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
        with torch.device("meta"), _NoNormalDraws():
            module = cls.from_config(config)
        tensors = cls.rename_keys(load_folder_tensors(root, cls.weights_name, variant, device=device))
        check_tensors(module, tensors, str(root))
        dtype = dtype or torch.float32
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(dtype)
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


def safe_child(folder: Path, name: str, where: str) -> Path:
    """Join a name read from a file to its folder; a name that leads out of the folder is refused."""
    if not name or name.startswith(("/", "\\", "~")) or ".." in Path(name).parts or ":" in name or "\0" in name:
        raise LdmPipeError(f"the file name {name!r} leads out of its folder", where, "Do not trust this model.")
    return folder / name


def load_folder_tensors(
    folder: Path, weights_name: str, variant: str | None = None, *, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Read the weights of one component: one safetensors file, or shards with their index.

    Raises: LdmPipeError; pickle files are named but not read.
    """
    suffix = f".{variant}" if variant else ""
    single = folder / f"{weights_name}{suffix}.safetensors"
    if single.is_file():
        return load_tensors(single, device=device)
    index = folder / f"{weights_name}.safetensors.index{suffix}.json"
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
        tensors: dict[str, Tensor] = {}
        for name in files:
            tensors.update(load_tensors(safe_child(folder, str(name), str(index)), device=device))
        return tensors
    present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    what = f"no {single.name} there, only {present}" if present else "the folder is missing or empty"
    raise LdmPipeError(what, str(folder), "Give a folder with safetensors weights, or another `variant`.")
