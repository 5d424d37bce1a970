"""How much signal and noise there is at each time, which times a sampler visits, and diffusers' scheduler files.

It may import `pretrained`. It does not know networks, samplers or pictures.
"""

from ldm_pipe.schedule.discrete import Final, Grid, Law, NoiseSchedule, Prediction, Spacing, Steps

__all__ = ["Final", "Grid", "Law", "NoiseSchedule", "Prediction", "Spacing", "Steps"]
