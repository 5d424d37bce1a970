"""Inception's weights from the files that people have, into a folder of ours; TensorFlow is not needed.

A file enters: the frozen graph of 2015 (`classify_image_graph_def.pb`), which guided-diffusion's evaluator and the
first FID read, torch-fidelity's or pytorch-fid's `.pth` of it, or torchvision's. A folder leaves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.interop.pickles.checkpoint import load_checkpoint
from ldm_pipe.metrics.inception import STEM, InceptionV3, Link, blocks
from ldm_pipe.pretrained import LdmPipeError, check_tensors

Field = tuple[int, int | memoryview]
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_FLOAT = 1  # DT_FLOAT
MAX_BYTES = 1 << 30  # the graph has 96 MB


def import_inception(source: str | Path, target: str | Path) -> InceptionV3:
    """Turn a file into a folder that `InceptionV3.from_pretrained` loads.

    Raises: LdmPipeError if the file is none of the known ones, or tensors are missing, unexpected, misshapen or not
        finite.
    """
    source = Path(source)
    if not source.is_file():
        what = "the file does not exist"
        raise LdmPipeError(what, str(source), "Give classify_image_graph_def.pb, or a .pth of torch-fidelity.")
    of_2015 = source.suffix == ".pb"
    tensors = from_graph(read_graph(source)) if of_2015 else load_checkpoint(source)
    tensors = {name: value for name, value in tensors.items() if not name.startswith("AuxLogits.")}
    if "fc.weight" not in tensors:
        raise LdmPipeError("there is no fc.weight", str(source), "This is no Inception v3.")
    num_classes = len(tensors["fc.weight"])
    config = {"variant": "torchvision" if num_classes == 1000 else "tf2015", "num_classes": num_classes}
    net = InceptionV3(config).eval()
    counters = {name: value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}
    tensors = {**counters, **tensors}  # counters of the training, which older files leave out
    check_tensors(net, tensors, str(source))
    net.load_state_dict(tensors, strict=True)
    net.save_pretrained(target)
    return net


# -- names of the graph ------------------------------------------------------------------------------------------------


def graph_names() -> dict[str, str]:
    """Map our names of convolutions to the graph's: Mixed_5b.branch5x5_1 is mixed/tower/conv."""
    stem = [link.split()[0] for link in STEM if link != "max"]
    found = {name: f"conv_{i}" if i else "conv" for i, name in enumerate(stem)}
    for number, (block, branches) in enumerate(blocks("tf2015").items()):
        room, tower = f"mixed_{number}" if number else "mixed", 0
        for branch in branches:
            links = [link for link in branch if isinstance(link, tuple) or not link.startswith(("avg", "max"))]
            if not links:
                continue
            if branch is branches[0] and len(links) == 1:
                place = room
            else:
                place, tower = f"{room}/tower_{tower}" if tower else f"{room}/tower", tower + 1
            found |= {f"{block}.{ours}": theirs for ours, theirs in _along(links, place)}
    return found


def _along(links: list[Link], place: str) -> Iterator[tuple[str, str]]:
    for i, link in enumerate(links):
        ends = link if isinstance(link, tuple) else (link,)
        room, first = (f"{place}/mixed", 0) if isinstance(link, tuple) else (place, i)
        for j, end in enumerate(ends, first):
            yield end.split()[0], f"{room}/conv_{j}" if j else f"{room}/conv"


def from_graph(constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the graph's constants under our names and into torch's order of axes.

    Raises: LdmPipeError naming what is missing.
    """
    wanted: dict[str, str] = {"fc.weight": "softmax/weights", "fc.bias": "softmax/biases"}
    for ours, theirs in graph_names().items():
        wanted[f"{ours}.conv.weight"] = f"{theirs}/conv2d_params"
        wanted |= {f"{ours}.bn.{name}": f"{theirs}/batchnorm/{word}" for word, name in _NORM.items()}
    missing = [name for name in wanted.values() if name not in constants]
    if missing:
        what = f"{len(missing)} of {len(wanted)} constants are missing, such as {missing[0]}"
        raise LdmPipeError(what, "graph", "This is not the Inception of 2015 (inception-2015-12-05.tgz).")
    found = {ours: constants[theirs] for ours, theirs in wanted.items()}
    # TensorFlow has (height, width, in, out) and (in, out).
    turned = {name: x.permute(3, 2, 0, 1).contiguous() if x.ndim == 4 else x for name, x in found.items()}
    turned["fc.weight"] = turned["fc.weight"].T.contiguous()
    return turned


# -- the file ----------------------------------------------------------------------------------------------------------


def read_graph(path: str | Path) -> dict[str, Tensor]:
    """Read the float constants of a TensorFlow graph: {name: tensor}.

    A graph is a protocol buffer: GraphDef.node = 1; NodeDef.name = 1, op = 2, attr = 5 (a map: key 1, value 2);
    AttrValue.tensor = 8; TensorProto.dtype = 1, tensor_shape = 2 (dim = 2, size = 1), tensor_content = 4,
    float_val = 5 (tensorflow/core/framework/*.proto). Nothing in it is run.

    Raises: LdmPipeError if the file is no such graph.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise LdmPipeError("the file is larger than a gigabyte", str(path), "This is not Inception's graph.")
    found: dict[str, Tensor] = {}
    try:
        for number, node in fields(memoryview(path.read_bytes())):
            if number == 1 and isinstance(node, memoryview):
                found.update(_constant(node))
    except (ValueError, IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise LdmPipeError(f"cannot be read as a graph of TensorFlow ({error})", str(path), "Fetch it anew.") from error
    if not found:
        raise LdmPipeError("holds no constants", str(path), "Give classify_image_graph_def.pb.")
    return found


def fields(data: memoryview) -> Iterator[Field]:
    """Yield (number, value) of a protocol buffer's message: a whole number, or the bytes of what has a length."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if place + size > len(data):
            raise ValueError("it ends too early")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number is too long")


def _parts(data: int | memoryview, number: int) -> list[memoryview]:
    found = [value for key, value in fields(_bytes(data)) if key == number]
    return [_bytes(value) for value in found]


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should")
    return value


def _constant(node: memoryview) -> dict[str, Tensor]:
    if [bytes(op) for op in _parts(node, 2)] != [b"Const"]:
        return {}
    name = bytes(_parts(node, 1)[0]).decode()
    for entry in _parts(node, 5):
        if bytes(_parts(entry, 1)[0]) == b"value":
            tensor = _parts(_parts(entry, 2)[0], 8)[0]
            if [value for key, value in fields(tensor) if key == 1] == [_FLOAT]:
                return {name: _tensor(tensor)}
    return {}


def _tensor(data: memoryview) -> Tensor:
    shape = []
    for part in _parts(data, 2):
        for dim in _parts(part, 2):
            shape.append(next((value for key, value in fields(dim) if key == 1 and isinstance(value, int)), 0))
    content = b"".join(bytes(part) for part in _parts(data, 4)) or b"".join(bytes(part) for part in _parts(data, 5))
    values = np.frombuffer(content, dtype="<f4")
    size = int(np.prod(shape, dtype=np.int64))
    if len(values) == 1 and size > 1:  # one value stands for all
        values = np.repeat(values, size)
    if len(values) != size:
        raise ValueError(f"{len(values)} numbers for a shape of {shape}")
    return torch.from_numpy(values.astype(np.float32).reshape(shape))
