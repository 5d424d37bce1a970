"""Packed convolutions compute the same, notice changed weights, and show nothing of themselves in files."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import packing
from ldm_pipe.packing import PackedConv2d, can_pack, pack_for_inference, unpack
from ldm_pipe.unet import UNet

pytestmark = pytest.mark.skipif(not can_pack(), reason="this build of torch cannot pack convolution weights")

TINY = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _count(module: nn.Module) -> int:
    return sum(isinstance(layer, PackedConv2d) and layer._packed.tensor is not None for layer in module.modules())


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) < 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
def test_packed_unet_computes_the_same(channels_last: bool, padding: int) -> None:
    net = UNet.from_config({**TINY, "downsample_padding": padding}).eval()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    tokens, t = _numbers(2, 2, 5, 12), torch.tensor([3.0, 700.0])
    keys = list(net.state_dict())
    for size in ((8, 8), (6, 9)):
        x = _numbers(1, 2, 4, *size)
        with torch.inference_mode():
            expected = unpack(net)(x, t, tokens=tokens)
            packed = pack_for_inference(net)
            for _ in range(2):
                assert _close(packed(x, t, tokens=tokens), expected)
        assert _count(net) == sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules()) > 0
    assert list(net.state_dict()) == keys


def _layer() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    net = pack_for_inference(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)))
    x = _numbers(1, 2, 8, 6, 6)
    with torch.no_grad():
        net(x)
    assert _count(net) == 1
    return net, x


@torch.no_grad()
def test_changed_weights_are_noticed() -> None:
    net, x = _layer()
    layer = net[0]

    def add_through_data() -> None:
        layer.weight.data += 1.0

    changes = {
        "in place": lambda: layer.weight.mul_(2.0),
        "through .data": add_through_data,
        "loaded": lambda: net.load_state_dict({"0.weight": torch.ones(8, 8, 3, 3), "0.bias": torch.ones(8)}),
        "another parameter": lambda: setattr(layer, "weight", nn.Parameter(_numbers(5, 8, 8, 3, 3))),
        "bias": lambda: layer.bias.add_(1.0),
    }
    for name, change in changes.items():
        change()
        assert _close(net(x), nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)), name


def test_moved_training_and_autocast_modules_take_the_plain_way() -> None:
    net, x = _layer()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
    net(x).sum().backward()
    assert net[0].weight.grad is not None
    net.train()
    assert _count(net) == 0
    with torch.no_grad():
        assert net.double()(x.double()).dtype == torch.float64
    assert net.to("meta")(x.double().to("meta")).shape == x.shape


@torch.no_grad()
def test_copies_and_files_hold_nothing_packed() -> None:
    net, x = _layer()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert _count(other) == 0
        assert torch.equal(other(x), net(x))
    assert list(net.state_dict()) == ["0.weight", "0.bias"]
    assert type(unpack(net)[0]) is nn.Conv2d
    assert "_packed" not in vars(net[0])


def test_threads_with_other_shapes_do_not_mix() -> None:
    net, _ = _layer()

    def run(side: int) -> bool:
        x = _numbers(side, 1, 8, side, side)
        with torch.no_grad():
            expected = nn.functional.conv2d(x, net[0].weight, net[0].bias, padding=1)
            return all(_close(net(x), expected) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, [4, 5, 8, 13]))


def test_a_build_without_the_operators_keeps_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "can_pack", lambda: False)
    assert type(pack_for_inference(nn.Sequential(nn.Conv2d(8, 8, 3)))[0]) is nn.Conv2d


def test_other_kinds_of_convolution_stay() -> None:
    layers = [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding_mode="reflect")]
    assert [type(layer) for layer in pack_for_inference(nn.Sequential(*layers))] == [nn.Conv2d] * 3
