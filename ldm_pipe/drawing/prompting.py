"""Prompts with a grammar in a call of the pipeline: checked before any work, encoded once, told step by step.

What enters: what the caller gave as `prompt_syntax`, and a checked request. What leaves: a `Plan`. The grammar lives in
conditioning/prompt.py, the encoding in conditioning/weighted.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from conditioning import Condition
from conditioning.prompt import Brackets, parse
from conditioning.weighted import EMPHASES, Emphasis, PromptSchedule, encode_weighted
from ldm_pipe import guidance
from ldm_pipe.denoiser import Denoise, Denoiser
from ldm_pipe.drawing.output import one_of
from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    from ldm_pipe.drawing.request.request import Request
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

SYNTAXES = ("plain", "weighted")


@dataclass(frozen=True)
class PromptSyntax:
    """How prompts are read; see `encode_weighted`."""

    emphasis: Emphasis = "context"
    brackets: Brackets = "error"

    @classmethod
    def read(cls, value: Any) -> PromptSyntax | None:
        """Read "plain" (None), "weighted", "weighted mean literal", or a mapping of emphasis and brackets.

        Raises: LdmPipeError naming what is known.
        """
        if not isinstance(value, Mapping):
            first, *words = value.split() if isinstance(value, str) and value.strip() else [value]
            if one_of("prompt_syntax", first, SYNTAXES) == "plain" and not words:
                return None
            if first == "plain":
                one_of("prompt_syntax", value, SYNTAXES)  # refuses more words
            value = {"brackets" if word == "literal" else "emphasis": word for word in words}
        known = {field.name for field in fields(cls)}
        if not set(value) <= known:
            raise LdmPipeError(f"prompt_syntax is {dict(value)!r:.80}", how_to_fix=f"give some of {sorted(known)}")
        one_of("prompt_syntax emphasis", value.get("emphasis", cls.emphasis), EMPHASES)
        one_of("prompt_syntax brackets", value.get("brackets", cls.brackets), ("error", "literal"))
        return cls(**value)

    def check(self, prompts: Sequence[str], negatives: Sequence[str]) -> None:
        """Parse every text once, so that a bad one is refused before any work."""
        for text in dict.fromkeys((*prompts, *negatives)):
            parse(text, brackets=self.brackets)

    def __str__(self) -> str:
        """Name it as it stands in the file of a picture."""
        changed = [getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default]
        return " ".join(["weighted", *changed])


@dataclass(frozen=True)
class Plan:
    """The conditions of a call, which may change from step to step."""

    cond: PromptSchedule
    uncond: PromptSchedule | None

    @property
    def first(self) -> tuple[Condition, Condition | None]:
        """Return the conditions that a call without branches begins with."""
        return self.cond.at(0).conditions[0], None if self.uncond is None else self.uncond.at(0).conditions[0]

    def changes(self, i: int) -> bool:
        """Tell whether other conditions hold from step i on."""
        schedules = [self.cond, *([self.uncond] if self.uncond else [])]
        return any(stage.first == i for schedule in schedules for stage in schedule.stages)

    def denoise(
        self,
        net: Denoiser,
        i: int,
        scale: float,
        rescale: float,
        beside: Condition,
        beside_null: Condition,
        chosen: guidance.Guidance | None = None,
    ) -> Denoise:
        """Build the guided network of step i; up to a scale of 1 branches still add up, without guidance beyond.

        Args:
            beside: what is joined to every condition, such as sizes and the known part of a picture.
            beside_null: and to the unconditional one.
            chosen: the caller's guidance.
        """
        stage = self.cond.at(i)
        conds = [condition.join(beside) for condition in stage.conditions]
        uncond = None if self.uncond is None else self.uncond.at(i).conditions[0].join(beside_null)
        weights = None if stage.is_plain else stage.weights
        assert weights is None or uncond is not None
        return guidance.guide(net, conds, weights, uncond, scale, rescale=rescale, guidance=chosen)


def plan_prompts(pipe: LatentDiffusionPipeline, request: Request, num_steps: int) -> Plan | None:
    """Encode the prompts of a request that are written in the grammar; None where they are plain.

    Raises: LdmPipeError as `encode_weighted` does.
    """
    syntax = request.syntax
    if syntax is None or request.prompts is None:
        return None

    def encoded(texts: Sequence[str], clip_skip: int | None, *, negative: bool) -> PromptSchedule:
        with contextlib.ExitStack() as stack:
            for encoder in pipe.text_encoders:
                stack.enter_context(pipe.on_device(encoder))
            schedule = encode_weighted(
                pipe.text_encoders, texts, num_steps=num_steps, clip_skip=clip_skip, emphasis=syntax.emphasis,
                brackets=syntax.brackets, negative=negative,
            )  # fmt: skip
        return schedule.map(lambda condition: condition.to(pipe.device, pipe.dtype))

    cond = encoded(request.prompts, request.clip_skip, negative=False)
    needed = request.guided or not all(stage.is_plain for stage in cond.stages)
    uncond = encoded(request.negatives, None, negative=True) if needed else None
    if uncond is not None and request.zero_null:
        uncond = uncond.map(Condition.zeros)
    length = max(schedule.num_tokens for schedule in (cond, uncond) if schedule is not None)
    return Plan(cond.map(lambda c: c.pad(length)), uncond and uncond.map(lambda c: c.pad(length)))
