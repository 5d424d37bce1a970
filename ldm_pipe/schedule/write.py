"""Write diffusers' scheduler_config.json.

Enters: a noise law and the name of a sampler. Leaves: the dict of the file with which diffusers does the same, or one
sentence why none does. Reading is in schedule_config.py. Nothing here imports diffusers.
"""

from __future__ import annotations

from typing import Any, get_args

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.sampler_table import SAMPLERS
from ldm_pipe.schedule.betas import make_betas
from ldm_pipe.schedule.discrete import Law, NoiseSchedule
from ldm_pipe.schedule.keys import KEYS
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow
from ldm_pipe.schedule.read import DIFFUSERS_BETAS, PREDICTIONS, RAMP_KEYS, solver_ends
from ldm_pipe.schedule.spacing import Ramp

_WHERE = "scheduler export"
_VERSION = "0.42.1"  # the version this agrees with by test
_NAMES = {ours: theirs for theirs, ours in PREDICTIONS.items()}
_EXACT_AT_NO_SIGNAL = ("ddim", "ddpm", "lcm")  # the other classes of diffusers divide by alpha

# sampler -> the class that is written for it, by kind of schedule
_OF_OTHER_KINDS = ("EDM", "FlowMatch", "ScoreSde")
_CLASSES, _EDM_CLASSES, _FLOW_CLASSES = (
    {name: found[0] for name, row in SAMPLERS.items() if (found := [c for c in row.diffusers if belongs(c)])}
    for belongs in (
        lambda c: not c.startswith(_OF_OTHER_KINDS),
        lambda c: c.startswith("EDM"),
        lambda c: c.startswith("FlowMatch"),
    )
)
_WITHOUT_X0 = ("plms", "euler_ancestral", "dpm2", "dpm2_ancestral", "dpmpp_sde")


def write(
    law: Law,
    sampler: str = "ddim",
    *,
    for_stable_diffusion: bool = True,
    thresholding: bool = False,
    dynamic_thresholding_ratio: float = 0.995,
    sample_max_value: float = 1.0,
) -> dict[str, Any]:
    """Write the diffusers scheduler config with which diffusers does what this law and sampler do here.

    DDIM agrees for step numbers that divide num_train_timesteps, or leading spacing: elsewhere diffusers'
    DDIMScheduler steps to other times than it evaluates next. Of dpmpp_2s,
    dpmpp_3m and dpmpp_3m_sde law, times and kind of solver agree, but not the formula of the step; why is in
    tests/parity/test_samplers_dpmpp_diffusers.py.

    Args:
        law: the noise law.
        sampler: one that diffusers has too.
        for_stable_diffusion: refuse what diffusers' StableDiffusionPipeline would rewrite on loading.
        thresholding: dynamic thresholding of latents, for ddpm and the family of DPM-Solver on discrete laws.
        dynamic_thresholding_ratio: the percentile.
        sample_max_value: the cap of the percentile; 1 is the static clip to [-1, 1].

    Raises: LdmPipeError with the reason, for what diffusers cannot represent.
    """
    threshold = {
        "thresholding": thresholding,
        "dynamic_thresholding_ratio": dynamic_thresholding_ratio,
        "sample_max_value": sample_max_value,
    }
    if thresholding and (not isinstance(law, NoiseSchedule) or not sampler.startswith(("ddpm", "dpmpp_2", "dpmpp_3"))):
        what = f"thresholding with {sampler}: diffusers' class does something else or nothing with it"
        raise LdmPipeError(what, _WHERE, "use ddpm or dpmpp_2m")
    match law:
        case NoiseSchedule():
            return _write_discrete(law, sampler, threshold, for_stable_diffusion=for_stable_diffusion)
        case Flow():
            return _write_flow(law, sampler)
        case EDM():
            return _write_edm(law, sampler)
        case VE() | ContinuousVP():
            return _write_sde(law, sampler)
    raise LdmPipeError(f"the law {type(law).__name__}", _WHERE, "diffusers has no such scheduler")


def _head(class_name: str) -> dict[str, Any]:
    return {"_class_name": class_name, "_diffusers_version": _VERSION}


def _class_of(sampler: str, classes: dict[str, str]) -> str:
    if sampler not in classes:
        raise LdmPipeError(
            f"no diffusers scheduler for the sampler {sampler!r}", _WHERE, f"known: {', '.join(classes)}"
        )
    return classes[sampler]


def _write_discrete(
    law: NoiseSchedule, sampler: str, threshold: dict[str, Any], *, for_stable_diffusion: bool
) -> dict[str, Any]:
    class_name = _class_of(sampler, _CLASSES)
    _check_discrete(law, sampler, class_name)
    offset = law.steps_offset
    if for_stable_diffusion and offset != 1 and "steps_offset" in KEYS[class_name]:
        if law.spacing == "leading":
            raise LdmPipeError(
                f"steps_offset {offset} with leading spacing: StableDiffusionPipeline rewrites it to 1",
                _WHERE,
                "use steps_offset=1, or trailing spacing",
            )
        offset = 1  # no other spacing reads it
    known = law.beta_schedule in DIFFUSERS_BETAS or (sampler == "ddpm" and law.beta_schedule == "sigmoid")
    betas = law.trained_betas
    if betas is None and not known:  # written out, under a name that diffusers then does not look at
        betas = make_betas(law.beta_schedule, law.beta_start, law.beta_end, law.num_train_timesteps).tolist()
    config = {
        **_head(class_name),
        "num_train_timesteps": law.num_train_timesteps,
        "beta_start": law.beta_start,
        "beta_end": law.beta_end,
        "beta_schedule": law.beta_schedule,
        "trained_betas": None if betas is None else list(betas),
        "prediction_type": _NAMES[law.prediction],
    }
    optional = {
        "timestep_spacing": law.spacing,
        "steps_offset": offset,
        "rescale_betas_zero_snr": law.zero_terminal_snr,
        **{key: kind == law.ramp for key, kind in RAMP_KEYS.items()},
    }
    config |= {key: value for key, value in optional.items() if key in KEYS[class_name]}
    return {**config, **_sampler_keys(sampler, threshold, clean=law.final(sampler) == "clean")}


def _check_discrete(law: NoiseSchedule, sampler: str, class_name: str) -> None:
    """Refuse what the class of diffusers cannot do.

    Raises: LdmPipeError with the reason.
    """
    if law.spacing is None:
        raise LdmPipeError("the schedule names no spacing", _WHERE, "set spacing= of the NoiseSchedule")
    keys = KEYS[class_name]
    if law.prediction not in ("eps", "x0", "v") or (law.prediction == "x0" and sampler in _WITHOUT_X0):
        what = f"prediction {law.prediction!r} on a discrete law with the sampler {sampler}"
        raise LdmPipeError(what, _WHERE, "diffusers has no such scheduler")
    only = {"lcm": "lcm", "dpmpp_2s": "linspace"}.get(sampler)
    if (law.spacing == "lcm") != (sampler == "lcm") or (only and law.spacing != only):
        advice = f"use spacing={only!r}" if only else "use another spacing"
        raise LdmPipeError(f"spacing {law.spacing!r} with the sampler {sampler}", _WHERE, advice)
    if law.ramp is not None and not any(kind == law.ramp and key in keys for key, kind in RAMP_KEYS.items()):
        raise LdmPipeError(f"ramp {law.ramp!r} with {sampler}", _WHERE, f"diffusers' {class_name} has no such sigmas")
    no_signal = float(law.alpha(law.num_train_timesteps - 1)) == 0
    if no_signal and (law.ramp is not None or not ("rescale_betas_zero_snr" in keys or sampler in _EXACT_AT_NO_SIGNAL)):
        raise LdmPipeError(f"a zero terminal SNR with {sampler}", _WHERE, f"diffusers' {class_name} divides by alpha")
    if no_signal and not law.zero_terminal_snr and sampler not in _EXACT_AT_NO_SIGNAL:
        raise LdmPipeError(f"betas up to 1 with {sampler}", _WHERE, f"diffusers' {class_name} divides by alpha")
    clean = law.final(sampler) == "clean"
    if sampler == "deis":
        if clean:
            what = "deis that ends clean: diffusers' always ends at t = 0"
            raise LdmPipeError(what, _WHERE, 'set noisy_end=("deis",) of the NoiseSchedule')
    elif not clean and not {"set_alpha_to_one", "final_sigmas_type"} & set(keys):
        raise LdmPipeError(f"{sampler} that ends at t = 0", _WHERE, f"diffusers' {class_name} always ends clean")


def _sampler_keys(sampler: str, threshold: dict[str, Any], *, clean: bool) -> dict[str, Any]:
    """Return the keys that only one class of diffusers has."""
    clip = {"clip_sample": False, "clip_sample_range": 1.0}
    final = {"final_sigmas_type": "zero" if clean else "sigma_min"}
    match sampler:
        case "ddim":
            return {**threshold, **clip, "set_alpha_to_one": clean}
        case "ddpm":
            return {**threshold, **clip, "variance_type": "fixed_small"}
        case "plms":
            return {"skip_prk_steps": True, "set_alpha_to_one": clean}
        case "lcm":
            return {**threshold, **clip, "original_inference_steps": 50, "set_alpha_to_one": True}
        case "euler":
            return {"interpolation_type": "linear", "timestep_type": "discrete", **final}
        case "heun":
            return clip
        case "unipc":
            return {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True, **final}
        case "deis":
            return {"solver_order": 3, "solver_type": "logrho", "algorithm_type": "deis", "lower_order_final": True}
        case "dpmpp_2s":
            return {**threshold, **_dpm_keys(sampler), **final}
    if sampler.startswith("dpmpp_") and sampler != "dpmpp_sde":
        return {**threshold, **_dpm_keys(sampler), "euler_at_final": False, **final}
    return {}


def _dpm_keys(sampler: str) -> dict[str, Any]:
    """Return what tells the members of the DPM-Solver family apart."""
    return {
        "algorithm_type": "sde-dpmsolver++" if sampler.endswith("_sde") else "dpmsolver++",
        "solver_order": int(sampler[len("dpmpp_")]),
        "solver_type": "midpoint",
        "lower_order_final": True,
    }


def _write_edm(law: EDM, sampler: str) -> dict[str, Any]:
    class_name = _class_of(sampler, _EDM_CLASSES)
    if law.prediction != "edm" or law.spacing not in ("karras", "exponential"):
        what = f"prediction {law.prediction!r} and spacing {law.spacing!r} on EDM's law"
        raise LdmPipeError(what, _WHERE, 'use prediction "edm", and spacing "karras" or "exponential"')
    return {
        **_head(class_name),
        "sigma_min": law.sigma_min,
        "sigma_max": law.sigma_max,
        "sigma_data": law.sigma_data,
        "sigma_schedule": law.spacing,
        "rho": law.rho,
        "prediction_type": "epsilon",
        "final_sigmas_type": "zero" if law.final(sampler) == "clean" else "sigma_min",
        **({} if sampler == "euler" else {**_dpm_keys(sampler), "euler_at_final": False, "thresholding": False}),
    }


def _write_sde(law: VE | ContinuousVP, sampler: str) -> dict[str, Any]:
    """Write the classes of score SDEs."""
    if sampler != "predictor_corrector" or law.spacing != "linspace":
        what = f"{type(law).__name__} with the sampler {sampler} and {law.spacing} spacing"
        raise LdmPipeError(what, _WHERE, "diffusers has predictor_corrector with linspace")
    if isinstance(law, VE):
        if law.told != "sigma" or law.prediction != "score":
            what = f"VE with told={law.told!r} and prediction {law.prediction!r}"
            raise LdmPipeError(what, _WHERE, 'diffusers has "sigma" and "score"')
        ends = {"sigma_min": law.sigma_min, "sigma_max": law.sigma_max, "sampling_eps": 1e-5}
        chosen = {"snr": 0.15, "correct_steps": 1}
        return {**_head("ScoreSdeVeScheduler"), "num_train_timesteps": law.num_train_timesteps, **ends, **chosen}
    if law.kind != "linear" or law.prediction != "eps" or law.t_max != 1:
        raise LdmPipeError(
            f"ContinuousVP {law.kind} with prediction {law.prediction}", _WHERE, "diffusers has linear, eps"
        )
    ends = {"beta_min": law.beta_min, "beta_max": law.beta_max, "sampling_eps": law.t_min}
    return {**_head("ScoreSdeVpScheduler"), "num_train_timesteps": law.num_train_timesteps, **ends}


def _write_flow(law: Flow, sampler: str) -> dict[str, Any]:
    if sampler in _FLOW_CLASSES:
        return _write_flow_match(law, sampler)
    solvers = {name: found for name, found in _CLASSES.items() if "use_flow_sigmas" in KEYS[found] and name != "deis"}
    class_name = _class_of(sampler, {**_FLOW_CLASSES, **solvers})
    shift = law.resolution
    plain_shift = shift is None or (shift.base_shift, shift.max_shift) == (0.5, 1.15)
    lengths = shift is None or (shift.base_image_seq_len, shift.max_image_seq_len) == (256, 4096)
    ends = solver_ends(sampler, law.num_train_timesteps)
    if law.spacing != "linspace" or law.line_ends != ends or (law.terminal and sampler != "unipc"):
        what = f"{law.spacing} spacing between {law.line_ends}, terminal {law.terminal}, with {sampler}"
        raise LdmPipeError(what, _WHERE, f"diffusers' {class_name} has linspace between {ends}; or use euler")
    if not (plain_shift and lengths) or law.prediction not in ("flow", "x0"):
        what = f"prediction {law.prediction!r} and {shift}"
        raise LdmPipeError(what, _WHERE, f"diffusers' {class_name} has no place for them; use euler")
    config = {
        **_head(class_name),
        "num_train_timesteps": law.num_train_timesteps,
        "beta_start": 0.00085,  # not looked at, but a file must hold them
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "prediction_type": _NAMES[law.prediction],
        "use_flow_sigmas": True,
        "flow_shift": law.shift,
        "use_dynamic_shifting": shift is not None,
        "time_shift_type": "exponential" if shift is None else shift.kind,
    }
    optional = {"timestep_spacing": "linspace", "steps_offset": 1, "rescale_betas_zero_snr": False}
    optional |= {"shift_terminal": law.terminal, "thresholding": False, **dict.fromkeys(RAMP_KEYS, False)}
    config |= {key: value for key, value in optional.items() if key in KEYS[class_name]}
    return {**_sampler_keys(sampler, {}, clean=True), **config}


def _write_flow_match(law: Flow, sampler: str) -> dict[str, Any]:
    """Write the classes that only rectified flow has."""
    class_name = _FLOW_CLASSES[sampler]
    ramps: tuple[Ramp, ...] = ("karras", "exponential", "beta")
    if law.prediction != "flow" or law.ends is not None or law.spacing not in ("linspace", *ramps):
        what = f"prediction {law.prediction!r}, ends {law.ends}, {law.spacing} spacing"
        raise LdmPipeError(what, _WHERE, f"diffusers' {class_name} has flow, ends=None, linspace or a ramp of {ramps}")
    base = {**_head(class_name), "num_train_timesteps": law.num_train_timesteps, "shift": law.shift}
    if sampler == "heun":
        if law.resolution or law.terminal or law.spacing in get_args(Ramp):
            raise LdmPipeError(
                f"a shift by resolution, a terminal time or {law.spacing} with heun", _WHERE, "use euler"
            )
        return base
    shift = law.resolution
    dynamic = {"use_dynamic_shifting": shift is not None}
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    dynamic |= dict(zip(names, (0.5, 1.15, 256, 4096), strict=True))
    if shift is not None:
        dynamic |= {name: getattr(shift, name) for name in names}
    return {
        **base,
        **dynamic,
        "time_shift_type": "exponential" if shift is None else shift.kind,
        "shift_terminal": law.terminal,
        "invert_sigmas": False,
        **{key: kind == law.spacing for key, kind in RAMP_KEYS.items() if kind in ramps},
        "stochastic_sampling": sampler == "lcm",
    }
