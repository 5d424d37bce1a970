"""Make an untrained text encoder and its tokenizer, to be trained jointly with a U-Net.

What enters: captions. What leaves: `text_encoder/` and `tokenizer/` in the output folder, for `train_diffusion.py` with
`train_text_encoder: true`.

    python scripts/make_text_encoder.py --config configs/emoji/text_encoder_transformer.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from conditioning import CLIPTextEncoder, ClipTokenizer, LabelEncoder, T5TextEncoder, TransformerTextEncoder
from conditioning.load import AnyTextEncoder
from conditioning.text import T5
from conditioning.tokenizer import train_bpe
from ldm_pipe.data.dataset import Records
from ldm_pipe.training.run.config import DataConfig, StrictModel, parse_config, run_script
from ldm_pipe.training.run.rng import key_seed
from ldm_pipe.training.tasks.pictures import open_records


class TextEncoderConfig(StrictModel):
    """One run of this script."""

    output_dir: str
    kind: Literal["clip", "transformer", "t5", "labels"] = Field(
        description="labels: one class per caption; the others read tokens"
    )
    data: DataConfig = DataConfig()
    vocab_size: int = Field(3000, ge=514)
    max_length: int = Field(32, ge=4, description="tokens per caption, start and end included")
    hidden_size: int = Field(192, ge=8)
    num_layers: int = Field(3, ge=1)
    num_heads: int = Field(6, ge=1)
    seed: int = Field(0, ge=0)


def build(config: TextEncoderConfig, records: Records) -> AnyTextEncoder:
    """Train the tokenizer and build the network with random weights."""
    width, depth, heads = config.hidden_size, config.num_layers, config.num_heads
    if config.kind == "labels":
        classes = sorted({caption for caption in records.captions if caption.strip()})
        return LabelEncoder({"num_classes": len(classes), "width": width, "classes": classes})
    texts = [*records.captions, *(word for words in records.keywords for word in words)]
    tokenizer: ClipTokenizer = train_bpe(texts, config.vocab_size, max_length=config.max_length)
    shared: dict[str, Any] = {"vocab_size": len(tokenizer)}
    match config.kind:
        case "clip":
            shared.update(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, hidden_act="gelu")
            shared.update(max_position_embeddings=config.max_length, eos_token_id=tokenizer.end_id)
            return CLIPTextEncoder({**shared, "num_attention_heads": heads}, tokenizer)
        case "transformer":
            shared.update(d_model=width, encoder_layers=depth, encoder_attention_heads=heads, head_dim=width // heads)
            shared.update(encoder_ffn_dim=4 * width, max_position_embeddings=config.max_length)
            return TransformerTextEncoder(shared, tokenizer)
        case "t5":
            shared.update(d_model=width, d_kv=width // heads, num_heads=heads, num_layers=depth, d_ff=3 * width)
            shared.update(feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=tokenizer.pad_id)
            encoder = T5TextEncoder.from_config({**shared, "model_type": "t5"})
            return T5TextEncoder(encoder.model, tokenizer, T5)


def main(argv: list[str]) -> None:
    """Make one text encoder."""
    config = parse_config(TextEncoderConfig, argv, "Make an untrained text encoder.")
    torch.manual_seed(key_seed(config.seed, "init", "text encoder"))
    encoder, folder = build(config, open_records(config.data)), Path(config.output_dir)
    encoder.save_pretrained(folder / "text_encoder")
    if encoder.tokenizer is not None:
        encoder.tokenizer.save_pretrained(folder / "tokenizer")  # type: ignore[union-attr]
    num = sum(parameter.numel() for parameter in encoder.parameters())
    print(f"{folder}: {config.kind}, {num:,} weights")


if __name__ == "__main__":
    run_script(main)
