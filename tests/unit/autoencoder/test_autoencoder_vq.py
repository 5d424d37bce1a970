"""Laws of VQModel and of its quantiser: what is quantised where, what moves the codebook, what files hold."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder import AutoencoderKL, VQModel, VQTraining, load_autoencoder, quantiser_loss
from autoencoder.quantizer import Quantised, VectorQuantizer, nearest, perplexity, usage
from ldm_pipe.pretrained import LdmPipeError, load_tensors

TINY: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "num_vq_embeddings": 12,
    "sample_size": 16,
}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(**changes: Any) -> VQModel:
    torch.manual_seed(0)
    model = VQModel.from_config({**TINY, **changes}).eval()
    with torch.no_grad():
        model.quantize.weight.copy_(randn(*model.quantize.weight.shape))  # apart, as after training
    return model


# -- the quantiser -----------------------------------------------------------------------------------------------


def test_every_latent_gets_the_nearest_code() -> None:
    vectors, codes = randn(500, 3), randn(40, 3, seed=2)
    expected = (vectors[:, None].double() - codes[None].double()).square().sum(2).argmin(1)
    assert torch.equal(nearest(vectors, codes), expected)


def test_memory_of_distances_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codes = randn(100, 3), randn(40, 3, seed=2)
    expected = nearest(vectors, codes)
    monkeypatch.setattr("autoencoder.quantizer.MAX_DISTANCES", 90)
    assert torch.equal(nearest(vectors, codes), expected)


@pytest.mark.parametrize("distance", [1.0, 1e-4])
def test_quantisation_is_idempotent(distance: float) -> None:
    """Codes far from the origin and close together: distances made of products would confuse them."""
    quantizer = VectorQuantizer(64, 4)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(10.0 + distance * randn(64, 4))
    once = quantizer(10.0 + distance * randn(2, 4, 8, 8, seed=2))
    again = quantizer(once.codes)
    assert torch.equal(again.codes, once.codes)
    assert torch.equal(again.indices, once.indices)
    assert len(once.indices.unique()) > 20


def test_the_gradient_passes_straight_through() -> None:
    quantizer, raw, slope = VectorQuantizer(16, 3), randn(2, 3, 4, 4).requires_grad_(), randn(2, 3, 4, 4, seed=2)
    quantised = quantizer(raw)
    out = quantised.straight_through()
    torch.testing.assert_close(out, quantised.codes)
    (out * slope).sum().backward()
    assert raw.grad is not None
    assert torch.equal(raw.grad, slope)
    assert quantizer.embedding.weight.grad is None


@pytest.mark.parametrize("legacy", [False, True])
def test_each_term_of_the_loss_moves_its_own_side(legacy: bool) -> None:
    """VQ-VAE, eq. 3: the codebook follows with weight 1, the encoder commits with beta; the legacy slip swaps them."""
    quantizer, raw = VectorQuantizer(16, 3), randn(2, 3, 4, 4).requires_grad_()
    quantised = quantizer(raw)
    quantiser_loss(quantised, beta=0.25, legacy=legacy).backward()
    towards_codes = 2 * (raw - quantised.codes).detach() / raw.numel()
    codebook, commitment = (0.25, 1.0) if legacy else (1.0, 0.25)
    torch.testing.assert_close(raw.grad, commitment * towards_codes)
    expected = torch.zeros(16, 3).index_add_(
        0, quantised.indices.flatten(), -towards_codes.movedim(1, -1).reshape(-1, 3)
    )
    torch.testing.assert_close(quantizer.embedding.weight.grad, codebook * expected)


def test_a_codebook_without_gradient_leaves_the_commitment() -> None:
    quantizer, raw = VectorQuantizer(16, 3), randn(1, 3, 4, 4).requires_grad_()
    quantizer.keep_from_optimiser()
    assert list(quantizer.parameters()) == []
    assert list(quantizer.state_dict()) == ["embedding.weight"]
    quantised = quantizer(raw)
    torch.testing.assert_close(quantiser_loss(quantised, 0.25), 0.25 * (raw - quantised.codes).square().mean())


def test_perplexity_and_usage_of_known_counts() -> None:
    assert float(perplexity(torch.tensor([5, 5, 5, 5]))) == pytest.approx(4.0)
    assert float(perplexity(torch.tensor([7, 0, 0, 0]))) == pytest.approx(1.0)
    assert float(perplexity(torch.tensor([3, 1]))) == pytest.approx(4 / 3**0.75)
    assert float(usage(torch.tensor([3, 0, 1, 0]))) == 0.5


# -- the codebook in training --------------------------------------------------------------------------------------


def clusters(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return four far means (4, 3) and latents (1, 3, 1, 4 num) around them."""
    means = 10.0 * torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [-1.0, -1.0, 0]])
    points = means.repeat(num, 1) + 0.1 * randn(4 * num, 3, seed=seed)
    return means, points.T[None, :, None]


def test_an_ema_codebook_converges_to_the_cluster_means() -> None:
    training = VQTraining(build(num_vq_embeddings=4), ema=True, decay=0.9, dead_below=0)
    weight = training.autoencoder.quantize.weight
    means, _ = clusters(1, 0)
    weight.copy_(means + 2.0 * randn(4, 3))
    rows = []
    for step in range(200):
        rows.append(clusters(8, seed=step)[1])
        training.update(*training.count(training.autoencoder.quantize(rows[-1])))
    # The known answer: the average of the latents under the exponential weights, and about the true means.
    decay = 0.9 ** torch.arange(199, -1, -1, dtype=torch.float64)
    per_step = torch.cat(rows).double()[:, :, 0].view(200, 3, 8, 4).mean(2)  # (steps, 3, clusters)
    expected = (decay[:, None, None] * per_step).sum(0) / decay.sum()
    torch.testing.assert_close(weight.double(), expected.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(weight, means, atol=0.1, rtol=0)
    torch.testing.assert_close(training.usage, torch.full((4,), 8.0), atol=1e-5, rtol=0)


def test_a_code_that_nothing_chooses_stays_where_it_is() -> None:
    training = VQTraining(build(num_vq_embeddings=2), ema=True, decay=0.5, dead_below=0)
    weight = training.autoencoder.quantize.weight
    weight.copy_(torch.tensor([[0.0, 0, 0], [100.0, 0, 0]]))
    for step in range(80):
        training.update(*training.count(training.autoencoder.quantize(0.1 * randn(1, 3, 4, 4, seed=step))))
    assert torch.equal(weight[1], torch.tensor([100.0, 0, 0]))


@pytest.mark.parametrize("ema", [True, False])
def test_dead_codes_are_revived(ema: bool) -> None:
    """Codebook collapse (vector-quantize-pytorch#170): codes far from all latents are never chosen and never move."""
    training = VQTraining(build(num_vq_embeddings=16), ema=ema)
    quantizer = training.autoencoder.quantize
    with torch.no_grad():
        quantizer.weight.copy_(100.0 + randn(16, 3))
        quantizer.weight[0] = 0.0
    raw = randn(1, 3, 8, 8, seed=3)
    assert len(quantizer(raw).indices.unique()) == 1
    counts, sums = training.count(quantizer(raw))
    assert counts.tolist() == [64.0] + [0.0] * 15
    training.update(counts, sums)
    vectors = raw.movedim(1, -1).flatten(0, 2)
    dead = training.revive(vectors, torch.Generator().manual_seed(0))
    assert dead.tolist() == list(range(1, 16))
    rows = {tuple(row) for row in vectors.tolist()}
    assert {tuple(row) for row in quantizer.weight[1:].tolist()} <= rows
    assert len(quantizer(raw).indices.unique()) >= 15
    assert len(training.revive(vectors, torch.Generator().manual_seed(1))) == 0, "they are given time"
    before = quantizer.weight.detach().clone()
    training.update(*training.count(quantizer(raw)))
    if not ema:
        assert torch.equal(quantizer.weight, before), "gradients move it, not averages"


def test_no_more_codes_are_revived_than_there_are_latents() -> None:
    training = VQTraining(build(num_vq_embeddings=16), ema=True)
    training.update(torch.tensor([1.0] + [0.0] * 15), torch.zeros(16, 3))
    assert training.revive(randn(3, 3), torch.Generator().manual_seed(0)).tolist() == [1, 2, 3]


def test_what_resuming_needs_is_in_the_state_and_what_is_saved_is_not() -> None:
    training = VQTraining(build(), ema=True)
    own = {"usage", "sums"}
    assert set(training.state_dict()) == own | {f"autoencoder.{name}" for name in build().state_dict()}
    assert set(training.autoencoder.state_dict()) == set(build().state_dict())
    assert set(VQTraining(build(), ema=False).state_dict()) == set(training.state_dict()) - {"sums"}
    with pytest.raises(LdmPipeError, match="dead_below"):
        VQTraining(build(), ema=True, dead_below=1.0)


# -- the model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_decoding_quantises_first_and_encoding_does_not() -> None:
    model, image = build(), randn(2, 3, 16, 16)
    z = model.encode(image)
    codes = model.quantise(z).codes
    assert not torch.allclose(z, codes * model.scaling_factor)
    assert torch.equal(model.decode(z), model.decode(codes * model.scaling_factor))
    torch.testing.assert_close(model.decode(z), model.decoder(model.post_quant_conv(codes)), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.decode_indices(model.quantise(z).indices), model.decode(z))
    reconstruction, quantised = model(image)
    torch.testing.assert_close(reconstruction, model.decode(z), atol=1e-5, rtol=1e-5)
    assert torch.equal(quantised.indices, model.quantise(z).indices)
    assert torch.equal(model.encode(image, randn(2, 3, 8, 8)), z)


def test_missing_scaling_factor_means_1() -> None:
    """A VQ model decoded with 0.18215 is garbage (diffusers#5166, #5213, #6725)."""
    assert build().scaling_factor == 1.0
    assert build(scaling_factor=None).scaling_factor == 1.0
    assert build(scaling_factor=0.5).scaling_factor == 0.5


@torch.no_grad()
def test_measured_statistics_make_unit_latents_and_change_no_picture() -> None:
    model, image = build(), randn(8, 3, 16, 16)
    raw, wanted, indices = model.encode_moments(image).mean, model(image)[0], model(image)[1].indices
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0)
    model.set_latent_statistics(mean.tolist(), std.tolist())
    z = model.encode(image)
    assert z.mean((0, 2, 3)).abs().max() < 1e-5
    assert float(z.square().mean()) == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(model.quantise(z).indices, indices)
    torch.testing.assert_close(model.decode(z), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std"), [([0.0] * 3, [0.0] * 3), ([0.0] * 2, [1.0] * 2), ([float("nan")] * 3, [1.0] * 3)]
)
def test_bad_statistics_are_refused_and_change_nothing(mean: Any, std: Any) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LdmPipeError):
        model.set_latent_statistics(mean, std)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("levels", [3, 4, 5, 6])
@torch.no_grad()
def test_factors_from_4_to_32(levels: int) -> None:
    shape = {
        "block_out_channels": [8] * levels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 4,
        "mid_block_add_attention": levels == 4,
    }
    image = randn(1, 3, 64, 32)
    for model in (VQModel.from_config(shape).eval(), AutoencoderKL.from_config(shape).eval()):
        z = model.encode(image)
        assert z.shape[2:] == (64 // 2 ** (levels - 1), 32 // 2 ** (levels - 1))
        assert model.factor == 2 ** (levels - 1)
        assert model.decode(z).shape == image.shape
        assert len(model.encoder.mid_block.attentions) == (levels == 4)


@pytest.mark.parametrize("levels", [5, 6])
@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_factors_16_and_32_build_at_full_size_and_train(kind: type[AutoencoderKL | VQModel], levels: int) -> None:
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    with torch.device("meta"):  # LDM, arXiv:2112.10752, table 8: widths 128 x (1, 1, 2, 2, 4, 4)
        large = kind.from_config({**types, "block_out_channels": [128, 128, 256, 256, 512, 512][:levels]})
    assert large.factor == 2 ** (levels - 1)
    assert sum(parameter.numel() for parameter in large.parameters()) > 20e6
    torch.manual_seed(0)
    small = kind.from_config({**types, "block_out_channels": [8] * levels, "norm_num_groups": 4}).train()
    image = torch.tanh(randn(2, 3, 64, 64))
    optimiser, losses = torch.optim.Adam(small.parameters(), 3e-3), []
    for _ in range(6):
        reconstruction, between = small(image)
        loss = (reconstruction - image).abs().mean()
        extra = quantiser_loss(between) if isinstance(between, Quantised) else 1e-6 * between.kl().mean()
        optimiser.zero_grad()
        (loss + extra).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_shrinking_averages_the_latents_before_they_are_decoded() -> None:
    model, image = build(), randn(1, 3, 16, 16)
    averaged = torch.nn.functional.avg_pool2d(model.encode_moments(image).mean, 2)
    reconstruction, quantised = model(image, 2)
    assert reconstruction.shape == (1, 3, 8, 8)
    torch.testing.assert_close(quantised.raw, averaged)
    torch.testing.assert_close(reconstruction, model.decode(averaged * model.scaling_factor), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tiled_and_sliced_is_whole() -> None:
    model, image = build(), randn(2, 3, 48, 64)
    z = model.encode(image)
    decoded = model.decode(z)
    model.enable_tiling(24)
    model.enable_slicing()
    torch.testing.assert_close(model.encode(image), z, atol=2e-5, rtol=0)
    torch.testing.assert_close(model.decode(z), decoded, atol=2e-5 * float(decoded.abs().max()), rtol=0)
    model.disable_tiling()
    model.disable_slicing()
    assert torch.equal(model.decode(z), decoded)


@torch.no_grad()
def test_nan_latents_are_an_error_not_some_code() -> None:
    z = randn(1, 3, 8, 8)
    z[0, 1, 2, 3] = float("nan")
    with pytest.raises(LdmPipeError, match="NaN or infinity in the input"):
        build().decode(z)


@torch.no_grad()
def test_files_hold_the_model_and_say_which_it_is(tmp_path: Path) -> None:
    model, z = build(note={"a": [1]}), randn(1, 3, 8, 8)
    model.set_latent_statistics([0.1, 0.2, 0.3], [2.0, 2.0, 2.0])
    model.save_pretrained(tmp_path / "vq")
    written = json.loads((tmp_path / "vq" / "config.json").read_text())
    assert (written["_class_name"], written["scaling_factor"], written["note"]) == ("VQModel", 0.5, {"a": [1]})
    assert "quantize.embedding.weight" in load_tensors(tmp_path / "vq" / "diffusion_pytorch_model.safetensors")
    again = load_autoencoder(tmp_path, subfolder="vq")
    assert isinstance(again, VQModel)
    assert torch.equal(again.decode(z), model.decode(z))
    with pytest.raises(LdmPipeError, match="holds a VQModel, not a AutoencoderKL"):
        AutoencoderKL.from_pretrained(tmp_path / "vq")
    levels = {
        "block_out_channels": [8],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    }
    AutoencoderKL.from_config({**levels, "norm_num_groups": 4}).save_pretrained(tmp_path / "kl")
    assert isinstance(load_autoencoder(tmp_path / "kl"), AutoencoderKL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_vq_embeddings", 0),
        ("num_vq_embeddings", 2**40),
        ("vq_embed_dim", -1),
        ("norm_type", "spatial"),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("scaling_factor", 0.0),
    ],
)
def test_a_config_that_cannot_be_built_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(LdmPipeError, match=field):
        build(**{field: value})


def test_one_batch_can_be_overfitted() -> None:
    model, image = VQTraining(build(num_vq_embeddings=64), ema=True, decay=0.9).train(), torch.tanh(randn(2, 3, 8, 8))
    optimiser, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        reconstruction, quantised = model(image)
        loss = (reconstruction - image).abs().mean()
        optimiser.zero_grad()
        (loss + quantiser_loss(quantised)).backward()
        optimiser.step()
        model.update(*model.count(quantised))
        model.revive(quantised.raw.detach().movedim(1, -1).flatten(0, 2), generator)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_quantised_latents_are_plain_data() -> None:
    quantised = Quantised(randn(1, 3, 2, 2), randn(1, 3, 2, 2, seed=2), torch.zeros(1, 2, 2, dtype=torch.int64))
    expected = (quantised.raw - quantised.codes).square().mean()
    assert float(quantised.commitment()) == float(quantised.codebook()) == pytest.approx(float(expected))
