"""What a pipeline learns from small files: LoRAs merged into its weights, and new words, under diffusers' names.

What enters: files. What leaves: the same networks with other weights, and back to the bit. Reading and writing of files
is in interop/lora.py and interop/textual_inversion.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from conditioning import CLIPTextEncoder
from ldm_pipe.interop.lora.file import WEIGHT_NAME, networks_of, save_lora
from ldm_pipe.interop.lora.words import bundled_words, forget_words, load_word, teach_word
from ldm_pipe.interop.pickles.checkpoint import PICKLES
from ldm_pipe.pipelines.loras import Adapter, Loras, Weight
from ldm_pipe.pretrained import LdmPipeError, resolve_folder, safe_child

WORD_NAME = "learned_embeds.safetensors"  # diffusers' name of a word in a folder


class Adapters:
    """LoRAs and new words of a pipeline, by the names that diffusers' pipelines have for them."""

    text_encoders: tuple[Any, ...]
    _loras: Loras | None = None
    _words: dict[str, str] | None = None  # loaded, and their files
    _bundled: dict[str, list[str]] | None = None  # words that lay in the file of a LoRA

    @property
    def loras(self) -> Loras:
        """Return the LoRAs of the pipeline's networks."""
        if self._loras is None:
            self._loras = Loras(networks_of(self))
        return self._loras

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> None:
        """Load a LoRA, DoRA, LoHa or LoKr file of diffusers, PEFT, kohya or LyCORIS; it acts at once, with weight 1.

        Words that lie in the file (`bundle_emb`) are taught along, and forgotten with it. Unlike in diffusers, it is
        merged into the weights (those without it are kept), so that drawing costs nothing more; and a file with
        anything that would be left unread is refused.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder or hub id with one, or its tensors.
            adapter_name: to speak of it later; None: `default_0`, `default_1`, ...
            weight_name: of the file in the folder; None: diffusers' name, or the only one there.
        Raises: LdmPipeError naming what does not fit; then nothing has changed.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping):
            options = {"subfolder": subfolder, "local_files_only": local_files_only, "revision": revision}
            source = _find(source, weight_name, WEIGHT_NAME, **options)
        name = adapter_name or f"default_{len(self.loras.adapters)}"
        words = bundled_words(source)
        encoders = self._word_encoders() if words else []
        taught: list[str] = []
        try:
            for word, vectors in words.items():
                taught.append(teach_word(encoders, word, vectors, f"{source!s:.200}"))
            self.loras.add(source, name)
        except LdmPipeError:
            self._forget(taught)
            raise
        self._bundled = {**(self._bundled or {}), name: taught}

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] | None = None
    ) -> None:
        """Let exactly these LoRAs act, with one weight for all, one for each, or 1; a weight may differ by network."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = adapter_weights if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        if len(given) != len(names) or len(set(names)) != len(names):
            raise LdmPipeError(
                f"{len(given)} weights for {names}", "set_adapters", "Give each name once, with a weight."
            )
        self.loras.set({name: 1.0 if w is None else w for name, w in zip(names, given, strict=True)})

    def get_active_adapters(self) -> list[str]:
        """Return the names of the LoRAs that act, or would if they were not disabled."""
        return [name for name, adapter in self.loras.adapters.items() if adapter.active]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of the LoRAs of each network."""
        found: dict[str, list[str]] = {}
        for name, adapter in self.loras.adapters.items():
            for part in dict.fromkeys(part for part, _ in adapter.layers):
                found.setdefault(part, []).append(name)
        return found

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take LoRAs out and forget them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.loras.delete(names)
        self._forget_bundled(names)

    def disable_lora(self) -> None:
        """Give the networks back their own weights, to the bit; the LoRAs stay loaded."""
        self.loras.enable(False)

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self.loras.enable(True)

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Fix the active LoRAs at their weights times `lora_scale`; `unload_lora_weights` then leaves them in.

        Before and after, with a scale of 1, the weights are the same to the bit: the LoRAs are merged all the time.
        """
        self.loras.fuse(lora_scale, adapter_names)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: the LoRAs act with their own weights again."""
        self.loras.unfuse()

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs: the networks have their own weights again, to the bit, and those of fused LoRAs."""
        self.loras.unload()
        self._forget_bundled(list(self._bundled or {}))

    def _forget_bundled(self, names: Sequence[str]) -> None:
        """Forget the words that lay in the files of LoRAs."""
        bundled = self._bundled or {}
        self._forget([word for name in names for word in bundled.get(name, ())])
        self._bundled = {name: words for name, words in bundled.items() if name not in names}

    def _forget(self, words: Sequence[str]) -> None:
        for encoder in self._word_encoders() if words else ():
            forget_words(encoder, words)

    def save_lora_weights(
        self, save_directory: str | Path, adapter_name: str | None = None, *, weight_name: str = WEIGHT_NAME
    ) -> None:
        """Write one of the loaded LoRAs as diffusers and PEFT read it.

        Args:
            adapter_name: which; None: the only one.
        Raises: LdmPipeError if it is unknown, or a form that diffusers does not read.
        """
        loaded = self.loras.adapters
        if adapter_name is None and len(loaded) == 1:
            (adapter_name,) = loaded
        if adapter_name not in loaded:
            what = f"there is no LoRA {adapter_name!r}"
            raise LdmPipeError(what, "save_lora_weights", f"Name one of {sorted(loaded)}.")
        target = safe_child(Path(save_directory), weight_name, "weight_name")
        save_lora(target, loaded[adapter_name].layers)

    def adapter_settings(self) -> dict[str, str]:
        """Return what a picture's settings say of LoRAs that act and of words, as `ldm-pipe generate` takes them."""
        loras = self.loras.adapters.items() if self._loras is not None and self._loras.enabled else ()
        told = {
            "Lora": "; ".join(f"{name}:{_weight(adapter)}" for name, adapter in loras if adapter.active),
            "Textual inversion": "; ".join(f"{path}:{word}" for word, path in (self._words or {}).items()),
        }
        return {name: text for name, text in told.items() if text}

    # New words

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | Path | Sequence[str | Path],
        token: str | Sequence[str] | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> None:
        """Teach all text encoders words from files of diffusers or A1111, one word per file.

        Args:
            pretrained_model_name_or_path: a file, a folder or hub id with one, or a list of them.
            token: as written in prompts, one for each file; None takes the file's.
            weight_name: of the file in the folder; None: diffusers' name, or the only one there.
        Raises: LdmPipeError if a word is taken or of another family.
        """
        one = isinstance(pretrained_model_name_or_path, (str, Path))
        paths = [pretrained_model_name_or_path] if one else list(pretrained_model_name_or_path)  # type: ignore[arg-type]
        tokens = [token] * len(paths) if token is None or isinstance(token, str) else list(token)
        if len(tokens) != len(paths) or (isinstance(token, str) and len(paths) > 1):
            what = f"{len(paths)} files and {len(tokens) if not isinstance(token, str) else 1} tokens"
            raise LdmPipeError(what, "load_textual_inversion", "Give one token for each file, or none.")
        options = {"subfolder": subfolder, "local_files_only": local_files_only, "revision": revision}
        for path, name in zip(paths, tokens, strict=True):
            file = _find(path, weight_name, WORD_NAME, **options)  # type: ignore[arg-type]
            word = load_word(self._word_encoders(), file, name)
            self._words = {**(self._words or {}), word: str(path)}

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forget words that were loaded; None: all of those, not the model's own. The tables get back their bits."""
        names = [tokens] if isinstance(tokens, str) else list(self._words or {} if tokens is None else tokens)
        for encoder in self._word_encoders():
            forget_words(encoder, names)
        kept = (self._words or {}).items()
        self._words = {word: path for word, path in kept if word not in names}

    def _word_encoders(self) -> list[CLIPTextEncoder]:
        encoders = [encoder for encoder in self.text_encoders if isinstance(encoder, CLIPTextEncoder)]
        if len(encoders) != len(self.text_encoders) or not encoders:
            kinds = [type(encoder).__name__ for encoder in self.text_encoders]
            raise LdmPipeError(
                f"the text encoders are {kinds}", "textual inversion", "Only CLIP's learn words from files."
            )
        return encoders


def _weight(adapter: Adapter) -> str:
    """Write a weight as one number, or by network."""
    factor = 1.0 if adapter.fused is None else adapter.fused
    if isinstance(adapter.weight, Mapping):
        return "/".join(f"{part}={weight * factor:g}" for part, weight in adapter.weight.items())
    return f"{adapter.weight * factor:g}"


def _find(
    name: str | Path,
    weight_name: str | None,
    usual: str,
    *,
    subfolder: str | None,
    local_files_only: bool,
    revision: str | None,
) -> Path:
    """Find the file of an adapter: the path itself, or in a folder or hub snapshot the named, usual or only one.

    Raises: LdmPipeError saying what is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".safetensors", *PICKLES):
        raise LdmPipeError("no such file", str(path), "Give the path of an existing one, a folder, or a hub id.")
    folder = resolve_folder(name, local_files_only=local_files_only, revision=revision)
    folder = safe_child(folder, subfolder, "subfolder") if subfolder else folder
    if weight_name is not None:
        return safe_child(folder, weight_name, str(folder))
    if (folder / "adapter_config.json").is_file():  # PEFT's own
        return folder
    there = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    found = [path for path in there if path.suffix == ".safetensors"] or [p for p in there if p.suffix in PICKLES]
    chosen = [path for path in found if path.stem == Path(usual).stem] or found
    if len(chosen) != 1:
        there = [path.name for path in found or there][:10]
        raise LdmPipeError(f"the file is not named and there are {there}", str(folder), "Name one as weight_name.")
    return chosen[0]
