"""Laws of the U-Net: configs and specs, masks, batches, checkpointing, refusals."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.networks import UNet, convolution
from ldm_pipe.networks.attention import Attention
from ldm_pipe.networks.config import read_config, write_config
from ldm_pipe.networks.config_2d import read_config_2d, write_config_2d
from ldm_pipe.networks.convolution import Conv3x3, doubling_convolution, doubling_kernel
from ldm_pipe.networks.layers import Upsample, pointwise
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import fill

FULL_SIZE = json.loads((Path(__file__).parents[2] / "data" / "full_size_configs.json").read_text())
UNETS = sorted(name for name, entry in FULL_SIZE.items() if str(entry).find("'UNet2D") >= 0)
TINY: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
T = torch.tensor([3.0, 701.5])


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tiny(**changes: Any) -> UNet:
    return fill(UNet.from_config({**TINY, **changes}))


def _spread(value: Any) -> Any:
    """Write a list of equal entries as that entry, as both spellings mean the same."""
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        return value[0]
    return value


@pytest.mark.parametrize("name", UNETS)
def test_full_size_config_has_the_known_keys_and_count(name: str) -> None:
    entry = FULL_SIZE[name]
    with torch.device("meta"):
        net = UNet.from_config({"_class_name": entry["_class_name"], **entry["config"]})
    keys = "\n".join(sorted(f"{key} {list(value.shape)}" for key, value in net.state_dict().items()))
    assert sum(value.numel() for value in net.parameters()) == entry["params"]
    assert hashlib.sha256(keys.encode()).hexdigest() == entry["keyhash"]
    assert {key: net.config[key] for key in entry["config"]} == entry["config"]


@pytest.mark.parametrize("name", UNETS)
def test_spec_survives_writing_and_reading(name: str) -> None:
    entry = FULL_SIZE[name]
    read, write = (
        (read_config_2d, write_config_2d) if entry["_class_name"] == "UNet2DModel" else (read_config, write_config)
    )
    spec = read(entry["config"])
    written = write(spec)
    assert read(written) == spec
    assert read(json.loads(json.dumps(written))) == spec
    stated = {key: value for key, value in entry["config"].items() if key != "sample_size"}
    assert {key: _spread(written[key]) for key in stated} == {key: _spread(value) for key, value in stated.items()}


def test_attention_head_dim_is_the_number_of_heads() -> None:
    """SD 1 has 8 heads at every width, not heads of width 8: every shape would load, every picture would be wrong."""
    with torch.device("meta"):
        net = UNet.from_config(FULL_SIZE["sd15/unet"]["config"])
        new = UNet.from_config(FULL_SIZE["sd21-base/unet"]["config"])
    assert [level.num_heads for level in net.spec.levels] == [8, 8, 8, 8]
    assert {m.num_heads for m in net.modules() if isinstance(m, Attention)} == {8}
    assert {m.to_q.out_features // m.num_heads for m in new.modules() if isinstance(m, Attention)} == {64}


def test_unknown_config_fields_are_kept() -> None:
    net = _tiny(_diffusers_version="0.42.1", from_a_later_version=3)
    assert net.config.from_a_later_version == 3
    assert net.config.in_channels == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("down_block_types", ["CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"]),
        ("down_block_types", ["DownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "SimpleCrossAttnUpBlock2D"]),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("attention_head_dim", 5),
        ("attention_head_dim", None),
        ("attention_head_dim", [2, 2, 2]),
        ("num_attention_heads", 4),
        ("norm_num_groups", 5),
        ("norm_num_groups", None),
        ("act_fn", "tanh"),
        ("resnet_time_scale_shift", "spatial"),
        ("resnet_skip_time_act", True),
        ("resnet_out_scale_factor", 2.0),
        ("time_embedding_type", "fourier"),
        ("time_cond_proj_dim", 8),
        ("class_embed_type", "unheard"),
        ("addition_embed_type", "image"),
        ("encoder_hid_dim_type", "image_proj"),
        ("dual_cross_attention", True),
        ("attention_type", "gated"),
        ("cross_attention_norm", "layer_norm"),
        ("layers_per_block", 0),
        ("layers_per_block", "2"),
        ("in_channels", True),
        ("block_out_channels", []),
        ("transformer_layers_per_block", [[1], [2]]),
        ("cross_attention_dim", [12, 12, 12]),
    ],
)
def test_config_that_cannot_be_represented_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(LdmPipeError, match=rf"{field} = .* cannot be represented\. Allowed: "):
        UNet.from_config({**TINY, field: value})


@pytest.mark.parametrize(
    ("field", "value", "also_needed"),
    [
        ("class_embed_type", "projection", "projection_class_embeddings_input_dim"),
        ("addition_embed_type", "text_time", "projection_class_embeddings_input_dim"),
        ("encoder_hid_dim_type", "text_proj", "encoder_hid_dim"),
    ],
)
def test_config_that_needs_another_field_names_it(field: str, value: str, also_needed: str) -> None:
    with pytest.raises(LdmPipeError, match=f"{also_needed} = None cannot be represented"):
        UNet.from_config({**TINY, field: value})


@torch.no_grad()
def test_token_mask_hides_padding() -> None:
    for changes in ({}, {"only_cross_attention": True}):
        net = _tiny(**changes)
        x, tokens = _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12)
        mask = torch.tensor([[True, True, True, False, False]] * 2)
        other = torch.where(mask[..., None], tokens, _numbers(3, 2, 5, 12))
        first = net(x, T, tokens=tokens, token_mask=mask)
        torch.testing.assert_close(net(x, T, tokens=other, token_mask=mask), first, rtol=0, atol=1e-6)
        torch.testing.assert_close(net(x, T, tokens=tokens[:, :3]), first, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(net(x, T, tokens=tokens), first, atol=1e-3)


@torch.no_grad()
def test_mask_without_any_token_gives_numbers() -> None:
    out = _tiny()(_numbers(1, 2, 4, 8, 8), T, tokens=_numbers(2, 2, 5, 12), token_mask=torch.zeros(2, 5))
    assert bool(torch.isfinite(out).all())


@torch.no_grad()
def test_batch_of_two_is_two_singles() -> None:
    net = _tiny()
    x, tokens = _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12)
    both = net(x, T, tokens=tokens)
    for i in range(2):
        one = net(x[i : i + 1], T[i], tokens=tokens[i : i + 1])
        torch.testing.assert_close(one, both[i : i + 1], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    net = _tiny()
    again = copy.deepcopy(net)
    again.enable_gradient_checkpointing()
    saved: list[int] = []
    for module in (net, again):
        count = [0]

        def pack(value: Tensor, count: list[int] = count) -> Tensor:
            count[0] += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = module(_numbers(1, 2, 4, 8, 8), T, tokens=_numbers(2, 2, 5, 12)).square().mean()
        saved.append(count[0])
        loss.backward()
    assert saved[1] < 0.5 * saved[0]
    for (name, value), (_, other) in zip(net.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, value.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_every_weight_gets_a_gradient() -> None:
    net = _tiny(num_class_embeds=3)
    net(
        _numbers(1, 2, 4, 8, 8), T, tokens=_numbers(2, 2, 5, 12), labels=torch.tensor([0, 2])
    ).square().mean().backward()
    assert [name for name, value in net.named_parameters() if value.grad is None or not bool(value.grad.any())] == []


@torch.no_grad()
def test_dropout_only_in_training() -> None:
    net = _tiny(dropout=0.5)
    x, tokens = _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12)
    torch.testing.assert_close(net(x, T, tokens=tokens), net(x, T, tokens=tokens), rtol=0, atol=0)
    net.train()
    assert not torch.allclose(net(x, T, tokens=tokens), net(x, T, tokens=tokens))


@torch.no_grad()
def test_half_precision_runs_in_its_own_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        net = _tiny(upcast_attention=True).to(dtype)
        x, tokens = _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12)
        out = net(x.to(dtype), T, tokens=tokens.to(dtype), token_mask=torch.ones(2, 5))
        exact = _tiny(upcast_attention=True)(x, T, tokens=tokens)
        assert out.dtype == dtype
        assert float((out.float() - exact).abs().max() / exact.abs().max()) < 0.06


def test_missing_and_misshapen_slots_are_named() -> None:
    x, tokens = _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12)
    net = _tiny()
    with pytest.raises(LdmPipeError, match="tokens are missing"):
        net(x, T)
    with pytest.raises(LdmPipeError, match=r"tokens of shape \(2, 5, 7\), expected \(B, L, 12\)"):
        net(x, T, tokens=_numbers(2, 2, 5, 7))
    with pytest.raises(LdmPipeError, match="4 channels of x_t and 5 of spatial, expected 4 together"):
        net(x, T, tokens=tokens, spatial=_numbers(3, 2, 5, 8, 8))
    with pytest.raises(LdmPipeError, match="this U-Net reads none"):
        net(x, T, tokens=tokens, labels=torch.tensor([1, 2]))
    with pytest.raises(LdmPipeError, match="labels is missing"):
        _tiny(num_class_embeds=3)(x, T, tokens=tokens)
    with pytest.raises(LdmPipeError, match="pooled is missing"):
        _tiny(class_embed_type="identity")(x, T, tokens=tokens)


def test_xformers_is_refused_with_the_reason_or_runs() -> None:
    net = _tiny()
    x, tokens = _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12)
    with pytest.raises(LdmPipeError, match=r"xformers cannot compute attention for torch.float32 on cpu: .+"):
        net.set_attention("xformers")
    with pytest.raises(LdmPipeError, match="unknown attention 'flash9'"):
        net.set_attention("flash9")
    net.set_attention("sdpa")
    assert net(x, T, tokens=tokens).shape == x.shape


def test_attention_chosen_by_name_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an xformers whose operator runs, its function is called, with heads third and the mask as a full bias."""
    import sys
    import types

    shapes: list[Any] = []

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None) -> Tensor:
        shapes.append(None if attn_bias is None else tuple(attn_bias.shape))
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
        scores = scores if attn_bias is None else scores + attn_bias
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    net = _tiny()
    x, tokens, mask = _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    with torch.no_grad():
        expected = net(x, T, tokens=tokens, token_mask=mask)
        net.set_attention("xformers")
        shapes.clear()
        torch.testing.assert_close(net(x, T, tokens=tokens, token_mask=mask), expected, rtol=1e-5, atol=1e-5)
    assert set(shapes) == {None, (2, 2, 64, 5), (2, 2, 16, 5)}  # the first level and the middle
    copy.deepcopy(net)


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (7, 5)])
def test_what_is_kept_changes_nothing_and_is_computed_once(size: tuple[int, int]) -> None:
    net = _tiny()
    x, tokens = _numbers(1, 2, 4, *size), _numbers(2, 2, 5, 12)
    layers = [m for m in net.modules() if isinstance(m, Attention) and m.is_cross]
    calls: list[int] = []
    for layer in layers:
        layer.to_k.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        kept = net.keep_tokens(tokens)
        for t in (T, T / 2):
            assert torch.allclose(net(x, t, tokens=kept), net(x, t, tokens=tokens), atol=1e-5)
    assert len(calls) == 3 * len(layers)  # once for what is kept, once in each of the two plain evaluations


def test_doubling_and_convolving_are_four_products() -> None:
    layer = Upsample(6).double()
    x = _numbers(1, 2, 6, 5, 4).double()
    joint = doubling_convolution(x, doubling_kernel(layer.conv.weight), layer.conv.bias)
    assert torch.allclose(joint, layer(x, (10, 8)), atol=1e-12)


def test_doubling_in_training_has_the_gradients_of_the_plain_form() -> None:
    layer, x = Upsample(6), _numbers(1, 4, 6, 8, 9).requires_grad_()
    asked = [x, *layer.parameters()]
    plain = layer.conv(F.interpolate(x, size=(16, 18), mode="nearest"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "interpolate", lambda *_, **__: pytest.fail("not joined"))
        joint = layer(x, (16, 18))
    assert torch.allclose(joint, plain, atol=1e-5)
    seed = _numbers(2, *plain.shape)
    ours, wanted = (torch.autograd.grad(value, asked, seed) for value in (joint, plain))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, wanted, strict=True))


def test_pointwise_is_the_convolution_in_either_memory_order() -> None:
    conv, x = nn.Conv2d(6, 8, 1), _numbers(1, 2, 6, 5, 4)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        assert torch.allclose(pointwise(conv, given), conv(x), atol=1e-6)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
def test_large_convolutions_are_one_product(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], layout: torch.memory_format
) -> None:
    monkeypatch.setattr(convolution, "LARGE", 1)
    monkeypatch.setattr(convolution, "MAX_POSITIONS", 20)  # three pictures in three parts, two, and one
    layer, x = Conv3x3(6, 8).to(memory_format=layout), _numbers(1, 3, 6, *size).requires_grad_()
    wanted = F.conv2d(x, layer.weight, layer.bias, padding=1)
    gradients = torch.autograd.grad(wanted.square().sum(), [x, *layer.parameters()])
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *_: pytest.fail("not as a product"))
    with torch.no_grad():
        assert torch.allclose(layer(x), wanted, atol=1e-6)
    found = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, gradients, strict=True))
    layer.requires_grad_(False)
    assert torch.allclose(torch.autograd.grad(layer(x).square().sum(), x)[0], gradients[0], atol=1e-5)


def test_nothing_is_kept_under_autograd() -> None:
    net, x, tokens = _tiny(), _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12)
    net.enable_gradient_checkpointing()
    net(x, T, tokens=tokens).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_kept_tokens_are_checked_like_others() -> None:
    with pytest.raises(LdmPipeError, match="expected"):
        _tiny().keep_tokens(_numbers(2, 2, 5, 13))


@pytest.mark.parametrize("changes", [{}, {"class_embed_type": "timestep", "class_embeddings_concat": True}])
def test_one_time_for_all_is_that_time_for_each(changes: dict[str, Any]) -> None:
    net, x, tokens = _tiny(**changes), _numbers(1, 3, 4, 8, 8), _numbers(2, 3, 5, 12)
    slots = {"tokens": tokens, "labels": torch.tensor([1.0, 2.0, 3.0]) if changes else None}
    with torch.no_grad():
        together = net(x, torch.tensor(7.0), **slots)
        assert torch.allclose(together, net(x, torch.full((3,), 7.0), **slots), atol=1e-5)


def test_the_layout_of_weights_and_features_does_not_matter() -> None:
    net, x, tokens = _tiny(), _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12)
    with torch.no_grad():
        wanted = net(x, T, tokens=tokens)
        net.to(memory_format=torch.channels_last)
        assert torch.allclose(net(x, T, tokens=tokens), wanted, atol=1e-5)
        assert torch.allclose(net(x.to(memory_format=torch.channels_last), T, tokens=tokens), wanted, atol=1e-5)
