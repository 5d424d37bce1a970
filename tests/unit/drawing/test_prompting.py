"""Laws of prompts with a grammar in a call of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.drawing.prompting import PromptSyntax
from ldm_pipe.pretrained import LdmPipeError

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny_pipeline"


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    found = LatentDiffusionPipeline.from_pretrained(TINY)
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipe: LatentDiffusionPipeline, prompt: Any, **options: Any) -> Tensor:
    settings = {"num_inference_steps": 4, "seed": 3, "guidance_scale": 3.0, "prompt_syntax": "weighted"}
    return pipe(prompt, output_type="latent", **{**settings, **options}).images


def test_plain_prompts_draw_the_same_bits(pipe: LatentDiffusionPipeline) -> None:
    prompts = ["red apple", "", "a: b"]
    plain = draw(pipe, prompts, prompt_syntax="plain", negative_prompt="dark")
    assert torch.equal(draw(pipe, prompts, negative_prompt="dark"), plain)
    assert torch.equal(
        draw(pipe, prompts, guidance_scale=1.0), draw(pipe, prompts, guidance_scale=1.0, prompt_syntax="plain")
    )


def test_plain_syntax_takes_every_sign_as_text(pipe: LatentDiffusionPipeline) -> None:
    escaped = draw(pipe, r"\(red\:1.5\) \[apple\]")
    assert torch.equal(draw(pipe, "(red:1.5) [apple]", prompt_syntax="plain"), escaped)
    assert not torch.allclose(draw(pipe, "(red:1.5) [apple]"), escaped, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_a_switch_is_the_first_prompt_then_the_second(sampler: str, pipe: LatentDiffusionPipeline) -> None:
    """The same as a caller who hands in other embeddings after two steps."""
    cat, null = pipe.encode_prompt("cat", "")
    dog, _ = pipe.encode_prompt("dog", "")

    def change(_: Any, i: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": dog} if i == 1 else tensors

    by_hand = draw(
        pipe, None, prompt_embeds=cat, negative_prompt_embeds=null, sampler=sampler, callback_on_step_end=change,
        prompt_syntax="plain",
    )  # fmt: skip
    for text in ("[cat:dog:2]", "[cat:dog:0.5]"):
        assert torch.allclose(draw(pipe, text, sampler=sampler), by_hand, atol=1e-5)


def test_a_negative_prompt_may_switch_too(pipe: LatentDiffusionPipeline) -> None:
    first = draw(pipe, "cat", negative_prompt="[red:green:0]")
    assert torch.allclose(first, draw(pipe, "cat", negative_prompt="green"), atol=1e-5)
    assert not torch.allclose(draw(pipe, "cat", negative_prompt="[red:green:2]"), first, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_and_with_itself_at_half_weight_is_the_prompt(scale: float, pipe: LatentDiffusionPipeline) -> None:
    found = draw(pipe, "cat :0.5 AND cat :0.5", guidance_scale=scale)
    assert torch.allclose(found, draw(pipe, "cat", guidance_scale=scale), atol=1e-4)
    assert not torch.allclose(draw(pipe, "cat AND dog :-1", guidance_scale=scale), found, atol=1e-3)


def test_pictures_do_not_depend_on_the_prompts_beside_them(pipe: LatentDiffusionPipeline) -> None:
    prompts = ["cat", "red " * 30 + "apple", "cat AND [dog:bird:1] :0.5", "(pie:1.4)"]
    together = draw(pipe, prompts, seed=[1, 2, 3, 4])
    for i, prompt in enumerate(prompts):
        alone = draw(pipe, prompt, seed=1 + i)
        assert torch.allclose(alone[0], together[i], atol=1e-4)
    one_by_one = draw(pipe, prompts, seed=[1, 2, 3, 4], deterministic_batch=True)
    assert torch.allclose(one_by_one, together, atol=1e-4)


def test_a_callback_may_change_the_guidance_but_not_the_embeddings(pipe: LatentDiffusionPipeline) -> None:
    def weaken(view: Any, i: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        view._guidance_scale = 3.0 if i < 2 else 1.5
        return tensors

    def by_hand(prompt: str) -> Tensor:
        return draw(pipe, prompt, callback_on_step_end=weaken)

    assert torch.allclose(by_hand("cat:0.5 AND cat:0.5"), by_hand("cat"), atol=1e-4)
    assert not torch.allclose(by_hand("cat"), draw(pipe, "cat"), atol=1e-4)
    other, _ = pipe.encode_prompt("dog", "")
    with pytest.raises(LdmPipeError, match="prompt with a grammar"):
        draw(pipe, "(cat)", callback_on_step_end=lambda *_: {"prompt_embeds": other})


def test_the_file_of_a_picture_tells_the_syntax(pipe: LatentDiffusionPipeline) -> None:
    settings = {"num_inference_steps": 1, "seed": 0, "output_type": "latent"}
    told = pipe("(cat)", prompt_syntax={"emphasis": "scale"}, **settings).infos[0].settings
    assert told["Prompt syntax"] == "weighted scale"
    assert "Prompt syntax" not in pipe("(cat)", **settings).infos[0].settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a (cat"}, "no partner at position 2"),
        ({"prompt": "cat", "negative_prompt": "(x:y)"}, "no number"),
        ({"prompt": "cat", "negative_prompt": "a AND b"}, "AND in a negative prompt"),
        ({"prompt": "cat", "prompt_syntax": "loud"}, "prompt_syntax"),
        ({"prompt": "cat", "prompt_syntax": "weighted loud"}, "emphasis"),
        ({"prompt": "cat", "prompt_syntax": "plain mean"}, "plain mean"),
        ({"prompt": "cat", "prompt_syntax": None}, "prompt_syntax"),
        ({"prompt": "cat", "prompt_syntax": {"emphasis": "loud"}}, "emphasis"),
        ({"prompt": "cat", "prompt_syntax": {"volume": 1}}, "volume"),
    ],
)
def test_bad_prompts_are_refused(options: dict[str, Any], message: str, pipe: LatentDiffusionPipeline) -> None:
    with pytest.raises(LdmPipeError, match=message):
        draw(pipe, **options)


def test_lone_brackets_when_asked(pipe: LatentDiffusionPipeline) -> None:
    literal = {"brackets": "literal"}
    assert torch.equal(draw(pipe, "a :)", prompt_syntax=literal), draw(pipe, "a :)", prompt_syntax="plain"))
    for value in (literal, "weighted literal", {"emphasis": "mean"}, "weighted mean literal", "weighted"):
        syntax = PromptSyntax.read(value)
        assert PromptSyntax.read(str(syntax)) == syntax
    assert str(PromptSyntax.read(literal)) == "weighted literal"
