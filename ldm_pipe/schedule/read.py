"""Read diffusers' scheduler_config.json.

Enters: the dict of such a file. Leaves: a noise law, and the name of the sampler. Diffusers puts three things into one
"scheduler": the noise law, the choice of times, and the sampler. What shapes the mathematics and is missing is an
error, unless the file is older than the key. Writing is in schedule_export.py. Nothing here imports diffusers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ldm_pipe.pretrained import FrozenConfig, LdmPipeError
from ldm_pipe.sampler_table import SAMPLERS
from ldm_pipe.schedule import own_file
from ldm_pipe.schedule.betas import WITHOUT_ENDS, make_betas
from ldm_pipe.schedule.discrete import Law, NoiseSchedule, Prediction
from ldm_pipe.schedule.keys import KEYS, WHERE, Getter
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow, ResolutionShift
from ldm_pipe.schedule.spacing import Ramp

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
RAMP_KEYS: dict[str, Ramp] = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "log_snr",
}
DIFFUSERS_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
_TRAINED_BETAS_SINCE = (0, 12)  # earlier files leave it out here and there

# settings of diffusers' samplers that no sampler here has: key -> the values that ask for nothing
_IGNORED: dict[str, tuple[Any, ...]] = {
    "lambda_min_clipped": (None, -math.inf, "-Infinity", "-inf"),
    "interpolation_type": ("linear",),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "predict_x0": (True,),
    "disable_corrector": ([], ()),
    "solver_p": (None,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
}
_RAMP_ENDS = ("sigma_min", "sigma_max")  # of a ramp, in the classes of discrete laws


def read(config: Mapping[str, Any]) -> Law:
    """Read a diffusers scheduler config of any class that has a law of ours, or a plain dict of a discrete one.

    Args:
        config: the content of scheduler_config.json.

    Returns: the noise law; the whole config is kept in `.config`.

    Raises: LdmPipeError naming a key that is missing, a value that is not known, or a class that has no law here.
    """
    class_name = config.get("_class_name")
    if class_name == own_file.CLASS_NAME:
        return own_file.read(config)
    if class_name is not None and class_name not in KEYS:
        advice = f"save the model with one of {', '.join(KEYS)}"
        raise LdmPipeError(f"scheduler class {class_name!r} is not known", WHERE, advice)
    get = Getter(config)
    flow = bool(get.of_class("use_flow_sigmas", False))
    for key, neutral in _IGNORED.items():
        if class_name == "DPMSolverSinglestepScheduler" and key == "lower_order_final":
            continue  # off is its default, and means nothing where the steps are even
        if key in config and config[key] not in neutral:
            warnings.warn(f"scheduler_config.json: {key}={config[key]!r} is ignored", UserWarning, stacklevel=2)
    match class_name:
        case "FlowMatchEulerDiscreteScheduler" | "FlowMatchHeunDiscreteScheduler" | "FlowMatchLCMScheduler":
            return _read_flow(get)
        case "EDMEulerScheduler" | "EDMDPMSolverMultistepScheduler":
            return _read_edm(get)
        case "ScoreSdeVeScheduler":
            return VE(
                sigma_min=get.number_of_class("sigma_min"),
                sigma_max=get.number_of_class("sigma_max"),
                told="sigma",
                num_train_timesteps=get.of_class("num_train_timesteps", None),
                config=FrozenConfig(config),
            )
        case "ScoreSdeVpScheduler":
            return ContinuousVP(
                beta_min=get.number_of_class("beta_min"),
                beta_max=get.number_of_class("beta_max"),
                t_min=get.number_of_class("sampling_eps"),
                num_train_timesteps=get.of_class("num_train_timesteps", None),
                config=FrozenConfig(config),
            )
    return _read_solver_flow(get) if flow else _read_discrete(get)


def sampler_name(config: Mapping[str, Any]) -> str | None:
    """Return which of our samplers does what the class and the settings of a diffusers scheduler config ask for.

    None: nothing here does, or the config names no class.
    """
    class_name = config.get("_class_name")
    if not isinstance(class_name, str) or class_name not in KEYS:
        return None
    for name, row in SAMPLERS.items():
        settings = row.diffusers.get(class_name)
        if settings is not None and all(_sets(config, class_name, key, values) for key, values in settings.items()):
            return name
    return None


def _sets(config: Mapping[str, Any], class_name: str, key: str, values: tuple[Any, ...]) -> bool:
    """Return whether a config, or the default of its class, has one of the values; of a flag, null is off."""
    value = config.get(key, KEYS[class_name][key][1])
    return (bool(value) if isinstance(values[0], bool) else value) in values


def sampler_options(config: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    """Return the options of a sampler of ours that a diffusers scheduler config, if it asks for this one, sets."""
    if sampler_name(config) != sampler:
        return {}
    if sampler == "ddpm" and config.get("variance_type") == "fixed_large":
        return {"variance": "fixed_large"}
    return {"order": config["solver_order"]} if sampler in ("unipc", "deis") and "solver_order" in config else {}


def _prediction(get: Getter) -> Prediction:
    """Return the prediction; without a class name there is no default."""
    name = get.of_class("prediction_type", None) if get.keys else get.required("prediction_type")
    if name not in PREDICTIONS:
        raise LdmPipeError(f"prediction_type is {name!r}", WHERE, f"use one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]


def _ramp(get: Getter) -> Ramp | None:
    """Return the ramp that the file asks for."""
    asked = [kind for key, kind in RAMP_KEYS.items() if get.of_class(key, False)]
    if len(asked) > 1:
        raise LdmPipeError(f"{' and '.join(asked)} sigmas at once", WHERE, "keep one of the flags")
    for key in _RAMP_ENDS:
        if asked and get.config.get(key) is not None:
            warnings.warn(f"scheduler_config.json: {key}={get.config[key]!r} is ignored", UserWarning, stacklevel=4)
    return asked[0] if asked else None


def _noisy_end(get: Getter) -> tuple[str, ...]:
    """Return the samplers that end at the first level, by this file."""
    name = sampler_name(get.config)
    if get.of_class("set_alpha_to_one", True) is False:
        return ("ddim",) if name in ("ddim", None) else ("ddim", name)  # DDIM is often run on files of PNDM
    if name == "deis":
        return ("deis",)  # diffusers' has no other end
    if get.of_class("final_sigmas_type", "zero") == "sigma_min":
        return (name or "dpmpp_2m",)
    return ()


def _read_discrete(get: Getter) -> NoiseSchedule:
    """Read the classes of discrete laws."""
    config, class_name = get.config, get.config.get("_class_name")
    if config.get("timestep_type", "discrete") != "discrete":
        advice = "no law here tells the network log(sigma) on discrete betas"
        raise LdmPipeError(f"timestep_type is {config['timestep_type']!r}", WHERE, advice)
    if get.of_class("original_inference_steps", 50) != 50:
        what = f"original_inference_steps is {config['original_inference_steps']!r}"
        raise LdmPipeError(what, WHERE, "only the customary 50 are known")
    trained = None
    kind = "squaredcos_cap_v2" if class_name == "UnCLIPScheduler" else config.get("beta_schedule", "linear")
    if class_name != "UnCLIPScheduler":
        trained = get.optional("trained_betas", _TRAINED_BETAS_SINCE, None)
        kind = kind if trained is not None else get.required("beta_schedule")
    named = trained is None and kind not in WITHOUT_ENDS
    start = get.number("beta_start") if named else float(config.get("beta_start", 1e-4))
    end = get.number("beta_end") if named else float(config.get("beta_end", 2e-2))
    levels = get.required("num_train_timesteps")
    betas = None if trained is None else tuple(float(beta) for beta in trained)
    if betas is not None and kind not in DIFFUSERS_BETAS:  # a kind that diffusers does not know, written out for it
        betas = None if betas == tuple(make_betas(kind, start, end, levels).tolist()) else betas
    spacing = get.of_class("timestep_spacing", None)
    if class_name in ("UnCLIPScheduler", "DPMSolverSinglestepScheduler", "LCMScheduler"):
        spacing = "lcm" if class_name == "LCMScheduler" else "linspace"  # they have no other
    return NoiseSchedule(
        beta_schedule=kind,
        beta_start=start,
        beta_end=end,
        num_train_timesteps=levels,
        prediction=_prediction(get),
        spacing=spacing,
        steps_offset=get.of_class("steps_offset", 1 if get.keys else 0),  # classes without it have no use for it
        zero_terminal_snr=bool(get.of_class("rescale_betas_zero_snr", False)),
        trained_betas=betas,
        ramp=_ramp(get),
        noisy_end=_noisy_end(get),
        config=FrozenConfig(config),
    )


def _read_edm(get: Getter) -> EDM:
    """Read the classes of EDM's law."""
    prediction = get.of_class("prediction_type", None)
    if prediction != "epsilon":  # what diffusers calls so here is EDM's own preconditioning
        advice = 'only "epsilon" is the preconditioning of EDM'
        raise LdmPipeError(f"prediction_type {prediction!r} on EDM's law", WHERE, advice)
    ends = {key: get.number_of_class(key) for key in ("sigma_min", "sigma_max", "sigma_data", "rho")}
    spacing = get.of_class("sigma_schedule", None)
    return EDM(**ends, spacing=spacing, noisy_end=_noisy_end(get), config=FrozenConfig(get.config))


def _read_flow(get: Getter) -> Flow:
    """Read the classes of rectified flow."""
    for key, neutral in (("invert_sigmas", False), ("scale_factors", None)):
        if get.config.get(key, neutral) not in (neutral, None):
            raise LdmPipeError(f"{key} is {get.config[key]!r}", WHERE, "no law here does that")
    resolution = None
    if get.of_class("use_dynamic_shifting", False):
        ends = {name: get.of_class(name, None) for name in ("base_shift", "max_shift")}
        lengths = {name: get.of_class(name, None) for name in ("base_image_seq_len", "max_image_seq_len")}
        resolution = ResolutionShift(**ends, **lengths, kind=get.of_class("time_shift_type", None))
    return Flow(
        spacing=_ramp(get) or "linspace",
        shift=get.number_of_class("shift"),
        resolution=resolution,
        terminal=get.of_class("shift_terminal", None) or None,
        num_train_timesteps=get.of_class("num_train_timesteps", None),
        config=FrozenConfig(get.config),
    )


def _read_solver_flow(get: Getter) -> Flow:
    """Read use_flow_sigmas of a class that otherwise has a discrete law."""
    name, prediction = sampler_name(get.config), _prediction(get)
    if prediction not in ("flow", "x0"):
        advice = "save it with flow_prediction"
        raise LdmPipeError(f"prediction_type {get.config['prediction_type']!r} with use_flow_sigmas", WHERE, advice)
    if _ramp(get) is not None or _noisy_end(get):
        what = "use_flow_sigmas with other sigmas, or with an end that leaves noise in"
        raise LdmPipeError(what, WHERE, "keep use_flow_sigmas, with final_sigmas_type zero")
    levels = get.required("num_train_timesteps")
    dynamic = bool(get.of_class("use_dynamic_shifting", False))
    resolution = ResolutionShift(kind=get.of_class("time_shift_type", None)) if dynamic else None
    law = Flow(
        prediction=prediction,
        shift=get.number_of_class("flow_shift"),
        resolution=resolution,
        terminal=get.of_class("shift_terminal", None) or None,
        num_train_timesteps=levels,
        config=FrozenConfig(get.config),
    )
    ends = solver_ends(name, levels)
    return law if law.line_ends == ends else replace(law, ends=ends)


def solver_ends(sampler: str | None, num_train_timesteps: int) -> tuple[float, float]:
    """Return the linspace ends of diffusers' solvers with use_flow_sigmas: only UniPC starts at pure noise."""
    low = 1 / num_train_timesteps
    return (1.0, low) if sampler == "unipc" else (1 - low, 0.0)
