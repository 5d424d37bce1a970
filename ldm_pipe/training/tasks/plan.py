"""What a run will cost, before it is started: parameters, memory, disk, time of a step.

What enters: a run config. What leaves: numbers. Networks are built without memory (torch's meta device): parameters and
operations are exact, activations near (kernels differ in what they keep) and those of fp32, which bf16 nearly halves.
Only the time is measured, on this machine, with zeros for inputs. Left out: the loss itself, perceptual networks,
caching, maps and classes beside the text, and what libraries take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.networks import UNet
from ldm_pipe.pretrained import LdmPipeError, read_json
from ldm_pipe.training.run.config import OptimConfig, TrainConfig, build_config, read_yaml
from ldm_pipe.training.run.optim import make_optimizer
from ldm_pipe.training.tasks.autoencoder import AutoencoderConfig
from ldm_pipe.training.tasks.diffusion import DiffusionConfig

MOST_OPERATIONS = 3e12  # of a measured step: some ten seconds on one core


@dataclass(frozen=True)
class Net:
    """One trained network and what it is run with.

    Args:
        make: builds it; called below `torch.device`.
        inputs: random inputs for a number of pictures.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    optim: OptimConfig
    has_average: bool


@dataclass(frozen=True)
class Cost:
    """What training one network costs a process; bytes, operations (multiply and add count as two) and seconds."""

    name: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int  # of one forward pass, kept for the backward pass
    operations: float  # of one optimiser step of this process
    seconds: float | None  # of one optimiser step of this process; None: not measured

    @property
    def memory(self) -> int:
        """Return all of it."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    @property
    def disk(self) -> int:
        """Return the size of a checkpoint."""
        return self.weights + self.optimizer + self.average


def read_plan_config(path: str | Path) -> AutoencoderConfig | DiffusionConfig:
    """Read the config of an autoencoder or of a diffusion model, told apart by their keys.

    Raises: LdmPipeError for other configs.
    """
    values = read_yaml(path)
    if "pretrained_model_name_or_path" in values or "method" in values:
        fix = "Name the config the model was trained with; a LoRA adds some per cent to its weights."
        raise LdmPipeError("plans of fine-tuning are not made", str(path), fix)
    for key in ("autoencoder", "text_encoder") if "network" not in values else ():
        planned = _planned(Path(path), str(values.get(key, "")))
        if planned is not None:
            values[key] = planned
    model = AutoencoderConfig if "network" in values else DiffusionConfig
    if model is DiffusionConfig and not values.keys() & {"unet", "schedule", "autoencoder", "text_encoder"}:
        raise LdmPipeError("neither an autoencoder's config nor a diffusion model's", str(path))
    return build_config(model, values, str(path))


def _planned(path: Path, folder: str) -> str | None:
    """Return the config beside a config whose run will write a folder that is not there yet; None: there is none."""
    if not folder or Path(folder).is_dir():
        return None
    for other in sorted(path.parent.glob("*.yaml")):
        made = str(read_yaml(other).get("output_dir", ""))
        if made and Path(folder) in (Path(made), Path(made) / "vae"):
            return str(other)
    return None


def _autoencoder_nets(config: AutoencoderConfig) -> list[Net]:
    from autoencoder import AutoencoderKL, PatchDiscriminator, VQModel

    levels, size = len(config.network.block_out_channels), config.data.resolution
    shape = config.network.model_dump(mode="json", exclude={"regularisation"}) | {
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip

    def network() -> nn.Module:
        if config.network.regularisation == "kl":
            return AutoencoderKL.from_config(shape)
        return VQModel.from_config(shape | {"num_vq_embeddings": config.codebook.num_vq_embeddings})

    def images(num: int) -> tuple[Tensor]:
        return (torch.zeros(num, 3, size, size),)

    nets = [Net("autoencoder", network, images, config.optim, config.use_ema)]
    if config.objective.adversarial_weight > 0:
        width, layers = config.discriminator_width, config.discriminator_layers
        judge = lambda: PatchDiscriminator(width=width, num_layers=layers)  # noqa: E731
        nets.append(Net("discriminator", judge, images, config.discriminator_optim, False))
    return nets


def _stored(folder: Path, name: str, keys: tuple[str, ...], default: int | None = None) -> int:
    stored: Mapping[str, Any] = read_json(folder / name / "config.json")
    for key in keys:
        if isinstance(stored.get(key), int):
            return int(stored[key])
    if default is None:
        raise LdmPipeError(f"config.json has none of {', '.join(keys)}", str(folder / name))
    return default


def _latents(place: Path) -> tuple[int, int]:
    """Return the channels and levels of an autoencoder: of its folder, or of the config that will make it."""
    if place.suffix == ".yaml":
        network = build_config(AutoencoderConfig, read_yaml(place), str(place)).network
        return network.latent_channels, len(network.block_out_channels)
    if not (place / "config.json").is_file():
        fix = "Put the config that makes it beside this one, or plan and train it first."
        raise LdmPipeError("the autoencoder is not there yet", str(place), fix)
    return _stored(place, ".", ("latent_channels",)), len(read_json(place / "config.json")["block_out_channels"])


def _tokens(place: Path) -> tuple[int, int]:
    """Return the width and number of tokens of a text encoder: of its folder, or of the config that will make it."""
    if place.suffix == ".yaml":
        values = read_yaml(place)
        width, length = values.get("hidden_size"), values.get("max_length", 77)
        if not isinstance(width, int) or not isinstance(length, int):
            raise LdmPipeError("hidden_size is not said", str(place), "Train the text encoder first.")
        return width, length
    width = _stored(place, "text_encoder", ("hidden_size", "d_model"))
    return width, _stored(place, "text_encoder", ("max_position_embeddings", "n_positions"), 77)


def _diffusion_nets(config: DiffusionConfig) -> list[Net]:
    channels, levels = _latents(Path(config.autoencoder))
    size = config.data.resolution // 2 ** (levels - 1)
    width, length = _tokens(Path(str(config.text_encoder)))
    shape = config.unet.model_dump(mode="json") | {
        "sample_size": size, "in_channels": channels, "cross_attention_dim": width,
        "out_channels": channels * (2 if config.learn_variance else 1),
    }  # fmt: skip

    def unet() -> nn.Module:
        net = UNet.from_config(shape)
        if config.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        return net

    def inputs(num: int) -> tuple[Tensor, ...]:
        return torch.zeros(num, channels, size, size), torch.ones(num), torch.zeros(num, length, width)

    return [Net("unet", unet, inputs, config.optim, config.use_ema)]


def _forward(net: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None = None) -> Tensor:
    with torch.autocast(inputs[0].device.type, dtype) if dtype is not None else nullcontext():
        out = net(inputs[0], inputs[1], tokens=inputs[2]) if len(inputs) == 3 else net(*inputs)
    return (out[0] if isinstance(out, tuple) else out).float().mean()


def count_activations(net: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, weights not counted, shared memory once."""
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that no other storage gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _forward(net, inputs)
    del loss
    return sum(size for size, _ in kept.values())


def count_operations(net: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Return the operations of a forward and a backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _forward(net, inputs).backward()
    return counter.get_total_flops()


def _measure(net: Net, batch: int, device: torch.device, dtype: torch.dtype | None) -> float:
    """Run two forward and backward passes with an optimiser step; returns the seconds of the second."""
    with torch.device(device), torch.random.fork_rng():
        module, inputs = net.make(), net.inputs(batch)
    optimizer = make_optimizer(module, net.optim)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        _forward(module, inputs, dtype).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds


def _optimizer_bytes(config: OptimConfig, module: nn.Module) -> int:
    """Return the size of the optimiser's state: two numbers per weight, or row and column means."""
    match config.optimizer:
        case "adamw":
            return sum(8 * p.numel() for p in module.parameters())
        case "adamw_8bit":
            return sum(2 * p.numel() for p in module.parameters())
        case "adafactor":
            return sum(4 * (p.numel() if p.ndim < 2 else len(p) + p[0].numel()) for p in module.parameters())


def plan_net(net: Net, config: TrainConfig, device: torch.device, measure: bool) -> Cost:
    """Count what a network costs."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
    with torch.device("meta"):
        module = net.make()
        one, all_of_them = net.inputs(1), net.inputs(config.train_batch_size)
    operations = count_operations(module, one)
    num = sum(p.numel() for p in module.parameters())
    batch, passes = config.train_batch_size, config.gradient_accumulation_steps
    tried = min(batch, 8)
    seconds = None
    if measure and operations * tried < (MOST_OPERATIONS if device.type == "cpu" else 100 * MOST_OPERATIONS):
        seconds = _measure(net, tried, device, dtype if device.type == "cuda" else None) * batch / tried * passes
    return Cost(
        net.name, num, 4 * num, 4 * num, _optimizer_bytes(net.optim, module), 4 * num if net.has_average else 0,
        count_activations(module, all_of_them), float(operations) * batch * passes, seconds,
    )  # fmt: skip


def plan(config: AutoencoderConfig | DiffusionConfig, device: torch.device, *, measure: bool = True) -> list[Cost]:
    """Count what the networks of a run cost each process."""
    nets = _autoencoder_nets(config) if isinstance(config, AutoencoderConfig) else _diffusion_nets(config)
    return [plan_net(net, config, device, measure) for net in nets]
