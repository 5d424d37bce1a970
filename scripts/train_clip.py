"""Train a small CLIP on captioned pictures: BPE tokenizer, text encoder, image tower.

What enters: captioned pictures of any source (`--data.train_data_dir`), or the emoji's parquet file with names,
keywords, concepts and marks of variants (`--train_file`). What leaves: `tokenizer/`, `text_encoder/` (transformers'
CLIPTextModel format, for the pipeline), `text_encoder_with_projection/` and `image_tower/` (together a CLIP) in the
output folder, and the retrieval accuracy on the training drawings.

    python scripts/train_clip.py --config configs/emoji/clip.yaml
    python scripts/train_clip.py --output_dir runs/text --data.train_data_dir my_pictures --data.caption_column text

A second phase (`--sketch_steps`, configs/emoji/sketch.yaml) teaches the text encoder to predict the latents of the
drawing, see `ldm_pipe.training.tasks.sketch`; with `--init_from` it starts from a trained one and writes no CLIP.
"""

from __future__ import annotations

import io
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder import load_autoencoder
from conditioning import CLIPTextEncoder, ClipTokenizer
from conditioning.contrastive import ImageTower, contrastive_loss
from conditioning.tokenizer import train_bpe
from ldm_pipe.data.captions import mix_caption
from ldm_pipe.data.colours import main_colour
from ldm_pipe.pretrained import LdmPipeError, atomic_write
from ldm_pipe.training.run.config import DataConfig, StrictModel, dump_config, parse_config, run_script
from ldm_pipe.training.run.rng import key_seed
from ldm_pipe.training.tasks.pictures import open_records
from ldm_pipe.training.tasks.sketch import SketchHead, SketchSettings, measure_sketch, train_sketch
from ldm_pipe.training.tasks.tower import TowerUpdate

VARIANTS = ("is_skin_tone_variant", "is_gender_variant", "is_flag")


class ClipConfig(StrictModel):
    """One run of this script."""

    output_dir: str
    train_file: str | None = Field(None, description="the emoji's parquet file; null: what `data` names")
    data: DataConfig = DataConfig()
    resolution: int = Field(64, ge=16)
    vocab_size: int = Field(3000, ge=514)
    max_length: int = Field(32, ge=4, description="tokens per caption, start and end included")
    hidden_size: int = Field(192, ge=8)
    num_layers: int = Field(3, ge=1)
    num_heads: int = Field(6, ge=1)
    projection_dim: int = Field(128, ge=8)
    channels: tuple[int, ...] = (32, 64, 128, 192)
    name_column: str = Field("name", description="of train_file")
    init_from: str | None = Field(None, description="folder with text_encoder/ and tokenizer/ to start from; no CLIP")
    autoencoder: str | None = Field(None, description="whose latents the text encoder learns to predict")
    sketch_steps: int = Field(0, ge=0, description="of the second phase, that predicts latents; 0: leave it out")
    contrastive_weight: float = Field(0.1, ge=0, description="of predicted against true latents")
    word_dropout: float = Field(0.1, ge=0, lt=1, description="of the second phase, beside that of mixed captions")
    colour_share: float = Field(0.2, ge=0, le=1, description="captions of the second phase that tell the main colour")
    validation_file: str | None = Field(None, description="the emoji's drawings that no training sees, to measure")
    variant_weight: float = Field(0.3, ge=0, description="share of skin tone, gender and flag rows within a concept")
    max_shift: int = Field(4, ge=0, description="largest shift of a picture in pixels")
    train_batch_size: int = Field(128, ge=2)
    max_train_steps: int = Field(500, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    lr_warmup_steps: int = Field(50, ge=0)
    seed: int = Field(0, ge=0)
    num_threads: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Drawings:
    """The training rows in memory: uint8 images (N, 3, H, W) and what is said of them."""

    images: Tensor
    names: list[str]
    keywords: list[list[str]]
    concepts: Tensor
    plain: Tensor
    groups: list[str] | None = None


def load_pictures(config: DataConfig, resolution: int) -> Drawings:
    """Read captioned pictures of any source; pictures of one caption, or of one concept where known, are alike."""
    records = open_records(config)
    images = np.empty((len(records), 3, resolution, resolution), dtype=np.uint8)
    for row in tqdm(range(len(records)), desc="reading pictures", leave=False):
        picture = ImageOps.fit(records.image(row), (resolution, resolution), Image.Resampling.BOX)
        images[row] = np.asarray(picture).transpose(2, 0, 1)
    kinds = records.captions if config.concept_column is None else records.column(config.concept_column)
    concepts = torch.tensor(pd.factorize(pd.Series(kinds))[0])
    keywords = [[str(word) for word in words] for words in records.keywords or [[]] * len(records)]
    plain = torch.ones(len(records), dtype=torch.bool)
    return Drawings(torch.from_numpy(images), list(records.captions), keywords, concepts, plain)


def load_drawings(path: str, resolution: int, name_column: str = "name") -> Drawings:
    """Read the emoji's parquet file; pictures are scaled down by box averaging."""
    wanted = ["image", name_column, "keywords", "concept", *VARIANTS]
    has_groups = "group" in parquet.read_schema(path).names
    table = pd.read_parquet(path, columns=[*wanted, "group"] if has_groups else wanted)
    images = np.empty((len(table), 3, resolution, resolution), dtype=np.uint8)
    for row, cell in enumerate(tqdm(table["image"], desc="reading pictures", leave=False)):
        picture = Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
        images[row] = np.asarray(picture.resize((resolution, resolution), Image.Resampling.BOX)).transpose(2, 0, 1)
    concepts = torch.tensor(pd.factorize(table["concept"])[0])
    plain = torch.tensor(~table[list(VARIANTS)].to_numpy(dtype=bool).any(axis=1))
    keywords = [[str(word) for word in words] for words in table["keywords"]]
    groups = table["group"].tolist() if has_groups else None
    return Drawings(torch.from_numpy(images), table[name_column].tolist(), keywords, concepts, plain, groups)


def row_weights(concepts: Tensor, plain: Tensor, variant_weight: float) -> Tensor:
    """Weigh rows so that each concept is equally likely; its variants share `variant_weight` of a plain row's weight.

    A concept that has only variants (a flag) weighs `variant_weight` in all.
    """
    num = int(concepts.max()) + 1
    num_plain = torch.bincount(concepts, weights=plain.double(), minlength=num)[concepts]
    num_variants = torch.bincount(concepts, weights=(~plain).double(), minlength=num)[concepts]
    return torch.where(plain, 1.0 / num_plain.clamp(min=1), variant_weight / num_variants.clamp(min=1))


def shifted(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Turn uint8 images to [-1, 1] and move each by up to max_shift pixels; the border is repeated."""
    batch, _, height, width = images.shape
    moves = torch.randint(-max_shift, max_shift + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + moves[0]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) + moves[1]).clamp(0, width - 1)
    index = torch.arange(batch)[:, None, None, None]
    picked = images[index, torch.arange(3)[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    return to_signed(picked)


def to_signed(images: Tensor) -> Tensor:
    """Map 0..255 to [-1, 1]."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def trimmed_ids(tokenizer: ClipTokenizer, captions: list[str]) -> Tensor:
    """Tokenize, and leave out columns that hold padding only: causal attention never looks at them."""
    batch = tokenizer(captions)
    return batch.ids[:, : int(batch.mask.sum(dim=1).max())]


def text_vectors(encoder: CLIPTextEncoder, ids: Tensor) -> Tensor:
    """Run the text tower and return vectors in the shared space."""
    projected = encoder(ids).projected
    assert projected is not None
    return projected


def build_models(config: ClipConfig, captions: list[str]) -> tuple[ClipTokenizer, CLIPTextEncoder, ImageTower]:
    """Train the tokenizer on the captions and build both towers."""
    tokenizer = train_bpe(captions, config.vocab_size, max_length=config.max_length)
    encoder = CLIPTextEncoder({
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": 4 * config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_length,
        "hidden_act": "quick_gelu",
        "projection_dim": config.projection_dim,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    })  # fmt: skip
    tower = ImageTower({"channels": list(config.channels), "projection_dim": config.projection_dim})
    return tokenizer, encoder, tower.to(memory_format=torch.channels_last)


def train(
    config: ClipConfig, data: Drawings, tokenizer: ClipTokenizer, encoder: CLIPTextEncoder, tower: ImageTower
) -> None:
    """Run AdamW with warm-up and cosine decay on the contrastive loss."""
    update = TowerUpdate(
        [*encoder.parameters(), *tower.parameters()],
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        num_warmup=config.lr_warmup_steps,
        num_steps=config.max_train_steps,
    )
    generator = torch.Generator().manual_seed(key_seed(config.seed, "clip"))
    rng = random.Random(key_seed(config.seed, "captions"))
    row_weight = row_weights(data.concepts, data.plain, config.variant_weight)
    progress = tqdm(range(config.max_train_steps), desc="CLIP")
    for step in progress:
        rows = torch.multinomial(row_weight, config.train_batch_size, generator=generator)
        captions = [mix_caption(data.names[row], data.keywords[row], rng) for row in rows.tolist()]
        images = shifted(data.images[rows], config.max_shift, generator)
        texts = text_vectors(encoder, trimmed_ids(tokenizer, captions))
        loss = contrastive_loss(tower(images), texts, update.log_scale, data.concepts[rows])
        update(loss, step)
        progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{update.log_scale.exp().item():.1f}")


@torch.no_grad()
def retrieval(
    data: Drawings, tokenizer: ClipTokenizer, encoder: CLIPTextEncoder, tower: ImageTower
) -> tuple[float, float]:
    """Rank all plain drawings for each of their names: how often the right one is first, and in the first five."""
    rows = data.plain.nonzero()[:, 0]
    names = [data.names[row] for row in rows.tolist()]
    images = torch.cat([tower(to_signed(data.images[part])) for part in rows.split(256)])
    texts = torch.cat(
        [text_vectors(encoder, trimmed_ids(tokenizer, names[i : i + 256])) for i in range(0, len(names), 256)]
    )
    scores = nn.functional.normalize(texts, dim=1) @ nn.functional.normalize(images, dim=1).T
    rank = (scores > scores.diagonal()[:, None]).sum(dim=1)
    return (rank < 1).float().mean().item(), (rank < 5).float().mean().item()


def check_phases(config: ClipConfig) -> None:
    """Refuse phases that lack something, before any work. Raises: LdmPipeError naming the field."""
    if config.sketch_steps and config.autoencoder is None:
        raise LdmPipeError("sketch_steps without an autoencoder", "autoencoder", "Name the folder of a trained one.")
    if config.init_from is not None and not config.sketch_steps:
        what = "init_from leaves the first phase out, sketch_steps 0 the second"
        raise LdmPipeError(what, "config", "Give sketch_steps, or no init_from.")
    if config.validation_file is not None and not config.sketch_steps:
        raise LdmPipeError(
            "only the second phase measures it", "validation_file", "Give sketch_steps, or leave it out."
        )


@torch.no_grad()
def encode_latents(config: ClipConfig, images: Tensor) -> Tensor:
    """Encode uint8 images to normalised latents, (N, C, h, w)."""
    assert config.autoencoder is not None  # see check_phases
    autoencoder = load_autoencoder(config.autoencoder)
    parts = [autoencoder.encode_moments(to_signed(part)).mean for part in tqdm(images.split(64), desc="latents")]
    return (torch.cat(parts) - autoencoder.shift_factor) * autoencoder.scaling_factor


def sketch_caption(config: ClipConfig, name: str, keywords: list[str], colour: str | None, rng: random.Random) -> str:
    """Mix a caption, often with the drawing's main colour in front, and drop words of it, never all."""
    caption = mix_caption(name, keywords, rng)
    if colour is not None and colour not in caption and rng.random() < config.colour_share:
        caption = f"{colour} {caption}"
    return " ".join(w for w in caption.split(" ") if rng.random() >= config.word_dropout).strip(",") or caption


def train_second_phase(config: ClipConfig, data: Drawings, tokenizer: ClipTokenizer, encoder: CLIPTextEncoder) -> str:
    """Teach the text encoder to predict latents, save it now and then, and return what it knows in words."""
    latents = encode_latents(config, data.images)
    colours = [main_colour(image) for image in data.images]
    rng = random.Random(key_seed(config.seed, "sketch captions"))
    settings = SketchSettings(
        config.sketch_steps, config.train_batch_size, config.learning_rate, config.weight_decay,
        config.lr_warmup_steps, config.contrastive_weight, config.seed,
    )  # fmt: skip

    def caption(row: int) -> str:
        return sketch_caption(config, data.names[row], data.keywords[row], colours[row], rng)

    def save(step: int) -> None:
        if step % 200 == 0:
            save_texts(config, tokenizer, encoder)

    weights = row_weights(data.concepts, data.plain, config.variant_weight)
    head = train_sketch(encoder, tokenizer, latents, data.concepts, weights, caption, settings, save=save)
    encoder.eval()
    seen = data.plain.nonzero()[:, 0]
    names = [data.names[row] for row in seen.tolist()]
    found = measure_sketch(head, encoder, tokenizer, names, latents[seen], latents[seen])
    told = f"name -> own latents of {len(names)}: {found.first:.3f}, variance explained {found.explained:.3f}"
    if config.validation_file is None:
        return told
    return f"{told}; {measure_unseen(config, data, latents[seen], seen, head, encoder, tokenizer)}"


def measure_unseen(
    config: ClipConfig,
    data: Drawings,
    latents: Tensor,
    seen: Tensor,
    head: SketchHead,
    encoder: CLIPTextEncoder,
    tokenizer: ClipTokenizer,
) -> str:
    """Tell how well names that no training saw foretell their drawings; `latents` are those of the rows `seen`."""
    assert config.validation_file is not None
    unseen = load_drawings(config.validation_file, config.resolution, config.name_column)
    rows = unseen.plain.nonzero()[:, 0]
    names = [unseen.names[row] for row in rows.tolist()]
    found = measure_sketch(head, encoder, tokenizer, names, encode_latents(config, unseen.images[rows]), latents)
    line = (
        f"{len(names)} unseen concepts: first {found.first:.3f}, ten {found.ten:.3f},"
        f" variance explained {found.explained:.3f}"
    )
    if data.groups is None or unseen.groups is None:
        return line
    pairs = zip(found.nearest.tolist(), rows.tolist(), strict=True)
    right = [data.groups[int(seen[near])] == unseen.groups[row] for near, row in pairs]
    return f"{line}, group of the nearest {sum(right) / len(right):.2f}"


def save_texts(config: ClipConfig, tokenizer: ClipTokenizer, encoder: CLIPTextEncoder) -> None:
    """Write what a pipeline needs of the text side."""
    tokenizer.save_pretrained(Path(config.output_dir) / "tokenizer")
    encoder.without_projection().save_pretrained(Path(config.output_dir) / "text_encoder")


def main(argv: list[str]) -> None:
    """Train, evaluate, save."""
    config = parse_config(ClipConfig, argv, __doc__ or "")  # pyright: ignore[reportArgumentType]
    check_phases(config)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    data = (
        load_pictures(config.data, config.resolution)
        if config.train_file is None
        else load_drawings(config.train_file, config.resolution, config.name_column)
    )
    if len(data.names) < config.train_batch_size:
        what = f"{len(data.names)} pictures for batches of {config.train_batch_size}"
        raise LdmPipeError(what, "train_batch_size", "A contrastive batch repeats no picture: use a smaller one.")
    out, lines = Path(config.output_dir), []
    if config.init_from is None:
        corpus = data.names + [", ".join(words) for words in data.keywords]
        tokenizer, encoder, tower = build_models(config, corpus)
        train(config, data, tokenizer, encoder, tower)
        first, five = retrieval(data, tokenizer, encoder.eval(), tower.eval())
        lines += [f"caption -> picture over {int(data.plain.sum())} plain ones: top1 {first:.3f}, top5 {five:.3f}"]
        encoder.save_pretrained(out / "text_encoder_with_projection")
        tower.save_pretrained(out / "image_tower")
    else:
        encoder = CLIPTextEncoder.from_pretrained(config.init_from, dtype=torch.float32)
        tokenizer = clip_tokenizer(encoder, config.init_from)
    if config.sketch_steps:
        lines += [train_second_phase(config, data, tokenizer, encoder.train())]
    save_texts(config, tokenizer, encoder)
    minutes = (time.perf_counter() - start) / 60
    line = "; ".join(lines)
    atomic_write(out / "clip.yaml", dump_config(config) + f"# {line}, {minutes:.1f} minutes\n")
    print(f"{line}; {minutes:.1f} minutes; written to {out}")


def clip_tokenizer(encoder: CLIPTextEncoder, folder: str) -> ClipTokenizer:
    """Return the tokenizer of a text encoder."""
    if encoder.tokenizer is None:
        raise LdmPipeError("there is no tokenizer", folder, "Name a folder with text_encoder/ and tokenizer/.")
    return encoder.tokenizer


if __name__ == "__main__":
    run_script(main)
