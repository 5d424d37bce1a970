"""Learnt words that stood only in tokenizer.json were cut into letters; tables with unnamed rows were refused.

Every place where a word can stand gives the ids that transformers gives.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conditioning import CLIPTextEncoder, ClipTokenizer
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.interop.lora.words import forget_words
from ldm_pipe.pretrained import LdmPipeError, read_json, save_tensors
from tests.single_files import make_folder
from tests.text_encoders import TOKENIZER, clip_fields, draw, tokenizer_folder

TEXTS = ["a <cat> pie", "<CAT> x", "my<cat>s", "Sks dog", "sks", "a < cat >", "<dog><cat>", "mysks <dog>", "red apple"]
FIRST = len(TOKENIZER)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(read_json(path) if path.is_file() else {}), **values}))


def token(name: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False, "special": False}
    return {"content": name, **plain, **flags}


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "tokenizer_config.json", **values)


def special_map(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "special_tokens_map.json", **values)


def added(**words: int) -> Callable[[Path], None]:
    return lambda folder: change(folder / "added_tokens.json", **words)


def both(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [step(folder) for step in steps] and None


def by_transformers_5(*words: Any, keep: bool = False) -> Callable[[Path], None]:
    """Let transformers add words and write the folder: it leaves no file but tokenizer.json that names them."""

    def write(folder: Path) -> None:
        transformers = pytest.importorskip("transformers", minversion="5")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([w if isinstance(w, str) else transformers.AddedToken(**w) for w in words])
        for file in () if keep else folder.iterdir():
            file.unlink()
        tokenizer.save_pretrained(folder)

    return write


CAT, DOG = {"<cat>": FIRST}, {"<dog>": FIRST + 1}
DECODER = {str(FIRST): token("<cat>"), str(FIRST + 1): token("<dog>", normalized=False)}
PLACES: dict[str, Callable[[Path], None]] = {
    "nowhere": lambda folder: None,
    "tokenizer.json alone": by_transformers_5("<cat>", "Sks"),
    "tokenizer.json, exact letters": by_transformers_5({"content": "Sks", "normalized": False}, "<cat>"),
    "tokenizer.json, whole words": by_transformers_5({"content": "sks", "single_word": True}, "<cat>"),
    "tokenizer.json, special": by_transformers_5({"content": "<cat>", "special": True, "normalized": False}),
    "tokenizer.json beside vocab.json": by_transformers_5("<cat>", "<dog>", keep=True),
    "added_tokens.json": added(**CAT, **DOG),
    "added_tokens.json, another order": added(**DOG, **CAT),
    "added_tokens.json, capital letter": added(Sks=FIRST),
    "added_tokens_decoder": config(added_tokens_decoder=DECODER),
    "added_tokens_decoder, with spaces": config(added_tokens_decoder={str(FIRST): token("<cat>", lstrip=True)}),
    "additional_special_tokens": config(additional_special_tokens=["<cat>", "<dog>"]),
    "extra_special_tokens, named": config(extra_special_tokens={"cat_token": "<cat>"}),
    "extra_special_tokens, listed": config(extra_special_tokens=["<cat>"]),
    "special_tokens_map.json": special_map(additional_special_tokens=["<cat>"]),
    "two places": both(added(**CAT), config(additional_special_tokens=["<cat>"])),
}


def ours(tokenizer: ClipTokenizer) -> list[list[int]]:
    batch = tokenizer(TEXTS)
    return [row[mask].tolist() for row, mask in zip(batch.ids, batch.mask, strict=True)]


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("again", [False, True], ids=["read", "saved and read"])
def test_a_word_is_read_wherever_transformers_reads_it(
    tmp_path: Path, place: Callable[[Path], None], again: bool
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    folder = tokenizer_folder(tmp_path / "tokenizer")
    place(folder)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer = ClipTokenizer.from_pretrained(folder)
    if again:
        tokenizer.save_pretrained(tmp_path / "again")
        tokenizer = ClipTokenizer.from_pretrained(tmp_path / "again")
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "again")
    assert ours(tokenizer) == [theirs(text).input_ids for text in TEXTS]
    assert len(tokenizer) == len(theirs)


def test_a_word_in_the_vocabulary_that_no_merge_makes_is_told(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    change(folder / "vocab.json", **CAT)
    with pytest.warns(UserWarning, match=r"no merge makes \['<cat>'\]"):
        ClipTokenizer.from_pretrained(folder)
    change(folder / "added_tokens.json", **CAT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FIRST in ours(ClipTokenizer.from_pretrained(folder))[0]


def test_words_whose_names_begin_alike_are_all_read(tmp_path: Path) -> None:
    """A name such as `<cat>_blue` is a word of its own; `<cat>_1` is the second vector of `<cat>`."""
    folder = tokenizer_folder(tmp_path)
    names = ["<cat>", "<cat>_1", "<cat>_blue", "<cat>_7", "my", "my_thing"]
    change(folder / "added_tokens.json", **{name: FIRST + i for i, name in enumerate(names)})
    tokenizer = ClipTokenizer.from_pretrained(folder)
    ids = {name: tokenizer([name]).ids[0, 1:].tolist() for name in names}
    assert ids["<cat>"][:3] == [FIRST, FIRST + 1, tokenizer.end_id]
    for name in ("<cat>_blue", "<cat>_7", "my", "my_thing"):
        assert ids[name][:2] == [FIRST + names.index(name), tokenizer.end_id], name


CLASHES: dict[str, Callable[[Path], None]] = {
    "two rows": both(added(**CAT), config(added_tokens_decoder={str(FIRST + 1): token("<cat>")})),
    "two words in a row": added(**{"<cat>": FIRST, "<dog>": FIRST}),
    "the row of a letter": added(**{"<cat>": 5}),
    "no number": lambda folder: change(folder / "added_tokens.json", **{"<cat>": "7"}),
    "below zero": added(**{"<cat>": -1}),
    "a list": lambda folder: (folder / "added_tokens.json").write_text("[1]") and None,
    "no content": config(added_tokens_decoder={str(FIRST): {"special": True}}),
    "a config that is a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]") and None,
}


@pytest.mark.parametrize("place", CLASHES.values(), ids=CLASHES.keys())
def test_files_that_contradict_each_other_are_refused(tmp_path: Path, place: Callable[[Path], None]) -> None:
    folder = tokenizer_folder(tmp_path)
    place(folder)
    with pytest.raises(LdmPipeError) as caught:
        ClipTokenizer.from_pretrained(folder)
    assert caught.value.where
    assert caught.value.how_to_fix


def test_words_that_transformers_loses_or_stumbles_over_are_read(tmp_path: Path) -> None:
    """Beside an added_tokens_decoder it does not look at added_tokens.json; a described word in the map is a crash."""
    folder = tokenizer_folder(tmp_path)
    both(added(**CAT), config(added_tokens_decoder={str(FIRST + 1): token("<dog>")}))(folder)
    change(folder / "special_tokens_map.json", additional_special_tokens=[token("<eel>", normalized=False)])
    tokenizer = ClipTokenizer.from_pretrained(folder)
    assert tokenizer(["<cat> <dog><eel>"]).ids[0, 1:4].tolist() == [FIRST, FIRST + 1, FIRST + 2]


def test_a_padding_token_may_be_an_added_one(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    change(folder / "tokenizer_config.json", pad_token="<pad>", added_tokens_decoder={str(FIRST): token("<pad>")})
    assert ClipTokenizer.from_pretrained(folder)(["red"]).ids[0, -1] == FIRST


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_words_of_every_encoder_survive_a_folder_of_transformers_5(tmp_path: Path, family: str) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(make_folder(tmp_path / "model", family))
    for i, encoder in enumerate(pipe.text_encoders):
        torch.manual_seed(i)
        encoder.add_token("<cat>", torch.randn(1, encoder.config.hidden_size))
    wanted = [encoder.encode(["a <cat> b"]).tokens for encoder in pipe.text_encoders]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(tmp_path / "saved")
    for place in (tmp_path / "saved").glob("tokenizer*"):
        by_transformers_5()(place)
        assert not (place / "added_tokens.json").exists()
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path / "saved")
    for encoder, tokens in zip(loaded.text_encoders, wanted, strict=True):
        assert encoder.config.vocab_size in encoder.tokenizer(["a <cat> b"]).ids + 1
        torch.testing.assert_close(encoder.encode(["a <cat> b"]).tokens, tokens)


@pytest.mark.parametrize("more", [1, 3, 64])
def test_rows_that_no_file_names_are_kept(tmp_path: Path, more: int) -> None:
    """Some tools write a table longer than config and tokenizer say; and transformers pads tables."""
    encoder = draw(CLIPTextEncoder.from_config(clip_fields(hidden_act="gelu")))
    encoder.tokenizer = ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=24)
    encoder.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    tensors = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
    key = "text_model.embeddings.token_embedding.weight"
    tensors[key] = torch.cat([tensors[key], torch.randn(more, 48)])
    save_tensors(tmp_path / "text_encoder" / "model.safetensors", tensors)
    with pytest.warns(UserWarning, match=f"has {FIRST + more} rows, vocab_size is {FIRST}"):
        loaded = CLIPTextEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(["red apple"]).tokens, encoder.encode(["red apple"]).tokens)
    word = torch.randn(2, 48)
    loaded.add_token("<new>", word)
    assert loaded.tokenizer(["<new>"]).ids[0, 1:3].tolist() == [FIRST + more, FIRST + more + 1]
    forget_words(loaded, ["<new>"])
    assert torch.equal(loaded.text_model.embeddings.token_embedding.weight, tensors[key])
    loaded.save_pretrained(tmp_path / "again" / "text_encoder")
    assert torch.equal(CLIPTextEncoder.from_pretrained(tmp_path / "again").state_dict()[key], tensors[key])


def test_a_table_that_is_too_short_is_refused(tmp_path: Path) -> None:
    encoder = draw(CLIPTextEncoder.from_config(clip_fields(hidden_act="gelu")))
    tensors = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
    encoder.save_pretrained(tmp_path)
    key = "text_model.embeddings.token_embedding.weight"
    save_tensors(tmp_path / "model.safetensors", {**tensors, key: tensors[key][:-1].clone()})
    with pytest.raises(LdmPipeError, match="misshapen"):
        CLIPTextEncoder.from_pretrained(tmp_path)


def test_unloading_words_leaves_those_of_the_model(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(make_folder(tmp_path / "model", "sd1"))
    (encoder,) = pipe.text_encoders
    encoder.add_token("<own>", torch.randn(2, 32))
    before = encoder.encode(["a <own> b"]).tokens
    save_tensors(tmp_path / "x.safetensors", {"<x>": torch.randn(1, 32)})
    pipe.load_textual_inversion(tmp_path / "x.safetensors")
    pipe.unload_textual_inversion()
    assert "<x>" not in encoder.tokenizer.vocab
    assert torch.equal(encoder.encode(["a <own> b"]).tokens, before)
