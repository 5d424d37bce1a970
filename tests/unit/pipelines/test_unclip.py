"""unCLIP: laws of its networks and pipelines, what is refused, folders, the command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm_pipe
from conditioning import CLIPImageEncoder, CLIPTextEncoder, ClipTokenizer
from conditioning.text import KARLO
from ldm_pipe import LatentDiffusionPipeline, NoiseSchedule, UNet
from ldm_pipe.cli import main
from ldm_pipe.drawing.editing import slerp
from ldm_pipe.drawing.png_info import read_png_info
from ldm_pipe.interop.folders.unclip import UnCLIPParts, scheduler_file
from ldm_pipe.networks.prior import PriorTransformer
from ldm_pipe.networks.text_projection import UnCLIPTextProjModel
from ldm_pipe.pipelines import UnCLIPImageVariationPipeline, UnCLIPPipeline
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import quiet
from tests.text_encoders import TOKENIZER

FULL_SIZE = json.loads((Path(__file__).parents[2] / "data" / "full_size_configs.json").read_text())
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


# Pipelines

TEXT: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 24, "projection_dim": 12, "hidden_act": "quick_gelu",
    "eos_token_id": TOKENIZER.end_id, "architectures": ["CLIPTextModelWithProjection"],
}  # fmt: skip
DECODER: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [16],
    "down_block_types": ["SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 8,
    "class_embed_type": "identity",
}
ENLARGING: dict[str, Any] = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 6, "out_channels": 3, "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 8,
    "add_attention": False,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "projection_dim": 12,
}  # fmt: skip
LAW = NoiseSchedule(beta_schedule="squaredcos_cap_v2", spacing="linspace", steps_offset=0)
FEW: dict[str, Any] = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "output_type": "pt"}
FEW_TEXT: dict[str, Any] = {**FEW, "prior_num_inference_steps": 2}


def parts(**changes: Any) -> UnCLIPParts:
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "text_encoder": CLIPTextEncoder(TEXT, TOKENIZER, KARLO),
        "text_proj": UnCLIPTextProjModel.from_config(PROJECTION),
        "decoder": UNet.from_config(DECODER),
        "super_res_first": UNet.from_config(ENLARGING),
        "super_res_last": UNet.from_config(ENLARGING),
    }
    made = {name: net.eval() for name, net in made.items()}
    return UnCLIPParts(**{**made, "decoder_schedule": LAW, "super_res_schedule": LAW, **changes})


def prior(**changes: Any) -> PriorTransformer:
    return PriorTransformer.from_config({**PRIOR, "num_embeddings": 24, **changes}).eval()


def from_text() -> UnCLIPPipeline:
    law = NoiseSchedule("squaredcos_cap_v2", prediction="x0", spacing="linspace", steps_offset=0)
    return quiet(UnCLIPPipeline(parts(), prior(), law))


def from_picture() -> UnCLIPImageVariationPipeline:
    return quiet(UnCLIPImageVariationPipeline(parts(), CLIPImageEncoder.from_config(VISION)))


def picture() -> Tensor:
    return numbers(5, 3, 16, 20).sigmoid()


MAKERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "UnCLIPPipeline": (from_text, {"prompt": "red apple", **FEW_TEXT}),
    "UnCLIPImageVariationPipeline": (from_picture, {"image": picture(), **FEW}),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_is_opened_by_the_class_that_wrote_it(name: str, tmp_path: Path) -> None:
    make, call = MAKERS[name]
    pipe = make()
    pipe.save_pretrained(tmp_path / "m")
    again = quiet(ldm_pipe.load_pipeline(tmp_path / "m"))
    assert type(again) is type(pipe)
    assert torch.equal(again(**call, seed=1).images, pipe(**call, seed=1).images)
    again.save_pretrained(tmp_path / "n", dtype="bfloat16", variant="low")
    low = quiet(ldm_pipe.load_pipeline(tmp_path / "n", variant="low", dtype="bfloat16"))
    assert {net.dtype for net in low.components.values() if hasattr(net, "dtype")} == {torch.bfloat16}
    assert low(**call, seed=1).images.isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "n"]
    with pytest.raises(LdmPipeError, match=name):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("name", MAKERS)
def test_the_hub_is_asked_for_every_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    MAKERS[name][0]().save_pretrained(tmp_path)
    written = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]

    def fetched(*_: Any, allow_patterns: list[str], **__: Any) -> Path:
        assert sorted(filter_repo_objects(written, allow_patterns=allow_patterns)) == sorted(written)
        return tmp_path

    monkeypatch.setattr("ldm_pipe.interop.folders.folder.resolve_folder", fetched)
    assert ldm_pipe.load_pipeline("owner/name").name


@pytest.mark.parametrize("name", MAKERS)
def test_a_picture_belongs_to_its_seed(name: str) -> None:
    """Every stage draws from the picture's own generator, whatever the batch."""
    make, call = MAKERS[name]
    pipe = make()
    both = pipe(**call, num_images_per_prompt=2, seed=5)
    assert both.seeds == [5, 6]
    torch.testing.assert_close(pipe(**call, seed=6).images[0], both.images[1], rtol=0, atol=1e-4)
    told = pipe(**call)
    assert torch.equal(pipe(**call, seed=told.seeds).images, told.images)


@pytest.mark.parametrize("name", MAKERS)
def test_offload_draws_the_same(name: str) -> None:
    """There is no GPU here: `cpu:0` stands for it."""
    pytest.importorskip("accelerate")
    make, call = MAKERS[name]
    pipe = make()
    plain = pipe(**call, seed=1).images
    pipe._offload = torch.device("cpu", 0)
    assert torch.equal(pipe(**call, seed=1).images, plain)


def test_the_second_network_takes_the_last_step() -> None:
    pipe, call = from_text(), MAKERS["UnCLIPPipeline"][1]
    plain = {n: pipe(**{**call, "super_res_num_inference_steps": n}, seed=1).images for n in (1, 2)}
    with torch.no_grad():
        pipe.parts.super_res_first.conv_out.bias.add_(5)
    assert torch.equal(pipe(**{**call, "super_res_num_inference_steps": 1}, seed=1).images, plain[1])
    assert not torch.equal(pipe(**call, seed=1).images, plain[2])


def test_the_way_between_two_pictures_has_them_as_its_ends() -> None:
    """Spherical interpolation of embeddings from one noise (arXiv:2204.06125, section 3.2)."""
    pipe = from_picture()
    pair = [picture(), 1 - picture()]
    one, other = pipe.encode_image(pair).split(1)
    way = slerp(one.expand(3, -1), other.expand(3, -1), torch.tensor([0.0, 0.5, 1.0]))
    drawn = pipe(image_embeddings=way, seed=[7] * 3, **FEW).images
    ends = torch.cat([pipe(end, seed=7, **FEW).images for end in pair])
    torch.testing.assert_close(drawn[::2], ends, rtol=0, atol=1e-4)


WRONG_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("UnCLIPPipeline", {"prompt": None}),
    ("UnCLIPPipeline", {"prompt": 3}),
    ("UnCLIPPipeline", {"prompt": []}),
    ("UnCLIPPipeline", {"num_images_per_prompt": 0}),
    ("UnCLIPPipeline", {"prior_num_inference_steps": 0}),
    ("UnCLIPPipeline", {"decoder_num_inference_steps": 1001}),
    ("UnCLIPPipeline", {"super_res_num_inference_steps": 2.5}),
    ("UnCLIPPipeline", {"prior_guidance_scale": "4"}),
    ("UnCLIPPipeline", {"decoder_guidance_scale": float("nan")}),
    ("UnCLIPPipeline", {"prior_latents": torch.zeros(1, 13)}),
    ("UnCLIPPipeline", {"decoder_latents": torch.zeros(1, 3, 8, 8)}),
    ("UnCLIPPipeline", {"super_res_latents": torch.full((1, 3, 8, 8), float("inf"))}),
    ("UnCLIPPipeline", {"text_model_output": (torch.zeros(1, 12), torch.zeros(1, 24, 12))}),
    ("UnCLIPPipeline", {"prompt": None, "text_model_output": 3, "text_attention_mask": torch.ones(1, 24)}),
    ("UnCLIPPipeline", {"seed": 1, "generator": torch.Generator()}),
    ("UnCLIPPipeline", {"seed": -1}),
    ("UnCLIPPipeline", {"output_type": "jpeg"}),
    ("UnCLIPImageVariationPipeline", {"image": None}),
    ("UnCLIPImageVariationPipeline", {"image": 3}),
    ("UnCLIPImageVariationPipeline", {"image_embeddings": torch.zeros(1, 12)}),
    ("UnCLIPImageVariationPipeline", {"image": None, "image_embeddings": torch.zeros(1, 13)}),
    ("UnCLIPImageVariationPipeline", {"image": None, "image_embeddings": [1.0]}),
    ("UnCLIPImageVariationPipeline", {"decoder_num_inference_steps": None}),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG_CALLS)
def test_a_wrong_call_is_refused_before_any_work(
    name: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, call = MAKERS[name]
    pipe = make()
    monkeypatch.setattr("ldm_pipe.pipelines.unclip.encode", lambda *_: pytest.fail("it worked already"))
    with pytest.raises(LdmPipeError, match="|".join(wrong)):
        pipe(**{**call, **wrong})


def test_parts_that_do_not_belong_together_are_refused() -> None:
    for wrong in (
        lambda: parts(text_encoder=CLIPTextEncoder(TEXT, TOKENIZER)),
        lambda: parts(text_encoder=CLIPTextEncoder({**TEXT, "projection_dim": 13}, TOKENIZER, KARLO)),
        lambda: parts(text_proj=UnCLIPTextProjModel.from_config({**PROJECTION, "time_embed_dim": 32})),
        lambda: parts(text_proj=UnCLIPTextProjModel.from_config({**PROJECTION, "cross_attention_dim": 12})),
        lambda: parts(decoder=UNet.from_config({**DECODER, "class_embed_type": None})),
        lambda: parts(decoder=UNet.from_config({**DECODER, "sample_size": None})),
        lambda: parts(super_res_last=UNet.from_config({**ENLARGING, "in_channels": 3})),
        lambda: UnCLIPPipeline(parts(), prior(embedding_dim=13), LAW),
        lambda: UnCLIPPipeline(parts(), prior(num_embeddings=23), LAW),
        lambda: UnCLIPPipeline(parts(), prior(added_emb_type=None), LAW),
        lambda: UnCLIPImageVariationPipeline(parts(), CLIPImageEncoder.from_config({**VISION, "projection_dim": 8})),
        lambda: UnCLIPImageVariationPipeline(parts(), CLIPImageEncoder.from_config(VISION, slot="token")),
    ):
        with pytest.raises(LdmPipeError):
            wrong()


def test_karlos_published_sizes_belong_together() -> None:
    configs = {name: FULL_SIZE[f"karlo/{name}"]["config"] for name in ("prior", "text_proj", "decoder")}
    words = ClipTokenizer(TOKENIZER.vocab, TOKENIZER.merges, max_length=77)
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    with torch.device("meta"):
        whole = parts(
            text_encoder=CLIPTextEncoder({**TEXT, **large, "max_position_embeddings": 77}, words, KARLO),
            text_proj=UnCLIPTextProjModel.from_config(configs["text_proj"]),
            decoder=UNet.from_config(configs["decoder"]),
        )
        pipe = UnCLIPPipeline(whole, PriorTransformer.from_config(configs["prior"]), LAW)
    assert pipe.default_size == (8, 8)


WRONG_FOLDERS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("custom code", "model_index.json", lambda j: j.update(text_proj=["my_module", "MyProjection"])),
    ("missing part", "model_index.json", lambda j: j.pop("decoder")),
    ("a part of another pipeline", "model_index.json", lambda j: j.update(vae=["diffusers", "AutoencoderKL"])),
    ("scheduler", "decoder_scheduler/scheduler_config.json", lambda j: j.update(prediction_type="score")),
    ("prior", "prior/config.json", lambda j: j.update(embedding_dim=16)),
    ("projection", "text_proj/config.json", lambda j: j.update(cross_attention_dim=16)),
    ("decoder", "decoder/config.json", lambda j: j.update(cross_attention_dim=16)),
    ("text encoder", "text_encoder/config.json", lambda j: j.update(architectures=["CLIPTextModel"])),
]


@pytest.mark.parametrize(("file", "change"), [w[1:] for w in WRONG_FOLDERS], ids=[w[0] for w in WRONG_FOLDERS])
def test_a_wrong_folder_is_refused(file: str, change: Callable[[Any], Any], tmp_path: Path) -> None:
    from_text().save_pretrained(tmp_path)
    value = json.loads((tmp_path / file).read_text())
    change(value)
    (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(LdmPipeError):
        ldm_pipe.load_pipeline(tmp_path)


def test_another_preparation_of_pictures_is_refused(tmp_path: Path) -> None:
    from_picture().save_pretrained(tmp_path)
    file = tmp_path / "feature_extractor" / "preprocessor_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "size": 16, "crop_size": 16}))  # as earlier versions wrote it
    ldm_pipe.load_pipeline(tmp_path)
    for key, value in (("resample", 2), ("image_mean", [0.5] * 3), ("crop_size", 15), ("do_resize", False)):
        file.write_text(json.dumps({**config, key: value}))
        with pytest.raises(LdmPipeError, match=key):
            ldm_pipe.load_pipeline(tmp_path)


def test_laws_that_diffusers_pipelines_cannot_step_with_are_not_written(tmp_path: Path) -> None:
    assert scheduler_file(LAW, learned=True)["variance_type"] == "learned_range"
    for law in (
        NoiseSchedule("linear", spacing="linspace"),
        NoiseSchedule("squaredcos_cap_v2", spacing="leading"),
        NoiseSchedule("squaredcos_cap_v2", spacing="linspace", prediction="v"),
    ):
        with pytest.raises(LdmPipeError, match="squaredcos_cap_v2"):
            quiet(UnCLIPPipeline(parts(), prior(), law)).save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_command_draws(tmp_path: Path) -> None:
    from_text().save_pretrained(tmp_path / "text")
    from_picture().save_pretrained(tmp_path / "picture")
    steps = ["--decoder-num-inference-steps", "2", "--super-res-num-inference-steps", "2", "--quiet", "--seed", "4"]
    base = ["draw", "red apple", "--model", str(tmp_path / "text"), "--prior-num-inference-steps", "2", *steps]
    assert main([*base, "--prior-guidance-scale", "2", "-n", "3", "--batch-size", "2", "-o", f"{tmp_path}/a.png"]) == 0
    third = from_text()("red apple", **{**FEW_TEXT, "output_type": "pil"}, prior_guidance_scale=2.0, seed=6).images[0]
    assert Image.open(tmp_path / "a-3.png").tobytes() == third.tobytes()
    info = read_png_info(tmp_path / "a-3.png")
    assert info is not None
    wanted = {"Seed": "6", "Steps": "2", "Prior steps": "2", "Prior CFG scale": "2", "Enlarging steps": "2"}
    wanted |= {"Pipeline": "UnCLIPPipeline"}
    assert {key: info.settings[key] for key in wanted} == wanted
    words = ["draw", "--model", str(tmp_path / "picture"), "--image", str(tmp_path / "a-1.png"), *steps]
    assert main([*words, "--decoder-guidance-scale", "1", "-n", "2", "-o", str(tmp_path / "b.png")]) == 0
    assert len(list(tmp_path.glob("b-*.png"))) == 2
    assert main([*base, "--steps", "2", "-o", str(tmp_path / "c.png")]) == 2
