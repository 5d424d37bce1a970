"""Laws of training a text encoder together with the U-Net, and of what a frozen one leaves in the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conditioning import LabelEncoder, TransformerTextEncoder
from conditioning.tokenizer import train_bpe
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.tasks.diffusion import DiffusionData, diffusion_loss
from ldm_pipe.training.tasks.joint import JointNet, token_ids
from tests.training import make_config, make_data, make_unet

TEXTS = ["red apple", "cat", "dog", "green apple", ""]
MICRO = Micro(0, [0, 3, 5, 7], range(4))


def encoders() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = train_bpe(TEXTS * 3, 530, max_length=6)
    sizes = {"encoder_layers": 1, "encoder_attention_heads": 2, "head_dim": 4, "encoder_ffn_dim": 16}
    config = {"vocab_size": len(tokenizer), "d_model": 8, "max_position_embeddings": 6, **sizes}
    labels = {"num_classes": 4, "width": 8, "classes": TEXTS[:4]}
    return {"transformer": TransformerTextEncoder(config, tokenizer), "labels": LabelEncoder(labels)}


def loss_of(net: nn.Module, data: DiffusionData, folder: Path) -> torch.Tensor:
    config = make_config(folder, caption_dropout=0.5)
    law = config.schedule.build()
    return diffusion_loss(net, data, law, config, global_batch=4, device=torch.device("cpu"))(MICRO)[0]


@pytest.mark.parametrize("kind", ["transformer", "labels"])
def test_joint_and_cached_have_the_same_loss_and_only_joint_has_the_gradient(kind: str, tmp_path: Path) -> None:
    encoder, unet = encoders()[kind], make_unet()
    with torch.no_grad():
        cached = replace(make_data(), tokens=encoder.encode(TEXTS).tokens)
    ids, mask = token_ids(encoder, TEXTS)
    assert ids.shape == mask.shape
    joint = loss_of(JointNet(unet, encoder), replace(make_data(), tokens=ids, token_mask=mask), tmp_path)
    frozen = loss_of(unet, cached, tmp_path)
    assert joint.item() == pytest.approx(frozen.item(), abs=1e-6)
    joint.backward()
    table = encoder.class_embedding if kind == "labels" else encoder.model.embed_tokens
    assert torch.count_nonzero(table.weight.grad) > 0


def test_the_mask_and_the_pooled_vector_of_a_frozen_encoder_reach_the_network(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def net(x_t: torch.Tensor, t: torch.Tensor, **slots: Any) -> torch.Tensor:
        seen.update(slots)
        return x_t

    data = make_data()
    plain = loss_of(net, data, tmp_path)  # type: ignore[arg-type]
    assert list(seen) == ["tokens"]
    mask, pooled = torch.ones(5, 3, dtype=torch.bool), torch.randn(5, 2).half()
    assert loss_of(net, replace(data, token_mask=mask, pooled=pooled), tmp_path) == plain  # type: ignore[arg-type]
    assert seen["token_mask"].dtype == torch.bool
    assert seen["pooled"].dtype == torch.float32
    assert all(len(value) == 4 for value in seen.values())
