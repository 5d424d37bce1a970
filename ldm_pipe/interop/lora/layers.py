"""LoRA while it is trained: two thin matrices beside each chosen module of frozen networks.

What enters: networks. What leaves: the same networks, whose outputs also depend on the few numbers of `TrainableLora`.
Files are written by `save_lora(path, lora.layers())`. This file knows neither data nor losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.interop.lora.forms import Layers, LoraLayer
from ldm_pipe.pretrained import LdmPipeError

TARGETS: dict[str, tuple[str, ...]] = {  # of diffusers' training examples
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "text_encoder_2": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


class _Branch(nn.Module):
    """The two halves beside one Linear or Conv2d: y += (alpha / r) up(down(x))."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, generator: torch.Generator | None) -> None:
        """Draw `down` from N(0, 1 / r^2) and set `up` to zero, so that the network starts as it was."""
        super().__init__()
        self.scale = alpha / rank
        is_conv = isinstance(base, nn.Conv2d)
        rows, columns = base.weight.shape[:2]
        kernel = tuple(base.weight.shape[2:])
        self.down = nn.Parameter(torch.empty(rank, columns, *kernel, device=base.weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, *[1] * len(kernel), device=base.weight.device))
        noise = torch.randn(self.down.shape, generator=generator) / rank
        with torch.no_grad():
            self.down.copy_(noise)
        self.conv: dict[str, Any] = (
            {name: getattr(base, name) for name in ("stride", "padding", "dilation")} if is_conv else {}
        )

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Add to the output of the module.

        Sum, scale and second product are one call; `up` is copied row by row because the gradient of a matrix that
        lies column by column is a product (rows, N) (N, rank), five times as slow as (rank, N) (N, rows).
        """
        down, up = self.down.to(out.dtype), self.up.to(out.dtype)
        if self.conv:
            return out + F.conv2d(F.conv2d(x, down, **self.conv), up) * self.scale
        thin = F.linear(x, down).flatten(0, -2)  # (N, rank)
        return torch.addmm(out.flatten(0, -2), thin, up.t().contiguous(), alpha=self.scale).view(out.shape)

    def beside(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Add to what the module returns; a bound method, so that a copied network has copied branches."""
        return self(args[0], out)


class TrainableLora(nn.Module):
    """Low-rank branches on the modules of networks (Hu et al. 2021, arXiv:2106.09685, eq. 3), and nothing else.

        h = W0 x + (alpha / r) B A x

    The networks are frozen; the parameters of this module (float32) are all that is trained and saved. The branches act
    by forward hooks, so that names and weights of the networks stay as they are.

    Args:
        networks: by their names in files: "unet", "text_encoder", "text_encoder_2".
        rank: r.
        alpha: of the scale alpha / r; None is r.
        targets: ends of module names, for each network; None: the projections of all attention.
        generator: draws A (on the CPU).
    Raises: LdmPipeError if a network has no such module, or a rank is below 1.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        *,
        rank: int,
        alpha: float | None = None,
        targets: Mapping[str, Sequence[str]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Freeze the networks and put the branches on."""
        super().__init__()
        if rank < 1:
            raise LdmPipeError(f"rank {rank}", "LoRA", "Use a whole number from 1.")
        self.alpha = float(rank if alpha is None else alpha)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise LdmPipeError(f"alpha {alpha}", "LoRA", "Use a number above 0.")
        self.rank = rank
        self.places: list[tuple[str, str]] = []
        self.branches = nn.ModuleList()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for part, net in networks.items():
            net.requires_grad_(False)
            ends = tuple((targets or TARGETS).get(part, ()))
            found = {name: module for name, module in net.named_modules() if _ends(name, ends)}
            if not found:
                what = f"{part} has no module whose name ends in one of {list(ends)}"
                raise LdmPipeError(what, "LoRA", "Name ends such as to_q, to_k, to_v, to_out.0.")
            for name, module in found.items():
                self._put_on(part, name, module, generator)

    def _put_on(self, part: str, name: str, module: nn.Module, generator: torch.Generator | None) -> None:
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or (isinstance(module, nn.Conv2d) and module.groups != 1):
            kind = type(module).__name__
            raise LdmPipeError(f"{part}.{name} is a {kind}", "LoRA", "Only Linear and plain Conv2d take a LoRA.")
        branch = _Branch(module, self.rank, self.alpha, generator)
        self.places.append((part, name))
        self.branches.append(branch)
        self._handles.append(module.register_forward_hook(branch.beside))

    def layers(self) -> Layers:
        """Return copies of all halves, to save or to merge."""
        return {
            place: LoraLayer(branch.down.detach().clone(), branch.up.detach().clone(), self.alpha)
            for place, branch in zip(self.places, self.branches, strict=True)
            if isinstance(branch, _Branch)
        }

    def load(self, layers: Layers) -> None:
        """Take over halves of the same places, rank and alpha, such as those of a saved file.

        Raises: LdmPipeError if they do not fit.
        """
        own = self.layers()
        same = layers.keys() == own.keys() and all(
            isinstance(layer, LoraLayer)
            and layer.magnitude is None
            and layer.core is None
            and layer.down.shape == own[place].down.shape  # type: ignore[union-attr]
            for place, layer in layers.items()
        )
        if not same:
            fix = "Train with the rank and targets of the file."
            raise LdmPipeError("the LoRA has other modules or another rank", "LoRA", fix)
        for place, branch in zip(self.places, self.branches, strict=True):
            layer = layers[place]
            assert isinstance(branch, _Branch)
            assert isinstance(layer, LoraLayer)
            with torch.no_grad():
                branch.down.copy_(layer.down)
                branch.up.copy_(layer.up * (layer.alpha / self.alpha))

    def remove(self) -> None:
        """Take the branches off; the networks are what they were, and stay frozen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
