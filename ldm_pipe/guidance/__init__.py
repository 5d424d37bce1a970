"""Guidance: ways to steer a denoiser towards its condition. Each returns a `Denoise`; samplers never hear of it."""

from ldm_pipe.guidance.classifier import classifier_mean, classifier_score
from ldm_pipe.guidance.classifier_free import cfg
from ldm_pipe.guidance.composed import composed

__all__ = ["cfg", "classifier_mean", "classifier_score", "composed"]
