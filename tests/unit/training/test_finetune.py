"""Laws of the fine-tuning config: diffusers' flags, refusals, captions, masks, conversions. No training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.data.dataset import load_records
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import build_config, parse_config, read_yaml
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.tasks.finetune.config import FinetuneConfig, check_config, flat_flags
from ldm_pipe.training.tasks.finetune.convert import convert, random_mask, random_masks
from ldm_pipe.training.tasks.finetune.data import captions_of
from ldm_pipe.training.tasks.finetune.nets import choose_parts
from tests.finetuning import TINY, make_config, make_pictures
from tests.source import ROOT

FLAGS = """--pretrained_model_name_or_path m --resolution 256 --train_batch_size 3 --gradient_accumulation_steps 2
--max_train_steps 7 --learning_rate 2e-5 --lr_scheduler constant --lr_warmup_steps 5 --mixed_precision bf16
--snr_gamma 5.0 --use_ema --seed 9 --output_dir out --checkpointing_steps 11 --checkpoints_total_limit 3
--validation_prompts a,b c --report_to none --enable_xformers_memory_efficient_attention --gradient_checkpointing
--use_8bit_adam --allow_tf32 --noise_offset 0.1 --random_flip --center_crop --max_train_samples 20
--resume_from_checkpoint latest --train_data_dir pictures --image_column i --caption_column c --max_grad_norm 0.5
--adam_beta1 0.8 --rank 8 --train_text_encoder --revision r --variant fp16 --cache_dir kept"""


def test_the_flags_of_diffusers_examples_mean_the_same_here() -> None:
    """HABITS.md: every flag of train_text_to_image.py that users type, in its spelling."""
    config = parse_config(FinetuneConfig, flat_flags(FLAGS.split()), "test")
    plain = {
        "pretrained_model_name_or_path": "m", "train_batch_size": 3, "gradient_accumulation_steps": 2,
        "max_train_steps": 7, "mixed_precision": "bf16", "snr_gamma": 5.0, "use_ema": True, "seed": 9,
        "output_dir": "out", "checkpointing_steps": 11, "checkpoints_total_limit": 3, "report_to": "none",
        "validation_prompts": ("a,b", "c"), "enable_xformers_memory_efficient_attention": True,
        "gradient_checkpointing": True, "allow_tf32": True, "noise_offset": 0.1, "resume_from_checkpoint": "latest",
        "rank": 8, "train_text_encoder": True, "revision": "r", "variant": "fp16", "cache_dir": "kept",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in plain} == plain
    data = {"resolution": 256, "random_flip": True, "center_crop": True, "max_train_samples": 20}
    data |= {"train_data_dir": "pictures", "image_column": "i", "caption_column": "c"}
    assert {name: getattr(config.data, name) for name in data} == data
    optim = {"learning_rate": 2e-5, "lr_scheduler": "constant", "lr_warmup_steps": 5, "max_grad_norm": 0.5}
    optim |= {"adam_beta1": 0.8, "optimizer": "adamw_8bit"}
    assert {name: getattr(config.optim, name) for name in optim} == optim


def test_other_spellings_of_flags() -> None:
    words = ["--learning-rate=1e-5", "--instance_data_dir", "d", "--no_random_flip", "--no-cache-latents"]
    wanted = ["--optim.learning_rate=1e-5", "--data.train_data_dir", "d", "--data.no_random_flip"]
    assert flat_flags(words) == [*wanted, "--no_cache_latents"]
    assert not parse_config(FinetuneConfig, flat_flags(words), "test").cache_latents
    assert flat_flags(["--validation_prompt", "a"]) == ["--validation_prompts", "a"]
    assert flat_flags(["--config", "a.yaml", "--optim.adam_beta1", "-1"]) == [
        "--config", "a.yaml", "--optim.adam_beta1", "-1"
    ]  # fmt: skip


def test_the_defaults_are_those_users_know() -> None:
    config = parse_config(FinetuneConfig, [], "test")
    assert (config.caption_dropout, config.snr_gamma, config.use_ema, config.rank) == (0.1, None, False, 4)
    assert config.data.caption_column == "text"
    assert build_config(FinetuneConfig, {"data": {"resolution": 32}}, "test").data.caption_column == "text"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("finetune*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_build(path: Path) -> None:
    config = build_config(FinetuneConfig, read_yaml(path), str(path))
    check_config(config)
    assert path.stem in config.output_dir


WORDS = {"method": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "apple"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "textual_inversion", "initializer_token": "a"}, "placeholder_token"),
        ({"method": "textual_inversion", "placeholder_token": "<x>"}, "initializer_token"),
        ({"placeholder_token": "<x>"}, "method full"),
        ({**WORDS, "instance_prompt": "a"}, "instance_prompt"),
        ({**WORDS, "train_text_encoder": True}, "train_text_encoder"),
        ({**WORDS, "caption_template": "{caption}"}, "does not hold {word}"),
        ({"caption_template": "{word}"}, "learns no word"),
        ({"method": "lora", "train_parts": ["attention"]}, "train_parts"),
        ({"method": "lora", "inpainting": True}, "inpainting"),
        ({"with_prior_preservation": True, "class_prompt": "a"}, "instance_prompt and class_prompt"),
        ({"class_prompt": "a"}, "without with_prior_preservation"),
        (
            {"with_prior_preservation": True, "class_prompt": "a", "instance_prompt": "b", "data": {"streaming": True}},
            "data.streaming",
        ),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LdmPipeError, match=named):
        check_config(make_config(tmp_path, **changes))


def test_captions_are_written_by_templates(tmp_path: Path) -> None:
    records = load_records(make_pictures(tmp_path / "pictures"))
    plain = captions_of(make_config(tmp_path), records)
    assert plain == [[caption] for caption in records.captions]
    styled = captions_of(make_config(tmp_path, caption_template="{caption}, flat style"), records)
    assert styled[0] == [f"{records.captions[0]}, flat style"]
    word = captions_of(make_config(tmp_path, **WORDS, caption_template="{word} of {caption}"), records)
    assert word[1] == [f"<x> of {records.captions[1]}"]
    assert all("<x>" in text for text in captions_of(make_config(tmp_path, **WORDS), records)[0])
    assert captions_of(make_config(tmp_path, instance_prompt="a sks apple"), records)[0] == ["a sks apple"]


def test_masks_belong_to_step_and_place() -> None:
    whole = random_masks(3, Micro(5, list(range(6)), range(6)), (16, 24))
    split = [random_masks(3, Micro(5, list(r), r), (16, 24)) for r in (range(2), range(2, 6))]
    assert whole.shape == (6, 1, 16, 24)
    assert torch.equal(whole, torch.cat(split))
    assert not torch.equal(whole, random_masks(3, Micro(6, list(range(6)), range(6)), (16, 24)))
    assert set(whole.unique().tolist()) <= {0.0, 1.0}


def test_a_mask_is_all_a_rectangle_or_an_ellipse() -> None:
    assert random_mask(torch.tensor([0.1, 0, 0, 0, 0, 0]), 8, 8).min() == 1
    box = random_mask(torch.tensor([0.9, 0.2, 0.5, 0.5, 0.0, 0.0]), 20, 40)[0]  # half of each side, upper left
    assert torch.equal(box.nonzero().amax(0), torch.tensor([9, 19]))
    assert box.sum() == 10 * 20
    disc = random_mask(torch.tensor([0.9, 0.7, 0.5, 0.5, 1.0, 1.0]), 80, 160)[0]
    assert float(disc.sum()) == pytest.approx(torch.pi / 4 * 40 * 80, rel=0.02)
    assert disc[:39].sum() == 0


def test_a_widened_unet_draws_as_before(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    g = torch.Generator().manual_seed(0)
    x, tokens, more = (torch.randn(shape, generator=g) for shape in ((2, 4, 8, 8), (2, 16, 32), (2, 5, 8, 8)))
    t = torch.tensor([3.0, 700.0])
    with torch.no_grad():
        before = pipe.unet(x, t, tokens=tokens)
        wide = convert(pipe, make_config(tmp_path, inpainting=True)).unet
        assert torch.equal(wide(x, t, tokens=tokens, spatial=more), before) or torch.allclose(
            wide(x, t, tokens=tokens, spatial=more), before, atol=1e-5
        )
    assert wide.config.in_channels == 9
    with pytest.raises(LdmPipeError, match="inpainting"):
        convert(pipe, make_config(tmp_path))


def test_conversion_to_v_and_zero_terminal_snr(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    changed = convert(pipe, make_config(tmp_path, prediction_type="v_prediction", zero_terminal_snr=True))
    assert (changed.schedule.prediction, changed.defaults.spacing) == ("v", "trailing")
    assert float(changed.schedule.alpha(999)) == 0.0
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    with pytest.raises(LdmPipeError, match='prediction="v"'):  # eps says nothing of x0 where there is no signal
        convert(pipe, make_config(tmp_path, prediction_type="epsilon", zero_terminal_snr=True))


def test_parts_are_chosen_by_name() -> None:
    unet = LatentDiffusionPipeline.from_pretrained(TINY).unet
    choose_parts(unet, ["cross_attention", "conv_in.*"])
    chosen = {name for name, weight in unet.named_parameters() if weight.requires_grad}
    assert chosen == {n for n, _ in unet.named_parameters() if ".attn2." in n or n.startswith("conv_in.")}
    with pytest.raises(LdmPipeError, match=r"nonsense.*up_blocks"):
        choose_parts(unet, ["nonsense"])
