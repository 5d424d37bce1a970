"""Ways to steer a denoiser and to keep its x0 in range. Each takes a `Denoise` and returns one.

It may import `schedule` and `denoiser`. It does not know samplers, which never hear of guidance, or pipelines.
"""

from ldm_pipe.guidance.classifier import classifier_mean, classifier_score
from ldm_pipe.guidance.classifier_free import cfg
from ldm_pipe.guidance.composed import composed

__all__ = ["cfg", "classifier_mean", "classifier_score", "composed"]
