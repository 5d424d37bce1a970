"""Randomness is a function of its keys: no order of draws, batch split or process matters."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from ldm_pipe.training.run.rng import batch_normal, batch_uniform, generator, key_seed
from tests.source import ROOT


def test_a_draw_is_the_same_however_the_batch_is_split() -> None:
    whole = batch_normal((2, 3), 0, "noise", 5, positions=range(6))
    parts = [batch_normal((2, 3), 0, "noise", 5, positions=range(i, i + 2)) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    whole = batch_uniform(2, 0, "t", 5, positions=range(4))
    assert torch.equal(torch.cat([batch_uniform(2, 0, "t", 5, positions=range(i, i + 1)) for i in range(4)]), whole)
    assert whole.dtype == torch.float64


def test_seed_purpose_step_and_position_all_matter_and_do_not_run_together() -> None:
    keys = [(0, "a", 1, 2), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 2), (0, "a", 1, 3), (0, "a", 12), (0, "a1", 2)]
    assert len({key_seed(*key) for key in keys}) == len(keys)
    assert len({key_seed(0, "noise", step, i) for step in range(50) for i in range(50)}) == 2500


def test_fault_8_a_fresh_process_draws_the_same() -> None:
    code = "from ldm_pipe.training.run.rng import *; print(key_seed(3, 'noise', 7, 11))"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(fresh.stdout) == key_seed(3, "noise", 7, 11)


def test_captions_are_the_same_in_every_process() -> None:
    """A resumed run once saw other captions: they were drawn in the order of a set, which differs between processes."""
    code = """
from ldm_pipe.data.cache import caption_variants
from ldm_pipe.data.captions import mix_caption
print(caption_variants(["apple"] * 20, [["red", "fruit", "tree", "sweet", "round", "red"]] * 20, 4, 0, mix_caption))"""
    drawn = []
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        fresh = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
        )
        drawn.append(fresh.stdout)
    assert drawn[0] == drawn[1]


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = batch_normal((2,), 0, "x", positions=range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(batch_normal((2,), 0, "x", positions=range(2)), first)


def test_draws_are_unit_normal_and_uniform_over_steps() -> None:
    normal = torch.stack([torch.randn(4, generator=generator(0, "noise", step, 0)) for step in range(2000)])
    assert abs(normal.mean()) < 4 / 8000**0.5
    assert abs(normal.std() - 1) < 4 / 16000**0.5
    uniform = torch.cat([batch_uniform(1, 0, "t", step, positions=range(1)) for step in range(2000)]).flatten()
    gap = (uniform.sort().values - (torch.arange(2000) + 0.5) / 2000).abs().max()
    assert gap < 1.95 / 2000**0.5  # Kolmogorov-Smirnov at 0.001
