"""Which sampler a name of other tools means: diffusers' classes, web interfaces, k-diffusion's functions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from ldm_pipe.sampler_table import SAMPLERS

# what the spelling rules below do not find: squeezed name -> ours
_OTHERS = {alias: name for name, row in SAMPLERS.items() for alias in row.aliases}
_FILLERS = {"scheduler", "discrete", "sampler", "sample", "k", "karras", "exponential", "polyexponential"}


def suggest(name: str, known: Sequence[str]) -> str | None:
    """Return the known sampler that a name most likely means, or None.

    Args:
        name: as a user typed it, say "DPM++ 2M Karras", "EulerAncestralDiscreteScheduler" or "k_euler_a".
        known: the names to choose from.
    """
    ours = spell(name)
    meant = _OTHERS.get(ours.replace("_", ""), ours)
    nearest = [meant] if meant in known else difflib.get_close_matches(meant, known, n=1, cutoff=0.4)
    return nearest[0] if nearest else None


def spell(name: str) -> str:
    """Return a name in our spelling: lower case with underscores, "pp" for "++", "ancestral" for "a", no fillers."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)  # EulerDiscrete -> Euler_Discrete
    text = re.sub(r"^KDPM", "DPM", text).lower().replace("++", "pp_")
    text = re.sub(r"dpm_(solver_)?(?=\d)", "dpm", re.sub(r"[^a-z0-9]+", "_", text))  # dpm_2 -> dpm2
    words = [{"a": "ancestral"}.get(word, word) for word in text.split("_") if word and word not in _FILLERS]
    return "_".join(words)
