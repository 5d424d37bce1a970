"""ADM classifiers: read as openai's code runs them (written out again below), refused where something does not fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe import NoiseSchedule, UNet
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.interop.single.adm import Heads, import_adm
from ldm_pipe.interop.single.adm_classifier import read_classifier_config
from ldm_pipe.networks.classifier import ADMClassifier
from ldm_pipe.pipelines import UnconditionalPipeline
from ldm_pipe.pretrained import LdmPipeError

WIDTHS, DEPTH, HEAD, SIZE, CLASSES = (32, 64), 2, 16, 16, 5
DRAW = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return 0.2 * torch.randn(*shape, generator=DRAW)


HIDDEN = 64


def checkpoint(pool: str = "attention") -> dict[str, Tensor]:
    """Draw the tensors of EncoderUNetModel, two levels with attention in the second and in the middle."""
    tensors: dict[str, Tensor] = {}

    def linear(name: str, before: int, after: int, *size: int) -> None:
        tensors.update({f"{name}.weight": numbers(after, before, *size), f"{name}.bias": numbers(after)})

    def norm(name: str, width: int) -> None:
        tensors.update({f"{name}.weight": 1 + numbers(width), f"{name}.bias": numbers(width)})

    def residual(name: str, before: int, after: int) -> None:
        norm(f"{name}.in_layers.0", before)
        linear(f"{name}.in_layers.2", before, after, 3, 3)
        linear(f"{name}.emb_layers.1", 128, 2 * after)
        norm(f"{name}.out_layers.0", after)
        linear(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            linear(f"{name}.skip_connection", before, after, 1, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        linear(f"{name}.qkv", width, 3 * width, 1)
        linear(f"{name}.proj_out", width, width, 1)

    linear("time_embed.0", 32, 128)
    linear("time_embed.2", 128, 128)
    linear("input_blocks.0.0", 3, 32, 3, 3)
    residual("input_blocks.1.0", 32, 32)
    residual("input_blocks.2.0", 32, 32)
    residual("input_blocks.3.0", 32, 32)  # halves
    residual("input_blocks.4.0", 32, 64)
    attention("input_blocks.4.1", 64)
    residual("input_blocks.5.0", 64, 64)
    attention("input_blocks.5.1", 64)
    residual("middle_block.0", 64, 64)
    attention("middle_block.1", 64)
    residual("middle_block.2", 64, 64)
    if pool.startswith("spatial"):  # conv_in, five blocks, the middle
        linear("out.0", 32 + 3 * 32 + 2 * 64 + 64, HIDDEN)
        linear("out.2" if pool == "spatial" else "out.3", HIDDEN, CLASSES)
        if pool == "spatial_v2":
            norm("out.1", HIDDEN)
        return tensors
    norm("out.0", 64)
    if pool == "adaptive":
        linear("out.3", 64, CLASSES, 1, 1)
        return tensors
    tensors["out.2.positional_embedding"] = numbers(64, 1 + (SIZE // 2) ** 2)
    linear("out.2.qkv_proj", 64, 192, 1)
    linear("out.2.c_proj", 64, CLASSES, 1)
    return tensors


def reference(tensors: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """Run EncoderUNetModel as guided_diffusion/unet.py does."""

    def of(name: str) -> tuple[Tensor, Tensor]:
        return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(16) / 16)
    emb = F.linear(torch.cat([angles.cos(), angles.sin()], dim=-1), *of("time_embed.0"))
    emb = F.linear(F.silu(emb), *of("time_embed.2"))

    def residual(name: str, x: Tensor, *, halve: bool = False) -> Tensor:
        h = F.silu(F.group_norm(x, 32, *of(f"{name}.in_layers.0")))
        h, x = (F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)) if halve else (h, x)
        h = F.conv2d(h, *of(f"{name}.in_layers.2"), padding=1)
        scale, shift = F.linear(F.silu(emb), *of(f"{name}.emb_layers.1"))[:, :, None, None].chunk(2, dim=1)
        h = F.group_norm(h, 32, *of(f"{name}.out_layers.0")) * (1 + scale) + shift
        h = F.conv2d(F.silu(h), *of(f"{name}.out_layers.3"), padding=1)
        wide = f"{name}.skip_connection.weight" in tensors
        return h + (F.conv2d(x, *of(f"{name}.skip_connection")) if wide else x)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1]), dim=-1)
        return torch.einsum("bts,bcs->bct", weight, v)

    def attention(name: str, x: Tensor) -> Tensor:  # QKVAttentionLegacy
        flat = x.flatten(2)
        batch, channels, length = flat.shape
        qkv = F.conv1d(F.group_norm(flat, 32, *of(f"{name}.norm")), *of(f"{name}.qkv"))
        q, k, v = qkv.reshape(batch * channels // HEAD, 3 * HEAD, length).split(HEAD, dim=1)
        h = attend(q, k, v).reshape(batch, channels, length)
        return (flat + F.conv1d(h, *of(f"{name}.proj_out"))).reshape(x.shape)

    h = F.conv2d(x, *of("input_blocks.0.0"), padding=1)
    means = [h.mean((2, 3))]
    for n in range(1, 6):
        h = residual(f"input_blocks.{n}.0", h, halve=n == 3)
        h = attention(f"input_blocks.{n}.1", h) if n > 3 else h
        means.append(h.mean((2, 3)))
    h = residual("middle_block.2", attention("middle_block.1", residual("middle_block.0", h)))
    if "out.2.weight" in tensors:  # spatial
        return F.linear(F.relu(F.linear(torch.cat([*means, h.mean((2, 3))], -1), *of("out.0"))), *of("out.2"))
    if "out.1.weight" in tensors:  # spatial_v2
        hidden = F.linear(torch.cat([*means, h.mean((2, 3))], -1), *of("out.0"))
        return F.linear(F.silu(F.group_norm(hidden, 32, *of("out.1"))), *of("out.3"))
    if "out.3.weight" in tensors:  # adaptive
        return F.conv2d(F.adaptive_avg_pool2d(F.silu(F.group_norm(h, 32, *of("out.0"))), 1), *of("out.3")).flatten(1)
    h = F.silu(F.group_norm(h, 32, *of("out.0"))).flatten(2)  # and AttentionPool2d
    h = torch.cat([h.mean(dim=-1, keepdim=True), h], dim=-1) + tensors["out.2.positional_embedding"][None]
    qkv = F.conv1d(h, *of("out.2.qkv_proj"))
    q, k, v = (part.reshape(len(x) * 64 // HEAD, HEAD, -1) for part in qkv.chunk(3, dim=1))
    return F.conv1d(attend(q, k, v).reshape(len(x), 64, -1), *of("out.2.c_proj"))[:, :, 0]


@pytest.fixture
def imported(tmp_path: Path) -> tuple[ADMClassifier, dict[str, Tensor]]:
    tensors = checkpoint()
    torch.save(tensors, tmp_path / "classifier.pt")
    notes = import_adm(tmp_path / "classifier.pt", tmp_path / "out", heads=Heads(width=HEAD))
    assert "classifier" in notes[0]
    return ADMClassifier.from_pretrained(tmp_path / "out" / "classifier"), tensors


@torch.no_grad()
@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_every_pool_of_openais_code_loads_and_computes_the_same(pool: str, tmp_path: Path) -> None:
    """fp32, 1e-5 of the largest logit; `pool="adaptive"` used to end in a KeyError."""
    tensors = checkpoint(pool)
    torch.save(tensors, tmp_path / "classifier.pt")
    import_adm(tmp_path / "classifier.pt", tmp_path / "out", heads=Heads(width=HEAD))
    net = ADMClassifier.from_pretrained(tmp_path / "out" / "classifier")
    x, t = torch.randn(2, 3, SIZE, SIZE, generator=DRAW), torch.tensor([3.0, 701.0])
    expected = reference(tensors, x, t)
    assert expected.shape == (2, CLASSES) and float(expected.abs().max()) > 0.1
    assert float((net(x, t) - expected).abs().max() / expected.abs().max()) < 1e-5
    net.save_pretrained(tmp_path / "again")
    assert torch.equal(ADMClassifier.from_pretrained(tmp_path / "again")(x, t), net(x, t))
    with pytest.raises(LdmPipeError, match="x_t"):
        net(x[:, :, 1:], t)


def test_an_unknown_pool_is_refused() -> None:
    config = read_classifier_config(checkpoint("adaptive"), "file", head_width=HEAD)
    with pytest.raises(LdmPipeError, match=r"pool.*'max'.*adaptive"):
        ADMClassifier.from_config({**config, "pool": "max"})


@torch.no_grad()
def test_it_computes_what_openais_code_computes(
    imported: tuple[ADMClassifier, dict[str, Tensor]], tmp_path: Path
) -> None:
    """fp32, 1e-5 of the largest logit: the same sums in another order."""
    net, tensors = imported
    x, t = torch.randn(2, 3, SIZE, SIZE, generator=DRAW), torch.tensor([3.0, 701.0])
    expected = reference(tensors, x, t)
    assert expected.shape == (2, CLASSES)
    assert float((net(x, t) - expected).abs().max() / expected.abs().max()) < 1e-5
    net.save_pretrained(tmp_path / "again")
    assert torch.equal(ADMClassifier.from_pretrained(tmp_path / "again")(x, t), net(x, t))


def test_its_gradient_guides_a_pipeline(imported: tuple[ADMClassifier, dict[str, Tensor]]) -> None:
    """One step of DDIM: x0 moves by s sigma^2 / alpha times the gradient (arXiv:2105.05233, algorithm 2)."""
    net, _ = imported
    config = {
        "_class_name": "UNet2DModel", "sample_size": SIZE, "block_out_channels": [16, 32], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    law = NoiseSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    pipe = UnconditionalPipeline(UNet.from_config(config).eval(), law, defaults=Defaults(sampler="ddim"))
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(2, 3, SIZE, SIZE, generator=DRAW)
    call: dict[str, Any] = {"batch_size": 2, "latents": x, "num_inference_steps": 1, "spacing": "trailing"}
    call |= {"sampler": "ddim", "output_type": "latent"}
    shift = pipe(**call, class_labels=2, classifier=net, classifier_scale=3.0).images - pipe(**call).images
    t = torch.tensor(999.0, dtype=torch.float64)
    alpha, sigma = (float(level) for level in law.alpha_sigma(t))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, 999.0).log_softmax(dim=1)[:, 2].sum(), x)
    torch.testing.assert_close(shift, 3.0 * sigma**2 / alpha * gradient, rtol=1e-3, atol=1e-3)
    assert gradient.abs().max() > 1e-4


def published(widths: tuple[int, ...], depth: int, attention: tuple[int, ...], side: int) -> dict[str, Tensor]:
    """Return tensors on the meta device under the names, and with the shapes, that `create_classifier` gives them."""
    shapes: dict[str, tuple[int, ...]] = {
        "time_embed.0.weight": (512, 128),
        "input_blocks.0.0.weight": (widths[0], 3, 3, 3),
        "out.2.positional_embedding": (widths[-1], side * side + 1),
        "out.2.c_proj.weight": (1000, widths[-1], 1),
    }
    n, before = 0, widths[0]
    for i, width in enumerate(widths):
        for j in range(depth + (i + 1 < len(widths))):
            n += 1
            shapes[f"input_blocks.{n}.0.in_layers.2.weight"] = (width, before, 3, 3)
            shapes[f"input_blocks.{n}.0.emb_layers.1.weight"] = (2 * width, 512)
            if before != width:
                shapes[f"input_blocks.{n}.0.skip_connection.weight"] = (width, before, 1, 1)
            if i in attention and j < depth:
                shapes[f"input_blocks.{n}.1.qkv.weight"] = (3 * width, width, 1)
            before = width
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("size", "widths", "depth", "attention"),
    [
        (64, (128, 256, 384, 512), 4, (1, 2, 3)),
        (128, (128, 128, 256, 384, 512), 2, (2, 3, 4)),
        (256, (128, 128, 256, 256, 512, 512), 2, (3, 4, 5)),
        (512, (64, 128, 128, 256, 256, 512, 512), 2, (4, 5, 6)),
    ],
)
def test_the_published_sizes_are_read_off_the_shapes(
    size: int, widths: tuple[int, ...], depth: int, attention: tuple[int, ...]
) -> None:
    """classifier_and_diffusion_defaults of guided-diffusion: width 128, depth 4 at 64 pixels, 2 above."""
    config = read_classifier_config(published(widths, depth, attention, size // 2 ** (len(widths) - 1)), "file")
    assert (config["sample_size"], config["num_classes"]) == (size, 1000)
    assert config["block_out_channels"] == list(widths)
    assert config["layers_per_block"] == depth
    found = [i for i, name in enumerate(config["down_block_types"]) if name == "AttnDownBlock2D"]
    assert tuple(found) == attention
    assert config["sinusoid_dim"] == (128 if widths[0] == 64 else 0)
    with torch.device("meta"):
        assert ADMClassifier.from_config(config).pool.num_heads == widths[-1] // 64


def test_damage_and_other_sizes_are_refused(imported: tuple[ADMClassifier, dict[str, Tensor]], tmp_path: Path) -> None:
    net, tensors = imported
    cases = {
        "fewer": ({n: x for n, x in tensors.items() if "middle_block.2" not in n}, "missing mid_block"),
        "more": ({**tensors, "extra.weight": torch.ones(2)}, r"unexpected extra.weight \[2\]"),
        "no level": ({n: x for n, x in tensors.items() if not n.startswith("input_blocks.5")}, "blocks on the way"),
    }
    for name, (content, reason) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(LdmPipeError, match=reason):
            import_adm(tmp_path / f"{name}.pt", tmp_path / name, heads=Heads(width=HEAD))
        assert not (tmp_path / name).exists()
    with pytest.raises(LdmPipeError, match="x_t"):
        net(torch.zeros(1, 3, 8, 8), 0.0)
