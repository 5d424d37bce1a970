"""What the parity tests of text encoders share: prompts, a tokenizer, random weights, how close is close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from conditioning import ClipTokenizer
from conditioning.tokenizer import train_bpe

TOKENIZER = train_bpe(["red green apple", "grinning face", "red apple", "smiling eyes"] * 3, 620, max_length=24)
PROMPTS = ["A Red Apple, please", "", "smiling face with big eyes"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def draw(module: nn.Module, std: float = 0.3) -> Any:
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(module.named_parameters()):
        nn.init.normal_(parameter, std=std, generator=generator)
    return module.eval()


def tokenizer_folder(folder: Path, pad_token: str = "<|endoftext|>") -> Path:
    ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=24, pad_token=pad_token).save_pretrained(folder)
    return folder
