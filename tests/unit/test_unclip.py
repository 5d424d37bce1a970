"""unCLIP: laws of the prior and the text projection, what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.unet.prior import PriorTransformer
from ldm_pipe.unet.text_projection import UnCLIPTextProjModel

FULL_SIZE = json.loads((Path(__file__).parents[1] / "data" / "full_size_configs.json").read_text())
NETWORKS: dict[str, Any] = {"karlo/prior": PriorTransformer, "karlo/text_proj": UnCLIPTextProjModel}
PRIOR: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "embedding_dim": 12,
    "num_embeddings": 5,
}
PROJECTION = {"clip_extra_context_tokens": 2, "clip_embeddings_dim": 12, "time_embed_dim": 64, "cross_attention_dim": 8}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
def test_full_size_config_has_the_known_keys_and_count(name: str) -> None:
    entry = FULL_SIZE[name]
    with torch.device("meta"):
        net = NETWORKS[name].from_config({"_class_name": entry["_class_name"], **entry["config"]})
    keys = "\n".join(sorted(f"{key} {list(value.shape)}" for key, value in net.state_dict().items()))
    assert sum(value.numel() for value in net.parameters()) == entry["params"]
    assert hashlib.sha256(keys.encode()).hexdigest() == entry["keyhash"]
    assert {key: net.config[key] for key in entry["config"]} == entry["config"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("added_emb_type", "sum"),
        ("encoder_hid_proj_type", "text_proj"),
        ("norm_in_type", "group"),
        ("embedding_proj_norm_type", True),
        ("time_embed_act_fn", "tanh"),
        ("num_layers", 0),
        ("embedding_dim", "12"),
        ("num_embeddings", None),
        ("additional_embeddings", -1),
        ("clip_embed_dim", 1.5),
        ("dropout", 1),
        ("dropout", "none"),
    ],
)
def test_a_prior_of_another_kind_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(LdmPipeError, match=field):
        PriorTransformer.from_config({**PRIOR, field: value})


@pytest.mark.parametrize("field", ["time_embed_dim", "cross_attention_dim", "clip_extra_context_tokens"])
def test_a_text_projection_of_no_width_is_refused_by_name(field: str) -> None:
    for value in (None, 0, "8"):
        with pytest.raises(LdmPipeError, match=field):
            UnCLIPTextProjModel.from_config({**PROJECTION, field: value})


def test_unknown_fields_are_kept() -> None:
    assert PriorTransformer.from_config({**PRIOR, "from_a_later_version": 3}).config.from_a_later_version == 3


@torch.no_grad()
def test_a_mask_hides_padding_and_what_comes_after() -> None:
    net = PriorTransformer.from_config(PRIOR).eval()
    x_t, caption, tokens = numbers(0, 2, 12), numbers(1, 2, 12), numbers(2, 2, 5, 12)
    mask = torch.arange(5) < torch.tensor([[3], [4]])
    changed = torch.where(mask[..., None], tokens, tokens + 9)
    found, same = (net(x_t, 3.0, tokens=rows, token_mask=mask, pooled=caption) for rows in (tokens, changed))
    torch.testing.assert_close(found, same, rtol=0, atol=1e-6)
    assert not torch.allclose(found, net(x_t, 3.0, tokens=changed, pooled=caption), atol=1e-2)


@torch.no_grad()
def test_the_prior_says_what_does_not_fit() -> None:
    net = PriorTransformer.from_config(PRIOR)
    right: dict[str, Any] = {"tokens": numbers(2, 2, 5, 12), "pooled": numbers(1, 2, 12)}
    for wrong in (
        {"pooled": None},
        {"pooled": numbers(1, 2, 13)},
        {"tokens": None},
        {"tokens": numbers(2, 2, 5, 13)},
        {"tokens": numbers(2, 2, 4, 12)},
        {"token_mask": torch.ones(2, 4, dtype=torch.bool)},
        {"labels": torch.tensor([1, 2])},
    ):
        with pytest.raises(LdmPipeError):
            net(numbers(0, 2, 12), 3.0, **{**right, **wrong})
