"""Which art style a picture is drawn in: logistic regression on its colours and on how they change from pixel to pixel.

Drawings of the same things in two styles enter; a probability per picture leaves. The classifier is fitted to the
drawings as they are and as an autoencoder rebuilds them, or it would call the autoencoder's own traces a style. It sees
the same concepts in both styles, so that what is drawn says little; its accuracy is measured on concepts it never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.data.dataset import load_records
from ldm_pipe.data.images import resize, to_tensor
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule

STYLES = ("noto", "twemoji")
# Drawings of skin tones and genders repeat a concept up to 60 times.
ONE_PER_IDEA = {"is_skin_tone_variant": False, "is_gender_variant": False}
NUM_COLOURS = 12  # per channel
EDGES = (0.004, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)  # of differences, in the range -1 to 1
NUM_FEATURES = NUM_COLOURS**3 + 2 * 4 * (len(EDGES) + 1)
PENALTY = 1e-4


def style_features(images: Tensor) -> Tensor:
    """Describe pictures by what a style decides: the palette, and how flat areas and how hard edges are.

    Histograms of the colours (12 x 12 x 12 boxes) and of first and second differences between neighbours, across and
    down, at full and at half resolution; square roots of the shares, so that the distance is Hellinger's.

    Args:
        images: (B, 3, H, W) in [-1, 1].
    Returns: (B, NUM_FEATURES).
    """
    boxes = ((images + 1) / 2 * NUM_COLOURS).long().clamp(0, NUM_COLOURS - 1)  # (B, 3, H, W)
    number = (boxes[:, 0] * NUM_COLOURS + boxes[:, 1]) * NUM_COLOURS + boxes[:, 2]
    found = [_shares(number.flatten(1), NUM_COLOURS**3)]
    edges = torch.tensor(EDGES, device=images.device)
    for pixels in (images, F.avg_pool2d(images, 2)):
        for axis in (-1, -2):
            once = pixels.diff(dim=axis)
            for change in (once, once.diff(dim=axis)):
                size = change.abs().amax(dim=1).flatten(1)  # the channel that changes most
                found.append(_shares(torch.bucketize(size, edges), len(EDGES) + 1))
    return torch.cat(found, dim=1).sqrt()


def _shares(numbers: Tensor, num: int) -> Tensor:
    """Return the share of each whole number in each row: (B, N) to (B, num)."""
    counts = torch.zeros(len(numbers), num, device=numbers.device)
    return counts.scatter_add_(1, numbers, torch.ones(numbers.shape, device=numbers.device)) / numbers.shape[1]


class StyleClassifier(PretrainedModule):
    """Logistic regression on `style_features`.

    Args:
        config: `styles`, two names, and what was measured when it was fitted.
    """

    weights_name = "model"
    class_name = "StyleClassifier"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        styles = list(config.get("styles", []))
        if len(styles) != 2 or not all(isinstance(name, str) for name in styles):
            raise LdmPipeError(f"styles is {styles}, expected two names", "style classifier config")
        self.config = FrozenConfig({**config, "styles": styles})
        self.linear = nn.Linear(NUM_FEATURES, 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StyleClassifier:
        """Build the classifier with random weights."""
        return cls(config)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the probability of the second style.

        Args:
            images: (B, 3, H, W) in [-1, 1], at the resolution of the fit.
        Returns: (B,).
        """
        return torch.cat([self.linear(style_features(part))[:, 0] for part in images.split(256)]).sigmoid()


def fit_style(first: Tensor, second: Tensor, styles: Sequence[str] = STYLES) -> StyleClassifier:
    """Fit by maximum likelihood with a penalty of 1e-4 |w|^2 / 2 (L-BFGS, float64; there is one optimum, no seed).

    Args:
        first, second: pictures of either style, (N, 3, H, W) in [-1, 1]; equal numbers.
        styles: their names.
    """
    if len(first) != len(second) or not len(first):
        raise LdmPipeError(f"{len(first)} and {len(second)} drawings", "style classifier", "Give equal numbers.")
    features = torch.cat([style_features(part) for part in (*first.split(256), *second.split(256))]).double()
    wanted = torch.arange(2, device=features.device).repeat_interleave(len(first)).double()
    weight = features.new_zeros(NUM_FEATURES + 1).requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = features @ weight[1:] + weight[0]
        loss = F.binary_cross_entropy_with_logits(logits, wanted) + PENALTY / 2 * weight[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = StyleClassifier({"styles": list(styles)})
    with torch.no_grad():
        found.linear.weight.copy_(weight[None, 1:])
        found.linear.bias.copy_(weight[:1])
    return found.eval()


def measure_style(classifier: StyleClassifier, first: Tensor, second: Tensor) -> dict[str, float]:
    """Return the mean of both styles' shares recognised, and the mean probability of the second style for each."""
    scores = [classifier(images).double() for images in (first, second)]
    shares = [(scores[0] < 0.5).double().mean(), (scores[1] > 0.5).double().mean()]
    names = classifier.config["styles"]
    means = {f"mean_{name}": round(float(score.mean()), 4) for name, score in zip(names, scores, strict=True)}
    return {"accuracy": round(float(sum(shares)) / 2, 4), **means}


def load_or_fit(
    folder: str | Path, rebuild: Callable[[Tensor], Tensor], data_dir: str | Path, resolution: int
) -> StyleClassifier:
    """Load a classifier, or fit one to the emoji set and keep it with what it reaches on the validation drawings.

    Args:
        folder: of the classifier.
        rebuild: an autoencoder's encoding and decoding, images to images.
        data_dir: holds `<style>/train.parquet` and `<style>/validation.parquet` of both styles.
        resolution: side of the drawings.
    """
    if (Path(folder) / "config.json").is_file():
        found = StyleClassifier.from_pretrained(folder)
        if found.config["resolution"] != resolution:
            what = f"the classifier was fitted at {found.config['resolution']} pixels, the pictures have {resolution}"
            raise LdmPipeError(what, str(folder), "Give another folder; a classifier will be fitted there.")
        return found
    train, held_out = (
        [_read(Path(data_dir) / style / f"{split}.parquet", resolution, rebuild) for style in STYLES]
        for split in ("train", "validation")
    )
    found = fit_style(*(images.flatten(0, 1) for images in train))
    measured = {
        "resolution": resolution,
        "num_train": 2 * train[0].shape[1],
        "num_validation": 2 * held_out[0].shape[1],
        "drawings": measure_style(found, *(images[0] for images in held_out)),
        "rebuilt": measure_style(found, *(images[1] for images in held_out)),
    }
    found.config = FrozenConfig({**found.config, **measured})
    found.save_pretrained(folder)
    return found


def _read(path: Path, resolution: int, rebuild: Callable[[Tensor], Tensor]) -> Tensor:
    """Read the drawings of one file and rebuild them: (2, N, 3, H, W)."""
    records = load_records(path, caption_column="caption", filters=ONE_PER_IDEA)
    images = torch.stack([to_tensor(resize(records.image(row), resolution)) for row in range(len(records))])
    with torch.no_grad():
        rebuilt = torch.cat([rebuild(part).clamp(-1, 1).cpu() for part in images.split(32)])
    return torch.stack([images, rebuilt])
