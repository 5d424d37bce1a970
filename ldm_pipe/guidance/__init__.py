"""Ways to steer a denoiser and to keep its x0 in range. Each takes a `Denoise` and returns one.

It may import `schedule` and `denoiser`. It does not know samplers, which never hear of guidance, or pipelines.
"""

from ldm_pipe.guidance.choice import guide
from ldm_pipe.guidance.classifier import classifier_mean, classifier_score
from ldm_pipe.guidance.classifier_free import cfg
from ldm_pipe.guidance.composed import composed
from ldm_pipe.guidance.loss import by_classifier, by_loss, clip_loss, loss_score, range_loss
from ldm_pipe.guidance.pair import Guidance, pair
from ldm_pipe.guidance.scale import NoiseLevel, Scale, cfgpp, cosine, interval, linear
from ldm_pipe.guidance.variants import apg, autoguidance, cfg_zero, classifier_free, magnitude_aware, tangential

__all__ = [
    "Guidance",
    "NoiseLevel",
    "Scale",
    "apg",
    "autoguidance",
    "by_classifier",
    "by_loss",
    "cfg",
    "cfg_zero",
    "cfgpp",
    "classifier_free",
    "classifier_mean",
    "classifier_score",
    "clip_loss",
    "composed",
    "cosine",
    "guide",
    "interval",
    "linear",
    "loss_score",
    "magnitude_aware",
    "pair",
    "range_loss",
    "tangential",
]
