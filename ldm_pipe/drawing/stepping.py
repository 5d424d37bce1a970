"""What happens between two steps of a sampler: bad numbers noticed, known parts put back, the caller asked.

What enters: the state after each step. What leaves: the state the sampler goes on with. This file knows no schedule
and no network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    from ldm_pipe.drawing.request.request import Request

Restore = Callable[[int, Tensor], Tensor]  # (i, x after step i) -> x
Rebuild = Callable[[dict[str, Any], float], None]  # (changed embeddings, guidance scale) -> None


class Interrupted(Exception):  # noqa: N818  (not an error: the caller asked for it)
    """Carry the state out of a sampler that the caller interrupted."""

    def __init__(self, x: Tensor) -> None:
        """Keep the state."""
        self.x = x


def not_finite(i: int) -> LdmPipeError:
    """Say at which step the latents were lost."""
    advice = "Use dtype=torch.float32 or bfloat16, a smaller guidance_scale, or look at what the callback returns."
    return LdmPipeError(f"NaN or infinity in the latents after step {i}", "sampling", advice)


class StepHook:
    """The callback a sampler calls after each step: `hook(i, t, x, x0) -> x`."""

    def __init__(
        self,
        view: Any,
        request: Request,
        *,
        advance: Callable[[int], Any],
        interrupted: Callable[[], bool],
        embeddings: dict[str, Tensor | None],
        rebuild: Rebuild,
        restore: Restore | None,
    ) -> None:
        """Keep what the steps of one call share."""
        self.view, self.request, self.advance, self.interrupted = view, request, advance, interrupted
        self.embeddings, self.rebuild, self.restore = embeddings, rebuild, restore
        self.flags: list[tuple[int, Tensor]] = []

    def __call__(self, i: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """Work on the state after step i."""
        if self.restore is not None:
            x = self.restore(i, x)
        if self.request.callback is not None:
            x = self._ask(i, t, x)
        self._watch(i, x)
        self.advance(i)
        if self.interrupted():
            raise Interrupted(x)
        return x

    def _watch(self, i: int, x: Tensor) -> None:
        """Notice bad numbers: at once on a CPU, elsewhere at the end, so that no step waits for the device."""
        fine = torch.isfinite(x).all()
        if x.device.type != "cpu":
            self.flags.append((i, fine))
        elif not bool(fine):
            raise not_finite(i)

    def finish(self) -> None:
        """Raise LdmPipeError for the first step whose latents held bad numbers."""
        if self.flags:
            bad = (~torch.stack([fine for _, fine in self.flags])).nonzero().flatten().tolist()
            if bad:
                raise not_finite(self.flags[bad[0]][0])

    def _ask(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        """Call the caller's function as diffusers does, and take back what it changed."""
        assert self.request.callback is not None
        scale = self.view._guidance_scale
        tensors = {"latents": x, **self.embeddings}
        given = {name: tensors[name] for name in self.request.callback_inputs}
        returned = self.request.callback(self.view, i, t, given)
        if returned is None:
            returned = {}
        if not isinstance(returned, dict):
            what = f"callback_on_step_end returned a {type(returned).__name__}"
            raise LdmPipeError(what, "sampling", "Return the dictionary of tensors it was given.")
        latents = returned.get("latents", x)
        if not isinstance(latents, Tensor) or latents.shape != x.shape:
            shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise LdmPipeError(f"callback_on_step_end returned latents {shape}", "sampling", f"Keep {tuple(x.shape)}.")
        names = ("prompt_embeds", "negative_prompt_embeds")
        changed = {n: returned[n] for n in names if n in returned and returned[n] is not self.embeddings[n]}
        if changed or self.view._guidance_scale != scale:
            self.embeddings.update(changed)
            self.rebuild(self.embeddings, self.view._guidance_scale)
        return latents.to(x)
