"""Inception v3 as the literature's numbers use it: the network of 2015, as TensorFlow ran it.

Pictures enter, pool_3's 2,048 features, sFID's 2,023 spatial ones and logits leave. Names of weights are torchvision's,
which torch-fidelity shares. Weights are not part of this package: `evaluate.py inception` converts the file of 2015.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule, check_sizes

Variant = Literal["tf2015", "torchvision"]
SIDE = 299
NUM_SPATIAL = 7  # channels of mixed_6/conv, 17 x 17 each: 2,023 numbers, about as many as pool_3 has

# A branch is a chain of convolutions "name width kernel_h kernel_w [stride]"; a tuple ends it in a fork. "avg" and
# "max" pool; what has stride 2 has no padding.
Link = str | tuple[str, ...]


def _a(pooled: int) -> list[list[Link]]:
    return [
        ["branch1x1 64 1 1"],
        ["branch5x5_1 48 1 1", "branch5x5_2 64 5 5"],
        ["branch3x3dbl_1 64 1 1", "branch3x3dbl_2 96 3 3", "branch3x3dbl_3 96 3 3"],
        ["avg", f"branch_pool {pooled} 1 1"],
    ]


def _c(width: int) -> list[list[Link]]:
    long = [f"branch7x7dbl_{i + 1} {width} {size}" for i, size in enumerate(("1 1", "7 1", "1 7", "7 1"))]
    return [
        ["branch1x1 192 1 1"],
        [f"branch7x7_1 {width} 1 1", f"branch7x7_2 {width} 1 7", "branch7x7_3 192 7 1"],
        [*long, "branch7x7dbl_5 192 1 7"],
        ["avg", "branch_pool 192 1 1"],
    ]


def _e(pool: str) -> list[list[Link]]:
    return [
        ["branch1x1 320 1 1"],
        ["branch3x3_1 384 1 1", ("branch3x3_2a 384 1 3", "branch3x3_2b 384 3 1")],
        ["branch3x3dbl_1 448 1 1", "branch3x3dbl_2 384 3 3", ("branch3x3dbl_3a 384 1 3", "branch3x3dbl_3b 384 3 1")],
        [pool, "branch_pool 192 1 1"],
    ]


STEM = [
    "Conv2d_1a_3x3 32 3 3 2", "Conv2d_2a_3x3 32 3 3 1 valid", "Conv2d_2b_3x3 64 3 3", "max",
    "Conv2d_3b_1x1 80 1 1", "Conv2d_4a_3x3 192 3 3 1 valid", "max",
]  # fmt: skip


def blocks(variant: Variant) -> dict[str, list[list[Link]]]:
    """Return the branches of every mixed block, in order.

    The frozen graph of 2015 pools by the maximum in its last block, where the paper and torchvision average.
    """
    last = "max 1" if variant == "tf2015" else "avg"
    return {
        "Mixed_5b": _a(32),
        "Mixed_5c": _a(64),
        "Mixed_5d": _a(64),
        "Mixed_6a": [
            ["branch3x3 384 3 3 2"],
            ["branch3x3dbl_1 64 1 1", "branch3x3dbl_2 96 3 3", "branch3x3dbl_3 96 3 3 2"],
            ["max"],
        ],
        "Mixed_6b": _c(128),
        "Mixed_6c": _c(160),
        "Mixed_6d": _c(160),
        "Mixed_6e": _c(192),
        "Mixed_7a": [
            ["branch3x3_1 192 1 1", "branch3x3_2 320 3 3 2"],
            ["branch7x7x3_1 192 1 1", "branch7x7x3_2 192 1 7", "branch7x7x3_3 192 7 1", "branch7x7x3_4 192 3 3 2"],
            ["max"],
        ],
        "Mixed_7b": _e("avg"),
        "Mixed_7c": _e(last),
    }


class NormedConv(nn.Module):
    """Convolution without bias, batch norm with the averages of the training, ReLU."""

    def __init__(self, in_channels: int, link: str) -> None:
        """Read `name width kernel_h kernel_w [stride] [valid]`."""
        super().__init__()
        _, width, height, across, *rest = link.split()
        kernel, stride = (int(height), int(across)), int(rest[0]) if rest else 1
        padding = (0, 0) if stride == 2 or "valid" in rest else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(in_channels, int(width), kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(int(width), eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, H, W)."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, joined along the channels.

    Args:
        in_channels: of what enters.
        branches: see `blocks`.
        counts_padding: whether averages at the border count the zeros beyond; TensorFlow does not, torchvision does.
    """

    def __init__(self, in_channels: int, branches: list[list[Link]], counts_padding: bool) -> None:
        """Build the convolutions under their names."""
        super().__init__()
        self.branches, self.counts_padding, self.out_channels = branches, counts_padding, 0
        for branch in branches:
            width = in_channels
            for link in branch:
                ends = link if isinstance(link, tuple) else (link,)
                widths = [width]
                for end in ends:
                    if not end.startswith(("avg", "max")):
                        self.add_module(end.split()[0], NormedConv(width, end))
                        widths.append(int(end.split()[1]))
                width = sum(widths[1:]) if len(widths) > 1 else width
            self.out_channels += width

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, H, W)."""
        return torch.cat([self.follow(branch, x) for branch in self.branches], dim=1)

    def follow(self, branch: list[Link], x: Tensor) -> Tensor:
        """Walk along one branch."""
        for link in branch:
            match link:
                case tuple():
                    x = torch.cat([self.get_submodule(end.split()[0])(x) for end in link], dim=1)
                case "avg":
                    x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=self.counts_padding)
                case "max 1":
                    x = F.max_pool2d(x, 3, 1, 1)
                case "max":
                    x = F.max_pool2d(x, 3, 2)
                case _:
                    x = self.get_submodule(link.split()[0])(x)
        return x


class InceptionV3(PretrainedModule):
    """Inception v3 (Szegedy et al. 2015, arXiv:1512.00567), as frozen in 2015 or as torchvision trains it.

    Args:
        config: `variant` and `num_classes` (1,008 in the graph of 2015).
    """

    weights_name = "model"
    class_name = "LdmPipeInception"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the network with random weights."""
        super().__init__()
        if config.get("variant") not in get_args(Variant):
            raise LdmPipeError(f"variant is {config.get('variant')!r}", "inception config", f"Use {get_args(Variant)}.")
        check_sizes(config, {"num_classes": 100_000}, where="inception config")
        self.config = FrozenConfig(config)
        width = 3
        for link in STEM:
            if link != "max":
                self.add_module(link.split()[0], NormedConv(width, link))
                width = int(link.split()[1])
        self.block_names = list(blocks(config["variant"]))
        for name, branches in blocks(config["variant"]).items():
            block = Mixed(width, branches, counts_padding=config["variant"] == "torchvision")
            self.add_module(name, block)
            width = block.out_channels
        self.fc = nn.Linear(width, config["num_classes"])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> InceptionV3:
        """Build the network with random weights."""
        return cls(config)

    @property
    def is_of_2015(self) -> bool:
        """Tell whether it is the network that FID is defined with."""
        return self.config["variant"] == "tf2015"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Describe pictures.

        Args:
            images: whole numbers from 0 to 255, shape (B, 3, H, W), any size.
        Returns: vectors: pool_3, (B, 2048). spatial: the first seven channels of mixed_6/conv, row by row with the
            channels innermost, (B, 2023). logits: (B, K), without the bias of the last layer for the network of 2015,
            as guided-diffusion's Inception Score has them.
        """
        x = self.prepare(images)
        for link in STEM:
            x = F.max_pool2d(x, 3, 2) if link == "max" else self.get_submodule(link.split()[0])(x)
        spatial = x
        for name in self.block_names:
            block = self.get_submodule(name)
            if name == "Mixed_6d":
                spatial = block.get_submodule("branch1x1")(x)[:, :NUM_SPATIAL]
            x = block(x)
        vectors = x.mean(dim=(2, 3))
        logits = F.linear(vectors, self.fc.weight, None if self.is_of_2015 else self.fc.bias)
        return {"vectors": vectors, "spatial": spatial.permute(0, 2, 3, 1).flatten(1), "logits": logits}

    def prepare(self, images: Tensor) -> Tensor:
        """Bring pictures to 299 x 299 and to about [-1, 1], each variant in its own way."""
        x = images.to(self.fc.weight)
        if self.is_of_2015:
            return (resize_like_tensorflow(x, SIDE) - 128.0) / 128.0
        return F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True) / 127.5 - 1.0


def resize_like_tensorflow(x: Tensor, side: int) -> Tensor:
    """Resize as TensorFlow 1's ResizeBilinear without align_corners: pixel i is taken at i * old / new.

    Neither centred on pixels nor smoothed when shrinking; torch has no such mode.

    Args:
        x: (B, C, H, W).
    """
    for axis in (3, 2):  # TensorFlow first mixes left and right, then above and below
        old = x.shape[axis]
        place = torch.arange(side, device=x.device, dtype=torch.float32) * torch.tensor(old / side)
        low = place.long().clamp_max(old - 1)
        high = (low + 1).clamp_max(old - 1)
        part = (place - low).to(x).reshape([-1 if a == axis else 1 for a in range(4)])
        first, second = x.index_select(axis, low), x.index_select(axis, high)
        x = first + (second - first) * part
    return x
