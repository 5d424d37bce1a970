"""The model card, README.md of a saved model: what it is, how it is loaded, what it cannot do."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ldm_pipe.interop.folders.index import OWN, pipeline_class

if TYPE_CHECKING:
    from ldm_pipe.interop.folders.folder import Parts

MAX_FACT = 2000
FACTS = ("data", "steps", "commit", "metrics", "licence")


def model_card(parts: Parts, *, name: str, sampler: str, dtype: str, facts: Mapping[str, str] | None = None) -> str:
    """Write the card. Facts the caller does not know are listed as unknown, never invented.

    Args:
        facts: what only the training knows: data, steps, commit, metrics, licence, and anything else worth a line.
    """
    facts = dict(facts or {})
    told = [f"- {_safe(key)}: {_safe(facts.pop(key, 'not recorded'))}" for key in FACTS]
    told += [f"- {_safe(key)}: {_safe(value)}" for key, value in facts.items()]
    counts = {
        "U-Net": parts.unet,
        "autoencoder": parts.autoencoder,
        **{f"text encoder{f' {i + 1}' if i else ''}": net for i, net in enumerate(parts.text_encoders)},
    }
    sizes = [f"- {part}: {sum(p.numel() for p in net.parameters()):,} parameters" for part, net in counts.items()]
    vae = parts.autoencoder
    law = getattr(parts.schedule, "beta_schedule", type(parts.schedule).__name__)
    theirs = pipeline_class(parts)
    diffusers = "" if theirs == OWN else f"  # or: from diffusers import {theirs}"
    defaults = [f"- {key}: {_safe(value)}" for key, value in parts.defaults.to_json().items()]
    return "\n".join(
        [
            "---",
            "pipeline_tag: text-to-image",
            "library_name: diffusers",
            "---",
            f"# {_safe(name)}",
            "",
            "A text-to-image latent diffusion model, written by ldm_pipe as a diffusers folder.",
            "",
            "## Use",
            "```python",
            f"from ldm_pipe import LatentDiffusionPipeline{diffusers}",
            "",
            'pipe = LatentDiffusionPipeline.from_pretrained("this folder")',
            'pipe("a prompt", seed=0).images[0].save("picture.png")',
            "```",
            "",
            "## Parts",
            *sizes,
            f"- weights: {dtype}, safetensors",
            f"- latents: {vae.latent_channels} channels, one for {vae.factor} pixels a side",
            f"- noise law: {law}, prediction {parts.schedule.prediction}",
            f"- sampler: {sampler}",
            "",
            "## Defaults (`ldm_pipe.json`)",
            *(defaults or ["- none stored"]),
            "",
            "## Training",
            *told,
            "",
            "## Limits",
            "Pictures show what the training data shows, with its gaps and biases. No safety checker runs",
            "(`safety_checker` is empty, `requires_safety_checker` is false). diffusers reads everything but",
            "`ldm_pipe.json`: pass the defaults above yourself there.",
            "",
        ]
    )


def _safe(value: object) -> str:
    """Escape and cap what came from outside; one line."""
    return html.escape(" ".join(str(value).split())[:MAX_FACT], quote=False)
