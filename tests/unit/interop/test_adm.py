"""ADM checkpoints: read as openai's code runs them (written out again below), refused where something is not known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.interop.single.adm import _SCHEDULER, KNOWN, Heads, import_adm, is_adm, known_heads, read_shape, split_qkv
from ldm_pipe.interop.single.ldm_names import unet_modules
from ldm_pipe.networks import UNet
from ldm_pipe.networks.config_2d import OWN_CLASS_2D, read_config_2d
from ldm_pipe.pipelines import UnconditionalPipeline, load_pipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import read as schedule_config

T, LABELS = torch.tensor([3.0, 701.0]), torch.tensor([1, 4])


class Reference:
    """openai's UNetModel with its own names, as guided_diffusion/unet.py computes it; r + 1 blocks per level."""

    def __init__(self, per_level: int, heads: Heads, sinusoid_dim: int = 32) -> None:
        """Draw weights of two levels, 32 and 64 wide, with attention in the second and in the middle."""
        self.per_level, self.heads, self.dim = per_level, heads, sinusoid_dim
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)
        self._linear("time_embed.0", sinusoid_dim, 128)
        self._linear("time_embed.2", 128, 128)
        self.tensors["label_emb.weight"] = self._numbers(5, 128)
        self._conv("input_blocks.0.0", 3, 32)
        widths, inputs = (32, 64), [32]
        n, before = 0, 32
        for i, width in enumerate(widths):
            for _ in range(per_level - 1):
                n += 1
                self._residual(f"input_blocks.{n}.0", before, width)
                if i == 1:
                    self._attention(f"input_blocks.{n}.1", width)
                before = width
                inputs.append(width)
            if i == 0:
                n += 1
                self._residual(f"input_blocks.{n}.0", width, width)
                inputs.append(width)
        self._residual("middle_block.0", 64, 64)
        self._attention("middle_block.1", 64)
        self._residual("middle_block.2", 64, 64)
        for n in range(2 * per_level):
            width = widths[1 - n // per_level]
            self._residual(f"output_blocks.{n}.0", before + inputs.pop(), width)
            if n < per_level:
                self._attention(f"output_blocks.{n}.1", width)
            if n == per_level - 1:
                self._residual(f"output_blocks.{n}.2", width, width)
            before = width
        self._norm("out.0", 32)
        self._conv("out.2", 32, 6)

    def _numbers(self, *shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=self.generator)

    def _linear(self, name: str, before: int, after: int) -> None:
        self.tensors |= {f"{name}.weight": self._numbers(after, before), f"{name}.bias": self._numbers(after)}

    def _conv(self, name: str, before: int, after: int, *size: int) -> None:
        size = size or (3, 3)
        self.tensors |= {f"{name}.weight": self._numbers(after, before, *size), f"{name}.bias": self._numbers(after)}

    def _norm(self, name: str, width: int) -> None:
        self.tensors |= {f"{name}.weight": 1 + self._numbers(width), f"{name}.bias": self._numbers(width)}

    def _residual(self, name: str, before: int, after: int) -> None:
        self._norm(f"{name}.in_layers.0", before)
        self._conv(f"{name}.in_layers.2", before, after)
        self._linear(f"{name}.emb_layers.1", 128, 2 * after)
        self._norm(f"{name}.out_layers.0", after)
        self._conv(f"{name}.out_layers.3", after, after)
        if before != after:
            self._conv(f"{name}.skip_connection", before, after, 1, 1)

    def _attention(self, name: str, width: int) -> None:
        self._norm(f"{name}.norm", width)
        self._conv(f"{name}.qkv", width, 3 * width, 1)
        self._conv(f"{name}.proj_out", width, width, 1)

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def _run_residual(self, name: str, x: Tensor, emb: Tensor, resample: Any = None) -> Tensor:
        resample = resample or (lambda value: value)
        h = resample(F.silu(F.group_norm(x, 32, *self._of(f"{name}.in_layers.0"))))
        h, x = F.conv2d(h, *self._of(f"{name}.in_layers.2"), padding=1), resample(x)
        scale, shift = F.linear(F.silu(emb), *self._of(f"{name}.emb_layers.1"))[:, :, None, None].chunk(2, dim=1)
        h = F.group_norm(h, 32, *self._of(f"{name}.out_layers.0")) * (1 + scale) + shift
        h = F.conv2d(F.silu(h), *self._of(f"{name}.out_layers.3"), padding=1)
        if f"{name}.skip_connection.weight" in self.tensors:
            x = F.conv2d(x, *self._of(f"{name}.skip_connection"))
        return x + h

    def _run_attention(self, name: str, x: Tensor) -> Tensor:
        batch, channels, *space = x.shape
        flat = x.reshape(batch, channels, -1)
        qkv = F.conv1d(F.group_norm(flat, 32, *self._of(f"{name}.norm")), *self._of(f"{name}.qkv"))
        count = self.heads.count or channels // (self.heads.width or channels)
        width, length = channels // count, flat.shape[-1]
        if self.heads.order == "per_head":  # QKVAttentionLegacy
            q, k, v = qkv.reshape(batch * count, width * 3, length).split(width, dim=1)
        else:  # QKVAttention
            q, k, v = (part.reshape(batch * count, width, length) for part in qkv.chunk(3, dim=1))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(width), dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(batch, -1, length)
        return (flat + F.conv1d(h, *self._of(f"{name}.proj_out"))).reshape(batch, channels, *space)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Run the network."""
        half = self.dim // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = F.linear(torch.cat([angles.cos(), angles.sin()], dim=-1), *self._of("time_embed.0"))
        emb = F.linear(F.silu(emb), *self._of("time_embed.2")) + self.tensors["label_emb.weight"][y]
        h = F.conv2d(x, *self._of("input_blocks.0.0"), padding=1)
        skips = [h]
        for n in range(1, 2 * self.per_level):
            h = self._run_residual(
                f"input_blocks.{n}.0", h, emb, (lambda value: F.avg_pool2d(value, 2)) if n == self.per_level else None
            )
            if n > self.per_level:
                h = self._run_attention(f"input_blocks.{n}.1", h)
            skips.append(h)
        h = self._run_residual("middle_block.0", h, emb)
        h = self._run_residual("middle_block.2", self._run_attention("middle_block.1", h), emb)
        for n in range(2 * self.per_level):
            h = self._run_residual(f"output_blocks.{n}.0", torch.cat([h, skips.pop()], dim=1), emb)
            if n < self.per_level:
                h = self._run_attention(f"output_blocks.{n}.1", h)
            if n == self.per_level - 1:
                h = self._run_residual(
                    f"output_blocks.{n}.2", h, emb, lambda value: F.interpolate(value, scale_factor=2)
                )
        return F.conv2d(F.silu(F.group_norm(h, 32, *self._of("out.0"))), *self._of("out.2"), padding=1)


CASES = {
    "width": (Heads(width=16), 32, "UNet2DModel"),
    "width_split": (Heads(width=16, order="split"), 32, "UNet2DModel"),
    "count": (Heads(count=4), 32, OWN_CLASS_2D),
    "sinusoid": (Heads(width=32), 64, OWN_CLASS_2D),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_imported_networks_compute_what_openais_code_computes(name: str, tmp_path: Path) -> None:
    """fp32, 1e-5 of the largest output: the same sums in another order."""
    heads, sinusoid_dim, class_name = CASES[name]
    reference = Reference(3, heads, sinusoid_dim)
    assert is_adm(reference.tensors)
    torch.save(reference.tensors, tmp_path / "model.pt")
    notes = import_adm(tmp_path / "model.pt", tmp_path / "out", heads=heads)
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["_class_name"] == class_name
    assert bool(notes) == (class_name == OWN_CLASS_2D)
    net = UNet.from_pretrained(tmp_path / "out" / "unet")
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    expected = reference(x, T, LABELS)
    assert float((net(x, T, labels=LABELS) - expected).abs().max() / expected.abs().max()) < 1e-5
    net.save_pretrained(tmp_path / "again")
    assert torch.equal(UNet.from_pretrained(tmp_path / "again")(x, T, labels=LABELS), net(x, T, labels=LABELS))


@torch.no_grad()
def test_the_wrong_order_of_q_k_v_fits_and_is_wrong(tmp_path: Path) -> None:
    reference = Reference(2, Heads(width=16))
    torch.save(reference.tensors, tmp_path / "model.pt")
    import_adm(tmp_path / "model.pt", tmp_path / "out", heads=Heads(width=16, order="split"))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net = UNet.from_pretrained(tmp_path / "out" / "unet")
    assert not torch.allclose(net(x, T, labels=LABELS), reference(x, T, LABELS), atol=1e-2)


def test_both_orders_are_the_same_rows() -> None:
    rows = torch.arange(24.0)[:, None]
    assert split_qkv(rows, 2, "split")[1][:, 0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert split_qkv(rows, 2, "per_head")[1][:, 0].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]


def test_diffusers_computes_the_same_where_its_class_fits(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    reference = Reference(2, Heads(width=16))
    torch.save(reference.tensors, tmp_path / "model.pt")
    import_adm(tmp_path / "model.pt", tmp_path / "out", heads=Heads(width=16))
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(x, T, LABELS)
        assert float((theirs(x, T, LABELS).sample - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("heads", [Heads(width=16), Heads(count=4)])
def test_a_published_model_becomes_a_folder_that_draws(
    heads: Heads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By class, with its learnt variance; heads that diffusers has not are ours to draw with."""
    reference = Reference(2, heads)
    monkeypatch.setitem(KNOWN, ((32, 64), 1, (1,)), (heads, "linear"))
    torch.save(reference.tensors, tmp_path / "model.pt")
    import_adm(tmp_path / "model.pt", tmp_path / "out")
    pipe: Any = load_pipeline(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, UnconditionalPipeline)
    assert (pipe.num_classes, pipe.default_size, pipe.defaults.sampler) == (5, (64, 64), "ddpm")
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z = pipe(class_labels=3, latents=noise, height=16, width=16, num_inference_steps=1, output_type="latent").images
    t = torch.tensor([0.0])  # one step of 1000, with leading spacing, is the last time
    alpha, sigma = (float(level) for level in pipe.schedule.alpha_sigma(t[0].double()))
    eps = reference(noise, t, torch.tensor([3]))[:, :3]
    torch.testing.assert_close(z, ((noise - sigma * eps) / alpha).clamp(-1, 1), rtol=0, atol=1e-4)


def test_published_models_are_known_by_their_shapes() -> None:
    """The 64 model's names and shapes, from the config whose 295,904,454 parameters are openai's number."""
    config = json.loads((Path(__file__).parents[2] / "data" / "full_size_configs.json").read_text())
    spec = read_config_2d(config["adm64-as-diffusers/unet"]["config"])
    with torch.device("meta"):
        net = UNet(spec, {"_class_name": "UNet2DModel", **config["adm64-as-diffusers/unet"]["config"]})
    modules = unet_modules(spec)
    names = {}
    for key, tensor in net.state_dict().items():
        module = key
        while module not in modules:
            module = module.rpartition(".")[0]
        name = modules[module] + key[len(module) :]
        names[name.replace("to_q", "qkv").replace("group_norm", "norm").replace("to_out.0", "proj_out")] = tensor
    shape = read_shape(names, "file")
    assert shape.channels == (192, 384, 576, 768)
    assert shape.attends == (False, True, True, True)
    assert (shape.num_residual, shape.num_classes, shape.out_channels) == (3, 1000, 6)
    assert shape.residual_resampling
    assert shape.scale_shift
    assert known_heads(shape, "file") == (Heads(width=64, order="split"), "squaredcos_cap_v2")
    assert len(KNOWN) == 6
    for beta_schedule in {law for _, law in KNOWN.values()}:
        law = schedule_config.read({**_SCHEDULER, "beta_schedule": beta_schedule})
        assert law.prediction == "eps"


def test_unknown_heads_classifiers_and_damage_are_refused(tmp_path: Path) -> None:
    reference = Reference(2, Heads(width=16))
    tensors = reference.tensors
    classifier = {name: x for name, x in tensors.items() if not name.startswith("output_blocks")}
    fewer = {name: x for name, x in tensors.items() if "middle_block.2" not in name}
    cases = {
        "unknown": (tensors, None, "are of no published model"),
        "classifier": (classifier, Heads(width=16), "it is a classifier, or another network"),
        "fewer": (fewer, Heads(width=16), "missing mid_block"),
        "more": ({**tensors, "extra.weight": torch.ones(2)}, Heads(width=16), r"unexpected extra.weight \[2\]"),
    }
    for name, (content, heads, reason) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(LdmPipeError, match=reason):
            import_adm(tmp_path / f"{name}.pt", tmp_path / "out", heads=heads)
    assert not (tmp_path / "out").exists()
