"""Read and write diffusers' scheduler_config.json.

Enters: the dict of such a file. Leaves: a `NoiseSchedule`, and the way back for a given sampler. Diffusers puts three
    things into one
"scheduler": the noise law, the choice of times, and the sampler; only the first two are read here. What shapes the
mathematics and is missing is an error, unless the file is older than the key. Nothing here imports diffusers.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from ldm_pipe.pretrained import FrozenConfig, LdmPipeError
from ldm_pipe.schedule import NoiseSchedule, Prediction

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}

# class -> key -> (diffusers version that brought the key, what the class does without it); from diffusers' history
_KEYS: dict[str, dict[str, tuple[tuple[int, int], Any]]] = {
    "DDIMScheduler": {
        "prediction_type": ((0, 9), "epsilon"),
        "timestep_spacing": ((0, 17), "leading"),
        "steps_offset": ((0, 4), 0),
        "set_alpha_to_one": ((0, 2), True),
        "rescale_betas_zero_snr": ((0, 17), False),
        "clip_sample": ((0, 2), True),
        "thresholding": ((0, 15), False),
    },
    "DDPMScheduler": {
        "prediction_type": ((0, 9), "epsilon"),
        "timestep_spacing": ((0, 18), "leading"),
        "steps_offset": ((0, 18), 0),
        "rescale_betas_zero_snr": ((0, 25), False),
        "clip_sample": ((0, 2), True),
        "thresholding": ((0, 15), False),
    },
    "PNDMScheduler": {
        "prediction_type": ((0, 10), "epsilon"),
        "timestep_spacing": ((0, 18), "leading"),
        "steps_offset": ((0, 4), 0),
        "set_alpha_to_one": ((0, 4), False),
    },
    "EulerDiscreteScheduler": {
        "prediction_type": ((0, 9), "epsilon"),
        "timestep_spacing": ((0, 18), "linspace"),
        "steps_offset": ((0, 18), 0),
        "rescale_betas_zero_snr": ((0, 25), False),
        "final_sigmas_type": ((0, 28), "zero"),
    },
    "DPMSolverMultistepScheduler": {
        "prediction_type": ((0, 9), "epsilon"),
        "timestep_spacing": ((0, 18), "linspace"),
        "steps_offset": ((0, 18), 0),
        "rescale_betas_zero_snr": ((0, 27), False),
        "final_sigmas_type": ((0, 26), "zero"),
        "thresholding": ((0, 9), False),
    },
}
_TRAINED_BETAS_SINCE = (0, 12)  # earlier files leave it out here and there

# settings of diffusers' samplers that no sampler here has: key -> the values that ask for nothing
_IGNORED: dict[str, tuple[Any, ...]] = {
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_dynamic_shifting": (False, None),
    "lambda_min_clipped": (None, -math.inf, "-Infinity", "-inf"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log"),
}


def read(config: Mapping[str, Any]) -> NoiseSchedule:
    """Read a diffusers scheduler config of DDIM, DDPM, PNDM, EulerDiscrete or DPMSolverMultistep, or a plain dict.

    Args:
        config: the content of scheduler_config.json.

    Returns: the schedule; the whole config is kept in `.config`.

    Raises: LdmPipeError naming a key that is missing or a value that is not known.
    """
    class_name = config.get("_class_name")
    if class_name is not None and class_name not in _KEYS:
        raise LdmPipeError(
            f"scheduler class {class_name!r} is not known",
            where="scheduler_config.json",
            how_to_fix=f"save the model with one of {', '.join(_KEYS)}",
        )
    get = _Getter(config)
    if config.get("use_flow_sigmas"):
        raise LdmPipeError(
            "use_flow_sigmas is not supported", where="scheduler_config.json", how_to_fix="set it to false"
        )
    trained = get.optional("trained_betas", _TRAINED_BETAS_SINCE, None)
    named = trained is None and get.required("beta_schedule") != "squaredcos_cap_v2"
    final = ("ddim",) if get.of_class("set_alpha_to_one", True) is False else ()
    if get.of_class("final_sigmas_type", "zero") == "sigma_min":
        final = ("euler",) if class_name == "EulerDiscreteScheduler" else ("dpmpp_2m",)
    for key, neutral in _IGNORED.items():
        if key in config and config[key] not in neutral:
            warnings.warn(f"scheduler_config.json: {key}={config[key]!r} is ignored", UserWarning, stacklevel=3)
    prediction = get.prediction()
    return NoiseSchedule(
        beta_schedule=config.get("beta_schedule", "linear"),
        beta_start=get.number("beta_start") if named else float(config.get("beta_start", 1e-4)),
        beta_end=get.number("beta_end") if named else float(config.get("beta_end", 2e-2)),
        num_train_timesteps=get.required("num_train_timesteps"),
        prediction=prediction,
        spacing=get.of_class("timestep_spacing", None),
        steps_offset=get.of_class("steps_offset", 0),
        zero_terminal_snr=bool(get.of_class("rescale_betas_zero_snr", False)),
        trained_betas=None if trained is None else tuple(float(beta) for beta in trained),
        noisy_end=final,
        config=FrozenConfig(config),
    )


def write(
    schedule: NoiseSchedule,
    sampler: str = "ddim",
    *,
    for_stable_diffusion: bool = True,
    thresholding: bool = False,
    dynamic_thresholding_ratio: float = 0.995,
    sample_max_value: float = 1.0,
) -> dict[str, Any]:
    """Write the diffusers scheduler config with which diffusers does what this schedule and sampler do here.

    DDIM agrees for step numbers that divide num_train_timesteps, or leading spacing: elsewhere diffusers'
    DDIMScheduler steps to other times than it evaluates next (`NoiseSchedule.steps(arrival="stride")`).

    Args:
        schedule: the noise law.
        sampler: "ddim", "ddpm", "euler" or "dpmpp_2m".
        for_stable_diffusion: refuse what diffusers' StableDiffusionPipeline would rewrite on loading.
        thresholding: dynamic thresholding of latents, for ddpm and dpmpp_2m.
        dynamic_thresholding_ratio: the percentile.
        sample_max_value: the cap of the percentile; 1 is the static clip to [-1, 1].

    Raises: LdmPipeError with the reason, for what diffusers cannot represent.
    """
    where = "scheduler export"
    if schedule.spacing is None:
        raise LdmPipeError("the schedule names no spacing", where, "set spacing= of the NoiseSchedule")
    offset = schedule.steps_offset
    if for_stable_diffusion and offset != 1:
        if schedule.spacing == "leading":
            raise LdmPipeError(
                f"steps_offset {offset} with leading spacing: StableDiffusionPipeline rewrites it to 1",
                where,
                "use steps_offset=1, or trailing spacing",
            )
        offset = 1  # no other spacing reads it
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items() if ours != "flow"}
    if schedule.prediction not in predictions:
        raise LdmPipeError(
            f"prediction {schedule.prediction!r} on a discrete law", where, "diffusers has no such scheduler"
        )
    config: dict[str, Any] = {
        "_class_name": _class_name(sampler),
        "_diffusers_version": "0.42.1",  # the version this agrees with by test
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "trained_betas": None if schedule.trained_betas is None else list(schedule.trained_betas),
        "prediction_type": predictions[schedule.prediction],
        "timestep_spacing": schedule.spacing,
        "steps_offset": offset,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }
    if thresholding and sampler in ("ddim", "euler"):
        raise LdmPipeError(
            f"thresholding with {sampler}: diffusers' {config['_class_name']} does something else or nothing with it",
            where,
            'use "dpmpp_2m" or "ddpm"',
        )
    if sampler == "ddpm" and schedule.final(sampler) == "first":
        raise LdmPipeError("ddpm that ends at t = 0", where, "diffusers' DDPMScheduler always ends clean")
    threshold = {
        "thresholding": thresholding,
        "dynamic_thresholding_ratio": dynamic_thresholding_ratio,
        "sample_max_value": sample_max_value,
    }
    return {**config, **_sampler_keys(sampler, threshold, clean=schedule.final(sampler) == "clean")}


def _sampler_keys(sampler: str, threshold: Mapping[str, Any], *, clean: bool) -> dict[str, Any]:
    """Return the keys that only one class of diffusers has."""
    clip = {"clip_sample": False, "clip_sample_range": 1.0}
    final = {"final_sigmas_type": "zero" if clean else "sigma_min"}
    match sampler:
        case "ddim":
            return {**threshold, **clip, "set_alpha_to_one": clean}
        case "ddpm":
            return {**threshold, **clip, "variance_type": "fixed_small"}
        case "euler":
            euler = {"interpolation_type": "linear", "use_karras_sigmas": False, "timestep_type": "discrete"}
            return {**euler, **final}
    return {
        **threshold,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_karras_sigmas": False,
        **final,
    }


def _class_name(sampler: str) -> str:
    match sampler:
        case "ddim":
            return "DDIMScheduler"
        case "ddpm":
            return "DDPMScheduler"
        case "euler":
            return "EulerDiscreteScheduler"
        case "dpmpp_2m":
            return "DPMSolverMultistepScheduler"
    raise LdmPipeError(
        f"no diffusers scheduler for the sampler {sampler!r}", "scheduler export", "known: ddpm, ddim, euler, dpmpp_2m"
    )


class _Getter:
    """Look keys up in a scheduler config, knowing since when a file must hold them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.keys = _KEYS.get(config.get("_class_name", ""), {})
        self.version = _version(config.get("_diffusers_version"))

    def required(self, key: str, hint: str = "") -> Any:
        """Return a value that must be there."""
        if self.config.get(key) is None:
            raise LdmPipeError(
                f"the key {key!r} is missing", "scheduler_config.json", hint or "add it with the value of the training"
            )
        return self.config[key]

    def number(self, key: str) -> float:
        value = self.required(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LdmPipeError(f"{key} is {value!r}", "scheduler_config.json", "it must be a number")
        return float(value)

    def optional(self, key: str, since: tuple[int, int], default: Any) -> Any:
        """Return a value, or what diffusers takes for it in a file older than the key or in a plain dict."""
        if key not in self.config and self.keys and (self.version is None or self.version >= since):
            self.required(key, f"add it; diffusers would take {json.dumps(default)} in silence")
        return self.config.get(key, default)

    def of_class(self, key: str, default: Any) -> Any:
        """Return a value that only some classes have; the others' is `default` whatever the file says."""
        if not self.keys:
            return self.config.get(key, default)
        return self.optional(key, *self.keys[key]) if key in self.keys else default

    def prediction(self) -> Prediction:
        """Return the prediction; without a class name there is no default."""
        name = self.of_class("prediction_type", None) if self.keys else self.required("prediction_type")
        if name not in _PREDICTIONS:
            known = ", ".join(_PREDICTIONS)
            raise LdmPipeError(f"prediction_type is {name!r}", "scheduler_config.json", f"use one of {known}")
        return _PREDICTIONS[name]


def _version(text: Any) -> tuple[float, float] | None:
    """Return (major, minor) of a diffusers version; a development version may lack what its release has."""
    found = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    if found is None:
        return None
    return int(found[1]), int(found[2]) - (0.5 if isinstance(text, str) and "dev" in text else 0)
