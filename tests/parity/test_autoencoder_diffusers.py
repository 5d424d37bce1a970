"""Our AutoencoderKL and VQModel against diffusers' on tiny random weights, and keys at full size on the meta device."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from autoencoder import AutoencoderKL, VQModel, quantiser_loss
from tests.bfloat16 import assert_as_close_as_the_reference

diffusers = pytest.importorskip("diffusers")

FULL_SIZE = json.loads((Path(__file__).parents[1] / "data" / "full_size_configs.json").read_text())
VAES = sorted(name for name, facts in FULL_SIZE.items() if name.endswith(("/vae", "/vqvae")))

# Two fp32 implementations of one sum differ by the order of additions; values are of order 1.
TOLERANCE = 1e-5

TINY: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three levels, two blocks": {
        "block_out_channels": [8, 16, 24],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
    },
    "one level": {
        "block_out_channels": [16],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    },
    "no attention": {"mid_block_add_attention": False},
    "no 1x1 convolutions": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "mish": {"act_fn": "mish"},
    "grey": {"in_channels": 1, "out_channels": 1, "latent_channels": 3},
}


def reference(config: dict[str, Any], seed: int = 0) -> Any:
    """Build diffusers' autoencoder with norms and biases away from their trivial initial values."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(**config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_encode_and_decode_agree_with_diffusers(variant: str) -> None:
    config = {**TINY, **VARIANTS[variant]}
    theirs = reference(config)
    ours = AutoencoderKL.from_config(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = randn(2, config.get("in_channels", 3), 24, 32)
    expected, posterior = theirs.encode(image).latent_dist, ours.encode_moments(image)
    torch.testing.assert_close(posterior.mean, expected.mean, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(posterior.log_var, expected.logvar, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(posterior.kl(), expected.kl(), atol=0, rtol=TOLERANCE)
    z = randn(2, config["latent_channels"], 24 // ours.factor, 32 // ours.factor)
    decoded = theirs.decode(z / theirs.config.scaling_factor).sample
    torch.testing.assert_close(ours.decode(z), decoded, atol=TOLERANCE * float(decoded.abs().max()), rtol=0)


def test_gradients_agree_with_diffusers() -> None:
    theirs = reference(TINY)
    ours = AutoencoderKL.from_config(TINY)
    ours.load_state_dict(theirs.state_dict())
    image = randn(2, 3, 16, 16)
    ours(image)[0].square().mean().backward()
    theirs.train()(image).sample.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        gradient = expected[name].grad
        torch.testing.assert_close(parameter.grad, gradient, atol=TOLERANCE * (1 + float(gradient.abs().max())), rtol=0)


@pytest.mark.parametrize("name", VAES)
def test_keys_and_shapes_at_full_size(name: str) -> None:
    facts = FULL_SIZE[name]
    with torch.device("meta"):
        kind = VQModel if facts["_class_name"] == "VQModel" else AutoencoderKL
        model = kind.from_config(facts["config"])
    state = model.state_dict()
    lines = "\n".join(sorted(f"{key} {list(value.shape)}" for key, value in state.items()))
    assert len(state) == facts["tensors"]
    assert sum(value.numel() for value in state.values()) == facts["params"]
    assert hashlib.sha256(lines.encode()).hexdigest() == facts["keyhash"]
    assert {key: model.config[key] for key in facts["config"]} == facts["config"]


def test_config_fields_and_defaults_are_those_of_diffusers() -> None:
    theirs = {key: value for key, value in diffusers.AutoencoderKL(**TINY).config.items() if not key.startswith("_")}
    ours = AutoencoderKL.from_config(TINY).config
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.items()}
    assert dict(ours) == plain


def loaded_silently(kind: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """Load with diffusers, which must find every weight and warn of nothing."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        theirs, info = kind.from_pretrained(
            str(folder), output_loading_info=True, local_files_only=True, low_cpu_mem_usage=False
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(info.values()), info
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    return theirs


@torch.no_grad()
def test_diffusers_loads_what_we_save_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = AutoencoderKL.from_config(TINY).eval()
    ours.set_latent_statistics(0.25, 2.0)
    ours.save_pretrained(tmp_path)
    theirs = loaded_silently(diffusers.AutoencoderKL, tmp_path, caplog)
    assert theirs.config.scaling_factor == 0.5
    assert theirs.config.shift_factor == 0.25
    z = randn(1, 4, 8, 8)
    torch.testing.assert_close(theirs.decode(z / 0.5 + 0.25).sample, ours.decode(z), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_we_load_what_diffusers_saves(tmp_path: Path) -> None:
    theirs = reference(TINY)
    theirs.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_pretrained(tmp_path)
    z = randn(1, 4, 8, 8)
    expected = theirs.decode(z / theirs.config.scaling_factor).sample
    torch.testing.assert_close(ours.decode(z), expected, atol=TOLERANCE * float(expected.abs().max()), rtol=0)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


@torch.no_grad()
def test_pipelines_that_ignore_the_shift_agree_after_folding() -> None:
    ours = AutoencoderKL.from_config(TINY).eval()
    ours.set_latent_statistics([0.5, -1.0, 2.0, 0.0], [0.5, 1.5, 3.0, 1.0])
    image, z = randn(2, 3, 16, 16), randn(2, 4, 8, 8)
    wanted_z, wanted_image = ours.encode(image), ours.decode(z)
    ours.fold_latent_shift()
    theirs = diffusers.AutoencoderKL(**TINY).eval()
    theirs.load_state_dict(ours.state_dict())
    scale = ours.config.scaling_factor
    # Rounding of the folded float32 weights, at latents of order 1.
    torch.testing.assert_close(theirs.encode(image).latent_dist.mean * scale, wanted_z, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(z / scale).sample, wanted_image, atol=1e-5, rtol=1e-5)


# -- VQModel -------------------------------------------------------------------------------------------------------

TINY_VQ = {**TINY, "latent_channels": 3, "num_vq_embeddings": 24, "scaling_factor": 0.7}
VQ_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three levels, two blocks": VARIANTS["three levels, two blocks"],
    "no attention": {"mid_block_add_attention": False},
    "codes of another width": {"vq_embed_dim": 5, "latent_channels": 8},
    "grey": {"in_channels": 1, "out_channels": 1},
}


def reference_vq(config: dict[str, Any]) -> Any:
    """Build diffusers' VQModel with codes as far apart as the latents are."""
    torch.manual_seed(0)
    model = diffusers.VQModel(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.5)
        weight = model.quantize.embedding.weight
        latents = model.encode(randn(1, config.get("in_channels", 3), 24, 32)).latents
        spread = latents.movedim(1, -1).flatten(0, 2)
        weight.copy_(spread.mean(0) + spread.std(0) * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("variant", VQ_VARIANTS)
@torch.no_grad()
def test_vq_forward_agrees_with_diffusers(variant: str) -> None:
    config = {**TINY_VQ, **VQ_VARIANTS[variant]}
    theirs, ours = reference_vq(config), VQModel.from_config(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image, scale = randn(2, config.get("in_channels", 3), 24, 32), theirs.config.scaling_factor
    latents = theirs.encode(image).latents
    torch.testing.assert_close(ours.encode(image), latents * scale, atol=TOLERANCE, rtol=TOLERANCE)
    z = latents * scale
    decoded = theirs.decode(z / scale)
    _, _, (_, _, indices) = theirs.quantize(z / scale)
    assert torch.equal(ours.quantise(z).indices.flatten(), indices)
    assert len(indices.unique()) > 5
    torch.testing.assert_close(
        ours.decode(z), decoded.sample, atol=TOLERANCE * float(decoded.sample.abs().max()), rtol=0
    )
    # Both networks in a row, and a sum that rounds: z + (codes - z).
    there_and_back, tolerance = theirs(image).sample, 3 * TOLERANCE * float(decoded.sample.abs().max())
    torch.testing.assert_close(ours(image)[0], there_and_back, atol=tolerance, rtol=0)


@pytest.mark.parametrize("legacy", [True, False])
def test_vq_loss_and_gradients_agree_with_diffusers(legacy: bool) -> None:
    theirs = reference_vq(TINY_VQ)
    theirs.quantize.legacy = legacy
    ours = VQModel.from_config(TINY_VQ)
    ours.load_state_dict(theirs.state_dict())
    image = randn(2, 3, 16, 16)
    reconstruction, quantised = ours(image)
    loss = quantiser_loss(quantised, beta=0.25, legacy=legacy)
    expected = theirs.train()(image)
    torch.testing.assert_close(loss, expected.commit_loss, atol=0, rtol=TOLERANCE)
    (reconstruction.square().mean() + loss).backward()
    (expected.sample.square().mean() + expected.commit_loss).backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        gradient = wanted[name].grad
        torch.testing.assert_close(parameter.grad, gradient, atol=TOLERANCE * (1 + float(gradient.abs().max())), rtol=0)


@pytest.mark.parametrize("vq", [False, True])
@torch.no_grad()
def test_bfloat16_is_as_close_to_fp32_as_diffusers_is(vq: bool) -> None:
    """Before the codes: which one is nearest is no matter of rounding alone."""
    theirs = reference_vq({**TINY_VQ, "scaling_factor": 1.0}) if vq else reference(TINY)
    ours: Any = (VQModel if vq else AutoencoderKL).from_config(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    image, z = randn(2, 3, 24, 32), randn(2, ours.config.latent_channels, 12, 16)
    more = {"force_not_quantize": True} if vq else {}

    def run(model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        decoder = model.to(dtype).decoder(model.post_quant_conv(z.to(dtype)))
        return model.quant_conv(model.encoder(image.to(dtype))), decoder

    exact = run(theirs, torch.float32)
    assert torch.equal(exact[1], theirs.decode(z, **more).sample)
    for found, wanted, value in zip(run(ours, torch.bfloat16), run(theirs, torch.bfloat16), exact, strict=True):
        assert_as_close_as_the_reference(found, wanted, value)


def test_vq_config_fields_are_those_of_diffusers_and_the_scale_is_not() -> None:
    plain = {key: value for key, value in TINY_VQ.items() if key != "scaling_factor"}
    theirs = {key: value for key, value in diffusers.VQModel(**plain).config.items() if not key.startswith("_")}
    theirs = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.items()}
    assert dict(VQModel.from_config(plain).config) == {**theirs, "scaling_factor": 1.0}
    assert theirs["scaling_factor"] == 0.18215  # garbage for VQ models without the field (diffusers#5166)


@torch.no_grad()
def test_diffusers_loads_the_vq_model_we_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = VQModel.from_config(TINY_VQ).eval()
    ours.load_state_dict(reference_vq(TINY_VQ).state_dict())
    ours.set_latent_statistics([0.5, -0.5, 0.25], [2.0, 1.0, 1.0])
    ours.save_pretrained(tmp_path)
    theirs = loaded_silently(diffusers.VQModel, tmp_path, caplog)
    assert theirs.config.scaling_factor == pytest.approx(2.0**-0.5)
    z = ours.encode(randn(1, 3, 16, 16))
    decoded = theirs.decode(z / theirs.config.scaling_factor).sample
    torch.testing.assert_close(ours.decode(z), decoded, atol=TOLERANCE * float(decoded.abs().max()), rtol=0)


@torch.no_grad()
def test_we_load_the_vq_model_diffusers_saves(tmp_path: Path) -> None:
    theirs = reference_vq(TINY_VQ)
    theirs.save_pretrained(tmp_path)
    ours, z = VQModel.from_pretrained(tmp_path), randn(1, 3, 8, 8)
    expected = theirs.decode(z / 0.7).sample
    torch.testing.assert_close(ours.decode(z), expected, atol=TOLERANCE * float(expected.abs().max()), rtol=0)
