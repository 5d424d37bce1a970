"""Laws of the tokenizer: nothing is unknown, padding, truncation, save and load."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conditioning import ClipTokenizer
from conditioning.tokenizer import byte_symbols, train_bpe
from ldm_pipe.pretrained import LdmPipeError

CAPTIONS = ["red apple", "green apple", "grinning face with big eyes", "smiling face", "apple pie, red, food"] * 3
TOKENIZER = train_bpe(CAPTIONS, 560, max_length=16)


def test_layout_is_bytes_then_merges_then_start_and_end() -> None:
    vocab = TOKENIZER.vocab
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert {vocab[char] for char in byte_symbols()} == set(range(256))
    assert {vocab[char + "</w>"] for char in byte_symbols()} == set(range(256, 512))
    assert vocab["<|startoftext|>"] == len(vocab) - 2
    assert vocab["<|endoftext|>"] == len(vocab) - 1  # the largest id, so both rules for the pooled position agree
    assert "apple</w>" in vocab
    assert len(TOKENIZER) <= 560


def test_no_text_is_unknown() -> None:
    rng = random.Random(0)
    planes = [range(0x20, 0x7F), range(0xA0, 0x800), range(0x800, 0xD800), range(0x1F300, 0x1FB00)]
    for _ in range(300):
        text = "".join(chr(rng.choice(rng.choice(planes))) for _ in range(rng.randint(1, 12)))
        ids = TOKENIZER([text], max_length=200).ids[0].tolist()
        assert ids[0] == TOKENIZER.start_id
        inside = ids[1 : ids.index(TOKENIZER.end_id)]
        assert (len(inside) > 0) == bool(text.strip()), repr(text)
        assert all(index < TOKENIZER.start_id for index in inside), repr(text)


def test_decode_undoes_encode_up_to_case_and_space() -> None:
    for text in ("red apple", "smörgåsbord 🍎 straße", "日本"):
        assert (
            TOKENIZER.decode(TOKENIZER([f"  {text.upper()}\t "], max_length=100).ids[0].tolist())
            == text.upper().lower()
        )


def test_empty_prompt_is_start_end_padding() -> None:
    batch = TOKENIZER([""])
    assert batch.ids[0].tolist() == [TOKENIZER.start_id] + [TOKENIZER.end_id] * 15
    assert batch.mask[0].tolist() == [True, True] + [False] * 14
    assert batch.truncated == [""]


def test_pad_token_of_stable_diffusion_2() -> None:
    tokenizer = ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=8, pad_token="!")
    ids = tokenizer(["red apple"]).ids[0].tolist()
    assert ids[-1] == TOKENIZER.vocab["!"]
    assert ids.count(tokenizer.end_id) == 1


def test_truncated_names_what_is_cut() -> None:
    batch = TOKENIZER(["red apple " * 7 + "Green Apple", "red apple"])
    assert batch.ids.shape == (2, 16)
    assert batch.ids[0, -1] == TOKENIZER.end_id
    assert batch.truncated == ["Green Apple", ""]
    assert torch.equal(batch.ids[1], TOKENIZER(["red apple"]).ids[0])


@pytest.mark.parametrize("prompts", ["red apple", [], [None], ["a", 3], [b"a"], ["\ud800"], 7])
def test_bad_prompts_are_refused(prompts: object) -> None:
    with pytest.raises(LdmPipeError, match="prompts"):
        TOKENIZER(prompts)  # type: ignore[arg-type]


def test_save_load_gives_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    again = ClipTokenizer.from_pretrained(tmp_path)
    assert (again.vocab, again.merges, again.max_length) == (TOKENIZER.vocab, TOKENIZER.merges, 16)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match=r"vocab\.json"):
        ClipTokenizer.from_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nzzz qqq\n")
    with pytest.raises(LdmPipeError, match="do not fit"):
        ClipTokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(LdmPipeError, match="two tokens"):
        ClipTokenizer.from_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(LdmPipeError, match="lacks"):
        ClipTokenizer.from_pretrained(tmp_path)


def test_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(LdmPipeError, match="514"):
        train_bpe(CAPTIONS, 300)


def test_training_twice_gives_the_same_merges_in_every_process() -> None:
    """The library's trainer breaks ties in the order of a hash map, another one in every process, if it is let."""
    code = (
        "from conditioning.tokenizer import train_bpe\n"
        "words = [a + b + c for a in 'bcdfgh' for b in 'aeiou' for c in 'klmnp']\n"
        "print(train_bpe(words, 700, min_frequency=1).merges)"
    )
    printed = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(printed) == 1
    assert printed != {"[]\n"}
