"""The pipelines beside LatentDiffusionPipeline: which class opens which folder, what is refused, seeds and classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm_pipe
from autoencoder import AutoencoderKL, VQModel
from ldm_pipe import LatentDiffusionPipeline, NoiseSchedule, UNet
from ldm_pipe.cli import main
from ldm_pipe.drawing.output import Defaults, Thresholding
from ldm_pipe.drawing.png_info import read_png_info
from ldm_pipe.drawing.request.checks import thresholding_of
from ldm_pipe.pipelines import (
    PixelDiffusionPipeline,
    SuperResolutionPipeline,
    UnconditionalPipeline,
    UpscalePipeline,
)
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import AUTOENCODER, TINY, UNET_2D, quiet

UNET: dict[str, Any] = {"_class_name": "UNet2DModel", **UNET_2D}
LAW = NoiseSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps_offset=0)
FEW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}


def network(**changes: Any) -> UNet:
    torch.manual_seed(0)
    return UNet.from_config({**UNET, **changes}).eval()


def unconditional(**changes: Any) -> UnconditionalPipeline:
    return quiet(UnconditionalPipeline(network(**changes), LAW, defaults=Defaults(sampler="ddim"), name="tiny"))


def by_class(null: int | None = 4) -> UnconditionalPipeline:
    return quiet(UnconditionalPipeline(network(num_class_embeds=5), LAW, null_label=null))


def latent() -> UnconditionalPipeline:
    vq = VQModel.from_config({**AUTOENCODER, "num_vq_embeddings": 16, "scaling_factor": 1.0}).eval()
    return quiet(UnconditionalPipeline(network(), LAW, vq))


def enlarging() -> SuperResolutionPipeline:
    vq = VQModel.from_config({**AUTOENCODER, "num_vq_embeddings": 16, "scaling_factor": 1.0}).eval()
    return quiet(SuperResolutionPipeline(network(in_channels=6), vq, LAW))


def enlarging_by_class() -> SuperResolutionPipeline:
    """Build the shape of ADM's 64 -> 256: in pixels, by class, with a variance."""
    unet = network(in_channels=6, out_channels=6, num_class_embeds=5, sample_size=16)
    return quiet(SuperResolutionPipeline(unet, None, LAW, defaults=Defaults(sampler="ddpm")))


MAKERS: dict[str, Callable[[], Any]] = {
    "DDIMPipeline": unconditional,
    "LDMPipeline": latent,
    "UnconditionalPipeline": by_class,
    "LDMSuperResolutionPipeline": enlarging,
    "SuperResolutionPipeline": enlarging_by_class,
}
CALLS: dict[str, dict[str, Any]] = {
    "UnconditionalPipeline": {"class_labels": 1},
    "LDMSuperResolutionPipeline": {"image": torch.rand(3, 8, 8)},
    "SuperResolutionPipeline": {"image": torch.rand(3, 8, 8), "class_labels": 1},
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_is_opened_by_the_class_that_wrote_it(name: str, tmp_path: Path) -> None:
    pipe = MAKERS[name]()
    pipe.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "model_index.json").read_text())["_class_name"] == name
    again = ldm_pipe.load_pipeline(tmp_path / "m")
    assert type(again) is type(pipe)
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(value, again.unet.state_dict()[key])
    again.save_pretrained(tmp_path / "n", dtype="bfloat16", variant="low")
    low: Any = ldm_pipe.load_pipeline(tmp_path / "n", variant="low", dtype="bfloat16")
    assert low.dtype == torch.bfloat16
    assert getattr(low, "null_label", None) == getattr(pipe, "null_label", None)
    call = {**CALLS.get(name, {}), **FEW, "seed": 0}
    torch.testing.assert_close(quiet(low)(**call).images, pipe(**call).images, rtol=0, atol=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "n"]
    with pytest.raises(LdmPipeError, match="differ"):
        ldm_pipe.load_pipeline(tmp_path / "m", dtype="float16", torch_dtype="float32")
    for other in (LatentDiffusionPipeline, PixelDiffusionPipeline, UpscalePipeline):
        with pytest.raises(LdmPipeError, match=name):
            other.from_pretrained(tmp_path / "m")


def test_the_shipped_kind_of_folder_is_opened_too() -> None:
    assert isinstance(ldm_pipe.load_pipeline(TINY), LatentDiffusionPipeline)
    with pytest.raises(LdmPipeError, match="load_pipeline"):
        UnconditionalPipeline.from_pretrained(TINY)


WRONG: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("unknown pipeline", "model_index.json", lambda j: j.update(_class_name="KandinskyPipeline")),
    ("custom code", "model_index.json", lambda j: j.update(unet=["my_module", "MyUNet"])),
    ("unknown part", "model_index.json", lambda j: j.update(prior=["diffusers", "PriorTransformer"])),
    ("scheduler from elsewhere", "model_index.json", lambda j: j.update(scheduler=["os", "system"])),
    ("missing part", "model_index.json", lambda j: j.pop("unet")),
    ("list", "model_index.json", lambda j: [j]),
    ("latent as pixel", "model_index.json", lambda j: j.update(_class_name="LDMPipeline")),
    ("scheduler list", "scheduler/scheduler_config.json", lambda j: [1]),
    ("no betas", "scheduler/scheduler_config.json", lambda j: j.pop("beta_start")),
    ("width", "unet/config.json", lambda j: j.update(block_out_channels=[16, 48])),
    ("huge", "unet/config.json", lambda j: j.update(block_out_channels=[2**31, 2**31])),
    ("six channels", "unet/config.json", lambda j: j.update(in_channels=6)),
    ("format", "ldm_pipe.json", lambda j: j.update(format_version=99)),
    ("null label", "ldm_pipe.json", lambda j: j.update(null_label="none")),
]


def test_a_device_that_is_not_there_is_no_broken_file(saved: Path) -> None:
    """It was told as "not a whole safetensors file. Fetch it anew", which would not have helped."""
    for folder in (saved, TINY):
        for device in ("cuda:99", "gpu0"):
            with pytest.raises(LdmPipeError, match=r"device is .* This machine has cpu"):
                ldm_pipe.load_pipeline(folder, device=device)


@pytest.mark.parametrize("option", ["safety_checker", "low_cpu_mem_usage"])
def test_an_option_that_only_diffusers_has_is_told_with_those_we_have(option: str, saved: Path) -> None:
    for folder in (saved, TINY):
        with pytest.raises(LdmPipeError, match=rf"{option}.*torch_dtype"):
            ldm_pipe.load_pipeline(folder, **{option: None})


@pytest.mark.parametrize(("file", "change"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_folder_is_refused(file: str, change: Callable[[Any], Any], saved: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(saved, tmp_path / "model"))
    value = json.loads((model / file).read_text())
    changed = change(value)
    (model / file).write_text(json.dumps(value if not isinstance(changed, list) else changed))
    with pytest.raises(LdmPipeError):
        ldm_pipe.load_pipeline(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    unconditional().save_pretrained(folder)
    return folder


def test_nothing_half_written_where_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = unconditional()
    pipe.save_pretrained(tmp_path / "m")
    before = {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipe.unet, "save_pretrained", full)
    with pytest.raises(LdmPipeError, match="No space left"):
        pipe.save_pretrained(tmp_path / "m")
    assert {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# Drawing


@pytest.mark.parametrize("maker", [unconditional, latent])
def test_a_picture_belongs_to_its_seed(maker: Callable[[], UnconditionalPipeline]) -> None:
    """Ancestral noise too: one generator per picture, whatever the batch."""
    pipe = maker()
    both = pipe(2, sampler="ddpm", seed=5, **FEW)
    assert both.seeds == [5, 6]
    torch.testing.assert_close(pipe(1, sampler="ddpm", seed=6, **FEW).images[0], both.images[1], rtol=0, atol=1e-5)
    assert pipe(1, seed=1, num_inference_steps=1).images[0].size == ((8, 8) if maker is unconditional else (16, 16))
    assert pipe(1, seed=1, return_dict=False, **FEW)[0].shape[0] == 1


def test_classes_and_guidance() -> None:
    """w = 1 is the class alone, and w extrapolates from none to the class (arXiv:2207.12598, eq. 6)."""
    pipe, call = by_class(), {"seed": 3, "num_inference_steps": 1, "output_type": "latent", "sampler": "ddim"}
    plain, none = (pipe(class_labels=label, **call).images for label in (2, 4))
    assert not torch.allclose(plain, none, atol=1e-3)
    guided = pipe(class_labels=2, guidance_scale=3.0, **call).images  # the one step is linear in the output
    torch.testing.assert_close(guided, none + 3 * (plain - none), rtol=1e-3, atol=1e-3)
    several = pipe(class_labels=[2, 4], **{**call, "seed": [3, 3]}).images
    torch.testing.assert_close(several, torch.cat([plain, none]), rtol=1e-4, atol=1e-4)


def logits(x: Tensor, t: Tensor) -> Tensor:
    """Say that class 1 is bright."""
    assert t.shape == (len(x),)
    mean = x.flatten(1).mean(1)
    return torch.stack([-20 * mean, 20 * mean], dim=1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun"])
def test_a_classifier_pulls_pictures_towards_its_class(sampler: str) -> None:
    pipe = unconditional()
    call: dict[str, Any] = {"seed": 0, "sampler": sampler, "num_inference_steps": 10, "output_type": "latent"}
    dark, bright = (pipe(class_labels=y, classifier=logits, classifier_scale=5.0, **call).images.mean() for y in (0, 1))
    plain = pipe(**call).images.mean()
    assert dark < plain < bright


@pytest.mark.parametrize(
    ("maker", "call"),
    [
        (unconditional, {"batch_size": 0}),
        (unconditional, {"class_labels": 1}),
        (unconditional, {"guidance_scale": 2.0}),
        (unconditional, {"height": "8"}),
        (unconditional, {"latents": torch.zeros(1, 3, 4, 4)}),
        (unconditional, {"seed": 1, "generator": torch.Generator()}),
        (unconditional, {"sampler": "dimm"}),
        (unconditional, {"sampler": "ddpm", "eta": 0.5}),
        (unconditional, {"output_type": "jpeg"}),
        (unconditional, {"classifier": logits}),
        (unconditional, {"classifier": logits, "class_labels": 7}),
        (latent, {"height": 15}),
        (by_class, {}),
        (by_class, {"class_labels": 5}),
        (by_class, {"class_labels": "cat"}),
        (by_class, {"class_labels": [1, 2], "batch_size": 3}),
        (lambda: by_class(None), {"class_labels": 1, "guidance_scale": 2.0}),
        (enlarging, {}),
        (enlarging, {"image": torch.rand(3, 8, 8), "class_labels": 1}),
        (enlarging, {"image": torch.rand(3, 8, 8), "height": 24}),
        (enlarging_by_class, {"image": torch.rand(3, 8, 8)}),
        (enlarging_by_class, {"image": torch.rand(3, 8, 8), "class_labels": 5}),
        (enlarging, {"image": torch.rand(2, 3, 8, 8), "batch_size": 3}),
    ],
)
def test_a_wrong_call_is_refused_before_any_work(maker: Callable[[], Any], call: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError):
        maker()(**{**FEW, **call})


def test_enlarging_by_class_in_pixels_is_adms() -> None:
    """SuperResModel of guided-diffusion: the picture enlarged bilinearly beside x_t, and the class."""
    pipe, small = enlarging_by_class(), torch.rand(2, 3, 8, 8)
    noise = torch.randn(2, 3, 16, 16)
    call: dict[str, Any] = {"latents": noise, "num_inference_steps": 1, "output_type": "latent"}
    z = pipe(small, class_labels=[1, 3], **call).images
    enlarged = torch.nn.functional.interpolate(small * 2 - 1, (16, 16), mode="bilinear")
    with torch.no_grad():
        eps = pipe.unet(noise, 0.0, spatial=enlarged, labels=torch.tensor([1, 3]))[:, :3]
    alpha, sigma = (float(level) for level in LAW.alpha_sigma(torch.tensor(0.0, dtype=torch.float64)))
    torch.testing.assert_close(z, (noise - sigma * eps) / alpha, rtol=0, atol=1e-4)
    assert pipe(small[0], class_labels=2, height=12, width=20, **FEW).images.shape == (1, 3, 12, 20)


def test_a_callback_sees_changes_and_stops() -> None:
    pipe, seen = unconditional(), []

    def callback(view: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(i)
        view._interrupt = i == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipe(seed=0, num_inference_steps=5, output_type="latent", callback_on_step_end=callback).images
    assert seen == [0, 1]
    assert not images.any()
    assert pipe(seed=0, num_inference_steps=3, output_type="latent").images.any()


def test_parts_that_do_not_belong_together_are_refused() -> None:
    vae = AutoencoderKL.from_config({**AUTOENCODER, "latent_channels": 4})
    for wrong in (
        lambda: UnconditionalPipeline(network(), LAW, vae),
        lambda: UnconditionalPipeline(network(in_channels=6), LAW),
        lambda: UnconditionalPipeline(network(num_class_embeds=3), LAW, null_label=3),
        lambda: SuperResolutionPipeline(network(), vae, LAW),
        lambda: UpscalePipeline(network(in_channels=6), None, (), LAW, LAW),
        lambda: PixelDiffusionPipeline(network(), (), LAW),
    ):
        with pytest.raises(LdmPipeError):
            wrong()


def test_what_a_scheduler_file_asks_for_is_what_its_class_of_diffusers_does() -> None:
    static = Thresholding("static", max_value=2.0)
    assert thresholding_of({"_class_name": "DDPMScheduler", "clip_sample_range": 2.0}) == static  # on by default there
    assert thresholding_of({"_class_name": "DDIMScheduler", "clip_sample": False}) == Thresholding()
    assert thresholding_of({"_class_name": "EulerDiscreteScheduler", "clip_sample": True}) == Thresholding()
    dynamic = {"_class_name": "DDPMScheduler", "thresholding": True, "sample_max_value": 1.5}
    assert thresholding_of(dynamic) == Thresholding("dynamic", cap=1.5)
    assert thresholding_of({}) == Thresholding()


def test_what_is_thresholded_here_is_so_in_the_file(tmp_path: Path) -> None:
    """A model of ours in pixels: clip_sample, its variance and its law reach diffusers' scheduler file."""
    defaults = Defaults(sampler="ddpm", thresholding=Thresholding("static"))
    UnconditionalPipeline(network(out_channels=6), LAW, defaults=defaults).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    wanted = {"_class_name": "DDPMScheduler", "clip_sample": True, "variance_type": "learned_range", "steps_offset": 0}
    assert {key: config[key] for key in wanted} == wanted
    assert ldm_pipe.load_pipeline(tmp_path).defaults.thresholding == Thresholding("static")


def test_the_command_draws_with_any_of_them(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["draw", "--model", str(saved), "--steps", "2", "--quiet", "--seed", "4"]
    assert main([*base, "-n", "3", "--batch-size", "2", "-o", str(tmp_path / "a.png")]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a-1.png", "a-2.png", "a-3.png"]
    third = ldm_pipe.load_pipeline(saved)(seed=6, num_inference_steps=2).images[0]
    assert Image.open(tmp_path / "a-3.png").tobytes() == third.tobytes()
    info = read_png_info(tmp_path / "a-3.png")
    assert info is not None
    assert info.settings["Seed"] == "6"
    for wrong in (["red apple"], ["--class-labels", "1"], ["--noise-level", "3"], ["--lora", "x"], ["-n", "0"]):
        assert main([*base, *wrong, "-o", str(tmp_path / "b.png")]) == 2
    by_class().save_pretrained(tmp_path / "classes")
    enlarging_by_class().save_pretrained(tmp_path / "larger")
    rest = ["--steps", "2", "--quiet", "--seed", "4", "-o"]
    words = [
        "draw",
        "--model",
        str(tmp_path / "classes"),
        "--class-labels",
        "1",
        "2",
        "-n",
        "2",
        "--guidance-scale",
        "2",
    ]
    assert main([*words, *rest, str(tmp_path / "c.png")]) == 0
    assert len(list(tmp_path.glob("c-*.png"))) == 4
    words = ["draw", "--model", str(tmp_path / "larger"), "--class-labels", "1", "--image", str(tmp_path / "a-1.png")]
    assert main([*words, *rest, str(tmp_path / "d.png")]) == 0
    assert Image.open(tmp_path / "d.png").size == (16, 16)
    assert "d.png" in capsys.readouterr().out


def test_info_tells_what_a_model_of_any_kind_is(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It refused all that `generate` does not draw with."""
    assert main(["info", str(saved), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == json.loads((saved / "model_index.json").read_text())["_class_name"]
    assert facts["parameters"]["unet"] > 1000
    assert "ldm-pipe draw" in facts["draws with"]


def test_info_names_no_command_that_would_draw_something_else(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said `ldm-pipe generate` without a model: another model, where this one needs `ldm-pipe draw`."""
    few = ["--steps", "1", "--seed", "0", "--quiet"]
    assert main(["draw", "--model", str(saved), *few, "-o", str(tmp_path / "a.png")]) == 0
    assert main(["generate", "apple", "--model", str(TINY), *few, "-o", str(tmp_path / "b.png")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "a.png"), "--json"]) == 0
    assert "again" not in json.loads(capsys.readouterr().out)
    assert main(["info", str(tmp_path / "b.png"), "--json"]) == 0
    assert "--model tiny " in json.loads(capsys.readouterr().out)["again"]


def test_an_option_of_another_kind_is_told_with_those_the_model_takes(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["draw", "--model", str(saved), "--quiet", "--decoder-num-inference-steps", "2"]
    assert main([*words, "-o", str(tmp_path / "a.png")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert "--num-inference-steps" in told[2]


@pytest.mark.parametrize("maker", [unconditional, latent])
def test_offload_draws_the_same(maker: Callable[[], UnconditionalPipeline]) -> None:
    """There is no GPU here: `cpu:0` stands for it."""
    pytest.importorskip("accelerate")
    pipe = maker()
    plain = pipe(seed=1, **FEW).images
    pipe._offload = torch.device("cpu", 0)
    assert torch.equal(pipe(seed=1, **FEW).images, plain)


def test_slicing_says_that_there_is_no_autoencoder() -> None:
    with pytest.warns(UserWarning, match="no autoencoder"):
        unconditional().enable_vae_slicing()
