"""Laws of AutoencoderKL: normalisation, sizes, dtypes, files."""

from __future__ import annotations

import copy
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder import AutoencoderKL
from ldm_pipe.pretrained import LdmPipeError, load_tensors, save_tensors

TINY: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
    "force_upcast": False,
}


def build(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL.from_config({**TINY, **changes}).eval()


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scaling_factor": 0.5, "shift_factor": 0.3},
        {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 3.0], "scaling_factor": 0.7},
    ],
)
@torch.no_grad()
def test_encode_normalises_and_decode_undoes_it(fields: dict[str, Any]) -> None:
    model, image = build(**fields), randn(2, 3, 16, 16)
    raw = model.encode_moments(image).mode()
    mean = torch.tensor(fields.get("latents_mean", [fields.get("shift_factor", 0.0)] * 4)).view(1, 4, 1, 1)
    std = torch.tensor(fields.get("latents_std", [1.0] * 4)).view(1, 4, 1, 1)
    z = model.encode(image)
    torch.testing.assert_close(z, (raw - mean) / std * fields.get("scaling_factor", 0.18215))
    reconstruction, _ = model(image)
    torch.testing.assert_close(model.decode(z), reconstruction, atol=1e-5, rtol=1e-5)


def test_missing_scaling_factor_is_that_of_the_first_models() -> None:
    assert build().scaling_factor == 0.18215
    assert build(scaling_factor=None).scaling_factor == 0.18215
    assert build().shift_factor == 0.0


@pytest.mark.parametrize("per_channel", [False, True])
@torch.no_grad()
def test_measured_statistics_make_unit_latents(per_channel: bool) -> None:
    model, images = build(), randn(8, 3, 16, 16)
    raw = model.encode_moments(images).mode()
    if per_channel:
        model.set_latent_statistics(raw.mean((0, 2, 3)).tolist(), raw.std((0, 2, 3)).tolist())
        z = model.encode(images)
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    else:
        model.set_latent_statistics(float(raw.mean()), float(raw.std()))
        z = model.encode(images)
        assert float(z.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(z.std()) == pytest.approx(1.0, abs=1e-5)


@torch.no_grad()
def test_statistics_are_stored_with_the_weights(tmp_path: Path) -> None:
    model = build()
    model.set_latent_statistics(0.5, 4.0)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["scaling_factor"] == 0.25
    assert written["shift_factor"] == 0.5
    again, z = AutoencoderKL.from_pretrained(tmp_path), randn(1, 4, 4, 4)
    assert torch.equal(again.decode(z), model.decode(z))
    assert again.config == {**model.config, "_class_name": "AutoencoderKL"}


@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), ([0.0] * 3, [1.0] * 3), (0.0, [1.0] * 4)]
)
def test_bad_statistics_are_refused_and_change_nothing(mean: Any, std: Any) -> None:
    model = build()
    before = dict(model.config)
    with pytest.raises(LdmPipeError):
        model.set_latent_statistics(mean, std)
    assert dict(model.config) == before


@torch.no_grad()
def test_folding_the_shift_changes_nothing_but_the_config() -> None:
    model, image, z, noise = build(), randn(2, 3, 16, 16), randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=2)
    model.set_latent_statistics([0.5, -1.0, 2.0, 0.0], [0.5, 1.5, 3.0, 1.0])
    wanted = model.encode(image, noise), model.decode(z)
    model.fold_latent_shift()
    torch.testing.assert_close(model.encode(image, noise), wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(z), wanted[1], atol=1e-5, rtol=1e-5)
    assert model.config.latents_mean is None
    assert model.config.shift_factor is None
    with pytest.raises(LdmPipeError, match="use_quant_conv"):
        build(use_quant_conv=False).fold_latent_shift()


@torch.no_grad()
def test_encode_draws_with_the_noise_it_is_given() -> None:
    model, image, noise = build(), randn(2, 3, 16, 16), randn(2, 4, 8, 8)
    posterior = model.encode_moments(image)
    expected = (posterior.mean + posterior.log_var.mul(0.5).exp() * noise) * model.scaling_factor
    torch.testing.assert_close(model.encode(image, noise), expected)
    assert torch.equal(model.encode(image), model.encode(image))


@torch.no_grad()
def test_the_picture_does_not_depend_on_its_batch() -> None:
    model, z, image = build(), randn(4, 4, 8, 8), randn(4, 3, 16, 16)
    singles = torch.cat([model.decode(part) for part in z.split(1)])
    torch.testing.assert_close(model.decode(z), singles, atol=1e-5, rtol=0)
    model.enable_slicing()
    assert torch.equal(model.decode(z), singles)
    assert torch.equal(model.encode(image), torch.cat([model.encode(part) for part in image.split(1)]))


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [(17, 16, "Nearest heights: 16 or 18; nearest widths: 16."), (16, 1, "nearest widths: 2."), (0, 16, "heights: 2;")],
)
def test_a_size_that_does_not_fit_names_size_factor_and_the_nearest(height: int, width: int, words: str) -> None:
    with pytest.raises(LdmPipeError, match=f"image size {height}x{width}: sides must be multiples of 2") as error:
        build().encode(torch.zeros(1, 3, height, width))
    assert words in str(error.value)


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(LdmPipeError, match="4, h, w"):
        build().decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(LdmPipeError, match="3, H, W"):
        build().encode(torch.zeros(1, 4, 8, 8))


@torch.no_grad()
def overflowing(**changes: Any) -> AutoencoderKL:
    """Build a model whose residual stream exceeds float16's 65504; its last norm brings the image back to order 1."""
    model = build(**changes)
    for conv in (model.decoder.conv_in, model.encoder.conv_in):
        conv.weight.mul_(2e5)
    return model


@pytest.mark.parametrize("force_upcast", [True, False])
@torch.no_grad()
def test_fp16_overflow_does_not_end_in_black_pictures(force_upcast: bool) -> None:
    model, z, image = overflowing(force_upcast=force_upcast), randn(1, 4, 8, 8), randn(1, 3, 16, 16)
    half = copy.deepcopy(model).half()
    assert not torch.isfinite(half.decoder(z.half())).all()  # the network itself does overflow
    whole = copy.deepcopy(half).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # float32 from the start, where it is asked for or on a CPU
        decoded = half.decode(z.half())
    assert decoded.dtype == torch.float16
    torch.testing.assert_close(decoded.float(), whole.decode(z.half().float()), atol=2e-3, rtol=2e-3)
    latents = half.encode(image.half())
    torch.testing.assert_close(latents.float(), whole.encode(image.half().float()), atol=2e-3, rtol=2e-3)
    assert half.dtype == torch.float16  # the model is not changed by the call


@torch.no_grad()
def test_overflow_under_autocast_is_noticed_and_computed_again() -> None:
    model, z = overflowing(), randn(1, 4, 8, 8)
    expected = model.decode(z)
    with torch.autocast("cpu", dtype=torch.float16), pytest.warns(UserWarning, match="overflowed in torch.float16"):
        decoded = model.decode(z)
    torch.testing.assert_close(decoded, expected)


@torch.no_grad()
def test_bf16_weights_decode_in_bf16() -> None:
    model, z = build(force_upcast=True), randn(1, 4, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = copy.deepcopy(model).bfloat16().decode(z.bfloat16())
    assert decoded.dtype == torch.bfloat16
    # Eight bits of mantissa through some twenty layers.
    torch.testing.assert_close(decoded.float(), model.decode(z), atol=0.1, rtol=0)


@torch.no_grad()
def test_nan_latents_are_an_error_not_a_black_picture() -> None:
    z = randn(1, 4, 8, 8)
    z[0, 0, 3, 3] = float("nan")
    with pytest.raises(LdmPipeError, match="NaN or infinity in the input"):
        build().decode(z)
    broken = build()
    broken.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(LdmPipeError, match="weights are damaged"):
        broken.decode(randn(1, 4, 8, 8))


@pytest.mark.parametrize("layout", ["linear", "1x1 convolution", "new names, 1x1 convolution"])
@torch.no_grad()
def test_old_attention_keys_load(layout: str, tmp_path: Path) -> None:
    model, z = build(), randn(1, 4, 8, 8)
    model.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_tensors(tmp_path / "diffusion_pytorch_model.safetensors").items():
        is_projection = "attentions" in name and "group_norm" not in name
        if is_projection and not layout.startswith("new"):
            for new_part, old_part in old.items():
                name = name.replace(f".{new_part}.", f".{old_part}.")
        if is_projection and "convolution" in layout and name.endswith("weight"):
            tensor = tensor[:, :, None, None]
        tensors[name] = tensor
    save_tensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    assert torch.equal(AutoencoderKL.from_pretrained(tmp_path).decode(z), model.decode(z))


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen", "NaN"])
def test_weights_that_do_not_fit_are_named(change: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors, name = load_tensors(path), "decoder.conv_out.weight"
    match change:
        case "missing":
            del tensors[name]
        case "unexpected":
            name = "decoder.conv_extra.weight"
            tensors[name] = torch.zeros(1)
        case "misshapen":
            tensors[name] = tensors[name][:1]
        case _:
            tensors[name][0, 0, 0, 0] = float("nan")
    save_tensors(path, tensors)
    with pytest.raises(LdmPipeError, match=rf"{change} .*{name}" if change != "NaN" else name):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_out_channels", []),
        ("block_out_channels", 16),
        ("block_out_channels", [8, 18]),
        ("block_out_channels", [8, 2**40]),
        ("block_out_channels", [8, -4]),
        ("down_block_types", ["DownEncoderBlock2D"]),
        ("down_block_types", ["DownEncoderBlock2D", "Evil"]),
        ("layers_per_block", 10**6),
        ("layers_per_block", "1"),
        ("act_fn", "exec"),
        ("latent_channels", True),
        ("norm_num_groups", 0),
        ("scaling_factor", 0.0),
        ("scaling_factor", float("nan")),
        ("scaling_factor", "0.18215"),
        ("shift_factor", float("inf")),
        ("latents_mean", [0.0] * 4),
        ("sample_size", -1),
    ],
)
def test_a_config_that_cannot_be_built_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(LdmPipeError, match=field):
        build(**{field: value})


def test_unknown_config_keys_are_kept_and_written_again(tmp_path: Path) -> None:
    model = build(_diffusers_version="0.1", note={"a": [1]})
    model.set_latent_statistics(0.0, 2.0)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["note"] == {"a": [1]}
    assert written["_class_name"] == "AutoencoderKL"


@torch.no_grad()
def test_two_threads_share_one_autoencoder() -> None:
    model = overflowing().half()
    batches = [randn(1, 4, 8, 8, seed=seed).half() for seed in range(8)]
    expected = [model.decode(z) for z in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(torch.no_grad()(model.decode), batches * 4))
    assert all(torch.equal(result, expected[i % 8]) for i, result in enumerate(results))


def test_one_batch_can_be_overfitted() -> None:
    model, image = build().train(), torch.tanh(randn(2, 3, 8, 8))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = (model(image)[0] - image).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
