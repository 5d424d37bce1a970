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


def clip_fields(tokenizer: ClipTokenizer = TOKENIZER, **changes: Any) -> dict[str, Any]:
    """Return the fields of CLIPTextConfig for a tiny encoder."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 24,
        "projection_dim": 20,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
        **changes,
    }


def draw(module: nn.Module, std: float = 0.3) -> Any:
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(module.named_parameters()):
        nn.init.normal_(parameter, std=std, generator=generator)
    return module.eval()


def tokenizer_folder(folder: Path, pad_token: str = "<|endoftext|>") -> Path:
    ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=24, pad_token=pad_token).save_pretrained(folder)
    return folder


def unigram_tokenizer() -> Any:
    """Train a tokenizer of T5's kind, for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(["a red apple, please", "smiling face with big eyes"] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
