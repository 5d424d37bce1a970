"""One table of samplers: no list beside it, and a new sampler is one file and one row."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ldm_pipe import samplers
from ldm_pipe.drawing.png_info import sampler_from_label, sampler_label
from ldm_pipe.sampler_table import SAMPLERS
from ldm_pipe.samplers.names import spell, suggest
from ldm_pipe.schedule.keys import KEYS
from ldm_pipe.schedule.read import sampler_name
from tests.source import PACKAGES, ROOT, files, tree

TABLE = ROOT / "ldm_pipe" / "sampler_table.py"
LISTS = (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Subscript, ast.Match)


def second_lists(module: ast.Module) -> Iterator[int]:
    """Yield the lines of collections, Literals and matches that name half of the samplers."""
    for node in ast.walk(module):
        if isinstance(node, LISTS):
            named = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            if len(named & set(SAMPLERS)) >= len(SAMPLERS) / 2:
                yield node.lineno


def test_the_samplers_are_listed_once() -> None:
    found = [f"{path.name}:{line}" for path in files(*PACKAGES) if path != TABLE for line in second_lists(tree(path))]
    assert found == []
    assert list(second_lists(tree(TABLE)))  # it would find one


def test_every_list_of_names_is_the_table() -> None:
    assert tuple(SAMPLERS) == samplers.NAMES
    assert set(SAMPLERS) < set(samplers.__all__)
    assert all(callable(getattr(samplers, name)) for name in samplers.__all__ if name != "NAMES")


def test_labels_aliases_and_classes_find_their_sampler() -> None:
    labels = [row.label for row in SAMPLERS.values() if row.label]
    aliases = [alias for row in SAMPLERS.values() for alias in row.aliases]
    assert (len(set(labels)), len(set(aliases))) == (len(labels), len(aliases))
    for name, row in SAMPLERS.items():
        assert sampler_from_label(sampler_label(name)) == name
        for alias in row.aliases:
            assert suggest(alias, samplers.NAMES) == name
            assert spell(alias).replace("_", "") == alias, "never looked up"
        for class_name, settings in row.diffusers.items():
            assert set(settings) <= set(KEYS[class_name])
            for pick in (0, -1):
                chosen = {key: values[pick] for key, values in settings.items()}
                assert sampler_name({"_class_name": class_name, **chosen}) == name
    assert set(KEYS) == {class_name for row in SAMPLERS.values() for class_name in row.diffusers}


NEW = '''
def mine(denoise, x, steps, *, noise=None, eta=0.0, callback=None, bend=1.0):
    """Return the first estimate."""
    return denoise(x, steps.t[0]).x0 * bend
'''
CHECK = """
import inspect, pathlib, sys
from ldm_pipe.cli import main
try:
    main(["generate", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
import ldm_pipe
from ldm_pipe import samplers
assert pathlib.Path(ldm_pipe.__file__).parent.parent == pathlib.Path(sys.argv[1]), ldm_pipe.__file__
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.drawing.png_info import sampler_from_label
from ldm_pipe.schedule import NoiseSchedule
from ldm_pipe.schedule.read import sampler_name
from ldm_pipe.schedule.write import write
assert samplers.get("mine").options == ("bend",)
assert samplers.mine is samplers.get("mine").function
assert "mine" in samplers.__all__ and "mine" in samplers.NAMES
assert sampler_from_label("Mine") == "mine" and Defaults(sampler="mine").sampler == "mine"
assert sampler_name({"_class_name": "DDIMScheduler", "clip_sample": "mine"}) == "mine"
assert write(NoiseSchedule(), "mine")["_class_name"] == "DDIMScheduler"
"""


def test_a_new_sampler_is_one_file_and_one_row(tmp_path: Path) -> None:
    """On a copy of the package; every list that users meet has it."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (tmp_path / "ldm_pipe" / "samplers" / "mine.py").write_text(NEW)
    table = tmp_path / "ldm_pipe" / TABLE.name
    row = '"mine": Row("mine", "integer", label="Mine", diffusers={"DDIMScheduler": {"clip_sample": ("mine",)}}),'
    start = "SAMPLERS: dict[str, Row] = {\n"
    table.write_text(table.read_text().replace(start, f"{start}    {row}\n"))
    command = [sys.executable, "-c", CHECK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mine, ddpm, ddim, euler" in " ".join(done.stdout.split())
