"""Rows of the matrix of faults that need many tries: dropped keys, damaged files, bad names, huge sizes."""

from __future__ import annotations

import gc
import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoencoder import VQModel
from conditioning import CLIPImageEncoder, OpenCLIPTextEncoder, T5TextEncoder
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.cli import main
from ldm_pipe.networks import UNet
from ldm_pipe.networks.prior import PriorTransformer
from ldm_pipe.pretrained import LdmPipeError, read_json
from ldm_pipe.pretrained.files import safe_child
from ldm_pipe.pretrained.weights import load_folder_tensors
from tests.pipelines import quiet

TINY = Path(__file__).parents[2] / "data" / "tiny_pipeline"
NAME = "diffusion_pytorch_model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def _picture(folder: Path) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe = quiet(LatentDiffusionPipeline.from_pretrained(folder))
    images: Any = pipe("a red apple", latents=latents, num_inference_steps=2, output_type="pt").images
    return images


DROPPED = {
    "unet": ("config.json", 8, "attention_head_dim"),
    "vae": ("config.json", 5, "scaling_factor"),
    "text_encoder": ("config.json", 7, "num_attention_heads"),
    "scheduler": ("scheduler_config.json", 10, "prediction_type"),
}


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"])
def test_a_file_that_lacks_is_named_with_what_to_do(file: str, model: Path) -> None:
    (model / file).unlink()
    with pytest.raises(LdmPipeError) as caught:
        LatentDiffusionPipeline.from_pretrained(model)
    assert Path(file).parent.name in caught.value.where
    assert caught.value.how_to_fix


@pytest.mark.slow
@pytest.mark.parametrize("part", DROPPED)
def test_fault_18_a_config_key_is_missing(part: str, model: Path) -> None:
    """Each in turn, of a plain folder of diffusers: refused, or harmless as the picture shows."""
    (model / "ldm_pipe.json").unlink()  # no golden sample helps
    wanted = _picture(model)
    name, count, deciding = DROPPED[part]
    path, refused = model / part / name, []
    config = read_json(path)
    for key in config:
        path.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        try:
            torch.testing.assert_close(_picture(model), wanted, rtol=0, atol=1e-5, msg=key)
        except LdmPipeError:
            refused.append(key)
    assert len(refused) >= count
    assert deciding in refused


def test_fault_18_files_older_than_a_key_are_read_without_it(model: Path) -> None:
    """The published Stable Diffusion 1 has no scaling_factor: 0.18215."""
    (model / "ldm_pipe.json").unlink()
    path = model / "vae" / "config.json"
    config = {k: v for k, v in read_json(path).items() if k != "scaling_factor"}
    path.write_text(json.dumps({**config, "_diffusers_version": "0.6.0"}))
    assert LatentDiffusionPipeline.from_pretrained(model).autoencoder.scaling_factor == 0.18215
    path.write_text(json.dumps({**config, "_diffusers_version": "0.42.1"}))
    with pytest.raises(LdmPipeError, match="the key 'scaling_factor' is missing"):
        LatentDiffusionPipeline.from_pretrained(model)


def _damaged(whole: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a file that is cut, empty, of another format, another part's, or has a damaged header."""
    header = 8 + int.from_bytes(whole[:8], "little")
    place = rng.randrange(header)
    return rng.choice(
        [
            lambda: whole[: rng.randrange(len(whole))],
            lambda: bytes(len(whole)),
            lambda: rng.randbytes(rng.randrange(1, 4000)),
            lambda: b"PK\x03\x04" + whole[4:],
            lambda: rng.choice([b"", b"<html>Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n"]),
            lambda: rng.choice(others),
            lambda: rng.randrange(2**64).to_bytes(8, "little") + whole[8:],
            lambda: whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :],
            lambda: whole + rng.randbytes(8),
        ]
    )()


def test_fault_24_two_hundred_damaged_files(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one error that names the file, or changes nothing (a flipped bit of the padding)."""
    rng = random.Random(0)
    path = model / "unet" / f"{NAME}.safetensors"
    whole = path.read_bytes()
    others = [p.read_bytes() for p in (model / "vae" / f"{NAME}.safetensors", model / "text_encoder/model.safetensors")]
    wanted, refused = UNet.from_pretrained(model / "unet").state_dict(), list[str]()
    for _ in range(200):
        path.write_bytes(_damaged(whole, others, rng))
        try:
            found = UNet.from_pretrained(model / "unet").state_dict()
        except LdmPipeError as error:
            refused.append(str(error))
        else:
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert len(refused) > 190
    assert all("unet" in text for text in refused)
    path.write_bytes(whole[:1000])
    assert main(["draw", "x", "--model", str(model), "--out", str(model / "x.png")]) == 2
    said = capsys.readouterr().err
    assert f"{NAME}.safetensors" in said
    assert "Traceback" not in said


OUT = [
    "..",
    "../x",
    "a/../../x",
    "a/../x",
    "./../x",
    "..\\x",
    "a\\..\\x",
    "/x",
    "//x",
    "/etc/passwd",
    "\\x",
    "\\\\host\\x",
]
OUT += ["c:x", "C:\\x", "~", "~/x", "~root/x", "", "x\0", "\0", "a\0/../x", "file:///x", "a/b/../../../x", "x/.."]
BAD_NAMES = [*OUT, *(f"sub/{name}" for name in OUT if name[:2] == ".."), *(f"../{'../' * n}x" for n in range(1, 40))]


def test_fault_50_sixty_bad_names_read_nothing_outside(model: Path, tmp_path: Path) -> None:
    """As names of files, of shards in an index, and of parts."""
    assert len(BAD_NAMES) >= 60
    unet = model / "unet"
    whole = unet / f"{NAME}.safetensors"
    shutil.copy(whole, tmp_path / "x")
    whole.rename(tmp_path / "model" / "x")
    index = unet / f"{NAME}.safetensors.index.json"
    for name in BAD_NAMES:
        with pytest.raises(LdmPipeError, match="leads out of its folder"):
            safe_child(tmp_path, name, "test")
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        with pytest.raises(LdmPipeError, match=f"leads out of its folder|{NAME}"):
            load_folder_tensors(unet, NAME)
        parts = {**read_json(TINY / "model_index.json"), name: ["diffusers", "AutoencoderKL"]}
        (model / "model_index.json").write_text(json.dumps(parts))
        with pytest.raises(LdmPipeError):
            LatentDiffusionPipeline.from_pretrained(model)


SIZES: list[tuple[str, dict[str, Any]]] = [
    ("unet", {"layers_per_block": 10**6}),
    ("unet", {"layers_per_block": -1}),
    ("unet", {"block_out_channels": [2**31, 2**31]}),
    ("unet", {"block_out_channels": [-16, 32]}),
    ("unet", {"block_out_channels": [16] * 10**5, "down_block_types": ["DownBlock2D"] * 10**5}),
    ("unet", {"transformer_layers_per_block": 10**6}),
    ("unet", {"attention_head_dim": 0}),
    ("unet", {"cross_attention_dim": 2**31}),
    ("unet", {"in_channels": 2**40}),
    ("vae", {"layers_per_block": 10**6}),
    ("vae", {"block_out_channels": [2**31] * 3}),
    ("vae", {"latent_channels": -4}),
    ("vae", {"norm_num_groups": 0}),
    ("text_encoder", {"num_hidden_layers": 10**6}),
    ("text_encoder", {"hidden_size": 2**31}),
    ("text_encoder", {"vocab_size": 2**31}),
    ("text_encoder", {"max_position_embeddings": 2**40}),
    ("text_encoder", {"num_attention_heads": -2}),
    ("scheduler", {"num_train_timesteps": 2**31}),
    ("scheduler", {"num_train_timesteps": -1}),
]


@pytest.mark.parametrize(("part", "change"), SIZES, ids=[f"{part} {next(iter(c))}" for part, c in SIZES])
def test_fault_51_huge_and_negative_sizes(part: str, change: dict[str, Any], model: Path) -> None:
    _refused_at_once(model, part, lambda config: json.dumps({**config, **change}))


NETWORKS: list[tuple[Any, dict[str, Any]]] = [
    (T5TextEncoder, {"model_type": "t5", "num_layers": 10**6}),
    (T5TextEncoder, {"model_type": "umt5", "d_model": 2**31}),
    (OpenCLIPTextEncoder, {"embed_dim": 8, "text_cfg": {"layers": 10**6}}),
    (CLIPImageEncoder, {"num_hidden_layers": 10**6}),
    (CLIPImageEncoder, {"image_size": 2**31}),
    (PriorTransformer, {"num_layers": 10**6}),
    (UNet, {"_class_name": "UNet2DModel", "layers_per_block": 10**6}),
    (VQModel, {"num_vq_embeddings": 2**40}),
]


@pytest.mark.parametrize(("cls", "config"), NETWORKS, ids=[f"{cls.__name__} {[*c][-1]}" for cls, c in NETWORKS])
def test_fault_51_huge_networks_are_refused_before_they_are_built(cls: Any, config: dict[str, Any]) -> None:
    with torch.device("meta"), pytest.raises(LdmPipeError, match=r"1000000|2147483648|1099511627776"):
        cls.from_config(config)


def test_fault_49_and_54_code_is_not_asked_for_and_a_hub_id_offline_is_one_error() -> None:
    """The whole suite runs with HF_HUB_OFFLINE=1."""
    with pytest.raises(LdmPipeError, match="owner/name"):
        LatentDiffusionPipeline.from_pretrained("owner/name")
    for code in ({"custom_pipeline": "owner/code"}, {"trust_remote_code": True}):
        with pytest.raises(TypeError):
            LatentDiffusionPipeline.from_pretrained(TINY, **code)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, '"' + "x" * 10**8, "{" + '"a": 1, ' * 10**7])
def test_fault_51_huge_files_of_json(text: str, model: Path) -> None:
    _refused_at_once(model, "unet", lambda config: text)


def _refused_at_once(model: Path, part: str, change: Callable[[dict[str, Any]], str]) -> None:
    """One error, in a second of computing and with 200 MB at most."""
    path = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(change(read_json(path)))
    LatentDiffusionPipeline.from_pretrained(TINY)  # what is imported at the first call
    gc.collect()
    gc.freeze()  # or a collection in between walks through all that earlier test files of this process have left
    try:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(LdmPipeError):
            LatentDiffusionPipeline.from_pretrained(model)
        assert time.process_time() - start < 1.0
    finally:
        gc.unfreeze()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200
