"""Pictures of a class, drawn by the model before it is fine-tuned, so that it does not forget its looks.

What enters: a pipeline and a FinetuneConfig. What leaves: a folder of pictures (Ruiz et al. 2022, arXiv:2208.12242,
section 3.2).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from ldm_pipe.data.dataset import Records, load_records
from ldm_pipe.data.images import SUFFIXES
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import atomic_write
from ldm_pipe.training.run.environment import start_processes
from ldm_pipe.training.tasks.finetune.config import FinetuneConfig

DRAWN = "drawn-"


def class_pictures(pipe: LatentDiffusionPipeline, config: FinetuneConfig) -> Records:
    """Read the pictures of the class; where there are too few, the main process draws the rest from seeds 0, 1, ...

    The pictures are written to `class_data_dir` one by one, so that an interrupted run draws only what is missing.
    """
    folder = Path(config.class_data_dir or Path(config.output_dir) / "class_images")
    folder.mkdir(parents=True, exist_ok=True)
    with start_processes(config.mixed_precision).main_process_first():
        own = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(DRAWN)]
        wanted = [folder / f"{DRAWN}{seed:05d}.png" for seed in range(config.num_class_images - len(own))]
        draw_class(pipe, config, {seed: path for seed, path in enumerate(wanted) if not path.is_file()})
    return load_records(folder, caption_column=None)


def draw_class(pipe: LatentDiffusionPipeline, config: FinetuneConfig, missing: Mapping[int, Path]) -> None:
    """Draw the pictures of some seeds."""
    seeds, side, size = list(missing), config.data.resolution, config.sample_batch_size
    for first in tqdm(range(0, len(seeds), size), desc="class pictures", disable=not seeds):
        batch = seeds[first : first + size]
        images = pipe([config.class_prompt or ""] * len(batch), seed=batch, height=side, width=side).images
        for image, seed in zip(images, batch, strict=True):
            file = io.BytesIO()
            image.save(file, format="PNG")
            atomic_write(missing[seed], file.getvalue())
