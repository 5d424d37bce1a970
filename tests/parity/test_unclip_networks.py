"""unCLIP's prior and text projection against diffusers (0.42.1) on tiny random models, fp32.

The same operators in the same order but for the sums inside attention: 1e-5, relative to the largest value; bfloat16:
`tests/bfloat16.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.networks.prior import PriorTransformer
from ldm_pipe.networks.text_projection import UnCLIPTextProjModel
from ldm_pipe.pretrained import load_tensors
from tests.bfloat16 import assert_as_close_as_the_reference
from tests.text_encoders import draw

diffusers = pytest.importorskip("diffusers", reason="the reference")

KARLO: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "embedding_dim": 20,
    "num_embeddings": 7,
    "additional_embeddings": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "karlo": {},
    "other widths": {"time_embed_dim": 40, "embedding_proj_dim": 16, "clip_embed_dim": 20, "dropout": 0.1},
    "norms": {"norm_in_type": "layer", "embedding_proj_norm_type": "layer", "time_embed_act_fn": "gelu"},
    "no last token": {"added_emb_type": None, "additional_embeddings": 3},
}
SHAP_E: dict[str, Any] = {
    **KARLO,
    **VARIANTS["norms"],
    "num_embeddings": 5,
    "additional_embeddings": 0,
    "encoder_hid_proj_type": None,
    "added_emb_type": None,
    "embedding_proj_dim": 16,
    "clip_embed_dim": 18,
    "time_embed_dim": 40,
}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.05
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def both(config: dict[str, Any], path: Path) -> tuple[Any, PriorTransformer]:
    theirs = draw(diffusers.PriorTransformer(**config))
    theirs.save_pretrained(path)
    return theirs, PriorTransformer.from_pretrained(path)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_prior(name: str, masked: bool, tmp_path: Path) -> None:
    config = {**KARLO, **VARIANTS[name]}
    theirs, ours = both(config, tmp_path)
    x_t, caption = numbers(0, 2, 20), numbers(1, 2, config.get("embedding_proj_dim", 20))
    tokens, t = numbers(2, 2, 7, 20), torch.tensor([3, 981])
    mask = torch.arange(7) < torch.tensor([[3], [6]]) if masked else None
    for time in (t, t[0]):
        found = ours(x_t, time.float(), tokens=tokens, token_mask=mask, pooled=caption)
        wanted = theirs(x_t, time, caption, tokens, mask).predicted_image_embedding
        close(found, wanted.reshape(found.shape))
    close(ours.denormalise(x_t), theirs.post_process_latents(x_t))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_prior_in_bfloat16(name: str, tmp_path: Path) -> None:
    config = {**KARLO, **VARIANTS[name]}
    theirs, ours = both(config, tmp_path)
    x_t, caption = numbers(0, 2, 20), numbers(1, 2, config.get("embedding_proj_dim", 20))
    tokens, mask = numbers(2, 2, 7, 20), torch.arange(7) < torch.tensor([[3], [6]])
    exact = ours(x_t, 7.0, tokens=tokens, token_mask=mask, pooled=caption)
    x_t, caption, tokens = x_t.bfloat16(), caption.bfloat16(), tokens.bfloat16()
    found = ours.bfloat16()(x_t, 7.0, tokens=tokens, token_mask=mask, pooled=caption)
    wanted = theirs.bfloat16()(x_t, 7, caption, tokens, mask).predicted_image_embedding.reshape(found.shape)
    assert_as_close_as_the_reference(found, wanted, exact)


@torch.no_grad()
def test_prior_of_shap_e(tmp_path: Path) -> None:
    """Many vectors at once, no caption but its embedding, positions of x_t only."""
    theirs, ours = both(SHAP_E, tmp_path)
    x_t, caption = numbers(0, 2, 5, 20), numbers(1, 2, 16)
    close(ours(x_t, 7.0, pooled=caption), theirs(x_t, 7, caption).predicted_image_embedding)


@pytest.mark.parametrize("kind", ["prior", "text_proj"])
def test_files_go_both_ways(kind: str, tmp_path: Path) -> None:
    """The config and every tensor come back, clip_mean and clip_std too, and diffusers misses and lacks nothing."""
    if kind == "prior":
        from diffusers import PriorTransformer as Theirs

        theirs, own = draw(Theirs(**KARLO)), PriorTransformer
    else:
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as Theirs

        config = {"clip_extra_context_tokens": 3, "clip_embeddings_dim": 20, "time_embed_dim": 24}
        theirs, own = draw(Theirs(**config, cross_attention_dim=16)), UnCLIPTextProjModel
    theirs.save_pretrained(tmp_path / "theirs")
    ours: Any = own.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again, told = Theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    assert {key: again.config[key] for key in theirs.config if key[0] != "_"} == {
        key: value for key, value in theirs.config.items() if key[0] != "_"
    }
    files = [load_tensors(tmp_path / side / "diffusion_pytorch_model.safetensors") for side in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        assert torch.equal(value, files[1][name])


@torch.no_grad()
def test_text_projection(tmp_path: Path) -> None:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as Theirs

    theirs = draw(
        Theirs(clip_extra_context_tokens=3, clip_embeddings_dim=20, time_embed_dim=24, cross_attention_dim=16)
    )
    theirs.save_pretrained(tmp_path)
    ours = UnCLIPTextProjModel.from_pretrained(tmp_path)
    image, caption, tokens = numbers(0, 2, 20), numbers(1, 4, 20), numbers(2, 4, 7, 20)
    wanted = theirs(
        image_embeddings=image, prompt_embeds=caption, text_encoder_hidden_states=tokens,
        do_classifier_free_guidance=True,
    )  # fmt: skip
    halves = [ours(None, caption[:2], tokens[:2]), ours(image, caption[2:], tokens[2:])]
    for found, right in zip(map(torch.cat, zip(*halves, strict=True)), wanted, strict=True):
        close(found, right)
