"""What evaluations of a U-Net on the same tokens have in common: computed once, instead of in every step.

What enters: tokens (B, L, D), and functions of tokens and weights. What leaves: values. This file knows no layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn

ValueT = TypeVar("ValueT")


class Kept:
    """Tokens, and what modules made of them and of their own weights.

    It is good as long as tokens and weights stay as they are: for one call of the pipeline. With `keep=False` nothing
    is kept, as under autograd, where every evaluation needs a graph of its own.
    """

    def __init__(self, tokens: Tensor, *, keep: bool, given: Tensor | None = None) -> None:
        """Hold the tokens; `given`: as they were before a first projection."""
        self.tokens, self.keep = tokens, keep
        self.given = tokens if given is None else given
        self._made: dict[nn.Module, Any] = {}

    def once(self, module: nn.Module, make: Callable[[], ValueT]) -> ValueT:
        """Return what `make` makes for a module, made at the first evaluation."""
        if not self.keep:
            return make()
        if module not in self._made:
            self._made[module] = make()
        return cast(ValueT, self._made[module])
