"""The keys of diffusers' scheduler files: which class has them, since when, and what it does without them.

Enters: the dict of a file. Leaves: values, or one sentence about a missing key. Nothing here knows noise laws.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ldm_pipe.pretrained import LdmPipeError

Keys = dict[str, tuple[tuple[int, int], Any]]  # key -> (diffusers version that surely writes it, value without it)
WHERE = "scheduler_config.json"

_PREDICTION: Keys = {"prediction_type": ((0, 9), "epsilon")}
_SPACED: Keys = {"timestep_spacing": ((0, 18), "linspace"), "steps_offset": ((0, 18), 0)}
_NEVER = (999, 0)  # what this package wrote before it knew the key lacks it, though it states a newer diffusers
_RAMPS: Keys = {
    "use_karras_sigmas": ((0, 25), False),
    "use_exponential_sigmas": (_NEVER, False),
    "use_beta_sigmas": (_NEVER, False),
}
_FLOW: Keys = {
    "use_flow_sigmas": (_NEVER, False),
    "flow_shift": ((0, 33), 1.0),
    "use_dynamic_shifting": ((0, 36), False),
    "time_shift_type": ((0, 36), "exponential"),
}
_ZERO_SNR: Keys = {"rescale_betas_zero_snr": ((0, 30), False)}
_ORDER: Keys = {"solver_order": ((0, 9), 2)}
_DPM: Keys = {**_ORDER, "algorithm_type": ((0, 9), "dpmsolver++"), "thresholding": ((0, 9), False)}
_FINAL: Keys = {"final_sigmas_type": ((0, 28), "zero")}
_KARRAS: Keys = {**_PREDICTION, **_SPACED, **_RAMPS}  # the classes that came from k-diffusion
_EDM: Keys = {
    **_PREDICTION,
    **_FINAL,
    "sigma_min": ((0, 27), 0.002),
    "sigma_max": ((0, 27), 80.0),
    "sigma_data": ((0, 27), 0.5),
    "sigma_schedule": ((0, 30), "karras"),
    "rho": ((0, 27), 7.0),
}
_SHIFT: Keys = {"shift": ((0, 28), 1.0), "num_train_timesteps": ((0, 28), 1000)}
_DYNAMIC: Keys = {
    **_RAMPS,
    **_SHIFT,
    "use_karras_sigmas": ((0, 33), False),
    "use_dynamic_shifting": ((0, 31), False),
    "base_shift": ((0, 31), 0.5),
    "max_shift": ((0, 31), 1.15),
    "base_image_seq_len": ((0, 31), 256),
    "max_image_seq_len": ((0, 31), 4096),
    "invert_sigmas": ((0, 33), False),
    "shift_terminal": ((0, 34), None),
    "time_shift_type": ((0, 34), "exponential"),
}
_DDIM: Keys = {
    "prediction_type": ((0, 9), "epsilon"),
    "timestep_spacing": ((0, 17), "leading"),
    "steps_offset": ((0, 4), 0),
    "set_alpha_to_one": ((0, 2), True),
    "rescale_betas_zero_snr": ((0, 17), False),
    "clip_sample": ((0, 2), True),
    "thresholding": ((0, 15), False),
}
_DDPM: Keys = {
    "prediction_type": ((0, 9), "epsilon"),
    "timestep_spacing": ((0, 18), "leading"),
    "steps_offset": ((0, 18), 0),
    "rescale_betas_zero_snr": ((0, 25), False),
    "clip_sample": ((0, 2), True),
    "thresholding": ((0, 15), False),
}

KEYS: dict[str, Keys] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "UnCLIPScheduler": {**_PREDICTION, "clip_sample": ((0, 9), True)},
    "PNDMScheduler": {
        "prediction_type": ((0, 10), "epsilon"),
        "timestep_spacing": ((0, 18), "leading"),
        "steps_offset": ((0, 4), 0),
        "set_alpha_to_one": ((0, 4), False),
        "skip_prk_steps": ((0, 4), False),
    },
    "LCMScheduler": {
        "prediction_type": ((0, 22), "epsilon"),
        "rescale_betas_zero_snr": ((0, 22), False),
        "original_inference_steps": ((0, 22), 50),
        "steps_offset": ((0, 22), 0),
    },
    "LMSDiscreteScheduler": _KARRAS,
    "EulerDiscreteScheduler": {**_KARRAS, **_FINAL, "rescale_betas_zero_snr": ((0, 25), False)},
    "EulerAncestralDiscreteScheduler": {**_PREDICTION, **_SPACED, **_ZERO_SNR},
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "DPMSolverSDEScheduler": _KARRAS,
    "DPMSolverMultistepScheduler": {
        **_KARRAS,
        **_DPM,
        **_FLOW,
        "final_sigmas_type": ((0, 26), "zero"),
        "rescale_betas_zero_snr": ((0, 27), False),
        "use_lu_lambdas": (_NEVER, False),
    },
    "DPMSolverSinglestepScheduler": {**_PREDICTION, **_RAMPS, **_DPM, **_FLOW, **_FINAL},
    "DEISMultistepScheduler": {**_KARRAS, **_ORDER, **_FLOW},
    "UniPCMultistepScheduler": {
        **_KARRAS,
        **_ORDER,
        **_FLOW,
        **_FINAL,
        **_ZERO_SNR,
        "shift_terminal": ((0, 40), None),
    },
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {**_EDM, **_DPM},
    "FlowMatchEulerDiscreteScheduler": {**_DYNAMIC, "stochastic_sampling": ((0, 35), False)},
    "FlowMatchHeunDiscreteScheduler": _SHIFT,
    "FlowMatchLCMScheduler": _DYNAMIC,
    "ScoreSdeVeScheduler": {
        "num_train_timesteps": ((0, 2), 2000),
        "sigma_min": ((0, 2), 0.01),
        "sigma_max": ((0, 2), 1348.0),
    },
    "ScoreSdeVpScheduler": {
        "num_train_timesteps": ((0, 2), 2000),
        "beta_min": ((0, 2), 0.1),
        "beta_max": ((0, 2), 20.0),
        "sampling_eps": ((0, 2), 1e-3),
    },
}


class Getter:
    """Look keys up in a scheduler config, knowing since when a file must hold them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Take a config; without a class name it is a plain dict, whose keys have no age."""
        self.config = config
        self.keys = KEYS.get(config.get("_class_name", ""), {})
        self.version = version_of(config.get("_diffusers_version"))

    def required(self, key: str) -> Any:
        """Return a value that must be there."""
        if self.config.get(key) is None:
            raise LdmPipeError(f"the key {key!r} is missing", WHERE, "add it with the value of the training")
        return self.config[key]

    def number(self, key: str) -> float:
        """Return a number that must be there."""
        return _number(key, self.required(key))

    def optional(self, key: str, since: tuple[int, int], default: Any) -> Any:
        """Return a value, or what diffusers takes for it in a file older than the key or in a plain dict."""
        if key not in self.config and self.keys and (self.version is None or self.version >= since):
            advice = f"add it; diffusers would take {json.dumps(default)} in silence"
            raise LdmPipeError(f"the key {key!r} is missing", WHERE, advice)
        return self.config.get(key, default)

    def of_class(self, key: str, default: Any) -> Any:
        """Return a value that only some classes have; the others' is `default` whatever the file says."""
        if not self.keys:
            return self.config.get(key, default)
        return self.optional(key, *self.keys[key]) if key in self.keys else default

    def number_of_class(self, key: str) -> float:
        """Return a number that this class has."""
        return _number(key, self.of_class(key, None))


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LdmPipeError(f"{key} is {value!r}", WHERE, "it must be a number")
    return float(value)


def version_of(text: Any) -> tuple[float, float] | None:
    """Return (major, minor) of a diffusers version; a development version may lack what its release has."""
    found = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    if found is None:
        return None
    return int(found[1]), int(found[2]) - (0.5 if isinstance(text, str) and "dev" in text else 0)
