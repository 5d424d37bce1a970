"""Inception: against torchvision and torch-fidelity with the same random weights, and against loops of its parts."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_pipe.metrics.inception import InceptionV3, Mixed, blocks, resize_like_tensorflow
from ldm_pipe.metrics.inception_weights import from_graph, graph_names, import_inception, read_graph
from ldm_pipe.pretrained import LdmPipeError


@pytest.fixture(scope="module")
def net() -> InceptionV3:
    """Make the network of 2015 with random weights and plausible averages in its norms."""
    made = InceptionV3({"variant": "tf2015", "num_classes": 1008}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
                module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
    return made


def pictures(num: int = 2, side: int = 40) -> Tensor:
    return torch.randint(0, 256, (num, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(7, 5), (40, 64), (299, 299), (400, 301)])
def test_resizing_is_tensorflows(height: int, width: int) -> None:
    x = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(0))
    found = resize_like_tensorflow(x, 299)
    for i, j in [(0, 0), (1, 298), (150, 149), (298, 298), (17, 203)]:
        y, z = i * np.float32(height / 299), j * np.float32(width / 299)
        top, left = int(y), int(z)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        above = x[0, 0, top, left] * (1 - (z - left)) + x[0, 0, top, right] * (z - left)
        below = x[0, 0, bottom, left] * (1 - (z - left)) + x[0, 0, bottom, right] * (z - left)
        assert float(found[0, 0, i, j]) == pytest.approx(float(above * (1 - (y - top)) + below * (y - top)), abs=2e-6)
    if height == width == 299:
        assert torch.equal(found, x)


def test_averages_of_2015_do_not_count_what_is_beyond_the_border_and_the_last_block_takes_the_maximum() -> None:
    x = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 3, 5, 5)
    of_2015, torchvisions = (Mixed(3, [["avg"]], counts) for counts in (False, True))
    assert torch.equal(of_2015(ones), ones)
    assert float(torchvisions(ones)[0, 0, 0, 0]) == pytest.approx(4 / 9)
    assert float(of_2015(x)[0, 0, 0, 0]) == pytest.approx(float(x[0, 0, :2, :2].mean()))
    assert blocks("tf2015")["Mixed_7c"][-1][0] == "max 1" and blocks("torchvision")["Mixed_7c"][-1][0] == "avg"
    assert blocks("tf2015")["Mixed_7b"][-1][0] == blocks("torchvision")["Mixed_7b"][-1][0] == "avg"
    assert float(Mixed(3, [["max 1"]], False)(x)[0, 1, 4, 4]) == float(x[0, 1, 3:, 3:].max())


@torch.no_grad()
def test_what_leaves_is_what_adms_evaluator_reads(net: InceptionV3) -> None:
    kept: dict[str, Tensor] = {}
    net.get_submodule("Mixed_6d.branch1x1").register_forward_hook(lambda *a: kept.update(branch=a[2]))
    found = net(pictures())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "vectors": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)
    }  # fmt: skip
    branch = kept["branch"]  # after the ReLU: mixed_6/conv is the graph's name of it
    assert tuple(branch.shape) == (2, 192, 17, 17) and float(branch.min()) == 0
    for row, column, channel in [(0, 0, 0), (0, 1, 0), (3, 16, 6), (16, 16, 2)]:
        assert torch.equal(found["spatial"][:, (row * 17 + column) * 7 + channel], branch[:, channel, row, column])
    torch.testing.assert_close(found["logits"], found["vectors"] @ net.fc.weight.T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["logits"], net.fc(found["vectors"]), atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_it_is_torchvisions_with_its_weights(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = models.inception_v3(weights=None, init_weights=False, aux_logits=True, transform_input=False).eval()
    torch.save(theirs.state_dict(), tmp_path / "inception_v3_google.pth")
    ours = import_inception(tmp_path / "inception_v3_google.pth", tmp_path / "ours")
    assert not ours.is_of_2015
    images = pictures(2, 299)
    expected = theirs(images.float() / 127.5 - 1)
    torch.testing.assert_close(ours(images)["logits"], expected, rtol=1e-4, atol=1e-5)
    again = InceptionV3.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(images)["vectors"], ours(images)["vectors"])


@pytest.mark.slow
@torch.no_grad()
def test_it_is_torch_fidelitys_with_its_weights(net: InceptionV3, tmp_path: Path) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    weights = {name: x for name, x in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "weights.pth")
    names = ["2048", "logits_unbiased"]
    theirs = module.FeatureExtractorInceptionV3("inception", names, str(tmp_path / "weights.pth"))
    ours = import_inception(tmp_path / "weights.pth", tmp_path / "ours")
    assert ours.is_of_2015
    for side in (32, 64, 299, 320):
        images = pictures(1, side)
        vectors, logits = theirs(images)
        found = ours(images)
        torch.testing.assert_close(found["vectors"], vectors, rtol=1e-4, atol=1e-5 * float(vectors.abs().max()))
        torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))


# -- the graph of TensorFlow -------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def const(name: str, x: Tensor, *, one_value: bool = False) -> bytes:
    shape = b"".join(message(2, varint(1 << 3) + varint(size)) for size in x.shape)
    content = message(5, struct.pack("<f", float(x.flatten()[0]))) if one_value else message(4, x.numpy().tobytes())
    tensor = varint(1 << 3) + varint(1) + message(2, shape) + content
    value = message(5, message(1, b"value") + message(2, message(8, tensor)))
    kind = message(5, message(1, b"dtype") + message(2, varint(6 << 3) + varint(1)))
    return message(1, message(1, name.encode()) + message(2, b"Const") + kind + value)


def to_graph(net: InceptionV3) -> dict[str, Tensor]:
    weights, found = net.state_dict(), {}
    for ours, theirs in graph_names().items():
        found[f"{theirs}/conv2d_params"] = weights[f"{ours}.conv.weight"].permute(2, 3, 1, 0).contiguous()
        words = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        found |= {f"{theirs}/batchnorm/{word}": weights[f"{ours}.bn.{name}"] for word, name in words.items()}
    return found | {"softmax/weights": net.fc.weight.detach().T.contiguous(), "softmax/biases": net.fc.bias.detach()}


def test_the_file_of_2015_is_read_without_tensorflow(net: InceptionV3, tmp_path: Path) -> None:
    path = tmp_path / "classify_image_graph_def.pb"
    other = message(1, message(1, b"ResizeBilinear") + message(2, b"ResizeBilinear") + message(3, b"ExpandDims"))
    whole = b"".join(const(name, x) for name, x in to_graph(net).items())
    path.write_bytes(other + const("ResizeBilinear/size", torch.zeros(2)) + whole + varint(4 << 3 | 0) + varint(9))
    found = import_inception(path, tmp_path / "ours")
    assert found.is_of_2015 and found.config["num_classes"] == 1008
    for name, x in net.state_dict().items():
        assert torch.equal(found.state_dict()[name], x), name
    assert torch.equal(InceptionV3.from_pretrained(tmp_path / "ours").fc.weight, net.fc.weight)
    path.write_bytes((other + whole)[:-1000])
    with pytest.raises(LdmPipeError, match="too early"):
        import_inception(path, tmp_path / "again")


def test_names_of_the_graph() -> None:
    # The pairs of torch-fidelity's conversion (utils/util_convert_inception_weights.py) that differ in their pattern.
    expected = {
        "Conv2d_1a_3x3": "conv", "Conv2d_4a_3x3": "conv_4", "Mixed_5b.branch1x1": "mixed/conv",
        "Mixed_5b.branch5x5_1": "mixed/tower/conv", "Mixed_5b.branch3x3dbl_3": "mixed/tower_1/conv_2",
        "Mixed_5b.branch_pool": "mixed/tower_2/conv", "Mixed_6a.branch3x3": "mixed_3/conv",
        "Mixed_6a.branch3x3dbl_2": "mixed_3/tower/conv_1", "Mixed_6d.branch1x1": "mixed_6/conv",
        "Mixed_6e.branch7x7_3": "mixed_7/tower/conv_2", "Mixed_6b.branch7x7dbl_5": "mixed_4/tower_1/conv_4",
        "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1", "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
        "Mixed_7b.branch3x3_2a": "mixed_9/tower/mixed/conv", "Mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
        "Mixed_7c.branch3x3dbl_2": "mixed_10/tower_1/conv_1",
        "Mixed_7c.branch3x3dbl_3b": "mixed_10/tower_1/mixed/conv_1", "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
    }  # fmt: skip
    names = graph_names()
    assert {name: names[name] for name in expected} == expected
    assert len(names) == len(set(names.values())) == 94


def test_constants_of_one_value_and_of_other_types(tmp_path: Path) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(const("a", torch.full((2, 3), 0.5), one_value=True) + const("b", torch.arange(4.0)))
    found = read_graph(path)
    assert torch.equal(found["a"], torch.full((2, 3), 0.5)) and torch.equal(found["b"], torch.arange(4.0))
    with pytest.raises(LdmPipeError, match="missing"):
        from_graph(found)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"PK\x03\x04 no graph", bytes(range(256))])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(content)
    with pytest.raises(LdmPipeError):
        import_inception(path, tmp_path / "ours")
    with pytest.raises(LdmPipeError, match="does not exist"):
        import_inception(tmp_path / "none.pb", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("config", [{}, {"variant": "v4", "num_classes": 5}, {"variant": "tf2015", "num_classes": 0}])
def test_senseless_configs_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError):
        InceptionV3(config)
