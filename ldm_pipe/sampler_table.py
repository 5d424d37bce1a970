"""The table of samplers: every list of their names comes from here.

What leaves: one row per sampler, in the order in which help and errors list them. This file imports neither torch nor
anything of this package, so that the command line can read it for `--help`. To add a sampler, write its function into
a file of `samplers/` and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Settings = Mapping[str, tuple[Any, ...]]
"""Keys of a scheduler file, and the values with which the class does what our sampler does."""


@dataclass(frozen=True)
class Row:
    """What is known of one sampler besides its function.

    Attributes:
        file: of `ldm_pipe/samplers/`, without its ending; the function there has the sampler's name.
        grid: for `NoiseSchedule.steps`; with it, diffusers' scheduler of the same name visits the same levels.
        evaluations_per_step: calls of the denoiser per step with the default options.
        has_eta: whether eta means something.
        always_stochastic: whether it needs noise whatever eta is.
        label: the name web interfaces show, and write into pictures; empty: they have none.
        diffusers: the scheduler classes that do the same, with the settings that choose it among the samplers of a
            class. The first of a kind of schedule is the one that is written.
        aliases: what other tools call it, in lower case without separators, where `samplers.names.spell` does not
            find it.
    """

    file: str
    grid: Literal["integer", "fractional", "multistep"]
    evaluations_per_step: int = 1
    has_eta: bool = False
    always_stochastic: bool = False
    label: str = ""
    diffusers: Mapping[str, Settings] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


def _multistep(order: int, *algorithms: str) -> dict[str, Settings]:
    """Return the classes of DPM-Solver++'s multistep samplers, which are told apart by two settings."""
    chosen: Settings = {"algorithm_type": algorithms, "solver_order": (order,)}
    return {"DPMSolverMultistepScheduler": chosen, "EDMDPMSolverMultistepScheduler": chosen}


# diffusers takes the algorithm "deis" of DPMSolverMultistepScheduler for "dpmsolver++".
_ODE, _SDE = ("dpmsolver++", "deis"), ("sde-dpmsolver++",)
_NOISY: dict[str, Any] = {"always_stochastic": True}
_TWICE: dict[str, Any] = {"evaluations_per_step": 2}

SAMPLERS: dict[str, Row] = {
    "ddpm": Row(
        "ddpm", "integer", label="DDPM", **_NOISY,
        diffusers={"DDPMScheduler": {}, "DDPMParallelScheduler": {}, "UnCLIPScheduler": {}},
    ),
    "ddim": Row(
        "ddim", "integer", label="DDIM", has_eta=True, diffusers={"DDIMScheduler": {}, "DDIMParallelScheduler": {}}
    ),
    "euler": Row(
        "euler", "fractional", label="Euler", aliases=("flowmatcheuler",),
        diffusers={
            "EulerDiscreteScheduler": {}, "EDMEulerScheduler": {},
            "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": (False,)},
        },
    ),
    "dpmpp_2m": Row(
        "dpmpp", "multistep", label="DPM++ 2M", diffusers=_multistep(2, *_ODE),
        aliases=("dpmsolvermultistep", "dpmsolverpp", "edmdpmsolvermultistep"),
    ),
    "euler_ancestral": Row(
        "euler", "fractional", label="Euler a", **_NOISY, diffusers={"EulerAncestralDiscreteScheduler": {}}
    ),
    "heun": Row(
        "heun", "fractional", label="Heun", **_TWICE, aliases=("flowmatchheun",),
        diffusers={"HeunDiscreteScheduler": {}, "FlowMatchHeunDiscreteScheduler": {}},
    ),
    "edm": Row("heun", "fractional", **_NOISY, **_TWICE, aliases=("edmeuler",)),
    "lms": Row("lms", "fractional", label="LMS", diffusers={"LMSDiscreteScheduler": {}}),
    "dpm2": Row("dpm2", "fractional", label="DPM2", **_TWICE, diffusers={"KDPM2DiscreteScheduler": {}}),
    "dpm2_ancestral": Row(
        "dpm2", "fractional", label="DPM2 a", **_NOISY, **_TWICE, diffusers={"KDPM2AncestralDiscreteScheduler": {}}
    ),
    "dpmpp_2s": Row(
        "dpmpp_2s", "multistep", label="DPM++ 2S", **_TWICE, aliases=("dpmsolversinglestep",),
        diffusers={"DPMSolverSinglestepScheduler": {"algorithm_type": ("dpmsolver++",), "solver_order": (2,)}},
    ),
    "dpmpp_2s_ancestral": Row("dpmpp_2s", "fractional", label="DPM++ 2S a", **_NOISY, **_TWICE),
    "dpmpp_3m": Row("dpmpp", "multistep", label="DPM++ 3M", diffusers=_multistep(3, *_ODE)),
    "dpmpp_sde": Row(
        "dpmpp_sde", "fractional", label="DPM++ SDE", **_NOISY, **_TWICE, aliases=("dpmsolversde",),
        diffusers={"DPMSolverSDEScheduler": {}},
    ),
    "dpmpp_2m_sde": Row(
        "dpmpp_sde", "multistep", label="DPM++ 2M SDE", **_NOISY, diffusers=_multistep(2, *_SDE),
        aliases=("sdedpmsolverpp",),
    ),
    "dpmpp_3m_sde": Row("dpmpp_sde", "multistep", label="DPM++ 3M SDE", **_NOISY, diffusers=_multistep(3, *_SDE)),
    "plms": Row(
        "plms", "integer", label="PLMS", aliases=("pndm", "ipndm"),
        diffusers={"PNDMScheduler": {"skip_prk_steps": (True,)}},  # the Runge-Kutta start is not here
    ),
    "unipc": Row(
        "unipc", "multistep", label="UniPC", diffusers={"UniPCMultistepScheduler": {}},
        aliases=("unipcmultistep", "unipcbh"),
    ),
    "deis": Row("deis", "multistep", diffusers={"DEISMultistepScheduler": {}}, aliases=("deismultistep",)),
    "restart": Row("restart", "fractional", label="Restart", **_NOISY, **_TWICE),
    "lcm": Row(
        "lcm", "integer", label="LCM", **_NOISY, aliases=("flowmatchlcm",),
        diffusers={
            "LCMScheduler": {}, "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": (True,)},
            "FlowMatchLCMScheduler": {},
        },
    ),
    "annealed_langevin": Row(
        "langevin", "integer", **_NOISY, evaluations_per_step=11, aliases=("ncsn", "langevin")
    ),
    "predictor_corrector": Row(
        "langevin", "integer", **_NOISY, **_TWICE, aliases=("scoresdeve",),
        diffusers={"ScoreSdeVeScheduler": {}, "ScoreSdeVpScheduler": {}},
    ),
}  # fmt: skip
